"""The forecast of a run (`--dry-run`): shape, memory, tokens and calls; and checks of memory."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import replace

import jax
from jax.sharding import Mesh

from mapo_jax.config import ROLES, Config, FreshModelConfig, played_roles, to_yaml
from mapo_jax.errors import UserError
from mapo_jax.files import as_path
from mapo_jax.learning.programs import abstract_batch, check_rows
from mapo_jax.learning.train_state import TrainState
from mapo_jax.model.backends import check_remat
from mapo_jax.model.qwen import QwenConfig, parameter_count, parameter_shapes
from mapo_jax.model.sharding import make_mesh, sharding_table, with_shardings
from mapo_jax.rollout.device import Exclusive
from mapo_jax.rollout.requests import Counts
from mapo_jax.running.display import duration
from mapo_jax.running.memory import GIB, Forecast, device_memory, forecast_memory, rollout_memory
from mapo_jax.running.metrics import METRICS_FILE, read_rows
from mapo_jax.running.policy import adapters, check_policy, make_engine, read_shape
from mapo_jax.running.utilization import peak_flops, step_work

FORECAST_ERROR = 1.1  # of the memory of an update, as tests require
# For the estimate of time. FLOP/s of the default run's updates and rollouts, and tokens/s of its warm start,
# on two cores of an AMD EPYC; the MFU of updates is assumed.
CPU_UPDATE, CPU_ROLLOUT, CPU_WARMSTART = 36e9, 12e9, 40e3
DEFAULT_PARAMETERS = 1.1e6
UPDATE_MFU = 0.4
_STEP_MFU = 0.2  # of a whole step
FRESH_ROPE_THETA = 10_000.0  # base of the small model's rotary frequencies


def fresh_model(config: FreshModelConfig, vocabulary: int, positions: int) -> QwenConfig:
    """The shape of the small Qwen3 that the warm start builds."""
    return QwenConfig(
        vocab_size=vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        rope_theta=FRESH_ROPE_THETA,
        max_position_embeddings=positions,
    )


def forecast(config: Config) -> str:
    """The size of a run in a few lines: devices, model, peak memory (`memory.py`), a step, and the time.

    Raises:
      UserError: a run would refuse the model folder or the mesh, or does not fit the memory.
    """
    model, mesh = _checked(config)
    rollout, training = config.rollout, config.training
    memory, limit = forecast_memory(config, model, mesh), device_memory(mesh)
    held, count = sum(memory.held.values()), parameter_count(model)
    updating, talking = (held + sum(part.values()) for part in (memory.update, memory.rollout))
    if limit is not None and updating > FORECAST_ERROR * limit:
        raise UserError(
            f"the run does not fit: an update is forecast to need {updating / GIB:.1f} GiB of each device, "
            f"which has {limit / GIB:.1f} GiB; {_less_for_roles(memory)}lower training.microbatch_tokens, "
            "set model.remat=block, use more devices, or begin a new run with a lower rollout.max_tokens"
        )
    trained = count if model.lora is None else count - parameter_count(replace(model, lora=None))
    dialogues = rollout.scenarios * rollout.rollouts
    turns = dialogues * rollout.max_turns
    most = "" if config.model.path else "at most "  # training the tokenizer may give fewer tokens
    of = "" if limit is None else f", of {limit / GIB:,.1f}"
    rows = {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}: "
        + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "model": f"{most}{count:,} parameters, {trained:,} of them trained "
        f"({model.family}, {model.num_layers} layers x {model.hidden_size})",
        "memory": f"GiB of each device: {updating / GIB:,.3f} while updating, {talking / GIB:,.3f} while "
        f"talking{of}",
        "a step": f"{dialogues:,} dialogues ({rollout.scenarios} x {rollout.rollouts}); at most "
        f"{turns * rollout.max_reply_tokens:,} sampled tokens, "
        f"{dialogues * rollout.max_tokens * training.epochs:,} tokens trained on in "
        f"{training.epochs * rollout.scenarios // training.minibatch_scenarios} updates, "
        f"and {turns:,} judge calls",
        "the run": f"{training.steps:,} steps, {training.steps * turns:,} judge calls at most",
        "time": estimate(config, model, mesh),
    }
    return "\n".join([summary_rows(rows), *ahead_table(config, model, mesh)])


def summary_rows(rows: Mapping[str, str]) -> str:
    """Named lines, wrapped between words at 80 columns."""
    whole = {"break_on_hyphens": False, "break_long_words": False}
    return "\n".join(
        textwrap.fill(text, 80, initial_indent=f"{name:<10}", subsequent_indent=10 * " ", **whole)
        for name, text in rows.items()
    )


def details(config: Config) -> str:
    """The resolved configuration, how arrays are cut over the mesh, and the memory by kind."""
    model, mesh = _checked(config)
    limit = device_memory(mesh)
    lines = [
        to_yaml(config),
        "sharding  size/mesh axis = size on each device",
        *(f"  {line}" for line in sharding_table(parameter_shapes(model), mesh)),
        f"{'memory    per device, GiB, while':<48}  updating   talking",
        *memory_table(forecast_memory(config, model, mesh)),
        *([] if limit is None else [f"  {'a device has':<46}{limit / GIB:10.3f}{limit / GIB:10.3f}"]),
        f"calls under way, at most {config.environment.concurrency:,} (of all processes together)",
    ]
    return "\n".join(lines)


def _checked(config: Config) -> tuple[QwenConfig, Mesh]:
    mesh = make_mesh(config.mesh)
    model = model_shape(config)
    if config.model.path is not None:
        check_policy(config.model.path, config.rollout)
    check_rows(config, mesh)
    check_remat(config.model.remat, mesh)
    check_memory(config, model, mesh)
    rollout, dtype = config.rollout, config.model.dtype
    make_engine(
        model, (0,), model.vocab_size, rollout, rollout.temperature, dtype=dtype, mesh=mesh
    )  # its sizes
    return model, mesh


def estimate(config: Config, model: QwenConfig, mesh: Mesh) -> str:
    """The time of a new run, from its operations, if every dialogue is as long as it may be.

    On CPUs by the speed of the default run on two cores. On accelerators only the updates, by their MFU: the
    time of dialogues depends on memory bandwidth and on the world.
    """
    rollout, training, device = config.rollout, config.training, mesh.devices.flat[0]
    dialogues = rollout.scenarios * rollout.rollouts
    tokens = dialogues * rollout.max_tokens
    sampled = min(dialogues * rollout.max_turns * rollout.max_reply_tokens, tokens // 2)
    rows, done = [rollout.max_tokens] * dialogues, Counts(prefilled=tokens - sampled, sampled=sampled)
    work = step_work(model, config, rows, sampled, done)
    update, talk = (1e12 * work[f"perf/{part}_tflop"] for part in ("update", "rollout"))
    if device.platform != "cpu":
        if (peak := peak_flops(device, config.logging.peak_flops)) is None:
            return "unknown: set logging.peak_flops for an estimate"
        seconds = training.steps * update / (peak * mesh.size * UPDATE_MFU)
        return (
            f"updates {duration(seconds)} if they reach {UPDATE_MFU:.0%} of the peak; dialogues come on top"
        )
    evaluations = len({*range(0, training.steps, config.evaluation.every), training.steps})
    evaluated = evaluations * config.evaluation.scenarios * config.evaluation.rollouts / dialogues
    step = update / CPU_UPDATE + talk / CPU_ROLLOUT
    seconds = training.steps * step + evaluated * talk / CPU_ROLLOUT
    warm = config.warmstart.steps * config.warmstart.rows * config.warmstart.row_tokens / CPU_WARMSTART
    warm *= parameter_count(model) / DEFAULT_PARAMETERS
    parts = [f"{training.steps} steps of {step:.1f} s", f"{evaluations} evaluations"]
    if config.model.path is None:
        seconds += warm
        parts.insert(0, f"a warm start of {duration(warm)} unless it is cached")
    world = "" if not played_roles(config.environment) else "; the calls of the world come on top"
    return f"up to {duration(seconds)} on two quiet CPU cores: {', '.join(parts)}{world}"


def ahead_table(config: Config, model: QwenConfig, mesh: Mesh) -> list[str]:
    """What `rollout.ahead` would bring, from the expected seconds of the roles' calls; empty without any.

    A dialogue's calls follow each other. A step takes its world's and its devices' time; N steps ahead divide
    that by N + 1, but the devices, and the calls at once, remain bounds.
    """
    environment, rollout = config.environment, config.rollout
    turn = sum(getattr(environment, name).seconds for name in ROLES)
    if environment.family != "live" or not turn:
        return []
    world = rollout.max_turns * turn + environment.user.seconds
    calls = turn + (environment.judge.samples - 1) * environment.judge.seconds  # asked at once
    queue = rollout.scenarios * rollout.rollouts * rollout.max_turns * calls / environment.concurrency
    device, source = _device_seconds(config, model, mesh)
    steps = [max((max(world, queue) + device) / (ahead + 1), queue, device) for ahead in range(3)]
    return [
        f"ahead     time of a step, if dialogues have {rollout.max_turns} turns of {turn:g} s of calls; "
        f"devices: {source}",
        *(f"  rollout.ahead={ahead:<17}{seconds:9,.0f} s" for ahead, seconds in enumerate(steps)),
    ]


def _device_seconds(config: Config, model: QwenConfig, mesh: Mesh) -> tuple[float, str]:
    """The devices' time for a step, and where it comes from."""
    rows = read_rows(as_path(config.run.directory) / METRICS_FILE)
    found = [row["perf/device_busy"] * row["timing_s/step"] for row in rows if row.get("perf/device_busy")]
    if found:
        seconds = statistics.median(found)
        return seconds, f"{seconds:.0f} s, measured in {config.run.directory}"
    peak = peak_flops(mesh.devices.flat[0], config.logging.peak_flops)
    if peak is None:
        return 0.0, "not counted; a step of the run in run.directory, or logging.peak_flops, would tell"
    rollout = config.rollout
    dialogues = rollout.scenarios * rollout.rollouts
    sampled = dialogues * min(rollout.max_turns * rollout.max_reply_tokens, rollout.max_tokens)
    done = Counts(prefilled=dialogues * rollout.max_tokens - sampled, sampled=sampled)
    work = step_work(model, config, [rollout.max_tokens] * dialogues, sampled, done)
    tflop = work["perf/rollout_tflop"] + work["perf/update_tflop"]
    seconds = tflop * 1e12 / (_STEP_MFU * peak * mesh.size)
    return seconds, f"{seconds:.0f} s, if the longest rows run at {_STEP_MFU:.0%} of the peak"


def memory_table(memory: Forecast) -> list[str]:
    """A line for each kind of memory, and one for the sums."""

    def line(kind: str, *sizes: float | None) -> str:
        cells = ("" if size is None else f"{size / GIB:.3f}" for size in sizes)
        return f"  {kind:<46}" + "".join(f"{cell:>10}" for cell in cells)

    held = sum(memory.held.values())
    return [
        *(line(kind, size, size) for kind, size in memory.held.items()),
        *(line(kind, size, None) for kind, size in memory.update.items()),
        *(line(kind, None, size) for kind, size in memory.rollout.items()),
        line("together", *(held + sum(part.values()) for part in (memory.update, memory.rollout))),
    ]


def check_memory(config: Config, model: QwenConfig, mesh: Mesh) -> None:
    """Refuses devices that are too small for the part of the memory that is certain.

    That is the memory of the whole run with the gradient, or with the sampler's weights and caches. The rest
    depends on the compiler (`check_update`).

    Raises:
      UserError: with the sizes and what to change.
    """
    limit = device_memory(mesh)
    if limit is None:
        return
    memory = forecast_memory(config, model, mesh)
    certain = sum(memory.held.values()) + memory.update["gradient"]
    if config.rollout.ahead and certain > limit:
        parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.held.items())
        raise UserError(
            f"`rollout.ahead` is {config.rollout.ahead}, with which each device needs {certain / GIB:.1f} "
            f"GiB ({parts}, and the gradient) and has {limit / GIB:.1f} GiB; lower it or rollout.slots, use "
            "more devices, or begin a new run with a lower rollout.max_tokens"
        )
    if certain > limit:
        raise UserError(
            f"the run does not fit: weights, moments and gradient need {certain / GIB:.1f} GiB of each "
            f"device, which has {limit / GIB:.1f} GiB; {_less_for_roles(memory)}"
            "use more devices (mesh.fsdp x mesh.tensor is "
            f"{mesh.shape['fsdp'] * mesh.shape['tensor']}), or begin a new run with a smaller model or "
            "adapters (lora.rank=16)"
        )
    talking = sum(memory.held.values()) + sum(memory.rollout.values())
    if talking > limit:
        parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in memory.rollout.items())
        raise UserError(
            f"the run does not fit: while dialogues are held each device needs {talking / GIB:.1f} GiB "
            f"({parts} beside weights and moments) and has {limit / GIB:.1f} GiB; "
            f"{_less_for_roles(memory)}lower rollout.slots, set rollout.copy_weights=false, "
            f"raise mesh.tensor, which is {mesh.shape['tensor']}, or begin a new run with a lower "
            "rollout.max_tokens"
        )


def _less_for_roles(memory: Forecast) -> str:
    """The remedy where models play roles on this machine."""
    if not memory.roles:
        return ""
    return (
        f"lower extra_body.slots and .tokens of the models of roles, which need {memory.roles / GIB:.1f} GiB "
        "of it, or name smaller ones, "
    )


def check_update(
    update: Exclusive, state: TrainState, config: Config, mesh: Mesh, model: QwenConfig | None = None
) -> None:
    """Compiles the update of the longest rows on an accelerator, before any dialogue is held.

    The first update takes it from the compilation cache. `model` is needed with `rollout.ahead` only.

    Raises:
      UserError: it does not fit; with the compiler's sizes and what to change.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return
    batch, limit = abstract_batch(config, mesh), device_memory(mesh)
    try:
        memory = update.lower(state, batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler raises it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
    else:
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        if mesh.devices.flat[0].platform == "tpu":  # its temp_size is more than it allocates (tpu/memory.py)
            needed = memory.peak_memory_in_bytes
        if config.rollout.ahead:
            weights = with_shardings(state.weights, jax.tree.map(lambda leaf: leaf.sharding, state.weights))
            needed += sum(rollout_memory(config, model, mesh, weights).values())
        if limit is None or needed <= limit:
            return
        reason = f"it needs {needed / GIB:.1f} GiB of {limit / GIB:.1f}"
    raise UserError(
        f"an update of rows of {batch.tokens.shape[1]} tokens does not fit a device: {reason}; lower "
        "training.microbatch_tokens, set model.remat=block, use more devices, or begin a new run with a "
        "lower rollout.max_tokens"
    )


def model_shape(config: Config) -> QwenConfig:
    """The shape of the model that a run would train, with adapters, from its folder or the configuration.

    Raises:
      UserError: there is no such folder or Hugging Face id, or its configuration cannot be read.
    """
    lora = adapters(config.lora)
    if config.model.path is None:
        fresh = config.model.fresh
        return replace(fresh_model(fresh, fresh.vocabulary, config.rollout.max_tokens), lora=lora)
    return replace(read_shape(config.model.path), lora=lora)
