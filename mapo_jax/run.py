"""A run: built from its configuration, started or continued, saved and ended."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import grain
import jax
from jax.sharding import Mesh
from rich.console import Console

from mapo_jax.commands import Stopped, cache_folder, machine_errors, show
from mapo_jax.config import Config, to_yaml
from mapo_jax.environment.roles import limits_of
from mapo_jax.environment.scenario import Scenario, load_scenarios
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.files import append_line, as_path, disk_errors, in_bucket
from mapo_jax.idle import idle_settings, refuse_unused_roles
from mapo_jax.learning.optimizer import Optimizer
from mapo_jax.learning.programs import make_programs
from mapo_jax.learning.train_state import (
    TrainState,
    abstract_state,
    create_state,
    trained_and_frozen,
    weights_copy,
)
from mapo_jax.learning.update import Update
from mapo_jax.model.backends import decode_attention
from mapo_jax.model.lora import join
from mapo_jax.model.qwen import Params, init_adapters, parameter_shapes
from mapo_jax.model.sharding import make_mesh, param_shardings, with_shardings
from mapo_jax.rollout.collect import Dialogue
from mapo_jax.rollout.device import Device, Exclusive
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.journal import Journal
from mapo_jax.rollout.requests import Counts
from mapo_jax.running.checkpoint import Checkpoints, restore_params, save_base
from mapo_jax.running.display import Display
from mapo_jax.running.forecast import check_memory, model_shape
from mapo_jax.running.heartbeat import Heartbeat
from mapo_jax.running.metrics import METRICS_FILE, CompileCounter, MetricWriter, import_wandb, read_rows
from mapo_jax.running.origin import start_row
from mapo_jax.running.phases import Phases
from mapo_jax.running.policy import Policy, adapters, load_policy, make_engine, read_policy, save_model_files
from mapo_jax.running.processes import Processes, rollout_mesh, rollout_weights, share_of
from mapo_jax.running.processes import join as join_processes
from mapo_jax.running.run_folder import (
    BASE_FOLDER,
    CONFIG_FILE,
    STARTS_FILE,
    claim,
    cut_back,
    refuse_lost_checkpoints,
    whole_steps,
)
from mapo_jax.running.stop import Interrupted, StopRequest
from mapo_jax.warmstart import run_warmstart
from mapo_jax.world import Begun, World, open_world


@dataclass(frozen=True)
class Position:
    """The state of a run that changes from step to step."""

    step: int  # finished steps
    state: TrainState
    deck: dict[str, Any]  # position of the scenario deck


@dataclass(frozen=True)
class UnderWay:
    """The dialogues of one step, from their first turn until the step's update is over."""

    engine: Engine  # with the weights that speak in them
    weights: Params | None  # the same; None without `rollout.ahead`, when they are the trainer's
    hold: Callable[[Journal | None], Awaitable[list[list[Dialogue]]]]
    started: float  # by `time.monotonic`
    before: Counts  # of the engine
    begun: Begun[Dialogue] | None = None  # with `rollout.ahead`
    ended: list[float] = field(default_factory=list)  # when attempts to hold them were over

    async def hold_timed(self, journal: Journal | None) -> list[list[Dialogue]]:
        """Holds the dialogues, and notes the time at the end."""
        try:
            return await self.hold(journal)
        finally:
            self.ended.append(time.monotonic())


@dataclass(frozen=True)
class Run:
    """The parts of a run that stay the same from step to step."""

    config: Config
    processes: Processes
    folder: Path
    mesh: Mesh
    policy: Policy
    start: Params | None  # start weights, donated by `begin`; None if a checkpoint is continued
    world: World
    limits: Limits
    validation: list[Scenario]
    engine: Engine  # samples for training; with `rollout.ahead`, each step does with a twin of it
    evaluator: Engine  # samples for evaluation
    sampling_weights: Callable[[Params], Params]  # from training weights to those of the engines
    copy_weights: jax.stages.Wrapped  # of a tree of weights, in the compute dtype
    update: Update
    scorer: Callable[..., Any]  # the trainer's log-probabilities
    optimizer: Optimizer
    checkpoints: Checkpoints
    writer: MetricWriter | None  # in process 0
    display: Display
    compiles: CompileCounter
    phases: Phases
    stop: StopRequest
    compiled_lengths: set[int] = field(default_factory=set)  # row lengths with a compiled update
    under_way: dict[int, UnderWay] = field(default_factory=dict)  # by step
    restored: dict[int, Params] = field(default_factory=dict)  # trained weights by version, of a checkpoint

    def leave(self, interruption: Interrupted, at: Position) -> NoReturn:
        """Saves an interrupted run and ends it.

        Raises:
          UserError: the error in this process that interrupted it, if any.
          Stopped: otherwise.
        """
        save(self, at)
        self.checkpoints.wait()
        saved = f"{self.folder} is saved after step {at.step} of {self.config.training.steps}"
        _end(self.processes, interruption, f": {saved}; the same command goes on from there")


@contextmanager
def open_run(config: Config, console: Console | None = None, *, verbose: bool = False) -> Iterator[Run]:
    """A run in all of its processes, built from its configuration; closed at the end of the context.

    Args:
      console: for its output; None for standard output.
      verbose: as of `Display`.

    Raises:
      UserError: bad input; nothing was written.
      Stopped: a stop request before the first step.
    """
    with (
        join_processes(config) as processes,
        ExitStack() as stack,
        processes.exit_on_error(),
        machine_errors(),
    ):
        console = console or Console(highlight=False, markup=False, quiet=not processes.first)
        answer = partial(show, console)
        stop = stack.enter_context(StopRequest(config.run.deadline_minutes, processes.peers, answer))
        try:
            run = prepare(config, stack, stop, console, processes, verbose=verbose)
        except Interrupted as interruption:
            _end(processes, interruption, " before the first step; the same command starts again")
        yield run
        processes.finish()


def _end(processes: Processes, interruption: Interrupted, where: str) -> NoReturn:
    processes.finish()
    if isinstance(interruption.__cause__, UserError):
        raise interruption.__cause__ from None
    raise Stopped(str(interruption), f"stopped by {interruption}{where}") from interruption


def prepare(
    config: Config,
    stack: ExitStack,
    stop: StopRequest,
    console: Console,
    processes: Processes,
    *,
    verbose: bool = False,
) -> Run:
    """Builds a run; refuses bad input before anything is written."""
    folder = as_path(config.run.directory)
    refuse_unused_roles(config)
    if config.logging.wandb and processes.first:
        import_wandb()  # before anything is spent
    _, validation = cards_of_run(config)
    compiles = stack.enter_context(CompileCounter())
    share = share_of(config.rollout, processes.count)  # may raise, so before anything is read
    mesh = make_mesh(config.mesh)
    sampling_mesh = rollout_mesh(mesh, processes)
    claim_together(config, folder, processes, stack)
    local = cache_folder("runs") / str(folder).replace("/", "-") if in_bucket(folder) else folder
    opened = open_world(config, local, sampling_mesh, run_folder=folder, processes=processes)
    world = stack.enter_context(opened)
    show(console, f"{folder}: building the run")
    policy, params = starting_policy(config, folder, mesh, stop, console, processes)
    phases = Phases()  # from here on: a warm start may take longer than any phase, and shows its progress
    stack.enter_context(Heartbeat(phases))
    chat = policy.chat
    programs = make_programs(config, policy.config, chat.vocabulary_size, mesh)
    model = policy.config, chat.stop_ids, chat.vocabulary_size
    device = Device(shared=config.rollout.ahead > 0)
    sampler = partial(make_engine, *model, share, dtype=config.model.dtype, mesh=sampling_mesh, device=device)
    engine = evaluator = sampler(config.rollout.temperature)
    if config.evaluation.temperature != config.rollout.temperature:
        evaluator = sampler(config.evaluation.temperature)
    title, live = f"{config.algorithm.estimator} · {folder}", config.logging.progress and processes.first
    display = Display(title, config.training.steps, live=live, console=console, verbose=verbose)
    phases.entered = lambda phase: display.enter(phase, phases.stretches(phase))
    kept = config.checkpoint
    checkpoints = stack.enter_context(Checkpoints(folder, keep=kept.keep, keep_best=kept.keep_best))
    # Before anything is appended: files after the newest whole checkpoint will be written again.
    done = max(checkpoints.steps, default=-1)
    writer = None
    if processes.first:
        if idle := idle_settings(config, len(validation), processes.count):
            display.note(f"no effect in this run: {', '.join(idle)}")
        for problem in cut_back(folder, done):
            display.note(problem)
        with disk_errors(folder / STARTS_FILE):
            append_line(folder / STARTS_FILE, (json.dumps(start_row(mesh)) + "\n").encode())
        display.continue_after(read_rows(folder / METRICS_FILE))
        logging = config.logging
        options = dict(tensorboard=logging.tensorboard, wandb=logging.wandb, after=done)
        writer = stack.enter_context(MetricWriter(folder, configuration=config.model_dump(), **options))
    processes.exchange("cut back", None)
    return Run(
        config=config,
        processes=processes,
        folder=folder,
        mesh=mesh,
        policy=policy,
        world=world,
        limits=limits_of(config),
        validation=validation,
        engine=engine,
        evaluator=evaluator,
        sampling_weights=rollout_weights(policy.config, mesh, processes, config.model.dtype),
        copy_weights=weights_copy(config.model.dtype),
        start=params,
        update=Exclusive(programs.update, device),
        scorer=Exclusive(programs.scorer, device),
        optimizer=programs.optimizer,
        checkpoints=checkpoints,
        writer=writer,
        display=stack.enter_context(display),
        compiles=compiles,
        phases=phases,
        stop=stop,
    )


def claim_together(config: Config, folder: Path, processes: Processes, stack: ExitStack) -> None:
    """Process 0 claims the run folder for all; the others check that they see the same folder."""
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
    """The policy and the start weights (None to continue); writes its model files into the run folder."""
    if processes.exchange("begun", bool(whole_steps(folder)))[0]:
        # The run folder has everything; weights are restored with the optimizer's state, in `begin`.
        policy = read_policy(folder, config.rollout)
        check_memory(config, policy.config, mesh)  # there may be fewer devices than before
        return policy, None
    refuse_lost_checkpoints(folder, config)
    decode_attention(config.rollout.cache, mesh, model_shape(config), config.model.dtype)  # may raise
    path = config.model.path or warm_start(config, mesh, stop, console, processes)
    check_memory(config, model_shape(config), mesh)
    lora = adapters(config.lora)
    dtype = "float32" if lora is None else config.model.dtype
    show(console, f"loading the model {path}")
    policy, params = load_policy(path, config.rollout, mesh=mesh, dtype=dtype)
    if lora is not None:
        policy = replace(policy, config=replace(policy.config, lora=lora))
        save_base(folder, params)
        params = join(params, init_adapters(policy.config, config.training.seed, mesh))
    if processes.first:
        save_model_files(folder, policy)
    return policy, params


def warm_start(config: Config, mesh: Mesh, stop: StopRequest, console: Console, processes: Processes) -> Path:
    """The folder of the warm start, which every process trains on its own devices unless it is cached.

    Raises:
      UserError: it is too weak, or differs between processes.
    """
    local_mesh = rollout_mesh(mesh, processes)
    make = partial(run_warmstart, config, console=console, check=stop.check, mesh=local_mesh)
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
    """The start of the run, or its newest whole checkpoint; sets the position of the deck."""
    shardings = param_shardings(parameter_shapes(run.policy.config), run.mesh)
    reference = run.config.algorithm.kl_coefficient > 0
    if run.start is not None:
        state = create_state(run.start, run.optimizer, shardings=shardings, reference=reference)
        return Position(0, state, deck.get_state())
    run.display.announce("reading the checkpoint")
    shapes = parameter_shapes(run.policy.config, run.config.model.dtype)
    template = abstract_state(shapes, run.optimizer, shardings=shardings, reference=reference)
    state, progress = run.checkpoints.restore_latest(template)
    if template.base is not None:
        state = replace(state, base=restore_params(run.folder / BASE_FOLDER, template.base))
    deck.set_state(progress["deck"])
    step, config = progress["step"], run.config
    copy = run.copy_weights.eval_shape(template.params)
    copy = with_shardings(copy, jax.tree.map(lambda leaf: leaf.sharding, template.params))
    run.restored.update(
        run.checkpoints.restore_sampling(dict.fromkeys(_versions_to_save(config, step), copy))
    )
    note = f"continuing {run.folder} after step {step}"
    if step == run.config.training.steps:
        note = f"the run in {run.folder} is finished; for another choose another run.directory"
    if run.processes.first:
        run.display.note(note)
    return Position(step, state, deck.get_state())


def sampler_version(config: Config, step: int) -> int:
    """The version of the weights that hold the dialogues of a step: how many updates they have had."""
    return max(0, step - config.rollout.ahead)


def _versions_to_save(config: Config, step: int) -> list[int]:
    """The versions before `step` that hold dialogues of the steps from `step` on."""
    later = range(step, min(step + config.rollout.ahead, config.training.steps))
    return sorted(
        {version for version in (sampler_version(config, each) for each in later) if version < step}
    )


def save(run: Run, at: Position) -> None:
    """Starts to save a checkpoint. It needs no random state: numbers follow from the seed and the step.

    Dialogues under way are not saved: those of a step are held again, by the same weights. So the checkpoint
    has these too, in the precision in which they sample.
    """
    earlier = _versions_to_save(run.config, at.step)
    sampling = {
        version: trained_and_frozen(collection.weights)[0]
        for step, collection in run.under_way.items()
        if (version := sampler_version(run.config, step)) in earlier
    }
    progress = {"deck": at.deck, "seed": run.config.training.seed, "configuration": to_yaml(run.config)}
    several = run.processes.count > 1  # they synchronise by programs on their devices
    run.checkpoints.wait()  # for the save before this one, without the devices
    with run.phases("checkpoint"), run.engine.device if several else nullcontext():
        run.checkpoints.save(at.step, at.state, progress, sampling)


def evaluation_due(config: Config, step: int) -> bool:
    """Whether the weights after `step` steps are evaluated."""
    return step % config.evaluation.every == 0 or step == config.training.steps


def checkpoint_due(config: Config, step: int) -> bool:
    """Whether to save after `step` steps: at intervals, before every evaluation, and at the end."""
    return step % config.checkpoint.every == 0 or evaluation_due(config, step)


def cards(config: Config, split: str) -> list[Scenario]:
    """The scenario cards of a split for this run's world. Raises as `load_scenarios` does."""
    scripted = config.environment.family == "scripted"
    return load_scenarios(config.environment.scenarios, split, scripted=scripted)


def cards_of_run(config: Config) -> tuple[list[Scenario], list[Scenario]]:
    """The training cards, and the validation cards of an evaluation.

    Raises:
      UserError: as `load_scenarios`, or there are too few for a step.
    """
    training, validation = cards(config, "train"), cards(config, "validation")
    if config.rollout.scenarios > len(training):
        raise UserError(
            f"`rollout.scenarios` is {config.rollout.scenarios}; it must be at most the {len(training)} "
            "training scenarios there are"
        )
    return training, validation[: config.evaluation.scenarios]


def scenario_deck(config: Config) -> grain.DatasetIterator:
    """An endless iterator over batches of S training scenarios, reshuffled every epoch; it has a state."""
    return iter(
        grain.MapDataset.source(cards(config, "train"))
        .seed(config.training.seed)
        .shuffle()
        .repeat(2**31)  # not `repeat()`: the length of endless batches of one overflows in grain
        .batch(config.rollout.scenarios, batch_fn=list)
        .to_iter_dataset()
    )
