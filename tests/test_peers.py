"""Peers: joining, exchanging values, failures. Threads stand for processes, except where one is killed."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from mapo_jax.errors import UserError
from mapo_jax.peers import Peers
from mapo_jax.running.processes import STATUS, agree


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def at(port, index):
    return socket.create_server(("127.0.0.1", port)) if index == 0 else ("127.0.0.1", port)


def star(count, ends=None, join=10, silent=10, present=None):
    """The Peers of each process, or the error it raised, created at the same time."""
    port = free_port()
    made = [None] * count

    def make(index):
        end = [].append if ends is None else ends[index].append
        try:
            made[index] = Peers(at(port, index), count, index, join, silent, end)
        except (UserError, TimeoutError) as error:
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
        told = at_once([partial(p.exchange, "figures", p.index, everybody=False) for p in peers])
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
    made = star(4, join=1, present=[0, 1, 3])
    assert made[2] is None
    for index in (0, 1, 3):
        assert "only 3 of 4 processes joined within 1 s; missing: process 2." in str(made[index])


def test_without_process_0_the_others_give_up():
    assert isinstance(star(2, join=1, present=[1])[1], TimeoutError)


def test_processes_that_disagree_refuse_with_one_sentence():
    about = [{"`training.seed`": "5", "the code": "a"}, {"`training.seed`": "6", "the code": "a"}]
    ends = [[], []]

    def refused(peer):
        with pytest.raises(UserError) as caught:
            agree(peer, about[peer.index])
        return str(caught.value)

    said = at_once([partial(refused, peer) for peer in star(2, ends=ends)])
    assert said[0] == said[1]
    assert "`training.seed` is 5 in process 0 and 6 in process 1; start the same command" in said[0]
    assert ends == [[], []]


@pytest.mark.parametrize(
    "left,right,said",
    [
        ({"a": "1"}, {}, "a is 1 in process 0 and nothing in process 1"),
        ({}, {"a": "1"}, "nothing in process 0"),
    ],
)
def test_what_only_one_process_has_is_a_disagreement(left, right, said):
    def refused(peer):
        with pytest.raises(UserError, match=said):
            agree(peer, (left, right)[peer.index])
        return True

    assert at_once([partial(refused, peer) for peer in star(2)]) == [True, True]


def test_two_processes_of_one_number_are_refused():
    port, said = free_port(), []

    def make(index):
        with pytest.raises(UserError) as caught:
            Peers(at(port, index), 3, index, 5, 5, said.append)
        said.append(str(caught.value))

    threads = [threading.Thread(target=make, args=(i,)) for i in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert said == ["two processes call themselves process 1 of 3"] * 3


STRANGERS = {
    "another number": b'{"hello": 1}\n',
    "a number": b"5\n",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a list of ours": b'["mapo_jax", null]\n',
    "too many": b'["mapo_jax", 2]\n',
    "no text": b"\xff\xfe\x00\n",
    "deep": b"[" * 100_000 + b"\n",
    "silence": b"",
}


@pytest.mark.parametrize("words", STRANGERS.values(), ids=STRANGERS)
def test_other_programs_at_the_port_are_disconnected(words):
    listener, made, ends = socket.create_server(("127.0.0.1", 0)), {}, []
    address = listener.getsockname()

    def make(index):
        made[index] = Peers(address if index else listener, 2, index, 10, 10, ends.append)

    first = threading.Thread(target=make, args=(0,))
    first.start()
    with socket.create_connection(address, timeout=5) as stranger:
        stranger.sendall(words)
        if words:
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""  # sent away
        make(1)
        first.join(10)
        assert at_once([partial(made[i].exchange, "place", i) for i in (0, 1)]) == [[0, 1], [0, 1]]
    for index in (0, 1):
        made[index].leave()
    assert not ends


def test_leaving_with_a_reason_ends_the_others():
    ends = [[], [], []]
    peers = star(3, ends=ends)
    peers[1].leave("the disk is full")
    until(lambda: ends[0] and ends[2])
    for index in (0, 2):
        (sentence,) = ends[index]
        assert sentence.startswith("process 1 of 3 is gone (the disk is full), so process")
        assert "start the same command on every host again" in sentence
    assert not ends[1]


def test_leaving_without_a_reason_ends_no_other_process():
    ends = [[], []]
    peers = star(2, ends=ends)
    peers[0].leave()
    time.sleep(0.2)
    peers[1].leave()
    time.sleep(0.2)
    assert ends == [[], []]


def test_a_silent_process_is_taken_for_dead():
    ends = [[], []]
    peers = star(2, ends=ends, silent=1)
    peers[1].over = True  # its heart stops, its connection stays
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
import socket
from mapo_jax.commands import Sentinel, exit_now
from mapo_jax.peers import Peers
def end(sentence):
    print(sentence, file=sys.stderr)
    exit_now(3)
port, index = int(sys.argv[1]), int(sys.argv[2])
where = ("127.0.0.1", port) if index else socket.create_server(("127.0.0.1", port))
peers = Peers(where, 2, index, 60, 60, end)
Sentinel.post("ended without a word")
peers.exchange("ready", index)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_a_sentence(killed):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(index)],
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
