"""Who is evaluated: a model folder, a run's checkpoint, or an endpoint, as the options say."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mapo_jax.commands import printable
from mapo_jax.config import HELD_OUT, ROLES, Config, load_config
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Answerer
from mapo_jax.evaluation.endpoint import Endpoint, only_model
from mapo_jax.evaluation.local import EngineAnswerer, LocalModel, load_model
from mapo_jax.files import encodable
from mapo_jax.model.peft import base_folder, is_adapter
from mapo_jax.running.policy import MODEL_FOLDER
from mapo_jax.running.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, checkpoint_folder


@dataclass(frozen=True)
class Subject:
    """A model under evaluation, not loaded yet."""

    name: str  # in tables and scores
    identity: dict[str, Any]  # what saved answers are tied to
    home: Path  # below which results go by default
    suffix: str  # of the default folder's name
    config: Config
    path: str | None  # of a local model
    step: int | None
    endpoint: str | None
    unused_world: str | None = None  # the live roles that a run's own configuration names, where not trusted

    def output(self, benchmark: str) -> Path:
        """Where results go by default."""
        return self.home / f"{benchmark}{self.suffix}"

    def load(self) -> LocalModel:
        """A local model. Raises UserError as `load_model` does."""
        assert self.path is not None, "an endpoint is not loaded"
        return load_model(self.path, self.config, step=self.step)

    def reached(self, options: argparse.Namespace, *, temperature: float, max_tokens: int) -> Endpoint:
        """An endpoint."""
        assert self.endpoint is not None, "a local model has no endpoint"
        return Endpoint(
            self.endpoint,
            self.identity["model"],
            temperature=temperature,
            max_tokens=max_tokens,
            seed=options.seed,
            concurrency=options.concurrency,
            timeout=options.timeout,
        )

    def answerer(
        self, options: argparse.Namespace, console: Console, *, temperature: float, max_tokens: int
    ) -> Answerer:
        """What answers prompts."""
        if self.endpoint is not None:
            return self.reached(options, temperature=temperature, max_tokens=max_tokens)
        return EngineAnswerer(
            self.load(), temperature, max_tokens, options.seed, console, slots=options.concurrency
        )


def find_subject(options: argparse.Namespace, defaults: tuple[str, ...] = ()) -> Subject:
    """The model that the options name.

    Args:
      options: `model` and `step`, or `endpoint` and `endpoint_model`; `config` and `overrides`.
      defaults: overrides that hold where no file says otherwise.

    Raises:
      UserError: no such folder, run or step, an endpoint that does not answer, or a bad configuration.
    """
    if options.trust_run_world and not (
        options.model is not None and (Path(options.model) / CHECKPOINTS_FOLDER).is_dir()
    ):
        raise UserError(f"{TRUST} is for --model RUN, whose own configuration it trusts; leave it out")
    if options.endpoint is not None:
        config = load_config(options.config, (*(() if options.config else defaults), *options.overrides))
        name = options.endpoint_model or only_model(options.endpoint)
        identity = {"endpoint": options.endpoint, "model": name}
        home = Path("evaluations") / _folder_name(name)
        return Subject(name, identity, home, "", config, None, None, options.endpoint)
    path = Path(options.model)
    if not path.is_dir():
        raise UserError(f"there is no model folder or run {path}")
    identity = {"model": str(path.resolve())}
    if not (path / CHECKPOINTS_FOLDER).is_dir():
        if is_adapter(path):
            identity["base"] = str(base_folder(path).resolve())
        elif not (path / "config.json").is_file():
            raise UserError(f"{path} is neither a Hugging Face model folder (no config.json) nor a run")
        if options.step is not None:
            raise UserError(
                f"{path} is no run, so it has no checkpoint of step {options.step}; leave out --step"
            )
        config = load_config(options.config, (*(() if options.config else defaults), *options.overrides))
        name = path.resolve().name
        return Subject(name, identity, Path("evaluations") / name, "", config, str(path), None, None)
    own = path / CONFIG_FILE
    if not own.is_file():
        raise UserError(f"the run {path} is half written: it has no {CONFIG_FILE}")
    if not (path / MODEL_FOLDER / "config.json").is_file():
        raise UserError(f"the run {path} is half written: it has no {MODEL_FOLDER}/config.json")
    config, unused_world = _run_config(own, options)
    step = int(checkpoint_folder(path, options.step).name)
    name, suffix = f"{path.resolve().name} step {step}", f"_step_{step:06d}"
    return Subject(
        name,
        identity | {"step": step},
        path / "evaluations",
        suffix,
        config,
        str(path),
        step,
        None,
        unused_world,
    )


def _folder_name(model: str) -> str:
    """A model's name, which a server chose, as that of a folder right here."""
    name = printable(encodable(model)).strip("/").replace("/", "_").replace("\n", "_")[:100]
    return name if name.strip(".") else "_"


TRUST = "--trust-run-world"

# Of a run's own configuration, which may be somebody else's: who plays the world would be sent requests and
# keys, or be imported; a folder of compiled programs holds machine code.
_ROLE_KEYS = tuple(f"environment.{role}" for role in (*ROLES, HELD_OUT))
_CODE_KEYS = ("run.compilation_cache",)


def _run_config(own: Path, options: argparse.Namespace) -> tuple[Config, str | None]:
    """The configuration for a run, and who plays its live world, where they are not asked.

    What `--config` names is the user's word. Of the run's own file live roles count only under
    `--trust-run-world`.
    """
    if options.config is not None:
        if options.trust_run_world:
            raise UserError(
                f"--config names the configuration, so {TRUST} has no effect; leave one of them out"
            )
        return load_config(options.config, options.overrides), None
    if options.trust_run_world:
        return load_config(own, options.overrides, without=_CODE_KEYS), None
    roles = _live_roles(load_config(own, without=_CODE_KEYS))
    if roles is None:
        return load_config(own, options.overrides, without=(*_CODE_KEYS, *_ROLE_KEYS)), None
    without = (*_CODE_KEYS, *_ROLE_KEYS, "environment.family")
    try:
        return load_config(own, options.overrides, without=without), roles
    except UserError as error:
        if not any(override.startswith("environment.") for override in options.overrides):
            raise
        raise UserError(f"{error} (those that {own} names count only with {TRUST})") from error


def _live_roles(config: Config) -> str | None:
    """Who plays the live world of a configuration; None for the scripted one."""
    if config.environment.family != "live":
        return None
    named = []
    for name in (*ROLES, HELD_OUT):
        role = getattr(config.environment, name)
        if who := role.implementation or role.model:
            where = f" at {role.url}" if role.url else ""
            named.append(f"{name.replace('_', ' ')} {who}{where}")
    return ", ".join(named)


def add_options(parser: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup) -> None:
    """The options that `find_subject` and `Subject` read; `source` takes those that exclude each other."""
    source.add_argument(
        "--model", metavar="FOLDER|RUN", help="Hugging Face folder, PEFT adapters, or a run's folder"
    )
    source.add_argument(
        "--endpoint", metavar="URL", help="OpenAI-compatible server, such as http://HOST:PORT/v1"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="of a run: which checkpoint (default: the latest)"
    )
    parser.add_argument("--endpoint-model", metavar="NAME", help="which of the server's models")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for a call (default: 120)")
    parser.add_argument(
        "--concurrency", type=int, default=32, metavar="N", help="prompts or calls at once (default: 32)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling; 0 is greedy")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--output", metavar="FOLDER", help="for answers and scores; the same one goes on")
    parser.add_argument(
        "--config", metavar="FILE", help="configuration (default: a run's own, else the defaults)"
    )
    parser.set_defaults(trust_run_world=False)  # only where a world is needed there is the option
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.dtype=bfloat16")
