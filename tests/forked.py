"""Starts processes that have imported everything already.

A tiny run spends a third of its processor time on imports. The standard library's fork server imports once,
and each process is forked from it, with arguments, variables, output and signals of its own. Tests of how a
command starts (tests/test_commands.py) start Python itself instead.
"""

import atexit
import fcntl
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
from pathlib import Path

TRAIN = "import sys, mapo_jax.train as train; sys.exit(train.main(sys.argv[1:]))"
MODULE = "import importlib, sys; sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"
SCRIPT = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """What of `subprocess.Popen` the tests need, for Python code with its arguments; output goes to files."""

    def __init__(self, code: str, arguments, *, env=None):
        self._files = [Path(name) for _, name in (_closed(tempfile.mkstemp()) for _ in range(2))]
        work = (code, [str(argument) for argument in arguments], dict(env or os.environ), self._files)
        self._process = _CONTEXT.Process(target=_child, args=work, daemon=True)  # ends with the tests
        self._process.start()
        self.pid, self.send_signal = self._process.pid, lambda number: os.kill(self.pid, number)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def kill(self):
        if self._process.is_alive():
            self._process.kill()

    def communicate(self, timeout=None):
        """Waits for the end, also of what it has started; returns standard output and standard error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked process", timeout)
        out, err = map(_read_whole, self._files)
        for file in self._files:
            file.unlink()
        return out, err


def run_forked(code, arguments=(), *, env=None, timeout=300) -> subprocess.CompletedProcess:
    """As `subprocess.run` with captured text, for Python code with its arguments."""
    process = Forked(code, arguments, env=env)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(code, process.returncode, out, err)


def run_on_devices(script, count, arguments=(), *, timeout=550) -> str:
    """Runs an indented script with `count` virtual devices; returns what it printed. It must succeed.

    In a process of its own, because the number of virtual devices is fixed when jax starts.
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = run_forked(textwrap.dedent(script), arguments, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_module(command, *, stdout, **_) -> subprocess.CompletedProcess:
    """In the place of `subprocess.run` for `python -m` and a command of ours; its output goes to a file."""
    _, option, *arguments = command
    assert option == "-m"
    done = run_forked(MODULE, arguments)
    stdout.write(done.stdout + done.stderr)
    return done


def _closed(opened):
    os.close(opened[0])
    return opened


def _read_whole(file: Path) -> str:
    """The text of a file, once nothing writes to it: a killed process's `Sentinel` writes after its end."""
    with file.open() as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        return opened.read()


def _child(code, arguments, environment, files):
    for number, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY)
        fcntl.flock(opened, fcntl.LOCK_SH)  # shared with every process that inherits it as its output
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As the interpreter ends: the fork server's own processes leave this out.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
