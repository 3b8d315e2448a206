"""The star of processes: joining, meeting, dying. Threads stand for processes, but where one is killed."""

import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from mapo_jax.errors import UserError
from mapo_jax.peers import STATUS, Peers


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def star(count, about=None, ends=None, join_seconds=10, silent_seconds=10, present=None):
    """Peers (or what they raised) of each process, made at the same time."""
    address = f"127.0.0.1:{free_port()}"
    made = [None] * count

    def make(index):
        try:
            made[index] = Peers(
                address,
                count,
                index,
                about=(about or [{}] * count)[index],
                join_seconds=join_seconds,
                silent_seconds=silent_seconds,
                end=None if ends is None else ends[index].append,
            )
        except UserError as error:
            made[index] = error

    threads = [
        threading.Thread(target=make, args=(i,)) for i in (range(count) if present is None else present)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return made


def at_once(calls):
    results = [None] * len(calls)

    def call(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_values_meet_in_the_order_of_processes():
    peers = star(3)
    for turn in range(20):
        text = "x" * 10_000 * turn
        met = at_once([partial(p.exchange, "place", [p.index, turn, text]) for p in peers])
        assert met == [[[i, turn, text] for i in range(3)]] * 3
        told = at_once([partial(p.report, "figures", p.index) for p in peers])
        assert told == [[0, 1, 2], None, None]
    for peer in peers:
        peer.leave()


def test_a_request_to_stop_reaches_all():
    peers = star(3)
    peers[2].ask_to_stop("SIGTERM")
    until(lambda: all(peer.stop_reason == "SIGTERM" for peer in peers))
    for peer in peers:
        peer.leave()


def test_a_missing_worker_is_named_to_those_who_came():
    made = star(4, join_seconds=1, present=[0, 1, 3])
    assert made[2] is None
    for index in (0, 1, 3):
        assert "only 3 of 4 processes joined within 1 s; missing: process 2." in str(made[index])


def test_without_process_0_the_others_say_where_they_looked():
    made = star(2, join_seconds=-4, present=[1])
    assert "process 0 at 127.0.0.1:" in str(made[1]) and "could not be reached" in str(made[1])


def test_processes_that_disagree_refuse_with_one_sentence():
    about = [{"`training.seed`": "5", "the code": "a"}, {"`training.seed`": "6", "the code": "a"}]
    made = star(2, about)
    assert str(made[0]) == str(made[1])
    assert "`training.seed` is 5 in process 0 and 6 in process 1; start the same command" in str(made[0])


def test_two_processes_of_one_number_are_refused():
    address = f"127.0.0.1:{free_port()}"
    said = []

    def make(index):
        with pytest.raises(UserError) as caught:
            Peers(address, 3, index, about={}, join_seconds=5, silent_seconds=5)
        said.append(str(caught.value))

    threads = [threading.Thread(target=make, args=(i,)) for i in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert said == ["two processes call themselves process 1 of 3"] * 3


def test_last_words_end_the_others():
    ends = [[], [], []]
    peers = star(3, ends=ends)
    peers[1].leave("the disk is full")
    until(lambda: ends[0] and ends[2])
    for index in (0, 2):
        (sentence,) = ends[index]
        assert sentence.startswith("process 1 of 3 is gone (the disk is full), so process")
        assert "start the same command on every host again" in sentence
    assert not ends[1]


def test_who_leaves_in_peace_ends_nobody():
    ends = [[], []]
    peers = star(2, ends=ends)
    peers[0].leave()
    time.sleep(0.2)
    peers[1].leave()
    time.sleep(0.2)
    assert ends == [[], []]


def test_a_silent_process_is_taken_for_dead():
    ends = [[], []]
    peers = star(2, ends=ends, silent_seconds=1)
    peers[1]._over = True  # its heart stops, its connection stays
    until(lambda: ends[0])
    assert "process 1 of 2 is gone (nothing was heard of it for 1 s)" in ends[0][0]


def test_processes_at_different_places_do_not_go_on():
    ends = [[], []]
    peers = star(2, ends=ends)
    threading.Thread(target=peers[1].exchange, args=("save", 1), daemon=True).start()
    peers[0].exchange("rollout", 0)
    until(lambda: ends[0] and ends[1])
    assert "different places: rollout, save" in ends[0][0]


PROCESS = """
import sys, time
from mapo_jax.peers import Peers, Sentinel
address, index = sys.argv[1], int(sys.argv[2])
peers = Peers(address, 2, index, about={}, join_seconds=60, silent_seconds=60)
Sentinel.post("ended without a word")
peers.exchange("ready", index)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_a_sentence(killed):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[killed].kill()
    _, said = processes[1 - killed].communicate(timeout=60)
    assert processes[1 - killed].returncode == STATUS
    assert f"process {killed} of 2 is gone (its connection closed" in said
    assert "ended without a word" not in said
    _, said = processes[killed].communicate(timeout=60)
    assert said == "error: ended without a word\n"
