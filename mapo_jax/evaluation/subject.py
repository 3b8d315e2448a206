"""The model under evaluation: a model folder, a run's checkpoint, or an endpoint."""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mapo_jax.commands import printable
from mapo_jax.config import HELD_OUT, ROLES, SERVER_URL, Config, load_config, played_roles
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Answerer
from mapo_jax.evaluation.endpoint import KEY, Endpoint, only_model
from mapo_jax.evaluation.local import EngineAnswerer, LocalModel, load_model
from mapo_jax.files import encodable
from mapo_jax.hub import fetch, hub_id
from mapo_jax.model.peft import base_folder, is_adapter
from mapo_jax.running.policy import MODEL_FOLDER
from mapo_jax.running.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, checkpoint_folder, step_option


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, not loaded yet."""

    name: str  # in tables and scores
    identity: dict[str, Any]  # identifies the model in the settings of saved answers
    home: Path  # default folder of results
    config: Config
    suffix: str = ""  # of the default folder's name
    path: str | None = None  # of a local model
    step: int | None = None
    endpoint: str | None = None
    unused_world: str | None = None  # the live roles in a run's own configuration, if it is not trusted

    def output(self, benchmark: str) -> Path:
        """The default folder of a benchmark's results."""
        return self.home / f"{benchmark}{self.suffix}"

    def load(self) -> LocalModel:
        """Loads a local model. Raises UserError as `load_model` does."""
        assert self.path is not None, "an endpoint is not loaded"
        return load_model(self.path, self.config, step=self.step)

    def connection(self, options: argparse.Namespace, temperature: float, max_tokens: int) -> Endpoint:
        """The endpoint with its sampling settings."""
        assert self.endpoint is not None, "a local model has no endpoint"
        sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": options.seed}
        calls = {"concurrency": options.concurrency, "timeout": options.timeout}
        return Endpoint(self.endpoint, self.identity["model"], **sampling, **calls)

    def answerer(
        self, options: argparse.Namespace, console: Console, temperature: float, max_tokens: int
    ) -> Answerer:
        """Answers prompts, whatever kind of model it is."""
        if self.endpoint is not None:
            return self.connection(options, temperature, max_tokens)
        model, slots = self.load(), options.concurrency
        return EngineAnswerer(model, temperature, max_tokens, options.seed, console, slots=slots)


def find_subject(options: argparse.Namespace, defaults: tuple[str, ...] = ()) -> Subject:
    """The model that the options name.

    Args:
      options: `model` and `step`, or `endpoint` and `endpoint_model`; `config` and `overrides`.
      defaults: overrides of the defaults; a configuration file takes precedence.

    Raises:
      UserError: no such folder, run or step, an endpoint that does not answer, or a bad configuration.
    """
    run = options.endpoint is None and (Path(options.model) / CHECKPOINTS_FOLDER).is_dir()
    if options.trust_run_world and not run:
        raise UserError(f"{TRUST} is for --model RUN, whose own configuration it trusts; leave it out")
    if run:
        return _run_subject(Path(options.model), options)
    overrides = options.overrides if options.config else (*defaults, *options.overrides)
    if options.endpoint is not None:
        if not re.fullmatch(SERVER_URL, options.endpoint):
            raise UserError(  # without the value, which may hold a key
                "`--endpoint` must be the http(s) address of an OpenAI-compatible server, such as "
                f"http://HOST:PORT/v1, without user, password or query (its key belongs in {KEY})"
            )
        config = load_config(options.config, overrides)
        name = options.endpoint_model or only_model(options.endpoint)
        identity = {"endpoint": options.endpoint, "model": name}
        home = Path("evaluations") / _folder_name(name)
        return Subject(name, identity, home, config, endpoint=options.endpoint)
    model = hub_id(options.model)
    if model is None and not Path(options.model).is_dir():
        raise UserError(f"there is no model folder or run {options.model}")
    if options.step is not None:
        raise UserError(
            f"{options.model} is no run, so it has no checkpoint of step {options.step}; leave out --step"
        )
    config, path = load_config(options.config, overrides), Path(fetch(options.model))
    identity = {"model": str(path.resolve())}
    if model is not None:
        identity = {"model": model.repo, "commit": path.name}
    if is_adapter(path):
        identity["base"] = str(base_folder(path).resolve())
    elif not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a Hugging Face model folder (no config.json) nor a run")
    name = path.resolve().name if model is None else model.name
    return Subject(name, identity, Path("evaluations") / name, config, path=str(path))


def _run_subject(path: Path, options: argparse.Namespace) -> Subject:
    for file in (CONFIG_FILE, f"{MODEL_FOLDER}/config.json"):
        if not (path / file).is_file():
            raise UserError(f"the run {path} is half written: it has no {file}")
    config, unused_world = _run_config(path / CONFIG_FILE, options)
    step = int(checkpoint_folder(path, options.step).name)
    name, suffix = f"{path.resolve().name} step {step}", f"_step_{step:06d}"
    identity = {"model": str(path.resolve()), "step": step}
    home = path / "evaluations"
    return Subject(name, identity, home, config, suffix, str(path), step, unused_world=unused_world)


def _folder_name(model: str) -> str:
    """A model's name, which a server chose, as the name of one folder."""
    name = printable(encodable(model)).strip("/").replace("/", "_").replace("\n", "_")[:100]
    return name if name.strip(".") else "_"


TRUST = "--trust-run-world"

# Keys of a run's own configuration that are not trusted, as somebody else may have written it: servers would
# get requests and keys, classes would be imported; a folder of compiled programs holds machine code.
_ROLE_KEYS = tuple(f"environment.{role}" for role in (*ROLES, HELD_OUT))
_CODE_KEYS = ("run.compilation_cache",)


def _run_config(file: Path, options: argparse.Namespace) -> tuple[Config, str | None]:
    """The configuration for a run, and the live roles in its own file that are not used.

    A file given by `--config` is trusted. Live roles in the run's own file are used only with
    `--trust-run-world`.
    """
    if options.config is not None:
        if options.trust_run_world:
            raise UserError(f"--config names the configuration, so {TRUST} has no effect; leave one out")
        return load_config(options.config, options.overrides), None
    if options.trust_run_world:
        return load_config(file, options.overrides, without=_CODE_KEYS), None
    roles = _live_roles(load_config(file, without=_CODE_KEYS))
    without = (*_CODE_KEYS, *_ROLE_KEYS, *(["environment.family"] if roles else []))
    try:
        return load_config(file, options.overrides, without=without), roles
    except UserError as error:
        if roles is None or not any(override.startswith("environment.") for override in options.overrides):
            raise
        raise UserError(f"{error} (those that {file} names count only with {TRUST})") from error


def _live_roles(config: Config) -> str | None:
    """The roles of a configuration that models or classes play; None in the scripted world."""
    played = played_roles(config.environment)
    if not played:
        return None
    roles = {name.replace("_", " "): getattr(config.environment, name) for name in played}
    return ", ".join(
        f"{name} {player}" + (f" at {role.url}" if role.url else "")
        for name, role in roles.items()
        if (player := role.implementation or role.model)
    )


_LEAST = {"timeout": 0.01, "concurrency": 1, "temperature": 0, "max_tokens": 1, "seed": 0, "worst": 0}


def check_numbers(options: argparse.Namespace) -> None:
    """Raises UserError for a number of the command line that is out of bounds."""
    for name, least in _LEAST.items():
        value = vars(options).get(name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"`--{name.replace('_', '-')}` is {value}; it must be at least {least}")


# Options of `add_options` and of the benchmarks that only one source of answers, or only a model, has.
_IDLE = {"model": ("endpoint_model", "timeout"), "endpoint": ("step",)}
_IDLE_SAVED = (
    *("step", "endpoint_model", "timeout", "concurrency", "temperature", "max_tokens", "protocol"),
    *("split", "cards", "trust_run_world", "output", "config", "overrides"),
)


def refuse_idle_options(options: argparse.Namespace) -> None:
    """Raises UserError for an option, or settings, that have no effect with the source of the answers.

    `options.default` gives the default of an option.
    """
    given = vars(options)
    source = next((name for name in (*_IDLE, "answers", "trajectories") if given.get(name)), None)
    for name in _IDLE.get(source, _IDLE_SAVED) if source else ():
        if given.get(name) not in (None, [], options.default(name)):
            word = "key=value" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise UserError(f"{word} has no effect with --{source}; leave it out")


def add_step(option: Callable[..., Any]) -> None:
    """Adds `--step` with `parser.add_argument`."""
    which = "of a run: which checkpoint (default: the latest; best: by validation)"
    option("--step", type=step_option, metavar="N|best", help=which)


def add_options(parser: argparse.ArgumentParser, saved: str, help: str) -> None:
    """Adds the options that `find_subject` and `Subject` read, and `saved`, the one for saved results."""
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source(saved, metavar="FILE", help=help)
    model = "Hugging Face folder or id (ORG/NAME[@REVISION]), PEFT adapters, or a run's folder"
    source("--model", metavar="FOLDER|ID|RUN", help=model)
    source("--endpoint", metavar="URL", help="OpenAI-compatible server, such as http://HOST:PORT/v1")
    option = parser.add_argument
    add_step(option)
    option("--endpoint-model", metavar="NAME", help="which of the server's models")
    option("--timeout", type=float, default=120.0, metavar="S", help="of a call (default: 120)")
    option("--concurrency", type=int, default=32, metavar="N", help="prompts or calls at once (default: 32)")
    option("--temperature", type=float, metavar="T", help="of sampling; 0 is greedy")
    option("--max-tokens", type=int, metavar="N", help="maximum tokens of an answer")
    parser.set_defaults(trust_run_world=False)  # an option only where a world is needed
