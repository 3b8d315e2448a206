"""A run and what it is made of: set up from its configuration, begun or continued, saved, and left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import grain
from jax.sharding import Mesh
from rich.console import Console

from mapo_jax.commands import Stopped, cache_folder, machine_errors
from mapo_jax.config import Config, to_yaml
from mapo_jax.environment.scenario import Scenario, load_scenarios
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.files import as_path, in_bucket, part_name
from mapo_jax.learning.batch import row_lengths
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
    refuse_lost_checkpoints,
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
    Policy,
    adapters,
    load_policy,
    make_engine,
    read_policy,
    save_model_files,
)
from mapo_jax.running.processes import Processes, rollout_mesh, rollout_weights, share_of
from mapo_jax.running.processes import join as join_processes
from mapo_jax.running.stop import Interrupted, StopRequest
from mapo_jax.warmstart import run_warmstart
from mapo_jax.world import World, open_world


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that changes from step to step."""

    step: int  # finished steps
    state: TrainState
    deck: dict[str, Any]  # the scenario deck's own position


@dataclass(frozen=True)
class Run:
    """What stays as it is while a run goes on."""

    config: Config
    processes: Processes
    folder: Path
    mesh: Mesh
    policy: Policy
    start: (
        Params | None
    )  # weights it starts from; None where it continues from a checkpoint; donated by `begin`
    world: World
    limits: Limits
    validation: list[Scenario]
    engine: Engine  # samples for training
    evaluator: Engine  # samples for evaluation
    sampling_weights: Callable[[Params], Params]  # the weights as the engines take them
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
    compiled_lengths: set[int] = field(default_factory=set)  # row lengths that an update is compiled for

    def leave(self, interruption: Interrupted, at: Position) -> NoReturn:
        """Saves an interrupted run and ends it.

        Raises:
          UserError: the error that interrupted it, if one did.
          Stopped: otherwise.
        """
        save(self, at)
        self.checkpoints.wait()
        saved = f"{self.folder} is saved after step {at.step} of {self.config.training.steps}"
        _end(self.processes, interruption, f": {saved}; the same command goes on from there")


@contextmanager
def open_run(config: Config, console: Console | None = None) -> Iterator[Run]:
    """A run, built from its configuration by all of its processes; closed at the end of the context.

    Raises:
      UserError: bad input; nothing is written then.
      Stopped: a signal came before the first step.
    """
    with join_processes(config) as processes, ExitStack() as stack, processes.speaking(), machine_errors():
        console = console or Console(highlight=False, markup=False, quiet=not processes.first)
        stop = stack.enter_context(StopRequest(config.run.deadline_minutes, processes.peers))
        try:
            run = prepare(config, stack, stop, console, processes)
        except Interrupted as interruption:
            _end(processes, interruption, " before the first step; the same command starts again")
        yield run
        processes.part()


def _end(processes: Processes, interruption: Interrupted, where: str) -> NoReturn:
    processes.part()
    if isinstance(interruption.__cause__, UserError):
        raise interruption.__cause__ from None
    raise Stopped(str(interruption), f"stopped by {interruption}{where}") from interruption


def prepare(
    config: Config, stack: ExitStack, stop: StopRequest, console: Console, processes: Processes
) -> Run:
    """Everything that a run needs; bad input is refused before anything is written."""
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
    share_of(config.rollout, processes.count)  # before anything is read
    mesh = make_mesh(config.mesh)
    sampling_mesh = rollout_mesh(mesh, processes)
    claim_together(config, folder, processes, stack)
    world = stack.enter_context(
        open_world(
            config,
            cache_folder("runs") / str(folder).replace("/", "-") if in_bucket(folder) else folder,
            sampling_mesh,
            run_folder=folder,
            part=part_name(processes.index, processes.count),
            count=processes.count,
        )
    )
    policy, params = starting_policy(config, folder, mesh, stop, console, processes)
    programs = make_programs(config, policy.config, policy.chat.vocabulary_size, mesh)
    placed = dict(dtype=config.model.dtype, mesh=sampling_mesh, processes=processes.count)
    engine = make_engine(policy, config.rollout, config.rollout.temperature, **placed)
    evaluator = (
        engine
        if config.evaluation.temperature == config.rollout.temperature
        else make_engine(policy, config.rollout, config.evaluation.temperature, **placed)
    )
    display = Display(
        f"{config.algorithm.estimator} · {folder}",
        config.training.steps,
        live=config.logging.progress and processes.first,
        console=console,
    )
    checkpoints = stack.enter_context(
        Checkpoints(folder, keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)
    )
    # Before anything is appended: what was written after the newest whole checkpoint is written again.
    done = max(checkpoints.steps, default=-1)
    if processes.first:
        for lost in cut_back(folder, done):
            display.note(lost)
    processes.exchange("cut back", None)
    run = Run(
        config=config,
        processes=processes,
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
        sampling_weights=rollout_weights(policy.config, mesh, processes, config.model.dtype),
        start=params,
        update=programs.update,
        scorer=programs.scorer,
        optimizer=programs.optimizer,
        row_lengths=row_lengths(config.rollout.max_tokens),
        checkpoints=checkpoints,
        writer=stack.enter_context(
            MetricWriter(
                folder, tensorboard=config.logging.tensorboard, wandb=config.logging.wandb, after=done
            )
        )
        if processes.first
        else None,
        display=stack.enter_context(display),
        compiles=compiles,
        phases=phases,
        stop=stop,
    )
    return run


def claim_together(config: Config, folder: Path, processes: Processes, stack: ExitStack) -> None:
    """The first process takes the run folder for all; the others see whether it is the same one."""
    if processes.first:
        stack.enter_context(claim(folder, config))
    processes.exchange("claimed", None)
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"process {processes.index} does not see what process 0 wrote to `run.directory` {folder}; it "
            "must be on storage that all hosts share, or a bucket"
        )


def starting_policy(
    config: Config, folder: Path, mesh: Mesh, stop: StopRequest, console: Console, processes: Processes
) -> tuple[Policy, Params | None]:
    """The policy that the run starts from; its model files go into the run folder."""
    if processes.exchange("begun", bool(whole_steps(folder)))[0]:
        # The run has begun: it needs nothing from outside any more, and its weights come with its moments.
        policy = read_policy(folder, config.rollout)
        check_memory(config, policy.config, mesh)  # it may go on with fewer devices
        return policy, None
    refuse_lost_checkpoints(folder, config)
    path = config.model.path or warm_start(config, mesh, stop, console, processes)
    check_memory(config, model_shape(config), mesh)
    lora = adapters(config.lora)
    dtype = "float32" if lora is None else config.model.dtype
    policy, params = load_policy(path, config.rollout, mesh=mesh, dtype=dtype)
    if lora is not None:
        policy = replace(policy, config=replace(policy.config, lora=lora))
        save_base(folder, params)
        params = join(params, init_adapters(policy.config, config.training.seed, mesh))
    if processes.first:
        save_model_files(folder, policy)
    return policy, params


def warm_start(config: Config, mesh: Mesh, stop: StopRequest, console: Console, processes: Processes) -> Path:
    """The folder of the warm start: every process makes it for itself on its own devices, or has it already.

    Raises:
      UserError: it is too weak, or not the same in all processes.
    """
    own = rollout_mesh(mesh, processes)
    make = partial(run_warmstart, config, console=console, check=stop.check, mesh=own)
    folder = processes.together("warm start", make)
    digest = blake2b()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    if len(set(processes.exchange("warm starts", digest.hexdigest()))) > 1:
        raise UserError(
            "the warm starts of the processes differ, as on machines of different kinds; make one with "
            "python -m mapo_jax.warmstart, and begin a new run with its folder as `model.path` on every host"
        )
    return folder


def begin(run: Run, deck: grain.DatasetIterator) -> Position:
    """Where the run begins, or its newest whole checkpoint; the deck is put there as well."""
    shardings = param_shardings(parameter_shapes(run.policy.config), run.mesh)
    reference = run.config.algorithm.kl_coefficient > 0
    if run.start is not None:
        state = create_state(run.start, run.optimizer, shardings=shardings, reference=reference)
        return Position(0, state, deck.get_state())
    shapes = parameter_shapes(run.policy.config, run.config.model.dtype)
    template = abstract_state(shapes, run.optimizer, shardings=shardings, reference=reference)
    state, reached = run.checkpoints.restore_latest(template)
    if template.base is not None:
        state = replace(state, base=restore_base(run.folder, template.base))
    deck.set_state(reached["deck"])
    if not run.processes.first:
        pass
    elif reached["step"] == run.config.training.steps:
        run.display.note(f"the run in {run.folder} is finished; for another choose another run.directory")
    else:
        run.display.note(f"continuing {run.folder} after step {reached['step']}")
    return Position(reached["step"], state, deck.get_state())


def save(run: Run, at: Position) -> None:
    """Starts to save a checkpoint; every random number follows from the seed and the step."""
    progress = {
        "deck": at.deck,
        "seed": run.config.training.seed,
        "configuration": to_yaml(run.config),
    }
    with run.phases("checkpoint"):
        run.checkpoints.save(at.step, at.state, progress)


def evaluation_due(config: Config, step: int) -> bool:
    """Whether the weights after `step` steps are evaluated."""
    return step % config.evaluation.every == 0 or step == config.training.steps


def checkpoint_due(config: Config, step: int) -> bool:
    """Whether to save after `step` steps: regularly, before every evaluation, and at the end."""
    return step % config.checkpoint.every == 0 or evaluation_due(config, step)


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
