"""The first signal is a stop request; the second has its default effect."""

import os
import signal
import subprocess
import sys

import pytest

from mapo_jax.running.stop import ANSWER, Interrupted, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_at_the_next_check(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name):
            stop.check()
    assert signal.getsignal(number) == before


def test_the_second_signal_does_what_it_always_does():
    program = (
        "import os, signal\n"
        "from mapo_jax.running.stop import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "alive\n"
    assert result.returncode == -signal.SIGTERM


ENDED = (128 + signal.SIGINT, -signal.SIGINT)  # by the thread or by the signal itself; 130 to a shell


def ends_at_the_second(program, answer):
    """A program that says `ready`, answers the first SIGINT with a line, and is ended by the second."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == f"{answer}\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in ENDED
        finally:
            process.kill()


def test_the_second_signal_acts_where_it_was_ignored_before():
    """As in a shell's background job, which ignores SIGINT."""
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from mapo_jax.running.stop import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.reason:\n"
        "        time.sleep(0.01)\n"
        "    print(stop.reason, flush=True)\n"
        "    time.sleep(600)\n"
    )
    ends_at_the_second(program, "SIGINT")


def test_the_answer_comes_at_once_also_within_a_compiled_program():
    """A program that runs for minutes without returning to the interpreter; the second signal ends it."""
    program = (
        "import hashlib, os, signal\n"
        "from mapo_jax.running.stop import StopRequest\n"
        "with StopRequest(answer=lambda text: print(text, flush=True)):\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000_000)\n"
    )
    ends_at_the_second(program, ANSWER)
