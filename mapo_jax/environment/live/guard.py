"""What stands around the roles, ours or yours: limits of time, and the watch over the share of failures."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mapo_jax.environment.allowance import allow
from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure
from mapo_jax.environment.live.calls import CallLog
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scenario import Scenario

WINDOW = 100  # role calls that the watch looks back on

T = TypeVar("T")


class WorldFailing(Exception):
    """Too many of the last calls failed: going on would train on what is left by chance."""


class Watch:
    """Looks back on the last WINDOW calls of the roles, from one step into the next."""

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
        if failure is None:
            return
        failures = [(name, problem) for name, problem in self._last if problem is not None]
        if len(failures) <= self._most:
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
        self,
        roles: Roles,
        watch: Watch,
        log: CallLog,
        *,
        dialogue_seconds: float,
        step_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:

        roles: whom to guard.
        watch: told of every call, but not of those that a limit here cut off.
        log: where what was lost is counted, and what a limit cut off is written down.
        dialogue_seconds: longest time that one dialogue may wait for its roles, all turns together. What
          calls wait for their turn (`allowance.waiting`) is not counted: it is the longer the more turns a
          dialogue has, and would leave out long ones.
        step_seconds: longest time from `begin` to the last call, waits included.
        clock: for tests.
        """
        self._roles, self._watch, self._log = roles, watch, log
        self._dialogue_seconds, self._step_seconds, self._clock = dialogue_seconds, step_seconds, clock
        self.begin()

    @property
    def roles(self) -> Roles:
        """Itself, as the three roles."""
        return Roles(self, self, self)

    def begin(self) -> None:
        """Starts the clocks of a collection."""
        self._deadline = self._clock() + self._step_seconds
        self._spent: dict[tuple[str, int], float] = defaultdict(float)

    async def open(self, scenario: Scenario, seed: int) -> str:
        """See User."""
        return await self._bounded("user", scenario, seed, self._roles.user.open(scenario, seed))

    async def reply(self, state: DialogueState) -> str:
        """See User."""
        return await self._bounded("user", state.scenario, state.seed, self._roles.user.reply(state))

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """See Judge."""
        return await self._bounded("judge", state.scenario, state.seed, self._roles.judge.score(state, reply))

    async def act(self, state: DialogueState) -> Action:
        """See Director."""
        return await self._bounded("director", state.scenario, state.seed, self._roles.director.act(state))

    async def _bounded(self, role: str, scenario: Scenario, seed: int, call: Awaitable[T]) -> T:
        dialogue = scenario.id, seed
        time_left = self._dialogue_seconds - self._spent[dialogue]
        try:
            async with allow(time_left, self._deadline, self._clock) as allowance:
                result = await call
        except TimeoutError:
            if not allowance.expired:
                raise
            which = "step" if self._deadline <= self._clock() else "dialogue"
            failure = RoleFailure("timeout", f"the time of the {which} is used up")
            self._log.failed(role, failure, final=True, seed=seed)
            self._log.lost[failure.kind] += 1
            raise failure from None
        except RoleFailure as failure:
            self._log.lost[failure.kind] += 1
            self._watch.note(role, failure)
            raise
        finally:
            self._spent[dialogue] += allowance.used
        self._watch.note(role, None)
        return result
