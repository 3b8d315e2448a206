"""The world that a run talks to: scripted, or live with its servers, engines, cache, limits and pauses."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jax.sharding import Mesh

from mapo_jax.commands import printable
from mapo_jax.config import (
    ENGINE,
    HELD_OUT,
    ROLES,
    Config,
    EnvironmentConfig,
    RoleConfig,
    RolloutConfig,
    held_out,
    updated,
    validate_role,
)
from mapo_jax.environment.live.call_cache import CACHE_FILE, CallCache
from mapo_jax.environment.live.calls import (
    FAILURES_FILE,
    Caller,
    CallLog,
    Complete,
    Messages,
    call_figures,
)
from mapo_jax.environment.live.director import LiveDirector
from mapo_jax.environment.live.guard import Guarded, Watch, WorldFailing
from mapo_jax.environment.live.health import score_all
from mapo_jax.environment.live.judge import LiveJudge
from mapo_jax.environment.live.keys import read_key
from mapo_jax.environment.live.limits import allow_connections
from mapo_jax.environment.live.user import LiveUser
from mapo_jax.environment.roles import Completion, Roles
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.errors import UserError
from mapo_jax.files import part_of
from mapo_jax.rollout.completion import EngineModel
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.journal import Journal, journal_files, prune
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.running.checkpoint import whole_steps
from mapo_jax.running.metrics import full_disk_is_a_user_error
from mapo_jax.running.policy import load_policy
from mapo_jax.running.processes import Processes

if TYPE_CHECKING:
    from mapo_jax.environment.live.client import Connections, Server

T = TypeVar("T")

PAUSES = 5  # each twice as long as the last; together environment.pause_minutes
_CHECK_SECONDS = 0.2  # how often a request to stop is looked for while the world is awaited
_METHODS = {"user": ("open", "reply"), "judge": ("score",), "director": ("act",), HELD_OUT: ("score",)}
_ENGINE_SLOTS, _ENGINE_TOKENS = 8, 4096


class World:
    """Three roles, and how dialogues with them are held.

    Attributes:
      roles: user, judge, director.
      evaluation_roles: the same, with the held-out judge in the judge's place if there is one.
      live: whether they are played by language models.
      concurrency: most calls that this process has under way at once.
      on_pause: called before every pause, so that what is done can be saved.
    """

    def __init__(
        self,
        roles: Roles,
        config: Config,
        folder: Path | None,
        runner: asyncio.Runner,
        *,
        live: bool = False,
        log: CallLog | None = None,
        evaluation_roles: Roles | None = None,
        run_folder: Path | None = None,
        part: str = "",
    ) -> None:
        """Use `open_world`, which also closes it."""
        self.live, self.concurrency = live, config.environment.concurrency
        self.on_pause: Callable[[], None] = lambda: None
        self._config, self._folder, self._runner = config.environment, folder, runner
        self._run_folder, self._part = run_folder or folder, part
        self._max_turns = config.rollout.max_turns
        self._log = log or CallLog()
        self._unguarded = self.roles = self.evaluation_roles = roles
        self._watches: dict[str, Watch] = {}  # by stream
        self._guards: dict[str, Guarded] = {}
        if live:
            for stream, own in (("train", roles), ("evaluation", evaluation_roles or roles)):
                self._watches[stream] = Watch(self._config.failure_share)
                self._guards[stream] = self._guarded(own, self._watches[stream])
            self.roles = self._guards["train"].roles
            self.evaluation_roles = self._guards["evaluation"].roles
        first = 60 * self._config.pause_minutes / (2**PAUSES - 1)
        self._waits = [first * 2**i for i in range(PAUSES)] if self._config.pause_minutes else []

    def run(self, work: Awaitable[T], check: Callable[[], None] = lambda: None) -> T:
        """Awaits `work` on the world's own event loop; `check` may raise to end it early."""
        return self._runner.run(_watched(work, check))

    def hold(
        self,
        collection: Callable[[Journal | None], Awaitable[list[list[T]]]],
        *,
        stream: str,
        step: int,
        check: Callable[[], None],
        note: Callable[[str], None],
        patient: bool = True,
        processes: Processes | None = None,
    ) -> list[list[T]]:
        """Holds a step's dialogues, in the live world through pauses and with a journal.

        What one process cannot reach it waits for alone. Whether a step has anything to learn from is decided
        on the dialogues of all processes: one may have an empty share, or lose all of its own.

        Args:
          collection: given the journal, holds the dialogues; called again after a pause.
          stream: train or evaluation.
          step: finished steps.
          check: raises to end it all.
          note: told of pauses.
          patient: whether a failing world is waited for.
          processes: the processes of the run, each of which holds its own dialogues; None for this one alone.

        Raises:
          WorldFailing: the world failed, and was not to be waited for; in all processes.
          UserError: the world kept failing through all pauses. `on_pause` was called; nothing is lost.
          Interrupted: it was ended in another process.
        """
        processes = processes or Processes()
        if not self.live:
            return processes.together("dialogues", lambda: self.run(collection(None), check))
        pause = self._pausing(stream, check, note) if patient else None
        while True:
            attempts = partial(self._attempts, collection, stream, step, check, pause)
            dialogues, failing = processes.together("dialogues", attempts)
            flat = [dialogue for group in dialogues for dialogue in group]
            usable = any(dialogue.usable(self._config.max_failed_share) for dialogue in flat)
            said = processes.exchange("the world", [failing, usable, len(flat)])
            failing = next((words for words, _, _ in said if words), None)
            if failing is None and any(usable for _, usable, _ in said):
                return dialogues
            total = sum(count for _, _, count in said)
            failing = failing or f"none of the {total} dialogues has enough scored turns and a proper end"
            if pause is None:
                raise WorldFailing(failing)
            processes.together("a pause", partial(pause, failing))

    def _attempts(
        self,
        collection: Callable[[Journal | None], Awaitable[list[list[T]]]],
        stream: str,
        step: int,
        check: Callable[[], None],
        pause: Callable[[str], None] | None,
    ) -> tuple[list[list[T]], str | None]:
        """This process's dialogues; none, and why, if the world failed and there are no pauses."""
        assert self._folder is not None
        if not self._part or self._part.startswith("-00000-"):
            prune(self._run_folder, max(whole_steps(self._run_folder), default=0))
        while True:
            self._guards[stream].begin()
            try:
                with (
                    full_disk_is_a_user_error(self._folder),
                    Journal(*journal_files(self._run_folder, stream, step, self._part)) as journal,
                ):
                    return self.run(collection(journal), check), None
            except WorldFailing as failing:
                self._watches[stream].clear()
                if pause is None:
                    return [], str(failing)
                pause(str(failing))

    def _pausing(
        self, stream: str, check: Callable[[], None], note: Callable[[str], None]
    ) -> Callable[[str], None]:
        """Waits when it is called with a failure: each time twice as long, and then it raises UserError."""
        waits = list(self._waits)

        def pause(failing: str) -> None:
            failing = printable(failing)
            self._watches[stream].clear()
            self.on_pause()
            if not waits:
                cleared = f"{self._config.pause_minutes:g} minutes of pauses did not clear it"
                raise UserError(
                    f"{failing}; {cleared if self._waits else 'no pause is configured'}. The run stopped "
                    f"with everything saved: see {FAILURES_FILE} in {self._folder}, mend the world, and the "
                    "same command goes on"
                )
            wait = waits.pop(0)
            number = len(self._waits) - len(waits)
            note(f"{failing}; pause {number} of {len(self._waits)}: {wait:.0f} s, then on from there")
            _sleep(wait, check)

        return pause

    def score_calibration(self, seed: int, check: Callable[[], None]) -> dict[str, tuple[int, ...] | None]:
        """The judge's levels for the fixed replies of `health`; a failure is None and pauses nothing."""
        judge = self._guarded(self._unguarded, Watch(1.0)).roles.judge
        return self.run(score_all(judge, seed, self._config.concurrency), check)

    def _guarded(self, roles: Roles, watch: Watch) -> Guarded:
        return Guarded(
            roles,
            watch,
            self._log,
            dialogue_seconds=2 * self._config.call_seconds * self._max_turns,
            step_seconds=self._config.step_seconds,
        )

    def drain(self) -> dict[str, Any] | None:
        """What calls came to since this was last called, for `metrics`; None in the scripted world."""
        return self._log.drain() if self.live else None

    def metrics(self, drained: Sequence[dict[str, Any] | None] | None = None) -> dict[str, float]:
        """The figures of what processes drained (by default of this one now); none in the scripted world."""
        if not self.live:
            return {}
        prices = {name: getattr(self._config, name).prices for name in (*ROLES, HELD_OUT)}
        return call_figures([self.drain()] if drained is None else drained, prices)

    def status(self) -> str:
        """Failures since `metrics` was last asked, by kind, for the display; empty if there are none."""
        lost = ", ".join(f"{kind} {count}" for kind, count in sorted(self._log.lost.items()))
        return f" · lost: {lost}" if lost else ""


@contextmanager
def open_world(
    config: Config,
    folder: Path | None,
    mesh: Mesh | None,
    *,
    run_folder: Path | None = None,
    part: str = "",
    count: int = 1,
) -> Iterator[World]:
    """The world of a run; a live one is asked whether it is there before anything is spent.

    Args:
      folder: on this machine's disk, where a live world keeps its cache and its failures; None for nowhere.
      mesh: where models on our own engine go, if there are any.
      run_folder: of the run, where it keeps its journals, if that is another folder.
      part: what to name those files by, if other processes keep theirs in the same folder.
      count: processes that share what is limited: calls at once, and per minute.

    Raises:
      UserError: a server does not answer or refuses the key, a model folder or a class cannot be used.
    """
    environment = _share(config.environment, count)
    config = updated(config, {"environment": environment})
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        if environment.family == "scripted":
            yield World(scripted_roles(environment), config, folder, runner)
            return
        names = (*ROLES, HELD_OUT) if held_out(environment) else ROLES
        callers, log = stack.enter_context(open_models(config, folder, mesh, runner, names, part=part))
        made = {name: _role(name, config, callers, log) for name in names}
        roles = Roles(*(made[name] for name in ROLES))
        evaluation_roles = replace(roles, judge=made.get(HELD_OUT, roles.judge))
        yield World(
            roles,
            config,
            folder,
            runner,
            live=True,
            log=log,
            evaluation_roles=evaluation_roles,
            run_folder=run_folder,
            part=part,
        )


@contextmanager
def open_judge(config: Config, folder: Path, mesh: Mesh | None) -> Iterator[World]:
    """A world of which only the judge is there: the configured one, or else the scripted one.

    Args and errors as of `open_world`. The user and the director need no configuration.
    """
    role = config.environment.judge
    scripted = scripted_roles(config.environment)
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        if role.model is None and role.implementation is None:
            yield World(scripted, config, folder, runner)
            return
        validate_role("judge", role)
        callers, log = stack.enter_context(open_models(config, folder, mesh, runner, ("judge",)))
        roles = replace(scripted, judge=_role("judge", config, callers, log))
        yield World(roles, config, folder, runner, live=True, log=log)


@contextmanager
def open_models(
    config: Config,
    folder: Path | None,
    mesh: Mesh | None,
    runner: asyncio.Runner,
    names: Sequence[str],
    *,
    part: str = "",
) -> Iterator[tuple[dict[str, Complete | None], CallLog]]:
    """What each of the named roles asks (None where no model is named), and the log of its calls.

    Args and errors as of `open_world`.
    """
    environment = config.environment
    with ExitStack() as stack:
        log = CallLog(None if folder is None else part_of(folder / FAILURES_FILE, part))
        engines: dict[Any, EngineModel] = {}
        calls: dict[str, Callable[..., Awaitable[Any]]] = {}
        connections = _connect([getattr(environment, name) for name in names], environment, runner, stack)
        for name in names:  # every key is looked at before anything is sent
            role = getattr(environment, name)
            if role.model is not None and not role.model.startswith(ENGINE):
                calls[name] = _server(name, role, environment, connections[role.url], log)
        for name in names:
            role = getattr(environment, name)
            if role.model is None:
                continue
            if role.model.startswith(ENGINE):
                calls[name] = _engine_call(name, role, engines, config, mesh, log)
            else:
                runner.run(_ready(name, role, calls[name]))
        cache = None
        if folder is not None:  # only now: a run that could not begin leaves its folder as it was
            cache = CallCache(part_of(folder / CACHE_FILE, part))
            stack.callback(cache.close)
        callers: dict[str, Complete | None] = dict.fromkeys(names)
        for name, call in calls.items():
            role = getattr(environment, name)
            settings = {
                "model": role.model,
                "temperature": role.temperature,
                "max_tokens": role.max_tokens,
                "extra_body": role.extra_body,
            }
            callers[name] = Caller(name, call, settings, log, cache)
        log.take({})  # whether servers are there belongs to no step
        yield callers, log


def _role(name: str, config: Config, callers: dict[str, Complete | None], log: CallLog) -> Any:
    role, complete = getattr(config.environment, name), callers[name]
    if role.implementation is not None:
        return load_role(name, role.implementation)(complete)
    if name == "user":
        return LiveUser(complete)
    if name == "director":
        return LiveDirector(complete, config.rollout.max_turns)
    return LiveJudge(complete, role.samples, lambda spread: log[name].spreads.append(spread))


def load_role(name: str, path: str) -> Callable[[Complete | None], Any]:
    """A class of the user's own, from `package.module:Class`; modules in the working directory are found too.

    Raises:
      UserError: there is no such class, or it lacks a method of the role.
    """
    key = f"environment.{name}.implementation"
    module, _, attribute = path.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # as under `python -m`, for the console commands
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"`{key}` is {path!r}, which cannot be imported: {error}") from error
    for method in _METHODS[name]:
        if not asyncio.iscoroutinefunction(getattr(found, method, None)):
            raise UserError(
                f"`{key}` is {path!r}, which has no `async def {method}`; see "
                f"mapo_jax/environment/{'judge' if name == HELD_OUT else name}.py"
            )
    return found


def _share(environment: EnvironmentConfig, count: int) -> EnvironmentConfig:
    """One of several processes' share of what is limited for all together; at least 1 of each."""

    def part(limit: int) -> int:
        return limit and max(1, limit // count)  # no limit stays none

    limits = ("requests_per_minute", "tokens_per_minute")
    changes = {
        f"{name}.{limit}": part(getattr(getattr(environment, name), limit))
        for name in (*ROLES, HELD_OUT)
        for limit in limits
    }
    return updated(environment, {"concurrency": part(environment.concurrency), **changes})


def _connect(
    roles: Sequence[RoleConfig], environment: EnvironmentConfig, runner: asyncio.Runner, stack: ExitStack
) -> dict[str | None, Connections]:
    """Connections to the servers that roles ask, by URL; roles of one server share them."""
    urls = dict.fromkeys(role.url for role in roles if role.model and not role.model.startswith(ENGINE))
    if not urls:
        return {}
    from mapo_jax.environment.live.client import Connections  # half a second of imports for live worlds alone

    allow_connections(len(urls) * environment.concurrency, "environment.concurrency")
    servers = {}
    for url in urls:
        servers[url] = connections = Connections(
            url, concurrency=environment.concurrency, call_seconds=environment.call_seconds
        )
        stack.callback(lambda connections=connections: runner.run(connections.close()))
    return servers


def _server(
    name: str, role: RoleConfig, environment: EnvironmentConfig, connections: Connections, log: CallLog
) -> Server:
    from mapo_jax.environment.live.client import Server

    key = None
    if role.key_variable is not None:
        try:
            key = read_key(role.key_variable)
        except UserError as error:
            raise UserError(f"`environment.{name}.key_variable`: {error}") from None
        if key is None:
            raise UserError(
                f"`environment.{name}.key_variable` names the environment variable {role.key_variable}, "
                "which is empty or not set; put the server's key there"
            )

    def attempted(seconds: float | None, failure: str | None) -> None:
        tally = log[name]
        if seconds is None:
            tally.lost_attempts += 1
        else:
            tally.seconds.append(seconds)

    return Server(
        role,
        key=key,
        call_seconds=environment.call_seconds,
        connections=connections,
        on_attempt=attempted,
    )


async def _ready(name: str, role: RoleConfig, server: Server) -> None:
    from mapo_jax.environment.live.client import CallFailed

    try:
        await server([{"role": "user", "content": "Answer with one word: ready"}], seed=0, schema=None)
    except CallFailed as failure:
        if failure.answered:
            return  # it talks, perhaps too long for max_tokens: that is for its calls to find out
        raise UserError(
            f"the {name}'s server at {role.url} does not serve {role.model!r} ({failure}); check "
            f"environment.{name}.url, .model and .key_variable"
        ) from None


def _engine_call(
    name: str,
    role: RoleConfig,
    engines: dict[Any, EngineModel],
    config: Config,
    mesh: Mesh | None,
    log: CallLog,
) -> Callable[..., Awaitable[Any]]:
    """A frozen model on our own engine; roles of one model and temperature share it."""
    options = {"slots": _ENGINE_SLOTS, "tokens": _ENGINE_TOKENS} | role.extra_body
    surplus = sorted(set(options) - {"slots", "tokens"})
    if surplus or not all(isinstance(value, int) and value > 0 for value in options.values()):
        raise UserError(
            f"`extra_body` of {role.model} is {role.extra_body}; an engine takes slots and tokens there, "
            "whole numbers above 0"
        )
    identity = (role.model, role.temperature, options["slots"], options["tokens"])
    if identity not in engines:
        roles = (getattr(config.environment, each) for each in (*ROLES, HELD_OUT))
        longest = max(each.max_tokens for each in roles if each.model == role.model)
        try:
            rollout = RolloutConfig(max_tokens=options["tokens"])
            policy, params = load_policy(role.model.removeprefix(ENGINE), rollout, mesh=mesh)
            engine = Engine(
                policy.config,
                slots=options["slots"],
                length=options["tokens"],
                sampling=Sampling(temperature=role.temperature),
                max_reply_tokens=longest,
                stop_ids=policy.chat.stop_ids,
                vocabulary_size=policy.chat.vocabulary_size,
                dtype=config.model.dtype,
                mesh=mesh,
            )
        except UserError as error:
            raise UserError(_in_terms_of_role(str(error), name)) from error
        engine.load(params, 0)
        engines[identity] = EngineModel(engine, policy.chat)
    model = engines[identity]

    async def call(messages: Messages, *, seed: int, schema: Mapping[str, Any] | None) -> Completion:
        started = time.monotonic()
        completion = await model(messages, seed=seed, schema=schema, max_tokens=role.max_tokens)
        log[name].seconds.append(time.monotonic() - started)
        return completion

    return call


def _in_terms_of_role(message: str, name: str) -> str:
    """What the engine says about the policy's keys, said about those that a role's engine is made from."""
    for key, own in (
        ("rollout.max_reply_tokens", "max_tokens"),
        ("rollout.max_tokens", "extra_body.tokens"),
        ("rollout.slots", "extra_body.slots"),
    ):
        message = message.replace(key, f"environment.{name}.{own}")
    return message


async def _watched(work: Awaitable[T], check: Callable[[], None]) -> T:
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_CHECK_SECONDS))[0]:
            check()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _sleep(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(_CHECK_SECONDS, left))
