"""The world that a run talks to, scripted or live: how its dialogues are held, with pauses and a journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh

from mapo_jax.commands import printable
from mapo_jax.config import HELD_OUT, ROLES, Config, EnvironmentConfig, played_roles, updated, validate_role
from mapo_jax.environment.dialogue import FAILURE_KINDS
from mapo_jax.environment.live.calls import FAILURES_FILE, CallLog, call_figures
from mapo_jax.environment.live.guard import Guarded, Watch, WorldFailing
from mapo_jax.environment.live.health import score_all
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.errors import UserError
from mapo_jax.event_loop import open_runner
from mapo_jax.files import disk_errors, part_name
from mapo_jax.role_models import keep_calls, make_role, open_models
from mapo_jax.rollout.journal import Journal, journal_files, prune
from mapo_jax.running.loop import LoopThread
from mapo_jax.running.processes import SINGLE, Processes
from mapo_jax.running.run_folder import whole_steps
from mapo_jax.running.stop import Check

T = TypeVar("T")
Collection = Callable[[Journal | None], Awaitable[list[list[T]]]]
Begun = asyncio.Task[list[list[T]]]
Note = Callable[[str], None]  # takes a message

PAUSES = 5  # each twice as long as the one before; their sum is environment.pause_minutes
_CHECK_SECONDS = 0.2  # between two checks of the stop flag while the world is awaited


class World:
    """The three roles, and how dialogues with them are held.

    Attributes:
      roles: user, judge, director.
      evaluation_roles: the same, with the held-out judge as the judge if there is one.
      live: whether language models, or classes of the user's, play any of them.
      concurrency: maximum calls of this process at once.
      calls: bounds them, of all collections together.
      processes: the processes of the run; each holds its share of the dialogues.
      on_pause: called before every pause, to save the run.
      awaited: the step whose training dialogues the run waits for, if any.
    """

    def __init__(
        self,
        roles: Roles,
        config: Config,
        folder: Path | None,
        runner: asyncio.Runner | LoopThread,
        *,
        log: CallLog | None = None,
        evaluation_roles: Roles | None = None,
        run_folder: Path | None = None,
        processes: Processes = SINGLE,
    ) -> None:
        """Use `open_world`, which also closes it. A live world has a `log`."""
        self.live, self.concurrency = log is not None, config.environment.concurrency
        self.calls = asyncio.Semaphore(self.concurrency)
        self.processes = processes
        self.on_pause: Callable[[], None] = lambda: None
        self.awaited: int | None = None
        self._config, self._folder, self._runner = config.environment, folder, runner
        self._run_folder = run_folder or folder
        self._max_turns = config.rollout.max_turns
        self._log = log or CallLog()
        self._unguarded = self.roles = self.evaluation_roles = roles
        self._guards: dict[str, Guarded] = {}  # by stream
        if self.live:
            for stream, unguarded in (("train", roles), ("evaluation", evaluation_roles or roles)):
                self._guards[stream] = self._guarded(unguarded, Watch(self._config.failure_share))
            self.roles = self._guards["train"].roles
            self.evaluation_roles = self._guards["evaluation"].roles
        self._part = part_name(processes.index, processes.count)
        first = 60 * self._config.pause_minutes / (2**PAUSES - 1)
        self._waits = [first * 2**i for i in range(PAUSES)] if self._config.pause_minutes else []

    def run(self, work: Awaitable[T], check: Check = lambda: None) -> T:
        """Awaits `work` on the world's event loop; `check` may raise to cancel it."""
        return self._runner.run(_watched(work, check))

    def begin(self, collection: Collection[T], *, stream: str, step: int) -> Begun[T]:
        """Begins a collection that `hold` is to wait for; only with `rollout.ahead`."""
        return self._runner.start(self._attempt(collection, stream, step))

    def hold(
        self,
        collection: Collection[T],
        *,
        stream: str,
        step: int,
        check: Check,
        note: Note,
        patient: bool = True,
        begun: Begun[T] | None = None,
    ) -> list[list[T]]:
        """Holds this process's dialogues of a step; in the live world with pauses and a journal.

        A process whose servers fail pauses alone. Whether a step has anything to learn from depends on the
        dialogues of all processes: one may have an empty share, or lose all of its dialogues.

        Args:
          collection: holds the dialogues with a journal; called again after a pause.
          stream: train or evaluation.
          step: finished steps.
          check: raises to stop.
          note: shows a message about a pause.
          patient: whether to pause when the world fails.
          begun: what `begin` returned for this collection, if it has begun.

        Raises:
          WorldFailing: the world failed and `patient` is false; in all processes.
          UserError: the world still fails after all pauses. `on_pause` was called; nothing is lost.
          Interrupted: another process was stopped.
        """
        together = self.processes.together
        if not self.live:
            attempt = begun or self._attempt(collection, stream, step)
            return together("dialogues", lambda: self.run(attempt, check))
        pause = self._pausing(stream, check, note) if patient else None
        while True:
            attempts = partial(self._attempts, collection, stream, step, check, pause, begun)
            dialogues, failure = together("dialogues", attempts)
            begun = None
            flat = [dialogue for group in dialogues for dialogue in group]
            usable = any(dialogue.usable(self._config.max_failed_share) for dialogue in flat)
            results = self.processes.exchange("the world", [failure, usable, len(flat)])
            failure = next((sentence for sentence, _, _ in results if sentence), None)
            if failure is None and any(usable for _, usable, _ in results):
                return dialogues
            total = sum(count for _, _, count in results)
            failure = failure or f"none of the {total} dialogues has enough scored turns and a proper end"
            if pause is None:
                raise WorldFailing(failure)
            together("a pause", partial(pause, failure))

    async def _attempt(self, collection: Collection[T], stream: str, step: int) -> list[list[T]]:
        if not self.live:
            return await collection(None)
        self._guards[stream].begin()
        files = journal_files(self._run_folder, stream, step, self._part)
        with disk_errors(self._folder), Journal(*files) as journal:
            return await collection(journal)

    def _attempts(
        self,
        collection: Collection[T],
        stream: str,
        step: int,
        check: Check,
        pause: Note | None,
        begun: Begun[T] | None,
    ) -> tuple[list[list[T]], str | None]:
        """This process's dialogues; without pauses and with a failing world, none and the failure."""
        assert self._folder is not None
        if self.processes.first:
            prune(self._run_folder, max(whole_steps(self._run_folder), default=0))
        if begun is not None and begun.done() and isinstance(begun.exception(), WorldFailing):
            begun = None  # it failed while nobody waited for it; the world may be well by now
            self._guards[stream].watch.clear()
        while True:
            try:
                return self.run(begun or self._attempt(collection, stream, step), check), None
            except WorldFailing as failing:
                begun = None
                self._guards[stream].watch.clear()
                if pause is None:
                    return [], str(failing)
                pause(str(failing))

    def _pausing(self, stream: str, check: Check, note: Note) -> Note:
        """A function that pauses after a failure, each time twice as long, and at last raises UserError."""
        waits = list(self._waits)

        def pause(failure: str) -> None:
            failure = printable(failure)
            self.on_pause()
            if not waits:
                cleared = f"{self._config.pause_minutes:g} minutes of pauses did not clear it"
                raise UserError(
                    f"{failure}; {cleared if self._waits else 'no pause is configured'}. The run stopped "
                    f"with everything saved: see {FAILURES_FILE} in {self._folder}, mend the world, and the "
                    "same command goes on"
                )
            wait = waits.pop(0)
            number = len(self._waits) - len(waits)
            note(f"{failure}; pause {number} of {len(self._waits)}: {wait:.0f} s, then on from there")
            _sleep(wait, check)
            self._guards[stream].watch.clear()  # of what steps under way counted meanwhile

        return pause

    def score_calibration(self, seed: int, check: Check) -> dict[str, tuple[int, ...] | None]:
        """The judge's levels for the fixed replies of `health`; None for a failed call. Never pauses."""
        judge = self._guarded(self._unguarded, Watch(1.0)).roles.judge
        return self.run(score_all(judge, seed, self.calls), check)

    def _guarded(self, roles: Roles, watch: Watch) -> Guarded:
        seconds = 2 * self._config.call_seconds * self._max_turns
        step_seconds = self._config.step_seconds
        return Guarded(roles, watch, self._log, dialogue_seconds=seconds, step_seconds=step_seconds)

    def drain(self) -> dict[str, Any] | None:
        """Counts of the calls since the last `drain`, for `metrics`; None in the scripted world."""
        return self._log.drain() if self.live else None

    def metrics(self, drained: Sequence[dict[str, Any] | None] | None = None) -> dict[str, float]:
        """Metrics of what the processes drained, by default this one now; empty in the scripted world."""
        if not self.live:
            return {}
        prices = {name: getattr(self._config, name).prices for name in (*ROLES, HELD_OUT)}
        none_lost = {f"failures/{kind}": 0.0 for kind in FAILURE_KINDS}
        return none_lost | call_figures([self.drain()] if drained is None else drained, prices)

    def status(self) -> str:
        """Failures since the last `metrics` by kind, for the display; empty without failures."""
        lost = ", ".join(f"{kind} {count}" for kind, count in sorted(self._log.lost.items()))
        return f" · lost: {lost}" if lost else ""


@contextmanager
def open_world(
    config: Config,
    folder: Path | None,
    mesh: Mesh | None,
    *,
    run_folder: Path | None = None,
    processes: Processes = SINGLE,
) -> Iterator[World]:
    """The world of a run. Servers of a live one get a first request before any other work.

    Args:
      folder: local folder of a live world's call cache and list of failures; None for none.
      mesh: where the engines of this process go, if roles are played by models on them.
      run_folder: where the journals are, if that is another folder.
      processes: those that share the limits: calls at once, and per minute.

    Raises:
      UserError: a server does not answer or refuses the key, a model folder or a class cannot be used.
    """
    environment = _share(config.environment, processes.count)
    config = updated(config, {"environment": environment})
    with ExitStack() as stack:
        runner = stack.enter_context(LoopThread() if config.rollout.ahead else open_runner())
        names, roles = played_roles(environment), scripted_roles(environment)
        if not names:
            yield World(roles, config, folder, runner, processes=processes)
            return
        part = part_name(processes.index, processes.count)
        callers, log = stack.enter_context(open_models(config, folder, mesh, runner, names, part=part))
        if isinstance(runner, LoopThread):
            stack.callback(runner.cancel)  # before connections are closed, which would look like failures
        made = {name: make_role(name, config, callers, log) for name in names}
        stack.enter_context(keep_calls(callers, folder, part))
        roles = replace(roles, **{name: role for name, role in made.items() if name in ROLES})
        yield World(
            roles,
            config,
            folder,
            runner,
            log=log,
            evaluation_roles=replace(roles, judge=made.get(HELD_OUT, roles.judge)),
            run_folder=run_folder,
            processes=processes,
        )


@contextmanager
def open_judge(config: Config, folder: Path, mesh: Mesh | None) -> Iterator[World]:
    """A world for its judge alone: the configured one, or else the scripted one.

    Args and errors as of `open_world`. The user and the director need no configuration.
    """
    role = config.environment.judge
    scripted = scripted_roles(config.environment)
    with ExitStack() as stack:
        runner = stack.enter_context(open_runner())
        if role.model is None and role.implementation is None:
            yield World(scripted, config, folder, runner)
            return
        validate_role("judge", role)
        callers, log = stack.enter_context(open_models(config, folder, mesh, runner, ("judge",)))
        roles = replace(scripted, judge=make_role("judge", config, callers, log))
        stack.enter_context(keep_calls(callers, folder))
        yield World(roles, config, folder, runner, log=log)


def _share(environment: EnvironmentConfig, count: int) -> EnvironmentConfig:
    """The share of each limit that one of `count` processes gets; at least 1."""

    def share(limit: int) -> int:
        return limit and max(1, limit // count)  # 0 means no limit

    changes = {
        f"{name}.{limit}": share(getattr(getattr(environment, name), limit))
        for name in (*ROLES, HELD_OUT)
        for limit in ("requests_per_minute", "tokens_per_minute")
    }
    return updated(environment, {"concurrency": share(environment.concurrency), **changes})


async def _watched(work: Awaitable[T], check: Check) -> T:
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_CHECK_SECONDS))[0]:
            check()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _sleep(seconds: float, check: Check) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(_CHECK_SECONDS, left))
