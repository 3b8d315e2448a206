"""The configuration: frozen dataclasses, one doc line per field, read from YAML and `key=value` overrides."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mapo_jax.errors import UserError

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class FreshModelConfig:
    """The small Qwen3 that the warm start builds when `model.path` is empty."""

    vocabulary: int = 4096  # tokens of the byte-level BPE, its special tokens included
    hidden: int = 128  # model width
    intermediate: int = 384  # width of the gated MLP
    layers: int = 3  # transformer blocks
    heads: int = 4  # query heads
    kv_heads: int = 2  # key/value heads
    head_size: int = 32  # width of one head
    rope_theta: float = 10_000.0  # base of the rotary frequencies


@dataclass(frozen=True)
class ModelConfig:
    """Which weights are trained, and how they are computed with."""

    path: str | None = None  # Hugging Face folder or run folder; empty: the small model, warm-started
    dtype: str = "float32"  # compute dtype: float32 or bfloat16 (master weights stay float32)
    remat: str = "none"  # what the backward pass recomputes: none, minimal or block (qwen.REMAT)
    attention: str = "auto"  # over whole rows: auto (by the mesh's platform), xla, splash (TPU), cudnn (GPU)
    fresh: FreshModelConfig = field(default_factory=FreshModelConfig)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained in the place of the weights (`model/lora.py`)."""

    rank: int = 0  # of the adapters; 0: none, all weights are trained
    alpha: float = 32.0  # the low-rank term counts alpha / rank times
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # which maps of every layer


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one axis may be -1 and takes the devices that are left."""

    data: int = 1  # replicas of the weights, each with its own rows
    fsdp: int = -1  # shards of weights, moments and rows
    tensor: int = 1  # shards of heads and MLP width


@dataclass(frozen=True)
class RolloutConfig:
    """How dialogues are held."""

    scenarios: int = 8  # S: scenarios per step
    rollouts: int = 8  # R: dialogues per scenario
    max_turns: int = 8  # T: a dialogue ends here
    min_turns: int = 5  # success and failure end a dialogue from this turn on
    temperature: float = 1.0  # sampling temperature in training
    top_p: float = 1.0  # must stay 1 in training: the trained distribution is the sampled one
    top_k: int = 0  # must stay 0 in training
    max_reply_tokens: int = 32  # a reply longer than this is cut and marked truncated
    max_tokens: int = 448  # longest dialogue in tokens; also the length of the KV cache
    copy_weights: bool | None = None  # sample with a copy, cast once: faster, but held; empty: on a CPU alone
    slots: int | None = None  # KV caches on the device, the others in host memory; empty: all of a step
    lanes: int | None = None  # dialogues that are decoded at once; empty: as many as `slots`
    history: str = "append"  # append: one growing row per dialogue; per_turn: one rendered row per turn
    system_prompt: str | None = None  # first message of every dialogue, if any


@dataclass(frozen=True)
class RoleConfig:
    """Who plays a role of the live world."""

    url: str | None = None  # base URL of an OpenAI-compatible server, such as http://localhost:8000/v1
    model: str | None = None  # the name that the server knows it by, or engine:FOLDER for our own engine
    key_variable: str | None = None  # environment variable with the server's key; the key is written nowhere
    implementation: str | None = None  # a class of your own, package.module:Class; empty: ours
    temperature: float = 1.0  # sampling temperature
    max_tokens: int = 2048  # longest answer, reasoning included
    extra_body: dict[str, Any] = field(default_factory=dict)  # more request fields; engine: slots, tokens
    requests_per_minute: int = 0  # the server's limit; 0: none
    tokens_per_minute: int = 0  # the server's limit, prompts and answers together; 0: none
    prices: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of a million prompt and answer tokens


@dataclass(frozen=True)
class JudgeConfig(RoleConfig):
    """The judge, who may score a reply more than once."""

    samples: int = 1  # judgements per reply; the median of each level counts


@dataclass(frozen=True)
class EnvironmentConfig:
    """The world the policy talks to."""

    family: str = "scripted"  # scripted: offline and deterministic; live: roles played by language models
    scenarios: str | None = None  # folder of cards; empty: the embedded ones
    fault_rate: float = 0.0  # scripted only: share of judge calls that fail, drawn by seed
    delayed_opening: bool = True  # scripted only: an early good reflection opens a stage later
    success_tolerance: float = 0.05  # `a` of the success rule (0.1 in the published result sets)
    max_failed_share: float = 0.5  # a dialogue with a larger share of unscored turns is left out
    concurrency: int = 64  # environment calls under way at once
    user: RoleConfig = field(default_factory=RoleConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    director: RoleConfig = field(default_factory=RoleConfig)
    held_out_judge: JudgeConfig = field(default_factory=JudgeConfig)
    call_seconds: float = 60.0  # live only: longest attempt of a call; a dialogue has twice that a turn
    step_seconds: float = 7200.0  # live only: longest collection; what is unfinished then is left out
    failure_share: float = 0.2  # live only: a larger share of failures in the last 100 calls pauses the run
    pause_minutes: float = 60.0  # live only: pauses, each twice the last, until the run stops


@dataclass(frozen=True)
class AlgorithmConfig:
    """Rewards, returns, advantages, objective."""

    estimator: str = "mapo"  # a name in advantages.ESTIMATORS
    turn_weight: float = 1 / 3  # weight of the turn-level term in the mix; the batch level has the rest
    discount: float = 0.85  # gamma per turn
    reward: str = "incremental"  # incremental, absolute, sum, or potential
    batch_scope: str = "batch"  # statistics of the batch-level term: batch, or group (one scenario)
    leave_one_out: bool = False  # centre the turn level on the mean of the other rollouts
    min_group: int = 2  # fewest scored rollouts for turn-level statistics
    outcome_weight: float = 1.0  # mt_grpo only: weight of the outcome term
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.28  # and above 1 + clip_high
    dual_clip: float = 10.0  # bound of the surrogate for negative advantages
    aggregation: str = "token-mean"  # token-mean, sequence-mean, or constant-length
    old_logprobs: str = "sampler"  # denominator of the ratio: sampler, or trainer (recomputed first)
    importance_cap: float = 2.0  # old_logprobs=trainer only: truncation of the trainer/sampler weight
    kl_coefficient: float = 0.0  # KL to the frozen start weights, in the loss
    kl_estimator: str = "k3"  # k1, k2 or k3
    entropy_coefficient: float = 0.01  # bonus for entropy of the policy


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 5e-4  # peak
    schedule: str = "cosine"  # after the warm-up: cosine (to 0), or constant
    warmup: float = 0.05  # share of the updates with a rising rate
    weight_decay: float = 0.1  # decoupled; not on norms and biases
    gradient_clip: float = 1.0  # largest global norm
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment


@dataclass(frozen=True)
class TrainingConfig:
    """The length of the run and the shape of an update."""

    steps: int = 45  # collect-and-update steps
    seed: int = 0  # everything random follows from it
    minibatch_scenarios: int = 2  # scenarios per optimizer update; divides rollout.scenarios
    microbatch_tokens: int = 1792  # most tokens of a device per pass, a row at least; 0: the whole mini-batch
    epochs: int = 1  # passes over a step's dialogues


@dataclass(frozen=True)
class WarmstartConfig:
    """Supervised training that precedes RL when there is no model yet; cached by its configuration."""

    steps: int = 1150  # optimizer updates
    rows: int = 8  # packed rows per update
    row_tokens: int = 256  # length of a packed row
    turns: int = 3  # dialogues are cut into pieces of so many turns; 0: as many as fit a row
    learning_rate: float = 3e-3  # peak of a cosine schedule with warm-up
    dialogues: int = 3000  # synthetic dialogues when `data` is empty
    data: str | None = None  # JSONL of chats (`messages`); empty: synthetic dialogues of mixed quality
    cache: str | None = None  # folder of finished warm starts; empty: the user's cache folder
    min_naming_ratio: float = 2.0  # gate: naming accuracy must be this many times chance before RL starts


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 10  # steps between checkpoints; before an evaluation and after the last step always
    keep: int = 2  # newest checkpoints kept
    keep_best: int = 1  # and beside them the best ones by validation return


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes besides metrics.jsonl."""

    tensorboard: bool = True  # event files
    wandb: bool = False  # Weights & Biases beside them, if installed
    dialogues_every: int = 1  # steps between files of dialogues
    progress: bool = True  # the live display
    peak_flops: float | None = None  # FLOP/s of a device, for perf/mfu; empty: from a table, or no MFU


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    every: int = 15  # steps between evaluations; before the first and after the last step always
    scenarios: int = 16  # validation cards, from the first
    rollouts: int = 2  # dialogues per card
    temperature: float = 1.0  # sampling temperature


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives."""

    directory: str = "runs/tiny"  # run folder; an existing run of the same configuration continues
    compilation_cache: str | None = None  # folder of compiled programs; empty: the user's cache folder
    deadline_minutes: float = 0.0  # save and stop so long after the start, wherever the run is; 0: never
    join_seconds: float = 300.0  # several processes only: how long to wait for all to have come
    silent_seconds: float = 120.0  # several processes only: who is silent for so long is taken for dead


@dataclass(frozen=True)
class Config:
    """One run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and `key=value` overrides on top of the defaults, and validates the result.

    Args:
      path: YAML file with any subset of the keys; None for `configs/tiny.yaml`'s content, which is the
        defaults of this module.
      overrides: dotted assignments such as `training.steps=20`.

    Raises:
      UserError: an unknown key (the nearest known one is named), a value of the wrong type, a
        combination that cannot work, or a file that cannot be read.
    """
    return _load({} if path is None else _read_yaml(Path(path)), str(path), overrides)


def load_run_config(
    path: str | Path, overrides: Sequence[str] = (), *, without: Sequence[str] = ()
) -> Config:
    """The configuration in a run folder, which may be somebody else's.

    Args:
      path: the run's `config.yaml`.
      overrides: as of `load_config`.
      without: dotted sections and keys of the file that have their defaults instead.

    Raises:
      UserError: as of `load_config`; or the file holds an interpolation (`${...}`), which would read what is
        on this machine, such as its environment variables.
    """
    content = _read_yaml(Path(path))
    _refuse_interpolations(content, str(path))
    for dotted in without:
        *sections, name = dotted.split(".")
        holder: Any = content
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(name, None)
    return _load(content, str(path), overrides)


def _refuse_interpolations(content: dict, source: str) -> None:
    waiting: list[tuple[str, Any]] = [("", content)]
    for number, (key, value) in enumerate(waiting):
        if number > _MOST_VALUES:  # also a file whose aliases hold themselves
            raise UserError(
                f"{source} holds more than {_MOST_VALUES} values, so it is no configuration of a run"
            )
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{source}: `{key}` holds an interpolation, which is not followed in a run's own "
                "configuration; write the value there"
            )
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}".lstrip("."), part) for name, part in value.items()]
            waiting += [(key, name) for name in value]
        elif isinstance(value, list):
            waiting += [(key, part) for part in value]


_MOST_VALUES = 10_000


def _load(content: dict, source: str, overrides: Sequence[str]) -> Config:
    merged = OmegaConf.structured(Config)
    if content:
        merged = _merge(merged, content, source=source)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"`{override}` is no override; write it as key=value, e.g. training.steps=20")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        merged = _merge(merged, _nest(key, value), source=f"override `{override}`")
    config = OmegaConf.to_object(merged)
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def differing_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings or dataclasses differ."""
    one = asdict(one) if is_dataclass(one) else one
    other = asdict(other) if is_dataclass(other) else other
    keys = []
    for name in dict.fromkeys([*one, *other]):
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += differing_keys(left, right, f"{prefix}{name}.")
        elif left != right:
            keys.append(f"{prefix}{name}")
    return keys


def known_keys(section: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, leaves only."""
    keys = []
    hints = get_type_hints(section)
    for entry in fields(section):
        inner = hints[entry.name]
        dotted = f"{prefix}{entry.name}"
        keys += known_keys(inner, f"{dotted}.") if is_dataclass(inner) else [dotted]
    return keys


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also a date or a number that is none
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(content).__name__}")
    return content or {}


def _nest(dotted: str, value: Any) -> dict:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree and not prefix.endswith(_FREE_FORM):
        for name, inner in tree.items():
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


def _merge(base: DictConfig, update: dict, source: str) -> DictConfig:
    known = known_keys()
    for key, value in _leaves(update):
        if key in known:
            continue
        if any(name.startswith(f"{key}.") for name in known):
            if value in (None, {}):
                continue
            raise UserError(f"{source}: `{key}` is a section; set one of its keys, e.g. `{_under(key)[0]}`")
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise UserError(f"{source}: unknown key `{key}`; the nearest known one is `{close[0]}`")
    for key, value in _leaves(update):
        if key not in known:
            continue
        ill_typed = UserError(f"{source}: `{key}` must be {_type_name(key)}, not {value!r}")
        logical = _type_of(key) in (bool, bool | None)
        if value is not None and isinstance(value, bool) != logical:
            raise ill_typed  # OmegaConf would take 3 for true and true for 1
        try:
            base = OmegaConf.merge(base, _nest(key, value))
        except OmegaConfBaseException as error:
            raise ill_typed from error
    return base


def _under(section: str) -> list[str]:
    return [key for key in known_keys() if key.startswith(f"{section}.")]


def _type_of(dotted: str) -> Any:
    section: Any = Config
    for name in dotted.split("."):
        section = get_type_hints(section)[name]
    return section


def _type_name(dotted: str) -> str:
    section = _type_of(dotted)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {kind | None: f"{name} or null" for kind, name in names.items()}
    if section == list[float]:
        return "a list of numbers"
    if section == list[str]:
        return "a list of names"
    return names.get(section) or "a mapping"


def _require(condition: bool, key: str, value: Any, right: str) -> None:
    if not condition:
        raise UserError(f"`{key}` is {value!r}; it must be {right}")


def validate(config: Config) -> None:
    """Checks every value and combination that can be judged without the model or the devices.

    Raises:
      UserError: names the key, its value, and what would be right.
    """
    for key, choices in _CHOICES.items():
        value = value_of(config, key)
        _require(value in choices, key, value, f"one of {', '.join(choices)}")
    for key, (low, high) in _RANGES.items():
        value = value_of(config, key)
        if value is None:  # only where the type allows it
            continue
        right = f"at least {low}" if high is None else f"between {low} and {high}"
        _require(math.isfinite(value) and value >= low and (high is None or value <= high), key, value, right)

    rollout, algorithm, training = config.rollout, config.algorithm, config.training
    groups = ESTIMATORS_THAT_COMPARE_ROLLOUTS
    if algorithm.estimator in groups and not (algorithm.estimator == "mapo" and algorithm.turn_weight == 0):
        _require(
            rollout.rollouts >= max(2, algorithm.min_group),
            "rollout.rollouts",
            rollout.rollouts,
            f"at least {max(2, algorithm.min_group)} with algorithm.estimator={algorithm.estimator}, "
            "which compares rollouts of one scenario",
        )
    _require(
        rollout.scenarios % training.minibatch_scenarios == 0,
        "training.minibatch_scenarios",
        training.minibatch_scenarios,
        f"a divisor of rollout.scenarios ({rollout.scenarios})",
    )
    _require(
        rollout.min_turns <= rollout.max_turns,
        "rollout.min_turns",
        rollout.min_turns,
        f"at most rollout.max_turns ({rollout.max_turns})",
    )
    _require(
        rollout.max_reply_tokens < rollout.max_tokens,
        "rollout.max_reply_tokens",
        rollout.max_reply_tokens,
        f"less than rollout.max_tokens ({rollout.max_tokens})",
    )
    _require(
        rollout.top_p == 1.0,
        "rollout.top_p",
        rollout.top_p,
        "1 in training, where the sampled distribution is the trained one; "
        "top-p is for evaluation and serving",
    )
    _require(
        rollout.top_k == 0,
        "rollout.top_k",
        rollout.top_k,
        "0 in training, where the sampled distribution is the trained one; "
        "top-k is for evaluation and serving",
    )
    _require(rollout.temperature > 0, "rollout.temperature", rollout.temperature, "above 0 in training")
    sizes = asdict(config.mesh)
    _require(sum(size == -1 for size in sizes.values()) <= 1, "mesh", sizes, "at most one axis of size -1")
    for axis, size in sizes.items():
        _require(size == -1 or size >= 1, f"mesh.{axis}", size, "at least 1, or -1 for the devices left")
    targets = config.lora.targets
    _require(
        bool(targets) and len(set(targets)) == len(targets) and set(targets) <= set(LORA_TARGETS),
        "lora.targets",
        targets,
        f"a list of some of {', '.join(LORA_TARGETS)}, each at most once",
    )
    if config.environment.family == "live":
        for name in ROLES:
            validate_role(name, getattr(config.environment, name))
        if held_out(config.environment):
            validate_role(HELD_OUT, config.environment.held_out_judge)
    fresh = config.model.fresh
    _require(
        fresh.heads % fresh.kv_heads == 0,
        "model.fresh.kv_heads",
        fresh.kv_heads,
        f"a divisor of model.fresh.heads ({fresh.heads})",
    )


def value_of(config: Config, dotted: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def held_out(environment: EnvironmentConfig) -> bool:
    """Whether evaluations have a judge of their own, who takes no part in training."""
    role = environment.held_out_judge
    return role.model is not None or role.implementation is not None


def validate_role(name: str, role: RoleConfig) -> None:
    """Checks who plays a role of the live world.

    Raises:
      UserError: names the key, its value, and what would be right.
    """
    key = f"environment.{name}"
    if role.model is None and role.implementation is None:
        raise UserError(
            f"`{key}.model` is empty; with environment.family=live it must be the name of a model at "
            f"{key}.url, or engine:FOLDER, unless {key}.implementation names a class of your own"
        )
    engine = role.model is not None and role.model.startswith(ENGINE)
    if role.url is not None or (role.model is not None and not engine):
        _require(
            role.url is not None and re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", role.url) is not None,
            f"{key}.url",
            None if role.url and re.search("[@?#]", role.url) else role.url,
            "the http(s) address of an OpenAI-compatible server, without user, password or query "
            "(a key belongs into the variable named by key_variable)",
        )
    if role.key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w*", role.key_variable):
        raise UserError(  # without the value, which may well be the key
            f"`{key}.key_variable` must be the name of an environment variable, not the key that it holds"
        )
    if role.implementation is not None:
        _require(
            re.fullmatch(r"[\w.]+:\w+", role.implementation) is not None,
            f"{key}.implementation",
            role.implementation,
            "written as package.module:Class",
        )
    for field_name, low in (
        ("temperature", 0),
        ("max_tokens", 1),
        ("requests_per_minute", 0),
        ("tokens_per_minute", 0),
    ):
        value = getattr(role, field_name)
        _require(math.isfinite(value) and value >= low, f"{key}.{field_name}", value, f"at least {low}")
    _require(
        len(role.prices) == 2 and all(math.isfinite(price) and price >= 0 for price in role.prices),
        f"{key}.prices",
        role.prices,
        "two numbers of at least 0: of a million prompt tokens, of a million answer tokens",
    )


ROLES = ("user", "judge", "director")
HELD_OUT = "held_out_judge"  # scores evaluations in the judge's place
ENGINE = "engine:"  # a role's model of this form is a frozen Qwen in a folder
_FREE_FORM = ("extra_body",)  # keys whose value is a mapping of the user's own

ESTIMATORS = (
    "mapo",
    "grpo",
    "turn",
    "batch",
    "grpo_per_turn",
    "reinforce_plus_plus",
    "rloo",
    "dr_grpo",
    "mt_grpo",
)
ESTIMATORS_THAT_COMPARE_ROLLOUTS = tuple(
    name for name in ESTIMATORS if name not in ("batch", "reinforce_plus_plus")
)

_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "minimal", "block"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    "rollout.history": ("append", "per_turn"),
    "environment.family": ("scripted", "live"),
    "algorithm.estimator": ESTIMATORS,
    "algorithm.reward": ("incremental", "absolute", "sum", "potential"),
    "algorithm.batch_scope": ("batch", "group"),
    "algorithm.aggregation": ("token-mean", "sequence-mean", "constant-length"),
    "algorithm.old_logprobs": ("sampler", "trainer"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "optimizer.schedule": ("cosine", "constant"),
}

# Smallest and largest sensible value; None: no upper bound.
_RANGES: dict[str, tuple[float, float | None]] = {
    "run.deadline_minutes": (0, None),
    "run.join_seconds": (1, None),
    "run.silent_seconds": (1, None),
    "model.fresh.vocabulary": (300, None),
    "model.fresh.hidden": (8, None),
    "model.fresh.intermediate": (8, None),
    "model.fresh.layers": (1, None),
    "model.fresh.heads": (1, None),
    "model.fresh.kv_heads": (1, None),
    "model.fresh.head_size": (2, None),
    "model.fresh.rope_theta": (1, None),
    "lora.rank": (0, None),
    "lora.alpha": (0, None),
    "rollout.scenarios": (1, None),
    "rollout.rollouts": (1, None),
    "rollout.max_turns": (1, None),
    "rollout.min_turns": (1, None),
    "rollout.temperature": (0, None),
    "rollout.max_reply_tokens": (1, None),
    "rollout.max_tokens": (2, None),
    "rollout.slots": (1, None),
    "rollout.lanes": (1, None),
    "environment.fault_rate": (0, 1),
    "environment.success_tolerance": (0, 1),
    "environment.max_failed_share": (0, 1),
    "environment.concurrency": (1, None),
    "environment.judge.samples": (1, None),
    "environment.held_out_judge.samples": (1, None),
    "environment.call_seconds": (0.01, None),
    "environment.step_seconds": (0.01, None),
    "environment.failure_share": (0, 1),
    "environment.pause_minutes": (0, None),
    "algorithm.turn_weight": (0, 1),
    "algorithm.discount": (0, 1),
    "algorithm.min_group": (2, None),
    "algorithm.outcome_weight": (0, None),
    "algorithm.clip_low": (0, 1),
    "algorithm.clip_high": (0, None),
    "algorithm.dual_clip": (1, None),
    "algorithm.importance_cap": (0, None),
    "algorithm.kl_coefficient": (0, None),
    "algorithm.entropy_coefficient": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.warmup": (0, 1),
    "optimizer.weight_decay": (0, None),
    "optimizer.gradient_clip": (0, None),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "training.steps": (1, None),
    "training.seed": (0, 2**31 - 1),
    "training.minibatch_scenarios": (1, None),
    "training.microbatch_tokens": (0, None),
    "training.epochs": (1, None),
    "warmstart.steps": (1, None),
    "warmstart.rows": (1, None),
    "warmstart.row_tokens": (2, None),
    "warmstart.turns": (0, None),
    "warmstart.learning_rate": (0, None),
    "warmstart.dialogues": (1, None),
    "warmstart.min_naming_ratio": (0, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
    "checkpoint.keep_best": (0, None),
    "logging.dialogues_every": (1, None),
    "logging.peak_flops": (1, None),
    "evaluation.every": (1, None),
    "evaluation.scenarios": (1, None),
    "evaluation.rollouts": (1, None),
    "evaluation.temperature": (0, None),
}
