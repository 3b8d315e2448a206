"""Time limits for the roles' calls, built-in or custom, and a maximum failure rate."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

from mapo_jax.environment.allowance import allow
from mapo_jax.environment.dialogue import Action, DialogueState, Judgement, RoleFailure
from mapo_jax.environment.live.calls import CallLog
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scenario import Scenario

WINDOW = 100  # last calls over which the failure rate is taken

T = TypeVar("T")


class WorldFailing(Exception):
    """The failure rate is too high: training would go on with whatever dialogues happen to be left."""


class Watch:
    """Checks the failure rate of the last WINDOW calls, across steps."""

    def __init__(self, share: float) -> None:
        """Args: share: maximum failure rate."""
        self._most = share * WINDOW
        self._last: deque[tuple[str, RoleFailure | None]] = deque(maxlen=WINDOW)

    def note(self, role: str, failure: RoleFailure | None) -> None:
        """Records one call.

        Raises:
          WorldFailing: more than the maximum rate of a whole window has failed.
        """
        self._last.append((role, failure))
        if failure is None:
            return
        last = list(self._last)  # at once: another thread may clear it
        kinds = Counter(f"{name} {problem.kind}" for name, problem in last if problem is not None)
        if kinds.total() <= self._most:
            return
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        raise WorldFailing(
            f"{kinds.total()} of the last {len(self._last)} calls of the world failed ({listed}; the last: "
            f"{role}, {' '.join(str(failure).split())[:200]})"
        )

    def clear(self) -> None:
        """Starts a new window."""
        self._last.clear()


class _Clocks(NamedTuple):
    """The time of one collection."""

    deadline: float
    spent: dict[tuple[str, int], float]  # by dialogue


class Guarded:
    """The three roles with time limits. Call `begin` before every collection of dialogues, in its task."""

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

        roles: the roles to guard.
        watch: records every call, except those that a limit of this class ends.
        log: counts what is lost, and logs the calls that a limit ends.
        dialogue_seconds: longest time of all role calls of one dialogue together. Waiting for capacity
          (`allowance.waiting`) does not count: it grows with the turns of a dialogue, so long dialogues would
          be lost.
        step_seconds: longest time from `begin` to the last call, including waits.
        clock: for tests.
        """
        self._roles, self.watch, self._log = roles, watch, log
        self._dialogue_seconds, self._step_seconds, self._clock = dialogue_seconds, step_seconds, clock
        # Collections may overlap; each one's tasks have its clocks.
        self._clocks: ContextVar[_Clocks] = ContextVar("clocks")
        self._first_clocks = self._new_clocks()

    @property
    def roles(self) -> Roles:
        """This object in all three roles."""
        return Roles(self, self, self)

    def begin(self) -> None:
        """Starts the clocks of a collection."""
        self._clocks.set(self._new_clocks())

    def _new_clocks(self) -> _Clocks:
        return _Clocks(self._clock() + self._step_seconds, defaultdict(float))

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
        dialogue, clocks = (scenario.id, seed), self._clocks.get(self._first_clocks)
        time_left = self._dialogue_seconds - clocks.spent[dialogue]
        try:
            async with allow(time_left, clocks.deadline, self._clock) as allowance:
                result = await call
        except TimeoutError:
            if not allowance.expired:
                raise
            which = "step" if clocks.deadline <= self._clock() else "dialogue"
            failure = RoleFailure("timeout", f"the time of the {which} is used up")
            self._log.failed(role, failure, final=True, seed=seed)
            self._log.lost[failure.kind] += 1
            raise failure from None
        except RoleFailure as failure:
            self._log.lost[failure.kind] += 1
            self.watch.note(role, failure)
            raise
        finally:
            clocks.spent[dialogue] += allowance.used
        self.watch.note(role, None)
        return result
