"""Limits: requests and tokens per minute, estimates of tokens, and open files."""

import asyncio
import os
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence

from mapo_jax.environment.allowance import waiting
from mapo_jax.errors import UserError

MINUTE = 60.0
_SPARE_FILES = 64  # for checkpoints, event files and host lookups, besides connections and already open files


class PerMinute:
    """Rate limiter: no window of a minute holds more than `limit`; first come, first served.

    A single amount above the limit waits for an empty window and then passes; the server decides about it.
    """

    def __init__(self, limit: int, *, clock=time.monotonic, sleep=asyncio.sleep) -> None:
        """Args: limit: maximum per minute; 0 for no limit. clock, sleep: for tests."""
        self._limit, self._clock, self._sleep = limit, clock, sleep
        self._passed: deque[list[float]] = deque()  # [time, amount] of the last minute
        self._sum = 0.0
        self._turn = asyncio.Lock()

    async def take(self, amount: float = 1.0) -> list[float] | None:
        """Waits until `amount` fits; returns an entry for `correct`, None without a limit."""
        if not self._limit:
            return None
        with waiting():
            async with self._turn:
                return await self._pass(amount)

    async def _pass(self, amount: float) -> list[float]:
        while True:
            now = self._clock()
            while self._passed and self._passed[0][0] <= now - MINUTE:
                self._sum -= self._passed.popleft()[1]
            if not self._passed or self._sum + amount <= self._limit:
                entry = [now, amount]
                self._passed.append(entry)
                self._sum += amount
                return entry
            await self._sleep(self._passed[0][0] + MINUTE - now)

    def correct(self, entry: list[float] | None, amount: float) -> None:
        """Replaces the estimated amount of an entry by the true one."""
        if entry is not None and any(entry is passed for passed in self._passed):
            self._sum += amount - entry[1]
            entry[1] = amount


def estimate_tokens(text: str) -> float:
    """Estimated tokens of a text: 0.25 per character, 0.8 per Chinese character."""
    wide = (len(text.encode(errors="replace")) - len(text)) / 2  # Chinese takes three bytes a character
    return wide * 0.8 + (len(text) - wide) / 4


def prompt_tokens(messages: Sequence[Mapping[str, str]]) -> float:
    """Estimated tokens of a prompt, including the chat template's."""
    return sum(estimate_tokens(message["content"]) + 4 for message in messages)


def allow_connections(count: int, key: str) -> None:
    """Checks that the process may open so many connections, and raises its soft limit if needed.

    Args:
      count: concurrent connections to servers.
      key: the configuration key that determines the count.

    Raises:
      UserError: the hard limit on open files is too low.
    """
    needed = len(os.listdir("/dev/fd")) + _SPARE_FILES + count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise UserError(
            f"`{key}` allows for {count} connections, which takes {needed} open files, and this process may "
            f"open {hard}; lower `{key}` or raise the limit (`ulimit -Hn`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
