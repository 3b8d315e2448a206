"""The language models that play a live world's roles: servers, local engines, and custom classes."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from mapo_jax.config import ENGINE, HELD_OUT, ROLES, Config, EnvironmentConfig, RoleConfig, RolloutConfig
from mapo_jax.environment.live.call_cache import CACHE_FILE, CallCache
from mapo_jax.environment.live.calls import FAILURES_FILE, Caller, CallLog, Complete
from mapo_jax.environment.live.director import LiveDirector
from mapo_jax.environment.live.judge import LiveJudge
from mapo_jax.environment.live.keys import read_key
from mapo_jax.environment.live.limits import allow_connections
from mapo_jax.environment.live.user import LiveUser
from mapo_jax.environment.roles import Completion, Messages, Schema
from mapo_jax.errors import UserError
from mapo_jax.files import part_of
from mapo_jax.model.qwen import QwenConfig
from mapo_jax.model.sharding import make_mesh
from mapo_jax.rollout.completion import EngineModel, RoleEngine, role_engine
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.running.loop import LoopThread
from mapo_jax.running.policy import check_policy, load_policy, read_shape

if TYPE_CHECKING:
    from mapo_jax.environment.live.client import Connections, Server

_METHODS = {"user": ("open", "reply"), "judge": ("score",), "director": ("act",), HELD_OUT: ("score",)}


@contextmanager
def open_models(
    config: Config,
    folder: Path | None,
    mesh: Mesh | None,
    runner: asyncio.Runner | LoopThread,
    names: Sequence[str],
    *,
    part: str = "",
) -> Iterator[tuple[dict[str, Caller | None], CallLog]]:
    """Opens the models of the named roles, and sends each server a first request.

    Args:
      folder: local folder of the list of failures; None for none.
      mesh: where the engines of this process go.
      names: roles.
      part: `files.part_name`, for the files of one of several processes.

    Yields:
      Each role's `complete` (None where no model is named), and the log of calls.

    Raises:
      UserError: a server does not answer or refuses the key, or a model folder cannot be used.
    """
    environment = config.environment
    roles = {name: role for name in names if (role := getattr(environment, name)).model is not None}
    remote = {name: role for name, role in roles.items() if role_engine(role) is None}
    with ExitStack() as stack:
        log = CallLog(None if folder is None else part_of(folder / FAILURES_FILE, part))
        connections = _connect(remote.values(), environment, runner, stack)
        calls: dict[str, Callable[..., Awaitable[Any]]] = {}
        for name, role in remote.items():  # checks every key before the first request
            calls[name] = _server(name, role, environment, connections[role.url], log)
        engines: dict[RoleEngine, EngineModel] = {}
        for name, role in roles.items():
            if name in remote:
                runner.run(_check_server(name, role, calls[name]))
            else:
                calls[name] = _engine_call(name, engines, config, mesh, log)
        callers: dict[str, Caller | None] = dict.fromkeys(names)
        for name, role in roles.items():
            keys = ("model", "temperature", "max_tokens", "extra_body")
            settings = {key: getattr(role, key) for key in keys}
            callers[name] = Caller(name, calls[name], settings, log)
        log.drain()  # the first requests belong to no step
        yield callers, log


@contextmanager
def keep_calls(callers: Mapping[str, Caller | None], folder: Path | None, part: str = "") -> Iterator[None]:
    """Opens the folder's cache of calls for the callers.

    After the roles are made: a run that cannot start leaves its folder unchanged.
    """
    if folder is None:
        yield
        return
    cache = CallCache(part_of(folder / CACHE_FILE, part))
    for caller in callers.values():
        if caller is not None:
            caller.cache = cache
    with closing(cache):
        yield


def make_role(name: str, config: Config, callers: Mapping[str, Complete | None], log: CallLog) -> Any:
    """A role of a live world: the configured class, or the one of this package.

    Raises:
      UserError: the configured class cannot be imported or made, or lacks a method of the role.
    """
    role, complete = getattr(config.environment, name), callers[name]
    if role.implementation is not None:
        cls = _load_class(name, role.implementation)
        try:
            return cls(complete)
        except UserError:
            raise
        except Exception as error:
            raise _own_class_error(name, role.implementation, "cannot be made", error) from error
    if name == "user":
        return LiveUser(complete)
    if name == "director":
        return LiveDirector(complete, config.rollout.max_turns)
    return LiveJudge(complete, role.samples, lambda spread: log[name].spreads.append(spread))


def check_roles(config: Config, names: Sequence[str]) -> None:
    """Makes the named roles as a run does, but without a request to a server and without an engine's weights.

    Raises:
      UserError: as `open_models` and `make_role`.
    """

    async def complete(*arguments: Any, **options: Any) -> str:
        raise AssertionError("a dry run asks no model")

    for name in names:
        role = getattr(config.environment, name)
        if (engine := role_engine(role)) is not None:
            try:
                check_policy(engine.folder, RolloutConfig(max_tokens=engine.tokens))
                model = read_shape(engine.folder)
                _make_engine(engine, model, (0,), model.vocab_size, config, make_mesh(config.mesh))
            except UserError as error:
                raise UserError(_with_role_keys(str(error), name)) from error
        elif role.model is not None:
            _server_key(name, role)
        make_role(name, config, {name: role.model and complete}, CallLog())


def _load_class(name: str, path: str) -> Callable[[Complete | None], Any]:
    """The class `package.module:Class`; modules in the working directory can be imported too."""
    key = f"environment.{name}.implementation"
    module, _, attribute = path.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # as `python -m` has it; console commands do not
        sys.path.append(os.getcwd())
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does
        raise _own_class_error(name, path, "cannot be imported", error) from error
    for method in _METHODS[name]:
        if not asyncio.iscoroutinefunction(getattr(cls, method, None)):
            raise UserError(
                f"`{key}` is {path!r}, which has no `async def {method}`; see mapo_jax/environment/roles.py"
            )
    return cls


def _own_class_error(name: str, path: str, what: str, error: Exception) -> UserError:
    return UserError(
        f"`environment.{name}.implementation` is {path!r}, which {what}: {type(error).__name__}: {error}"
    )


def _connect(
    roles: Iterable[RoleConfig],
    environment: EnvironmentConfig,
    runner: asyncio.Runner | LoopThread,
    stack: ExitStack,
) -> dict[str | None, Connections]:
    """Connections to the roles' servers by URL; roles with one server share them."""
    urls = dict.fromkeys(role.url for role in roles)
    if not urls:
        return {}
    from mapo_jax.environment.live.client import Connections  # half a second of imports, for servers only

    allow_connections(len(urls) * environment.concurrency, "environment.concurrency")
    limits = dict(concurrency=environment.concurrency, call_seconds=environment.call_seconds)
    servers = {}
    for url in urls:
        servers[url] = connections = Connections(url, **limits)
        stack.callback(lambda connections=connections: runner.run(connections.aclose()))
    return servers


def _server(
    name: str, role: RoleConfig, environment: EnvironmentConfig, connections: Connections, log: CallLog
) -> Server:
    from mapo_jax.environment.live.client import Server

    key = _server_key(name, role)

    def count_attempt(seconds: float | None, failure: str | None) -> None:
        if seconds is None:
            log[name].lost_attempts += 1
        else:
            log[name].seconds.append(seconds)

    seconds = environment.call_seconds
    return Server(role, connections, key=key, call_seconds=seconds, on_attempt=count_attempt)


def _server_key(name: str, role: RoleConfig) -> str | None:
    if role.key_variable is None:
        return None
    try:
        key = read_key(role.key_variable)
    except UserError as error:
        raise UserError(f"`environment.{name}.key_variable`: {error}") from None
    if key is None:
        raise UserError(
            f"`environment.{name}.key_variable` names the environment variable {role.key_variable}, "
            "which is empty or not set; put the server's key there"
        )
    return key


async def _check_server(name: str, role: RoleConfig, server: Server) -> None:
    from mapo_jax.environment.live.client import CallFailed

    try:
        await server([{"role": "user", "content": "Answer with one word: ready"}], seed=0, schema=None)
    except CallFailed as failure:
        if failure.answered:
            return  # the server works; the answer may be longer than max_tokens, which calls will report
        raise UserError(
            f"the {name}'s server at {role.url} does not serve {role.model!r} ({failure}); check "
            f"environment.{name}.url, .model and .key_variable"
        ) from None


def _engine_call(
    name: str, engines: dict[RoleEngine, EngineModel], config: Config, mesh: Mesh | None, log: CallLog
) -> Callable[..., Awaitable[Any]]:
    """Calls a frozen model on an engine of this process; roles of one model and temperature share it."""
    role = getattr(config.environment, name)
    made_of = role_engine(role)
    if made_of not in engines:
        try:
            rollout, dtype = RolloutConfig(max_tokens=made_of.tokens), config.model.dtype
            policy, params = load_policy(made_of.folder, rollout, mesh=mesh, dtype=dtype)
            chat = policy.chat
            engine = _make_engine(made_of, policy.config, chat.stop_ids, chat.vocabulary_size, config, mesh)
        except UserError as error:
            raise UserError(_with_role_keys(str(error), name)) from error
        engine.load(params, 0)
        engines[made_of] = EngineModel(engine, policy.chat)
    model = engines[made_of]

    async def call(messages: Messages, *, seed: int, schema: Schema | None) -> Completion:
        started = time.monotonic()
        completion = await model(messages, seed=seed, schema=schema, max_tokens=role.max_tokens)
        log[name].seconds.append(time.monotonic() - started)
        return completion

    return call


def _make_engine(
    made_of: RoleEngine,
    model: QwenConfig,
    stop_ids: Sequence[int],
    vocabulary_size: int,
    config: Config,
    mesh: Mesh | None,
) -> Engine:
    """The engine, without weights, for the longest answers of the roles that have its model."""
    roles = (getattr(config.environment, name) for name in (*ROLES, HELD_OUT))
    return Engine(
        model,
        slots=made_of.slots,
        length=made_of.tokens,
        sampling=Sampling(temperature=made_of.temperature),
        max_reply_tokens=max(role.max_tokens for role in roles if role.model == ENGINE + made_of.folder),
        stop_ids=stop_ids,
        vocabulary_size=vocabulary_size,
        dtype=config.model.dtype,
        mesh=mesh,
    )


def _with_role_keys(message: str, name: str) -> str:
    """An engine's error message with the keys of the role in place of the policy's."""
    for policy_key, role_key in (
        ("rollout.max_reply_tokens", "max_tokens"),
        ("rollout.max_tokens", "extra_body.tokens"),
        ("rollout.slots", "extra_body.slots"),
    ):
        message = message.replace(policy_key, f"environment.{name}.{role_key}")
    return message
