"""The stages of one step, which the loop of `train.py` calls, over all processes of a run.

Each process holds its share of the dialogues. From the cells on, each has the data of the whole step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np

from mapo_jax.algorithm.cells import Mask, Values
from mapo_jax.environment.dialogue import from_stripped, strip_texts
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.readings import reading_metrics
from mapo_jax.errors import UserError
from mapo_jax.files import part_name, part_of, write_whole
from mapo_jax.learning.batch import Batch, Cells, make_batch, make_cells, row_length, row_lengths
from mapo_jax.learning.programs import rows_per_dialogue
from mapo_jax.learning.train_state import TrainState, trained_and_frozen
from mapo_jax.learning.update import Metrics, fetch, place
from mapo_jax.model.lora import join
from mapo_jax.model.qwen import Params
from mapo_jax.rollout.collect import Dialogue, collect
from mapo_jax.rollout.device import Exclusive
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.journal import Journal
from mapo_jax.rollout.requests import Counts
from mapo_jax.run import Position, Run, UnderWay, sampler_version, save
from mapo_jax.running.forecast import check_update
from mapo_jax.running.utilization import memory, peak_flops, step_work, utilization
from mapo_jax.scores.figures import summarize

T = TypeVar("T")
Dialogues = list[list[Dialogue]]  # [S][R], of this process's scenarios
EVALUATION_STREAM = 1_000_003  # added to the seed, so that no dialogue of validation repeats one of training


def warm_up(run: Run, at: Position) -> None:
    """Compiles the sampler's programs, and on an accelerator the longest update, before the first dialogue.

    So no step waits for the sampler, and an update that does not fit is found at once.
    """
    with run.phases("warm_up"):
        for engine in dict.fromkeys((run.engine, run.evaluator)):
            if engine is not run.engine:
                run.display.announce("compiling the sampler of validation")
            weights = [at.state.weights]
            if run.config.rollout.ahead and engine is run.engine:
                weights.append(_copy(run, at, at.step))  # of another precision, and so for other programs
            while weights:
                engine.load(run.sampling_weights(weights.pop()), -1)
                engine.warm_up()
                engine.unload()  # one engine at a time has weights
            run.processes.together("compiling", run.stop.check)
        if run.mesh.devices.flat[0].platform != "cpu":
            run.display.announce("compiling the longest update")
        check_update(run.update, at.state, run.config, run.mesh, run.policy.config)
    finished = run.writer and run.writer.last("timing_s/unix")
    if finished is not None:  # time since the end of the last finished step
        run.phases.add("lost", max(0.0, time.time() - finished))


# --- Dialogues. ---


def hold_dialogues(run: Run, at: Position, deck: grain.DatasetIterator) -> tuple[Dialogues, dict[str, float]]:
    """Holds R dialogues in each scenario of the step: dialogues [S][R], and their metrics.

    With `rollout.ahead` they began N steps earlier, and those of the step N later begin now.
    """
    device, started = run.engine.device, time.monotonic()
    device.take_seconds()  # those before this step do not count
    busy = device.seconds
    scenarios = _begin_due(run, at, deck)
    collection = run.under_way[at.step]
    dialogues = _wait(run, at, collection, stream="train", step=at.step)
    engine, rows = collection.engine, [row for group in dialogues for each in group for row in each.rows]
    measured = {
        "seconds": collection.ended[-1] - collection.started,
        "waited": time.monotonic() - started - (device.seconds - busy),
        "tokens": sum(sum(row.sampled) for row in rows),
        "sizes": [len(row) for row in rows],
        "work": asdict(engine.counts.since(collection.before)),
    }
    metrics, reports = measure(run, scenarios, dialogues, measured)
    version = dialogues[0][0].weight_version
    metrics |= {"sampler/version": float(version), "sampler/staleness": float(at.step - version)}
    return dialogues, metrics | (_rollout_metrics(run, reports) if reports else {})


def _begin_due(run: Run, at: Position, deck: grain.DatasetIterator) -> list[Scenario]:
    """Begins every step whose weights exist by now; returns the scenarios of this one, and draws them."""
    last = min(at.step + run.config.rollout.ahead, run.config.training.steps - 1)
    scenarios = next(deck)
    following = deck.get_state()
    for step in range(at.step, last + 1):
        drawn = scenarios if step == at.step else next(deck)
        if step not in run.under_way:
            run.under_way[step] = _begin(run, at, drawn, step)
    run.restored.clear()
    deck.set_state(following)  # the next step draws the later ones again
    return scenarios


def _begin(run: Run, at: Position, scenarios: Sequence[Scenario], step: int) -> UnderWay:
    """Loads the weights that hold the dialogues of a step; with `rollout.ahead`, also begins these.

    All of a step's dialogues are of one version, and that follows from the step alone.
    """
    version, ahead, started = sampler_version(run.config, step), run.config.rollout.ahead, time.monotonic()
    engine, copy = (run.engine.twin(), _copy(run, at, version)) if ahead else (run.engine, None)
    before = replace(engine.counts)
    engine.load(Exclusive(run.sampling_weights, engine.device)(copy or at.state.weights), version)
    hold = _collection(run, scenarios, engine, step=step, training=True)
    collection = UnderWay(engine, copy, hold, started, before)
    if not ahead:
        return collection
    return replace(collection, begun=run.world.begin(collection.hold_timed, stream="train", step=step))


def _copy(run: Run, at: Position, version: int) -> Params:
    """The weights of a version, that updates leave alone; all steps under way share the frozen ones."""
    copy = Exclusive(run.copy_weights, run.engine.device)
    trained = copy(at.state.params) if version == at.step else run.restored[version]
    if at.state.base is None:
        return trained
    others = [collection.weights for collection in run.under_way.values()]
    return join(trained_and_frozen(others[0])[1] if others else copy(at.state.base), trained)


def _rollout_metrics(run: Run, reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tokens, time and work of a step's dialogues, from the measurements of each process."""
    sampled = sum(report["tokens"] for report in reports)
    sizes = [size for report in reports for size in report["sizes"]]
    turns = [turn for report in reports for _, dialogue in report["dialogues"] for turn in dialogue["turns"]]
    truncated = sum(turn["truncated"] for turn in turns)
    work = Counts(**{name: sum(report["work"][name] for report in reports) for name in reports[0]["work"]})
    world = max(report["seconds"] - report["work"]["seconds"] for report in reports)
    return step_work(run.policy.config, run.config, sizes, sampled, work) | {
        "response_length/mean": sampled / max(1, len(turns)),
        "response_length/truncated": truncated / max(1, len(turns)),
        "timing_s/environment": max(0.0, world),
        "timing_s/waiting_for_world": max(0.0, *(report["waited"] for report in reports)),
        "perf/tokens_per_second": sampled / max(report["seconds"] for report in reports),
        "perf/prefilled_share": work.prefilled / max(1, work.prefilled + work.copied),
        "perf/lanes_busy": work.sampled / max(1, work.steps * run.engine.lanes),
    }


def converse(run: Run, at: Position, scenarios: Sequence[Scenario], *, patient: bool = True) -> Dialogues:
    """This process's share of the validation dialogues with the weights of `run.evaluator`, [S][rollouts].

    They have the same random numbers after every step. `patient` and errors as of `World.hold`; a world that
    fails in one process fails in all.
    """
    hold = _collection(run, scenarios, run.evaluator, step=0, training=False)
    collection = UnderWay(run.evaluator, None, hold, time.monotonic(), replace(run.evaluator.counts))
    return _wait(run, at, collection, stream="evaluation", step=at.step, patient=patient)


def _collection(
    run: Run, scenarios: Sequence[Scenario], engine: Engine, *, step: int, training: bool
) -> Callable[[Journal | None], Awaitable[Dialogues]]:
    """A function that holds this process's share of the dialogues, [S / processes][rollouts]."""
    config, share = run.config, run.processes.share(len(scenarios))
    if training:
        name, roles = "dialogues", run.world.roles
        rollouts, seed = config.rollout.rollouts, config.training.seed
    else:
        name, roles = "validation dialogues", run.world.evaluation_roles
        rollouts, seed = config.evaluation.rollouts, config.training.seed + EVALUATION_STREAM
    count = (share.stop - share.start) * rollouts

    def progress(turns: int, ended: int) -> None:
        run.stop.check()
        if not training or step == run.world.awaited:  # not of steps that nobody waits for yet
            most = count * run.limits.max_turns
            run.display.phase(name + run.world.status(), turns, most, counted=f"{ended}/{count}")

    def collection(journal: Journal | None) -> Awaitable[Dialogues]:
        return collect(
            scenarios,
            rollouts,
            engine,
            run.policy.chat,
            roles,
            run.limits,
            seed=seed,
            step=step,
            concurrency=run.world.calls,
            share=share,
            on_turn=progress,
            journal=journal,
        )

    return collection


def _wait(
    run: Run, at: Position, collection: UnderWay, *, stream: str, step: int, patient: bool = True
) -> Dialogues:
    """The dialogues of a collection, which begins now unless it has begun; frees its memory."""
    if run.processes.count == 1:  # of several each pauses alone, and cannot save alone
        run.world.on_pause = partial(save, run, at)
    run.world.awaited = step if stream == "train" else None
    try:
        return run.world.hold(
            collection.hold_timed,
            stream=stream,
            step=step,
            check=run.stop.check,
            note=run.display.note,
            patient=patient,
            begun=collection.begun,
        )
    finally:
        if collection.begun is None:
            collection.engine.unload()  # the update needs the memory
        else:
            collection.engine.reset()  # a checkpoint may still need the weights


def measure(
    run: Run, scenarios: Sequence[Scenario], dialogues: Dialogues, measured: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]] | None]:
    """Metrics of all processes' dialogues: rewards, returns, kinds of replies, cost of calls.

    Each process reports numbers and labels of its dialogues, without text, and `measured`. Process 0
    gets the metrics and all reports; the others get ({}, None).
    """
    states = [(dialogue.scenario, strip_texts(dialogue.state)) for group in dialogues for dialogue in group]
    report = {"dialogues": states, "calls": run.world.drain(), **measured}
    if (reports := run.processes.report("figures", report)) is None:
        return {}, None
    states = [from_stripped(scenarios[s], state) for each in reports for s, state in each["dialogues"]]
    calls = run.world.metrics([each["calls"] for each in reports])
    return summarize(states, run.config.algorithm.discount) | reading_metrics(states) | calls, reports


def write_dialogues(run: Run, file: Path, dialogues: Dialogues) -> None:
    """Writes one JSON row per dialogue: enough to read it, score it again, or replay its update.

    Each of several processes writes a file of its share: step_000010-00001-of-00004.jsonl.
    """
    lines = [json.dumps(dialogue.to_json()) for group in dialogues for dialogue in group]
    file = part_of(file, part_name(run.processes.index, run.processes.count))
    write_whole(file, "".join(f"{line}\n" for line in lines))


# --- From dialogues to rows. ---


def lay_out_cells(run: Run, dialogues: Dialogues) -> Cells:
    """Positions and masks of every turn of the step, `[S, R, T]`, of all processes' dialogues."""
    max_failed_share = run.config.environment.max_failed_share
    cells = make_cells(dialogues, run.config.rollout.max_turns, max_failed_share=max_failed_share)
    return Cells(*_gather(run, (cells.positions, cells.valid, cells.scored)))


def lay_out_rows(run: Run, dialogues: Dialogues, advantages: Values, scored: Mask) -> Batch:
    """The token rows of the step, `[B, L]`, of all processes' dialogues, with each token's advantage."""
    share = run.processes.share(run.config.rollout.scenarios)
    length = row_length(dialogues, row_lengths(run.config.rollout.max_tokens))
    length = max(run.processes.exchange("rows", length))
    advantages, rows = np.asarray(advantages)[share], rows_per_dialogue(run.config)
    batch = make_batch(dialogues, advantages, scored[share], length, rows_per_dialogue=rows)
    return _gather(run, batch)


def _gather(run: Run, tree: T) -> T:
    """`Processes.gather`, which runs programs on the devices."""
    if run.processes.count == 1:
        return tree
    with run.engine.device:
        return run.processes.gather(tree)


# --- The update. ---


def save_before_compiling(run: Run, at: Position, rows: Batch) -> None:
    """Saves the run before an update is compiled for rows of a new length.

    Compilation cannot be interrupted, and may outlast the preemption notice.
    """
    length = rows.tokens.shape[1]
    if length in run.compiled_lengths:
        return
    if at.step:
        save(run, at)
    run.compiled_lengths.add(length)
    run.display.announce(f"compiling the update of rows of {length} tokens")


def rescore(run: Run, state: TrainState, rows: Batch) -> Batch:
    """The rows with the old log-probabilities of the ratio: the sampler's, or computed by the trainer."""
    if run.config.algorithm.old_logprobs == "sampler":
        return rows
    logprobs = run.scorer(state.weights, place(rows, run.mesh))
    return replace(rows, old_logprobs=np.asarray(_gather(run, logprobs)))


def finish_update(
    run: Run, at: Position, updates: Sequence[Metrics], advantages: Values, scored: Mask
) -> dict[str, float]:
    """Metrics of a step's updates and advantages; waits for the device.

    Raises:
      UserError: a loss or gradient was not finite. That update was not applied.
    """
    with run.engine.device:  # busy until the updates are over
        metrics = fetch(updates)
    if metrics["actor/skipped"]:
        raise UserError(not_finite(run, at.step, float(updates[0]["actor/skipped"]) > 0))
    values = np.asarray(advantages)[scored] if scored.any() else np.zeros(1)
    statistics = ("mean", "std", "min", "max")
    return metrics | {f"advantages/{name}": float(getattr(values, name)()) for name in statistics}


def not_finite(run: Run, step: int, first_update: bool) -> str:
    """The error message about an update that is not finite; `first_update`: it is the first of its step."""
    what = f"the loss or gradient of step {step + 1} is not finite, so its update was not applied; "
    if step == 0 and first_update:
        start = run.config.model.path or "the warm start"
        return (
            f"{what}no update came before it, so the start weights are the reason: {start} overflows in "
            f"model.dtype={run.config.model.dtype}; start a new run from others, or in another model.dtype"
        )
    if not run.checkpoints.steps:
        return f"{what}start a new run with a lower optimizer.learning_rate: run.directory=NEW"
    return (
        f"{what}start a new run from the last good weights with a lower optimizer.learning_rate: "
        f"model.path={run.folder} run.directory=NEW"
    )


def record(run: Run, at: Position, dialogues: Dialogues, metrics: dict[str, float], started: float) -> None:
    """Writes a finished step to the disk and the display; lets the weights go that spoke in it.

    Args:
      at: after the step.
      metrics: of its dialogues and updates.
      started: the start of the step, by `time.monotonic`.
    """
    run.under_way.pop(at.step - 1)
    seconds = time.monotonic() - started
    times = {
        "timing_s/step": seconds,
        "timing_s/compile": run.compiles.take_seconds(),
        "timing_s/unix": time.time(),
        "perf/device_busy": run.engine.device.take_seconds() / seconds,
        "perf/compiled_programs": float(run.compiles.count),
    }
    metrics = metrics | run.phases.take() | times
    write_dialogues(run, run.folder / "dialogues" / f"step_{at.step:06d}.jsonl", dialogues)
    if not run.processes.first:
        return
    devices = run.mesh.devices
    peak = peak_flops(devices.flat[0], run.config.logging.peak_flops)
    metrics |= utilization(metrics, devices=devices.size, peak=peak) | memory()
    run.writer.write(at.step, metrics)
    run.display.step(at.step, metrics)
