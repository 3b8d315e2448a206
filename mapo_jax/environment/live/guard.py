"""What stands around the roles, ours or yours: limits of time, and the watch over the share of failures."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Hashable
from typing import Any, TypeVar

from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure, Roles
from mapo_jax.environment.live.calls import CallLog
from mapo_jax.environment.scenario import Scenario

WINDOW = 100  # role calls that the watch looks back on

T = TypeVar("T")


class WorldFailing(Exception):
    """Too many of the last calls failed: going on would train on what is left by chance."""


class Watch:
    """Looks back on the last WINDOW calls of the roles."""

    def __init__(self, share: float) -> None:
        """Args: share: of failures that is still borne."""
        self._most = share * WINDOW
        self._last: deque[tuple[str, RoleFailure | None]] = deque(maxlen=WINDOW)

    def note(self, role: str, failure: RoleFailure | None) -> None:
        """Takes in one call.

        Raises:
          WorldFailing: with it, more than the share of a whole window has failed.
        """
        self._last.append((role, failure))
        failures = [(name, problem) for name, problem in self._last if problem is not None]
        if failure is None or len(failures) <= self._most:
            return
        kinds = Counter(f"{name} {problem.kind}" for name, problem in failures)
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        raise WorldFailing(
            f"{len(failures)} of the last {len(self._last)} calls of the world failed ({listed}; the last: "
            f"{role}, {' '.join(str(failure).split())[:200]})"
        )

    def clear(self) -> None:
        """Forgets what was."""
        self._last.clear()


class Guarded:
    """The three roles behind limits of time. `begin` before every collection."""

    def __init__(
        self, roles: Roles, watch: Watch, log: CallLog, *, dialogue_seconds: float, step_seconds: float
    ) -> None:
        """Args:

        roles: whom to guard.
        watch: told of every call, but not of those that a limit here cut off.
        log: where what was lost is counted.
        dialogue_seconds: longest time that one dialogue may wait for its roles, all turns together.
        step_seconds: longest time from `begin` to the last call.
        """
        self._roles, self._watch, self._log = roles, watch, log
        self._dialogue_seconds, self._step_seconds = dialogue_seconds, step_seconds
        self.begin()

    @property
    def roles(self) -> Roles:
        """Itself, as the three roles."""
        return Roles(self, self, self)

    def begin(self) -> None:
        """Starts the clocks of a collection, and forgets earlier failures."""
        self._deadline = time.monotonic() + self._step_seconds
        self._spent: dict[Hashable, float] = defaultdict(float)
        self._watch.clear()

    async def open(self, scenario: Scenario, seed: int) -> str:
        """See User."""
        return await self._bounded(
            "user", ("opening", scenario.id, seed), self._roles.user.open(scenario, seed)
        )

    async def reply(self, state: DialogueState) -> str:
        """See User."""
        return await self._bounded("user", _identity(state), self._roles.user.reply(state))

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """See Judge."""
        return await self._bounded("judge", _identity(state), self._roles.judge.score(state, reply))

    async def act(self, state: DialogueState) -> Action:
        """See Director."""
        return await self._bounded("director", _identity(state), self._roles.director.act(state))

    async def _bounded(self, role: str, dialogue: Hashable, call: Awaitable[T]) -> T:
        started = time.monotonic()
        left = min(self._deadline - started, self._dialogue_seconds - self._spent[dialogue])
        try:
            async with asyncio.timeout(max(0.0, left)) as limit:
                result = await call
        except TimeoutError:
            if not limit.expired():
                raise
            which = "step" if self._deadline <= time.monotonic() else "dialogue"
            self._log.lost["timeout"] += 1
            raise RoleFailure("timeout", f"the time of the {which} is used up") from None
        except RoleFailure as failure:
            self._log.lost[failure.kind] += 1
            self._watch.note(role, failure)
            raise
        finally:
            self._spent[dialogue] += time.monotonic() - started
        self._watch.note(role, None)
        return result


def _identity(state: DialogueState) -> Any:
    return state.scenario.id, state.seed
