"""The configuration: every key with its type, default, bounds and description; loading it.

The models below generate the validation, the list of all keys (`python -m mapo_jax.train --keys`) and
`configs/schema.json`, which editors use for the YAML files. After a change:

    python -m mapo_jax.config > configs/schema.json

The module is longer than others so that all keys, and the rules between them, are in one place.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from mapo_jax import settings
from mapo_jax.errors import UserError
from mapo_jax.settings import Section, differing_keys, key, updated, value_of  # noqa: F401 (re-exported)

Estimator = Literal[
    "mapo", "grpo", "turn", "batch", "grpo_per_turn", "reinforce_plus_plus", "rloo", "dr_grpo", "mt_grpo"
]
SINGLE_ROLLOUT_ESTIMATORS = ("batch", "reinforce_plus_plus")  # they do not compare rollouts of a scenario
LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]

ROLES = ("user", "judge", "director")
HELD_OUT = "held_out_judge"  # replaces the judge in evaluations
ENGINE = "engine:"  # prefix of a role's model that is a frozen Qwen in a folder


def _check_axis(size: int) -> int:
    if size < -1 or size == 0:
        raise ValueError(f"is {size}; it must be at least 1, or -1 for the devices left")
    return size


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Axis = Annotated[int, AfterValidator(_check_axis), Field(json_schema_extra={"not": {"const": 0}})]


class RunConfig(Section):
    """Folder and limits of the run."""

    directory: str = key("runs/tiny", "run folder; an existing run of the same configuration continues")
    compilation_cache: str | None = key(None, "folder of compiled programs; empty: the user's cache folder")
    deadline_minutes: Amount = key(0.0, "save and stop this long after the start; 0: never")
    join_seconds: float = key(300.0, "several processes only: time limit for all to join", ge=1)
    silent_seconds: float = key(120.0, "several processes only: time limit without a message", ge=1)


class FreshModelConfig(Section):
    """The small Qwen3 that the warm start builds when `model.path` is empty."""

    vocabulary: int = key(4096, "tokens of the byte-level BPE, its special tokens included", ge=300)
    hidden: int = key(128, "model width; the gated MLP is three times as wide", ge=8)
    layers: Count = key(3, "transformer blocks")
    heads: int = key(4, "query heads, each of hidden / heads; half as many for keys and values", ge=2)

    @property
    def intermediate(self) -> int:
        """Width of the gated MLP."""
        return 3 * self.hidden

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.heads // 2

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


class ModelConfig(Section):
    """The weights, and how the model is computed."""

    path: str | None = key(
        None, "Hugging Face folder or id, or run folder; empty: a small model, warm-started"
    )
    dtype: Literal["float32", "bfloat16"] = key("float32", "compute dtype; master weights stay float32")
    remat: Literal["none", "minimal", "block", "offload"] = key(
        "none", "what the backward pass recomputes (qwen.REMAT)"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = key(
        "auto", "for whole rows; auto: by the mesh's platform; splash: on TPU; cudnn: on GPU"
    )
    fresh: FreshModelConfig = FreshModelConfig()


class LoraConfig(Section):
    """Low-rank adapters, trained instead of the weights (`model/lora.py`)."""

    rank: int = key(0, "rank of the adapters; 0: none, all weights are trained", ge=0)
    alpha: Amount = key(32.0, "the low-rank term is scaled by alpha / rank")
    targets: list[LoraTarget] = key(list(get_args(LoraTarget)), "projections with adapters", min_length=1)


class MeshConfig(Section):
    """Sizes of the device mesh; one axis may be -1: it gets the remaining devices."""

    data: Axis = key(1, "replicas of the weights, each with its own rows")
    fsdp: Axis = key(-1, "shards of weights, moments and rows")
    tensor: Axis = key(1, "shards of heads and MLP width")


class RolloutConfig(Section):
    """How dialogues are collected."""

    scenarios: Count = key(8, "S: scenarios per step")
    rollouts: Count = key(4, "R: dialogues per scenario")
    max_turns: Count = key(8, "T: most turns of a dialogue")
    min_turns: Count = key(5, "success and failure end a dialogue from this turn on")
    temperature: float = key(0.7, "sampling temperature in training", gt=0)
    max_reply_tokens: Count = key(32, "a reply longer than this is cut and marked truncated")
    max_tokens: int = key(512, "longest dialogue in tokens; also the length of the KV cache", ge=2)
    cache: Literal["exact", "int8", "paged"] = key(
        "exact", "in training; int8: 8 bits, a scale per token and head; paged: only its used part is read"
    )
    copy_weights: bool | None = key(None, "sample with a cast copy: faster, needs memory; empty: only on CPU")
    slots: Count | None = key(None, "KV caches on the device, the rest in host memory; empty: all of a step")
    ahead: int = key(
        0, "N: steps that are held ahead; the dialogues of step k by the weights after update k - N", ge=0
    )
    history: Literal["append", "per_turn"] = key(
        "append", "append: one growing row per dialogue; per_turn: one rendered row per turn"
    )
    system_prompt: str | None = key(None, "first message of every dialogue, if any")


SERVER_URL = r"https?://[^/@?#\s]+(/[^@?#\s]*)?"
_FORMS = {
    "url": (
        SERVER_URL,
        "the http(s) address of an OpenAI-compatible server, without user, password or query (put a key into "
        "the variable named by key_variable)",
    ),
    "key_variable": (r"[A-Za-z_]\w*", "the name of an environment variable, not the key itself"),
    "implementation": (r"[\w.]+:\w+", "written as package.module:Class"),
}


class RoleConfig(Section):
    """A role of the live world; judge, director and held-out judge have the same keys."""

    url: str | None = key(None, "base URL of an OpenAI-compatible server, such as http://localhost:8000/v1")
    model: str | None = key(None, "the model's name on the server, or engine:FOLDER for our own engine")
    key_variable: str | None = key(None, "environment variable that holds the server's key")
    implementation: str | None = key(None, "a class of your own, package.module:Class; empty: ours")
    temperature: Amount = key(1.0, "sampling temperature")
    seconds: Amount = key(0.0, "expected time of a call, for the estimates of --dry-run only")
    max_tokens: Count = key(2048, "longest answer, reasoning included")
    extra_body: dict[str, Any] = key({}, "more request fields; engine: slots, tokens")
    requests_per_minute: int = key(0, "the server's limit; 0: none", ge=0)
    tokens_per_minute: int = key(0, "the server's limit, prompts and answers together; 0: none", ge=0)
    prices: list[float] = key([0.0, 0.0], "price of a million prompt tokens, and of a million answer tokens")

    @field_validator("url", "key_variable", "implementation")
    @classmethod
    def _is_well_formed(cls, value: str | None, info: ValidationInfo) -> str | None:
        pattern, rule = _FORMS[info.field_name]
        if value is None or re.fullmatch(pattern, value):
            return value
        secret = info.field_name == "key_variable" or re.search("[@?#]", value)  # may be, or contain, a key
        raise ValueError(f"must be {rule}" if secret else f"is {value!r}; it must be {rule}")

    @field_validator("prices")
    @classmethod
    def _are_two(cls, prices: list[float]) -> list[float]:
        if len(prices) != 2 or min(prices) < 0:
            raise ValueError(f"is {prices}; it must be two numbers of at least 0: of prompts, of answers")
        return prices


class JudgeConfig(RoleConfig):
    """A judge: the keys of a role and one more; the held-out judge replaces it in evaluations."""

    samples: Count = key(1, "judgements per reply; the median of each level counts")


class EnvironmentConfig(Section):
    """The environment: the roles that the policy talks to."""

    family: Literal["scripted", "live"] = key(
        "scripted", "scripted: offline and deterministic; live: roles played by language models"
    )
    scenarios: str | None = key(None, "folder of cards; empty: the embedded ones")
    fault_rate: Share = key(0.0, "scripted only: share of judge calls that fail, drawn by seed")
    delayed_opening: bool = key(True, "scripted only: an early good reflection opens a stage later")
    success_tolerance: Share = key(0.05, "`a` of the success rule (0.1 in the published result sets)")
    max_failed_share: Share = key(0.5, "a dialogue with a larger share of unscored turns is left out")
    concurrency: Count = key(64, "most concurrent environment calls, of all processes")
    call_seconds: float = key(
        60.0, "live only: time limit of an attempt; a dialogue's calls have 2 x this x max_turns", ge=0.01
    )
    step_seconds: float = key(
        7200.0,
        "live only: time limit of a rollout with its waits; unfinished dialogues are left out",
        ge=0.01,
    )
    failure_share: Share = key(0.2, "live only: pause if more than this of the last 100 calls failed")
    pause_minutes: Amount = key(60.0, "live only: all pauses together, each twice the last; then a stop")
    user: RoleConfig = RoleConfig()
    judge: JudgeConfig = JudgeConfig()
    director: RoleConfig = RoleConfig()
    held_out_judge: JudgeConfig = JudgeConfig()


class AlgorithmConfig(Section):
    """Rewards, returns, advantages, objective."""

    estimator: Estimator = key("mapo", "estimator of the advantages (algorithm/advantages.py)")
    turn_weight: Share = key(1 / 3, "weight of the turn-level term; the batch-level term has the rest")
    discount: Share = key(0.85, "gamma per turn")
    reward: Literal["incremental", "absolute", "sum", "potential"] = key(
        "incremental", "reward of a turn, from the positions before and after it (algorithm/rewards.py)"
    )
    batch_scope: Literal["batch", "group"] = key("batch", "batch-level statistics: over all or per scenario")
    leave_one_out: bool = key(False, "centre the turn level on the mean of the other rollouts")
    clip_low: Share = key(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: Amount = key(0.28, "the ratio is clipped above 1 + clip_high")
    dual_clip: float = key(10.0, "largest ratio that counts where the advantage is negative", ge=1)
    aggregation: Literal["token-mean", "sequence-mean", "constant-length"] = key(
        "token-mean", "mean of the tokens' losses; constant-length: as in Dr. GRPO"
    )
    old_logprobs: Literal["sampler", "trainer"] = key(
        "sampler", "denominator of the ratio; trainer: recomputed before the first mini-batch"
    )
    importance_cap: Amount = key(2.0, "old_logprobs=trainer only: truncation of the trainer/sampler weight")
    kl_coefficient: Amount = key(0.0, "KL to the frozen start weights, in the loss")
    kl_estimator: Literal["k1", "k2", "k3"] = key("k3", "estimator of that KL")
    entropy_coefficient: Amount = key(0.01, "bonus for entropy of the policy")


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Amount = key(5e-4, "peak of the schedule")
    schedule: Literal["cosine", "constant"] = key("cosine", "after the warm-up; cosine: to 0")
    warmup: Share = key(0.05, "share of the updates with a rising learning rate")
    weight_decay: Amount = key(0.1, "decoupled weight decay; not on norms and biases")
    gradient_clip: Amount = key(1.0, "largest global norm of the gradient; 0: no clipping")


class TrainingConfig(Section):
    """The length of the run and the shape of an update."""

    steps: Count = key(40, "collect-and-update steps")
    seed: int = key(0, "seed of all random numbers", ge=0, le=2**31 - 1)
    minibatch_scenarios: Count = key(2, "scenarios per optimizer update; divides rollout.scenarios")
    microbatch_tokens: int = key(2048, "tokens per device and pass, at least one row; 0: no limit", ge=0)
    epochs: Count = key(1, "passes over a step's dialogues")


class WarmstartConfig(Section):
    """Supervised training before RL when `model.path` is empty; cached by its configuration."""

    steps: Count = key(600, "optimizer updates")
    rows: Count = key(8, "packed rows per update")
    row_tokens: int = key(256, "length of a packed row", ge=2)
    turns: int = key(3, "dialogues are cut into pieces of this many turns; 0: as many as fit a row", ge=0)
    learning_rate: Amount = key(5e-3, "peak of a cosine schedule with warm-up")
    dialogues: Count = key(2700, "synthetic dialogues when `data` is empty")
    data: str | None = key(None, "JSONL of chats (`messages`); empty: synthetic dialogues of mixed quality")
    cache: str | None = key(None, "folder of finished warm starts; empty: the user's cache folder")
    min_naming_ratio: Amount = key(2.0, "naming accuracy needed before RL, in multiples of chance; 0: any")


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: Count = key(10, "steps between checkpoints; also before an evaluation and after the last step")
    keep: Count = key(2, "newest checkpoints kept")
    keep_best: int = key(1, "best checkpoints by validation return, kept in addition", ge=0)


class LoggingConfig(Section):
    """Output of a run besides metrics.jsonl and dialogues/."""

    tensorboard: bool = key(True, "event files")
    wandb: bool = key(False, "also log to Weights & Biases, if installed")
    progress: bool = key(True, "the live display")
    peak_flops: float | None = key(None, "device FLOP/s for perf/mfu; empty: from a table, or no MFU", ge=1)


class EvaluationConfig(Section):
    """Validation during training."""

    every: Count = key(20, "steps between evaluations; also before the first and after the last step")
    scenarios: Count = key(16, "number of validation cards, the first ones")
    rollouts: Count = key(2, "dialogues per card")
    temperature: Amount = key(0.7, "sampling temperature")


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    warmstart: WarmstartConfig = WarmstartConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        """Checks keys against each other, as far as neither the model nor the devices are needed."""

        def require(holds: bool, dotted: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"`{dotted}` is {value_of(self, dotted)!r}; it must be {rule}")

        rollout, algorithm, fresh = self.rollout, self.algorithm, self.model.fresh
        estimator = algorithm.estimator
        single = estimator in SINGLE_ROLLOUT_ESTIMATORS
        single |= estimator == "mapo" and algorithm.turn_weight == 0
        rule = f"at least 2 with algorithm.estimator={estimator}, which compares a scenario's rollouts"
        require(single or rollout.rollouts >= 2, "rollout.rollouts", rule)
        rule = f"a divisor of rollout.scenarios ({rollout.scenarios})"
        divides = rollout.scenarios % self.training.minibatch_scenarios == 0
        require(divides, "training.minibatch_scenarios", rule)
        rule = f"at most rollout.max_turns ({rollout.max_turns})"
        require(rollout.min_turns <= rollout.max_turns, "rollout.min_turns", rule)
        rule = f"less than rollout.max_tokens ({rollout.max_tokens})"
        require(rollout.max_reply_tokens < rollout.max_tokens, "rollout.max_reply_tokens", rule)
        rule = f"even, and a divisor of half of model.fresh.hidden ({fresh.hidden})"
        require(fresh.heads % 2 == 0 == fresh.hidden % (2 * fresh.heads), "model.fresh.heads", rule)
        targets = self.lora.targets
        require(len(set(targets)) == len(targets), "lora.targets", "names that differ from each other")
        sizes = self.mesh.model_dump()
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"`mesh` is {sizes}; it must have at most one axis of size -1")
        for name in played_roles(self.environment):
            validate_role(name, getattr(self.environment, name))
            model = getattr(self.environment, name).model or ""
            rule = f"0 with environment.{name}.model={model}, whose answers need the same devices"
            require(not rollout.ahead or not model.startswith(ENGINE), "rollout.ahead", rule)
        return self


# --- Keys of version 0.1 that no longer exist. ---


class Gone(NamedTuple):
    """Why a key was removed, and the value that is in effect now."""

    sentence: str
    value: Callable[[Config], Any]


GONE = {
    "rollout.top_p": Gone("training samples from the whole distribution", lambda _: 1.0),
    "rollout.top_k": Gone("training samples from the whole distribution", lambda _: 0),
    "rollout.cache_dtype": Gone(
        "it is rollout.cache", lambda c: None if c.rollout.cache == "exact" else "int8"
    ),
    "rollout.lanes": Gone("all caches on the device are decoded at once; set rollout.slots", lambda _: None),
    "model.fresh.intermediate": Gone("it is 3 x model.fresh.hidden", lambda c: c.model.fresh.intermediate),
    "model.fresh.kv_heads": Gone("it is model.fresh.heads / 2", lambda c: c.model.fresh.kv_heads),
    "model.fresh.head_size": Gone("it is model.fresh.hidden / heads", lambda c: c.model.fresh.head_size),
    "model.fresh.rope_theta": Gone("it is always 10000", lambda _: 10_000.0),
    "optimizer.b1": Gone("it is always 0.9", lambda _: 0.9),
    "optimizer.b2": Gone("it is always 0.999", lambda _: 0.999),
    "algorithm.outcome_weight": Gone("it is always 1", lambda _: 1.0),
    "algorithm.min_group": Gone("it is always 2", lambda _: 2),
    "logging.dialogues_every": Gone("the dialogues of every step are written", lambda _: 1),
}
RUN_FILE = "config.yaml"  # of a run folder; there a removed key is allowed if it has the value in effect


def _refusal(gone: Mapping[str, Any], places: Mapping[str, str]) -> str:
    dotted, *others = gone
    also = f"; also gone: {', '.join(f'`{other}`' for other in others)}" if others else ""
    named = f"{places.get(dotted, '')}`{dotted}` ({gone[dotted]!r})"
    return f"{named} is gone: {GONE[dotted].sentence}; remove the key{also}"


def find_config(name: str | Path) -> str | Path:
    """A configuration file: `name` itself, or, if that is no file, the one of that name in `configs/`.

    Raises:
      UserError: a name without a folder is neither.
    """
    if "/" in str(name) or Path(name).is_file():
        return name
    package = Path(__file__).parent  # an installed one has its own copy of configs/
    folders = (package.parent / "configs", package / "configs")
    files = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if (stem := str(name).removesuffix(".yaml")) in files:
        return files[stem]
    raise UserError(f"there is no file {name}; configurations known by name are {', '.join(files)}")


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, without: Sequence[str] = ()
) -> Config:
    """Reads a YAML file and `key=value` overrides on top of the defaults, and validates the result.

    Args:
      path: YAML file with any subset of the keys, or the name of one in `configs/`, such as live; None for
        the defaults, which `configs/tiny.yaml` lists.
      overrides: dotted assignments such as `training.steps=20`.
      without: dotted sections and keys of the file that are ignored, for a file that another person may have
        written, such as a run's.

    Raises:
      UserError: an unknown key (the message names the nearest known one) or a removed one, a value of the
        wrong type or out of bounds, an invalid combination, or a file that cannot be read.
    """
    content, places = ({}, {}) if path is None else settings.read_yaml(find_config(path))
    values = {
        dotted: value
        for dotted, value in settings.leaves(Config, content).items()
        if not any(f"{dotted}.".startswith(f"{section}.") for section in without)
    }
    gone = {dotted: values.pop(dotted) for dotted in GONE if dotted in values}
    if gone and Path(str(path)).name != RUN_FILE:
        raise UserError(_refusal(gone, places))
    for override in overrides:
        given = settings.read_override(Config, override)
        if named := {dotted: value for dotted, value in given.items() if dotted in GONE}:
            raise UserError(_refusal(named, {}))
        values = settings.merged(values, given)
        places = {dotted: place for dotted, place in places.items() if dotted not in given}
    config = settings.validated(Config, values, places)
    if differing := {dotted: value for dotted, value in gone.items() if value != GONE[dotted].value(config)}:
        raise UserError(_refusal(differing, places))
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def known_keys() -> list[str]:
    """Every dotted key of the configuration, leaves only."""
    return list(settings.fields(Config))


def distinct_keys() -> list[str]:
    """The known keys, with those of a role once: the user's, and the judge's additional ones."""
    repeated = [f"environment.judge.{name}" for name in RoleConfig.model_fields]
    repeated += ["environment.director.", f"environment.{HELD_OUT}."]
    return [dotted for dotted in known_keys() if not dotted.startswith(tuple(repeated))]


def describe_keys() -> str:
    """Every distinct key with its default, meaning, type and bounds, 80 columns wide."""
    return settings.describe(Config, distinct_keys())


def is_played(role: RoleConfig) -> bool:
    """Whether a model or a class of the user's is to play the role."""
    return role.model is not None or role.implementation is not None


def held_out(environment: EnvironmentConfig) -> bool:
    """Whether a held-out judge, which takes no part in training, scores evaluations."""
    return is_played(environment.held_out_judge)


def played_roles(environment: EnvironmentConfig) -> tuple[str, ...]:
    """The roles that models or the user's classes play: in the scripted world, a judge that is named."""
    judges = [name for name in ("judge", HELD_OUT) if is_played(getattr(environment, name))]
    return tuple(judges) if environment.family == "scripted" else tuple(dict.fromkeys((*ROLES, *judges)))


def validate_role(name: str, role: RoleConfig) -> None:
    """Checks that a role of the live world has a model or a class. Raises UserError."""
    dotted = f"environment.{name}"
    if role.model is None and role.implementation is None:
        raise UserError(
            f"`{dotted}.model` is empty; with environment.family=live it must be the name of a model at "
            f"{dotted}.url, or engine:FOLDER, unless {dotted}.implementation names a class of your own"
        )
    if role.model is not None and not role.model.startswith(ENGINE) and role.url is None:
        raise UserError(f"`{dotted}.url` is None; it must be {_FORMS['url'][1]}")


if __name__ == "__main__":
    print(json.dumps(settings.json_schema(Config), indent=1))
