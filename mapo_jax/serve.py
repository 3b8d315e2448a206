"""Serves a policy to OpenAI's clients and, at `/`, to a browser.

    python -m mapo_jax.serve --model FOLDER|ID|RUN [--port 8000] [--conversations FOLDER]

It listens at 127.0.0.1 unless --host says otherwise, and then only with a key. SIGTERM or Ctrl-C ends it when
the replies under way have been sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import math
import signal
import socket
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from mapo_jax.chat_log import ChatLog
from mapo_jax.commands import command_parser, exit_now, prepare_jax, printable, run_command, show
from mapo_jax.environment.live.keys import read_key
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.evaluation.local import load_model
from mapo_jax.evaluation.subject import Subject, add_step, find_subject
from mapo_jax.idle import refuse_unread, show_unread
from mapo_jax.rollout.engine import Engine

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from mapo_jax.serving.app import Service
    from mapo_jax.serving.served import ServedModel

NO_LIMIT_TOKENS = 4096  # cache of a conversation with a model that is no run, if its positions allow
SLOTS_PER_STREAM = 4  # conversations that keep their cache, for each reply at once
STALL_MILLISECONDS = 60_000  # until a connection whose client takes nothing is closed
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, or a request meets one that is closing
HTTP_ONLY = (
    "name", "adapter", "admin_key_variable", "conversations", "max_messages", "requests_per_minute",
)  # fmt: skip
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


def load_served(name: str, options: Namespace, subject: Subject | None = None) -> ServedModel:
    """Loads a model and compiles its programs, so that no request waits for that.

    Raises:
      UserError: as `find_subject` and `load_model`, or sizes that do not fit.
    """
    from mapo_jax.serving.served import ServedModel

    subject = subject or find_subject(options)
    config, model = subject.config, load_model(subject.path, subject.config, step=subject.step)
    positions = model.policy.config.max_position_embeddings
    is_run = subject.step is not None
    length = options.max_tokens or min(config.rollout.max_tokens if is_run else NO_LIMIT_TOKENS, positions)
    engine = Engine(
        model.policy.config,
        slots=SLOTS_PER_STREAM * options.streams,
        resident=options.streams,
        length=length,
        max_reply_tokens=length - 1,
        stop_ids=model.policy.chat.stop_ids,
        vocabulary_size=model.policy.chat.vocabulary_size,
        per_request=True,
        block=options.block,
        dtype=model.dtype,
        mesh=model.mesh,
    )
    engine.load(model.params, 0)
    engine.warm_up()
    limit = options.max_reply_tokens or (config.rollout.max_reply_tokens if is_run else None)
    return ServedModel(name, engine, model.policy.chat, source=subject.name, reply_tokens=limit)


def run(options: Namespace, console: Console) -> None:
    """Loads the models and serves them until a signal."""
    grpc = options.protocol == "jetstream"
    try:
        from mapo_jax.serving.app import Service, make_app
        from mapo_jax.serving.limits import Limits

        if grpc:
            from mapo_jax.serving.jetstream import serve_jetstream
    except ImportError as error:
        name = "jetstream" if grpc else "serve"
        needed = f"`pip install -r requirements-{name}.txt`" + (
            "" if grpc else ", or the extra mapo_jax[serve]"
        )
        raise UserError(f"serving needs the package {error.name}; {needed}") from error
    for name in HTTP_ONLY if grpc else ():
        if getattr(options, name) != _parser().get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with JetStream; leave it out")
    refuse_unread("serve", options.overrides)
    key, admin_key = (
        _key(variable, option)
        for variable, option in (
            (options.key_variable, "--key-variable"),
            (options.admin_key_variable, "--admin-key-variable"),
        )
    )
    local = _is_local(options.host)
    if not local and key is None:
        raise UserError(
            f"--host {options.host} lets others in; name the environment variable of a key that they must "
            "have with --key-variable, or leave --host out"
        )
    limits = Limits(
        body_bytes=options.max_body,
        messages=options.max_messages,
        requests_per_minute=options.requests_per_minute,
        waiting=options.queue,
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    listening = _listen(options.host, options.port)
    subject = find_subject(options)
    if subject.step is None:
        show_unread(console, "serve without a run", options.overrides)
    prepare_jax(subject.config.run.compilation_cache)
    if grpc:
        show(console, f"loading {printable(options.model)} and compiling ...")
        served = load_served(subject.name, options, subject)
        address = f"{host}:{listening.getsockname()[1]}"
        listening.close()  # held until now, so that a port in use is told at once
        asyncio.run(serve_jetstream(served, limits, key, address, partial(show, console)))
        show(console, "stopped: every reply under way was sent")
        return
    names = {options.name or subject.name.split()[0]: options.model}
    for adapter in options.adapter:
        name, _, path = adapter.partition("=")
        if not name or not path or name in names:
            raise UserError(f"--adapter {adapter} must be NAME=FOLDER, with a name that is not served yet")
        names[name] = path

    def load(name: str, path: str, step: int | None) -> ServedModel:
        return load_served(name, Namespace(**vars(options) | {"model": path, "step": step}))

    models = {}
    for index, (name, path) in enumerate(names.items()):
        show(console, f"loading {printable(path)} and compiling ...")
        models[name] = load_served(name, options, subject) if index == 0 else load(name, path, None)
    chats = None if options.conversations is None else ChatLog(options.conversations)
    service = Service(
        models,
        limits,
        key=key,
        admin_key=admin_key,
        load=load,
        chats=chats,
        cards=load_scenarios(subject.config.environment.scenarios, scripted=False),
    )
    listening.listen(1024)
    port = listening.getsockname()[1]
    show(console, f"serving {', '.join(models)} at http://{host}:{port}/ (API: http://{host}:{port}/v1)")
    show(
        console,
        "conversations are not kept"
        if chats is None
        else f"conversations and feedback on them are kept in {chats.folder}",
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    app = make_app(service, hosts=() if key else (*LOCAL_NAMES, host.lower()))
    asyncio.run(_serve(app, service, listening))
    show(console, "stopped: every reply under way was sent")


async def _serve(app: Starlette, service: Service, listening: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self):
            return contextlib.nullcontext()  # the handlers below

    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = Server(config)

    def stop(number: signal.Signals) -> None:
        if service.closing:  # a second signal does not wait, not even for a model that is being loaded
            exit_now(128 + number)
        service.closing = server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.serve(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a client that reads nothing would hold up the shutdown
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MILLISECONDS)
        listening.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); choose another --host or --port"
        ) from error
    return listening


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(variable: str | None, option: str) -> str | None:
    if variable is None:
        return None
    try:
        key = read_key(variable)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    if key is None:
        raise UserError(
            f"{option} names the environment variable {variable}, which is empty or not set; set it"
        )
    return key


def _parser() -> argparse.ArgumentParser:
    def number(text: str, least: int, most: float = math.inf) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}")
        return value

    count = partial(number, least=1)
    parser = command_parser("serve", __doc__.split("\n\n")[0].replace("\n", " "))
    option = parser.add_argument
    option(
        "--model",
        required=True,
        metavar="FOLDER|ID|RUN",
        help="Hugging Face folder or id (ORG/NAME[@REVISION]), PEFT adapters, or a run's folder",
    )
    add_step(option)
    option("--protocol", choices=("openai", "jetstream"), default="openai", help="default: openai")
    option("--name", help="of the model in requests (default: its folder's name)")
    option(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER", help="a further model; repeatable"
    )
    option("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    option(
        "--port",
        type=partial(number, least=0, most=65535),
        default=8000,
        help="0: any free one (default: 8000)",
    )
    option("--key-variable", metavar="NAME", help="environment variable of the key that requests must carry")
    option(
        "--admin-key-variable", metavar="NAME", help="environment variable of the key for POST /admin/load"
    )
    option("--conversations", metavar="FOLDER", help="keep conversations and feedback there (default: not)")
    option("--streams", type=count, default=16, metavar="N", help="replies at once (default: 16)")
    option("--max-tokens", type=count, metavar="N", help="of a conversation (default: the run's, or 4096)")
    option("--max-reply-tokens", type=count, metavar="N", help="of a reply whose request sets no limit")
    option("--block", type=count, default=8, metavar="N", help="tokens between two deliveries (default: 8)")
    option("--max-body", type=count, default=2**20, metavar="BYTES", help="of a request (default: 1 MiB)")
    option("--max-messages", type=count, default=200, metavar="N", help="of a request (default: 200)")
    option("--queue", type=count, default=64, metavar="N", help="replies that may wait (default: 64)")
    option(
        "--requests-per-minute",
        type=partial(number, least=0),
        default=0,
        metavar="N",
        help="of one address (default: no limit)",
    )
    option("--config", metavar="FILE|NAME", help="configuration (default: a run's own, else the defaults)")
    option("overrides", nargs="*", metavar="key=value", help="such as model.dtype=bfloat16")
    parser.set_defaults(endpoint=None, endpoint_model=None, trust_run_world=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 after a signal, 2 bad input."""
    options = _parser().parse_intermixed_args(arguments)
    console = Console(highlight=False, markup=False)  # names from outside are not markup
    return run_command(lambda: run(options, console))


if __name__ == "__main__":
    raise SystemExit(main())
