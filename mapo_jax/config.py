"""The configuration: frozen dataclasses, one doc line per field, read from YAML and `key=value` overrides."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FreshModelConfig:
    """The small Qwen3 that the warm start builds when `model.path` is empty."""

    vocabulary: int = 1024  # tokens of the byte-level BPE, its special tokens included
    hidden: int = 128  # model width
    intermediate: int = 384  # width of the gated MLP
    layers: int = 4  # transformer blocks
    heads: int = 4  # query heads
    kv_heads: int = 2  # key/value heads
    head_size: int = 32  # width of one head
    rope_theta: float = 10_000.0  # base of the rotary frequencies


@dataclass(frozen=True)
class ModelConfig:
    """Which weights are trained, and how they are computed with."""

    path: str | None = None  # Hugging Face folder or run folder; empty: the small model, warm-started
    dtype: str = "float32"  # compute dtype: float32 or bfloat16 (master weights stay float32)
    remat: str = "none"  # what the backward pass recomputes: none, or block (each layer)
    fresh: FreshModelConfig = field(default_factory=FreshModelConfig)


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
    max_tokens: int = 640  # longest dialogue in tokens; also the length of the KV cache
    history: str = "append"  # append: one growing row per dialogue; per_turn: one rendered row per turn
    system_prompt: str | None = None  # first message of every dialogue, if any


@dataclass(frozen=True)
class EnvironmentConfig:
    """The world the policy talks to."""

    family: str = "scripted"  # scripted: offline and deterministic
    scenarios: str | None = None  # folder of cards; empty: the embedded ones
    fault_rate: float = 0.0  # scripted only: share of judge calls that fail, drawn by seed
    delayed_opening: bool = True  # scripted only: an early good reflection opens a stage later
    success_tolerance: float = 0.05  # `a` of the success rule (0.1 in the published result sets)
    max_failed_share: float = 0.5  # a dialogue with a larger share of unscored turns is left out
    concurrency: int = 64  # environment calls under way at once


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
    old_logprobs: str = (
        "sampler"  # the ratio's denominator: sampler, or trainer (recomputed before the update)
    )
    importance_cap: float = 2.0  # old_logprobs=trainer only: truncation of the trainer/sampler weight
    kl_coefficient: float = 0.0  # KL to the frozen start weights, in the loss
    kl_estimator: str = "k3"  # k1, k2 or k3
    entropy_coefficient: float = 0.0  # bonus for entropy of the policy


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 3e-4  # peak
    schedule: str = "cosine"  # after the warm-up: cosine (to 0), or constant
    warmup: float = 0.05  # share of the updates with a rising rate
    weight_decay: float = 0.1  # decoupled; not on norms and biases
    gradient_clip: float = 1.0  # largest global norm
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment


@dataclass(frozen=True)
class TrainingConfig:
    """The length of the run and the shape of an update."""

    steps: int = 40  # collect-and-update steps
    seed: int = 0  # everything random follows from it
    minibatch_scenarios: int = 4  # scenarios per optimizer update; divides rollout.scenarios
    microbatch_rows: int = 0  # rows per forward/backward pass; 0: the whole mini-batch
    epochs: int = 1  # passes over a step's dialogues


@dataclass(frozen=True)
class WarmstartConfig:
    """Supervised training that precedes RL when there is no model yet; cached by its configuration."""

    steps: int = 300  # optimizer updates
    rows: int = 16  # dialogues per update
    learning_rate: float = 2e-3  # peak of a cosine schedule with warm-up
    dialogues: int = 2000  # synthetic dialogues when `data` is empty
    data: str | None = None  # JSONL of chats (`messages`); empty: synthetic dialogues of mixed quality
    cache: str | None = None  # folder of finished warm starts; empty: the user's cache folder
    min_naming_ratio: float = 2.0  # gate: naming accuracy must be this many times chance before RL starts


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 10  # steps between checkpoints (the last step is always kept)
    keep: int = 2  # newest checkpoints kept


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes besides metrics.jsonl."""

    tensorboard: bool = True  # event files
    wandb: bool = False  # Weights & Biases beside them, if installed
    dialogues_every: int = 1  # steps between files of dialogues
    progress: bool = True  # the live display


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    every: int = 10  # steps between evaluations; before the first and after the last step always
    scenarios: int = 16  # validation cards, from the first
    rollouts: int = 2  # dialogues per card
    temperature: float = 1.0  # sampling temperature


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives."""

    directory: str = "runs/tiny"  # run folder; an existing run of the same configuration continues
    compilation_cache: str | None = None  # folder of compiled programs; empty: the user's cache folder


@dataclass(frozen=True)
class Config:
    """One run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
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
