"""How the processes of one run know of each other: who has come, who lives, who wants to stop.

A star of sockets with process 0 in its middle, beside the device runtime and older than it: it stands before
`jax.distributed.initialize`, on the coordinator's own port, which it then leaves to the runtime. So a worker
that never comes, or comes with another configuration, is named before anything is waited for; and a process
that dies ends the others within seconds, where a collective would wait for half an hour.

What travels here are short JSON values: flags, lengths, figures. Arrays travel by collectives
(`running/processes.py`). Nothing here knows of devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mapo_jax.errors import UserError

STATUS = 3  # exit status of a process that ends because another one did
AGAIN = "nothing that was saved is lost; start the same command on every host again"
_BEATS = 5  # in the time after which a silent process is taken for dead

About = Mapping[str, str]  # what all processes must agree on: a name of it -> its text


class Peers:
    """This process's place in the star.

    Every process makes the same calls of `exchange` and `report` in the same order; a call returns when all
    have made it. If a process dies, falls silent, or leaves with last words, all others print why and end
    with STATUS: they are inside collectives that nobody can call off.
    """

    def __init__(
        self,
        address: str,
        count: int,
        index: int,
        *,
        about: About,
        join_seconds: float,
        silent_seconds: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        """Waits until all processes have come and agree.

        Args:
          address: HOST:PORT of process 0; the port is free again when this returns.
          count: processes, this one included.
          index: of this one, from 0.
          about: what all must agree on.
          join_seconds: how long to wait for the others.
          silent_seconds: a process of which nothing was heard for so long is taken for dead.
          end: called with a sentence when another process is gone; by default prints it and ends this one.

        Raises:
          UserError: processes are missing, there are too many, or they disagree; every one that has come
            gets the same sentence.
        """
        self.index, self.count = index, count
        self.stop_reason: str | None = None  # somebody's request to stop
        self._silent, self._end = silent_seconds, end or _end_process
        self._lock = threading.Condition()
        self._round = 0
        self._boxes: dict[int, dict[int, Any]] = {}  # of process 0: round -> index -> value
        self._results: dict[int, Any] = {}
        self._left: set[int] = set()  # who has said goodbye
        self._over = False
        self._links: dict[int, _Link] = {}
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if index == 0:
            self._gather(int(port), about, join_seconds)
        else:
            self._links[0] = self._reach(host, int(port), about, join_seconds)
        self._listeners = [
            threading.Thread(target=self._listen, args=item, daemon=True) for item in self._links.items()
        ]
        for listener in self._listeners:
            listener.start()
        threading.Thread(target=self._beat, daemon=True).start()

    # --- What a run uses. ---

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Everybody's `value` (JSON), in the order of processes. `what` names the place in the program."""
        return self._meet(what, value, everybody=True)

    def report(self, what: str, value: Any) -> list[Any] | None:
        """Everybody's `value` for process 0, which waits for them; None at once for the others."""
        return self._meet(what, value, everybody=False)

    @property
    def over(self) -> bool:
        """Whether this process has left."""
        return self._over

    def ask_to_stop(self, reason: str) -> None:
        """Sets everybody's `stop_reason`, if there is none yet. Does not wait; may be called in a handler."""
        if self.stop_reason is None:
            self.stop_reason = reason
            threading.Thread(target=self._spread, args=({"stop": reason},), daemon=True).start()

    def leave(self, last_words: str | None = None) -> None:
        """Ends this process's part: in peace, or, with last words, everybody's."""
        with self._lock:
            if self._over:
                return
            self._over = True
        self._spread({"bye": True} if last_words is None else {"gone": self.index, "words": last_words})
        for link in self._links.values():
            link.close()
        for listener in self._listeners if last_words is not None else ():
            listener.join(1)  # until the others have heard it

    # --- Coming together. ---

    def _gather(self, port: int, about: About, join_seconds: float) -> None:
        deadline = time.monotonic() + join_seconds
        refusal = None
        with _listener(port) as listener:
            while len(self._links) < self.count - 1 and refusal is None:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    link = _Link(listener.accept()[0])
                    hello = link.receive(timeout=10)
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue  # somebody else knocked and said nothing
                    come = [0, *sorted(self._links)]
                    missing = [i for i in range(self.count) if i not in come]
                    refusal = (
                        f"only {len(come)} of {self.count} processes joined within {join_seconds:g} s; "
                        f"missing: process {', '.join(map(str, missing))}. Start the same command on every "
                        "host, and see that they reach process 0"
                    )
                    break
                except (OSError, ValueError):
                    continue
                other = hello.get("hello") if isinstance(hello, dict) else None
                if not isinstance(other, int):
                    continue
                if not 0 < other < self.count or other in self._links:
                    refusal = f"two processes call themselves process {other} of {self.count}"
                else:
                    refusal = _disagreement(about, hello["about"], other)
                self._links[-1 if other in self._links else other] = link
        answer = {"welcome": True} if refusal is None else {"refused": refusal}
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(answer)
        if refusal is not None:
            for link in self._links.values():
                link.close()
            raise UserError(refusal)

    def _reach(self, host: str, port: int, about: About, join_seconds: float) -> _Link:
        # Process 0 gives up first, and says how many have come.
        deadline = time.monotonic() + join_seconds + 5
        nobody = UserError(
            f"process 0 at {host}:{port} could not be reached within {join_seconds:g} s by process "
            f"{self.index} of {self.count}; start the same command there, and see that the port is open"
        )
        while True:
            try:
                link = _Link(socket.create_connection((host, port), timeout=5))
                link.send({"hello": self.index, "about": dict(about)})
                answer = link.receive(timeout=max(0.01, deadline - time.monotonic()))
            except (OSError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise nobody from error
                time.sleep(0.1)
                continue
            if "refused" in answer:
                link.close()
                raise UserError(answer["refused"])
            return link

    # --- Meeting. ---

    def _meet(self, what: str, value: Any, *, everybody: bool) -> list[Any] | None:
        self._round += 1
        number = self._round
        if self.index != 0:
            self._tell(0, {"round": number, "what": what, "value": value, "everybody": everybody})
            if not everybody:
                return None
            with self._lock:
                self._lock.wait_for(lambda: number in self._results)
                return self._results.pop(number)
        self._put(number, 0, what, value, everybody)
        with self._lock:
            self._lock.wait_for(lambda: number in self._results)
            return self._results.pop(number)

    def _put(self, number: int, other: int, what: str, value: Any, everybody: bool) -> None:
        with self._lock:
            box = self._boxes.setdefault(number, {})
            box[other] = (what, value)
            if len(box) < self.count:
                return
            del self._boxes[number]
            self._results[number] = [box[i][1] for i in range(self.count)]
            places = {box[i][0] for i in range(self.count)}
            self._lock.notify_all()
        if len(places) > 1:
            self._everybody_ends(0, f"the processes are at different places: {', '.join(sorted(places))}")
        elif everybody:
            self._spread({"round": number, "values": [box[i][1] for i in range(self.count)]})

    # --- Watching. ---

    def _listen(self, other: int, link: _Link) -> None:
        while True:
            try:
                message = link.receive(timeout=self._silent)
            except TimeoutError:
                self._everybody_ends(other, f"nothing was heard of it for {self._silent:g} s")
                return
            except (OSError, ValueError):
                if other not in self._left and not self._over:
                    self._everybody_ends(other, "its connection closed: it was killed, or its machine taken")
                return
            if "round" in message and self.index == 0:
                self._put(message["round"], other, message["what"], message["value"], message["everybody"])
            elif "round" in message:
                with self._lock:
                    self._results[message["round"]] = message["values"]
                    self._lock.notify_all()
            elif "stop" in message:
                if self.stop_reason is None:
                    self.stop_reason = message["stop"]
                    if self.index == 0:
                        self._spread(message)
            elif "bye" in message:
                self._left.add(other)
            elif "gone" in message:
                self._everybody_ends(message["gone"], message["words"])
                return

    def _everybody_ends(self, other: int, words: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        if self.index == 0:
            self._spread({"gone": other, "words": words})
        self._end(f"process {other} of {self.count} is gone ({words}), so process {self.index} ends; {AGAIN}")

    def _beat(self) -> None:
        while not self._over:
            self._spread({"beat": True})
            time.sleep(self._silent / _BEATS)

    def _spread(self, message: Mapping[str, Any]) -> None:
        for other in self._links:
            self._tell(other, message)

    def _tell(self, other: int, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever is gone is noticed by its listener
            self._links[other].send(message)


class _Link:
    """One connection: JSON values, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""
        self._sending = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # leaves the port to the runtime
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            self._socket.sendall(data)

    def receive(self, timeout: float) -> Any:
        """The next value. Raises TimeoutError after so long a silence, OSError at the end."""
        self._socket.settimeout(timeout)
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("closed")
            parts.append(data)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """Lets what was sent arrive, then closes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


def _listener(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}); is another run at work on this "
            "machine? Stop it, or choose another port in JAX_COORDINATOR_ADDRESS"
        ) from error


def _disagreement(ours: About, theirs: About, other: int) -> str | None:
    for name in dict.fromkeys((*ours, *theirs)):
        mine, its = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if mine != its:
            return (
                f"processes 0 and {other} disagree: {name} is {mine} in process 0 and {its} in process "
                f"{other}; start the same command with the same code on every host"
            )
    return None


def _end_process(sentence: str) -> None:
    Sentinel.dismiss()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(STATUS)


class Sentinel:
    """A shell that speaks when this process ends without a word of its own.

    The device runtime aborts a process, with a stack trace, the instant that process 0 is gone, and the
    system kills one that takes too much memory: neither leaves room for a sentence.
    """

    _shell: subprocess.Popen | None = None

    @classmethod
    def post(cls, sentence: str) -> None:
        """`sentence` is printed to standard error if this process ends before `dismiss`."""
        script = 'read word; [ "$word" = dismissed ] || echo "error: $0" >&2'
        cls._shell = subprocess.Popen(
            ["sh", "-c", script, sentence], stdin=subprocess.PIPE, start_new_session=True
        )

    @classmethod
    def dismiss(cls) -> None:
        """Sends it away."""
        if cls._shell is not None:
            with contextlib.suppress(OSError):
                cls._shell.communicate(b"dismissed\n", timeout=5)
            cls._shell = None
