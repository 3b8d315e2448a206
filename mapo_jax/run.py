"""A run and what it is made of: set up from its configuration, then begun or continued."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import grain
from jax.sharding import Mesh
from rich.console import Console

from mapo_jax.commands import cache_folder
from mapo_jax.config import Config, to_yaml
from mapo_jax.environment.scenario import Scenario, load_scenarios
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.files import as_path, in_bucket, part_name
from mapo_jax.learning import batch as rows
from mapo_jax.learning.optimizer import Optimizer
from mapo_jax.learning.programs import make_programs
from mapo_jax.learning.train_state import TrainState, abstract_state, create_state
from mapo_jax.learning.update import Update
from mapo_jax.model.lora import join
from mapo_jax.model.qwen import Params, init_adapters, parameter_shapes
from mapo_jax.model.sharding import make_mesh, param_shardings
from mapo_jax.rollout.engine import Engine
from mapo_jax.running.checkpoint import (
    CONFIG_FILE,
    Checkpoints,
    claim,
    cut_back,
    restore_base,
    save_base,
    whole_steps,
)
from mapo_jax.running.display import Display
from mapo_jax.running.forecast import check_memory, model_shape
from mapo_jax.running.heartbeat import Heartbeat
from mapo_jax.running.metrics import CompileCounter, MetricWriter
from mapo_jax.running.phases import Phases
from mapo_jax.running.policy import (
    MODEL_FOLDER,
    Policy,
    adapters,
    load_policy,
    make_engine,
    read_policy,
    save_model_files,
)
from mapo_jax.running.processes import Hosts, rollout_mesh, rollout_weights, share_of
from mapo_jax.running.stop import StopRequest
from mapo_jax.warmstart import run_warmstart
from mapo_jax.world import World, open_world


@dataclass(frozen=True)
class Run:
    """What stays as it is while a run goes on."""

    config: Config
    hosts: Hosts  # the processes that hold it together
    folder: Path
    mesh: Mesh
    policy: Policy
    world: World
    limits: Limits
    validation: list[Scenario]
    engine: Engine  # samples for training
    evaluator: Engine  # samples for evaluation
    sampling_weights: Callable[[Params], Params]  # the weights as the engines take them
    credit: Callable[..., Any]  # cells -> rewards, advantages
    update: Update
    scorer: Callable[..., Any]  # the trainer's own log-probabilities
    optimizer: Optimizer
    row_lengths: tuple[int, ...]
    checkpoints: Checkpoints
    writer: MetricWriter | None  # of the first process
    display: Display
    compiles: CompileCounter
    phases: Phases
    stop: StopRequest


def prepare(
    config: Config, stack: ExitStack, stop: StopRequest, console: Console, hosts: Hosts | None = None
) -> tuple[Run, Params | None]:
    """Everything that a run needs; bad input is refused before anything is written.

    Args:
      hosts: the processes of the run; None for this one alone.

    Returns:
      The run, and the weights that it starts from: None where it continues from a checkpoint of its own.
    """
    hosts = hosts or Hosts()
    folder = as_path(config.run.directory)
    compiles, phases = stack.enter_context(CompileCounter()), Phases()
    stack.enter_context(Heartbeat(phases))
    training = cards(config, "train")
    validation = cards(config, "validation")[: config.evaluation.scenarios]
    if config.rollout.scenarios > len(training):
        raise UserError(
            f"`rollout.scenarios` is {config.rollout.scenarios}; it must be at most the {len(training)} "
            "training scenarios there are"
        )
    share_of(config.rollout, hosts.count)  # before anything is read
    mesh = make_mesh(config.mesh)
    sampling_mesh = rollout_mesh(mesh, hosts)
    claim_together(config, folder, hosts, stack)
    world = stack.enter_context(
        open_world(
            config,
            cache_folder("runs") / str(folder).replace("/", "-") if in_bucket(folder) else folder,
            sampling_mesh,
            run_folder=folder,
            part=part_name(hosts.index, hosts.count),
            count=hosts.count,
        )
    )
    policy, params = starting_policy(config, folder, mesh, stop, console, hosts)
    programs = make_programs(config, policy.config, policy.chat.vocabulary_size, mesh)
    placed = dict(dtype=config.model.dtype, mesh=sampling_mesh, processes=hosts.count)
    engine = make_engine(policy, config.rollout, config.rollout.temperature, **placed)
    evaluator = (
        engine
        if config.evaluation.temperature == config.rollout.temperature
        else make_engine(policy, config.rollout, config.evaluation.temperature, **placed)
    )
    display = Display(
        f"{config.algorithm.estimator} · {folder}",
        config.training.steps,
        live=config.logging.progress and hosts.first,
        console=console,
    )
    checkpoints = stack.enter_context(
        Checkpoints(folder, keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)
    )
    # Before anything is appended: what was written after the newest whole checkpoint is written again.
    if hosts.first:
        cut_back(folder, max(checkpoints.steps, default=-1))
    hosts.exchange("cut back", None)
    run = Run(
        config=config,
        hosts=hosts,
        folder=folder,
        mesh=mesh,
        policy=policy,
        world=world,
        limits=Limits(
            config.rollout.min_turns, config.rollout.max_turns, config.environment.success_tolerance
        ),
        validation=validation,
        engine=engine,
        evaluator=evaluator,
        sampling_weights=rollout_weights(policy.config, mesh, hosts, config.model.dtype),
        credit=rows.make_credit(config.algorithm),
        update=programs.update,
        scorer=programs.scorer,
        optimizer=programs.optimizer,
        row_lengths=rows.row_lengths(config.rollout.max_tokens),
        checkpoints=checkpoints,
        writer=stack.enter_context(
            MetricWriter(folder, tensorboard=config.logging.tensorboard, wandb=config.logging.wandb)
        )
        if hosts.first
        else None,
        display=stack.enter_context(display),
        compiles=compiles,
        phases=phases,
        stop=stop,
    )
    return run, params


def claim_together(config: Config, folder: Path, hosts: Hosts, stack: ExitStack) -> None:
    """The first process takes the run folder for all; the others see whether it is the same one."""
    if hosts.first:
        stack.enter_context(claim(folder, config))
    hosts.exchange("claimed", None)
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"process {hosts.index} does not see what process 0 wrote to `run.directory` {folder}; it must "
            "be on storage that all hosts share, or a bucket"
        )


def starting_policy(
    config: Config, folder: Path, mesh: Mesh, stop: StopRequest, console: Console, hosts: Hosts
) -> tuple[Policy, Params | None]:
    """The policy that the run starts from; its model files go into the run folder."""
    begun = (folder / MODEL_FOLDER / "config.json").exists() and bool(whole_steps(folder))
    if hosts.exchange("begun", begun)[0]:
        # The run has begun: it needs nothing from outside any more, and its weights come with its moments.
        policy = read_policy(folder, config.rollout)
        check_memory(config, policy.config, mesh)  # it may go on with fewer devices
        return policy, None
    path = config.model.path or warm_start(config, mesh, stop, console, hosts)
    check_memory(config, model_shape(config), mesh)
    lora = adapters(config.lora)
    dtype = "float32" if lora is None else config.model.dtype
    policy, params = load_policy(path, config.rollout, mesh=mesh, dtype=dtype)
    if lora is not None:
        policy = replace(policy, config=replace(policy.config, lora=lora))
        save_base(folder, params)
        params = join(params, init_adapters(policy.config, config.training.seed, mesh))
    if hosts.first:
        save_model_files(folder, policy)
    return policy, params


def warm_start(config: Config, mesh: Mesh, stop: StopRequest, console: Console, hosts: Hosts) -> Path:
    """The folder of the warm start: every process makes it for itself on its own devices, or has it already.

    Raises:
      UserError: it is too weak, or not the same in all processes.
    """
    own = rollout_mesh(mesh, hosts)
    make = partial(run_warmstart, config, console=console, check=stop.check, mesh=own)
    folder = hosts.together("warm start", make)
    digest = blake2b()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    if len(set(hosts.exchange("warm starts", digest.hexdigest()))) > 1:
        raise UserError(
            "the warm starts of the processes differ, as on machines of different kinds; make one with "
            "python -m mapo_jax.warmstart, and begin a new run with its folder as `model.path` on every host"
        )
    return folder


def begin(run: Run, params: Params | None, deck: grain.DatasetIterator) -> tuple[int, TrainState]:
    """Steps done, and the state after them: a beginning with `params`, or the newest whole checkpoint."""
    shardings = param_shardings(run.policy.config, run.mesh)
    reference = run.config.algorithm.kl_coefficient > 0
    if params is not None:
        return 0, create_state(params, run.optimizer, shardings=shardings, reference=reference)
    shapes = parameter_shapes(run.policy.config, run.config.model.dtype)
    template = abstract_state(shapes, run.optimizer, shardings=shardings, reference=reference)
    state, reached = run.checkpoints.restore_latest(template)
    if template.base is not None:
        state = replace(state, base=restore_base(run.folder, template.base))
    deck.set_state(reached["deck"])
    if not run.hosts.first:
        pass
    elif reached["step"] == run.config.training.steps:
        run.display.note(f"the run in {run.folder} is finished; for another choose another run.directory")
    else:
        run.display.note(f"continuing {run.folder} after step {reached['step']}")
    return reached["step"], state


def cards(config: Config, split: str) -> list[Scenario]:
    """The cards of a split that this run's world can play. Raises as `load_scenarios` does."""
    scripted = config.environment.family == "scripted"
    return load_scenarios(config.environment.scenarios, split, scripted=scripted)


def scenario_deck(config: Config) -> grain.DatasetIterator:
    """Endless batches of S training scenarios, reshuffled every epoch; its position can be saved."""
    return iter(
        grain.MapDataset.source(cards(config, "train"))
        .seed(config.training.seed)
        .shuffle()
        .repeat()
        .batch(config.rollout.scenarios, batch_fn=list)
        .to_iter_dataset()
    )


def progress(config: Config, deck_state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside the state. Every random number follows from the seed and the step."""
    return {"deck": deck_state, "seed": config.training.seed, "configuration": to_yaml(config)}
