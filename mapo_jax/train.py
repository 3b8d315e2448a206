"""The main job: collect dialogues, give every turn its credit, update, and again.

    python -m mapo_jax.train [--config configs/NAME.yaml] [key=value ...] [--dry-run]

One step, as in docs/design.md: scenarios -> dialogues -> rewards -> advantages -> rows -> new weights. The
same command started again continues the run from its newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from mapo_jax.commands import Stopped, prepare_jax, printable, run_command
from mapo_jax.config import Config, load_config
from mapo_jax.environment.dialogue import facts, from_facts
from mapo_jax.environment.live import health
from mapo_jax.environment.live.cost import live_forecast
from mapo_jax.environment.live.guard import WorldFailing
from mapo_jax.environment.scenario import Scenario
from mapo_jax.environment.scripted.helper import good_helper, hold_dialogue
from mapo_jax.environment.scripted.readings import reading_metrics
from mapo_jax.errors import UserError
from mapo_jax.files import in_bucket, part_name, part_of, read_object, write_whole
from mapo_jax.learning import batch as rows
from mapo_jax.learning.programs import rows_per_dialogue
from mapo_jax.learning.train_state import TrainState
from mapo_jax.learning.update import fetch, place
from mapo_jax.reporting.write import write_report
from mapo_jax.rollout.collect import Dialogue, collect
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.journal import Journal
from mapo_jax.run import Run, begin, cards, prepare, progress, scenario_deck
from mapo_jax.running.display import results_table, transcript
from mapo_jax.running.forecast import check_update, forecast
from mapo_jax.running.phases import phase
from mapo_jax.running.processes import Hosts, join
from mapo_jax.running.stop import Interrupted, StopRequest
from mapo_jax.running.utilization import memory, peak_flops, step_work, utilization
from mapo_jax.scores.figures import summarize

EVALUATION_STREAM = 1_000_003  # added to the seed: evaluation's dialogues are never training's


def train(config: Config, console: Console | None = None) -> None:
    """Makes, or continues, the run that `config` describes; all it writes is below `run.directory`.

    Raises:
      UserError: bad input, a full disk, an update that is not finite; what was saved stays whole.
      Stopped: a signal came; the last finished step is saved.
    """
    prepare_jax(config.run.compilation_cache)
    with join(config) as hosts, ExitStack() as stack, hosts.speaking():
        console = console or Console(highlight=False, markup=False, quiet=not hosts.first)
        stop = stack.enter_context(StopRequest(config.run.deadline_minutes, hosts.peers))
        try:
            run, params = prepare(config, stack, stop, console, hosts)
        except Interrupted as interruption:
            leave(hosts, interruption, " before the first step; the same command starts again")
        deck = scenario_deck(config)
        done, state = begin(run, params, deck)
        deck_state = deck.get_state()

        def save() -> None:
            with run.phases("checkpoint"):
                run.checkpoints.save(done, state, progress(config, deck_state))

        if hosts.count == 1:  # a checkpoint is everybody's work, a pause is one's own
            run.world.on_pause = save
        lengths = set()
        try:
            if done < config.training.steps:
                warm_up(run, state)
                count_lost_time(run)
            while True:
                if done % config.evaluation.every == 0 or done == config.training.steps:
                    evaluate(run, state, done)
                    inspect_judge(run, done)
                if done == config.training.steps:
                    break

                started = time.monotonic()
                dialogues, rollout_metrics = gather(run, state, next(deck), done)
                if (length := row_length(run, dialogues)) not in lengths:
                    lengths.add(length)  # an update of this length is compiled now, which may outlast the
                    if done:  # time that a machine leaves us which is taken away
                        save()
                state, update_metrics = learn(run, state, dialogues, done)
                done, deck_state = done + 1, deck.get_state()
                record(run, done, dialogues, rollout_metrics | update_metrics, started)

                due = done % config.checkpoint.every == 0 or done % config.evaluation.every == 0
                if due or done == config.training.steps:
                    save()
                hosts.together("the end of a step", run.stop.check)
        except Interrupted as interruption:
            save()
            run.checkpoints.wait()
            saved = f"{run.folder} is saved after step {done} of {config.training.steps}"
            leave(hosts, interruption, f": {saved}; the same command goes on from there")
        run.checkpoints.wait()
        run.display.close()
        if hosts.first:
            conclude(run, console)
        hosts.part()


def leave(hosts: Hosts, interruption: Interrupted, where: str) -> NoReturn:
    """Ends an interrupted run: with the error that was the reason, where it was had, else with Stopped."""
    hosts.part()
    if isinstance(interruption.__cause__, UserError):
        raise interruption.__cause__ from None
    raise Stopped(str(interruption), f"stopped by {interruption}{where}") from interruption


# --- One step. ---


@phase("rollout")
def gather(
    run: Run, state: TrainState, scenarios: list[Scenario], step: int
) -> tuple[list[list[Dialogue]], dict[str, float]]:
    """The policy as it stands talks R times in each scenario: dialogues [S][R]."""
    started, before = time.monotonic(), replace(run.engine.counts)
    run.engine.load(run.sampling_weights(state.weights), step)
    dialogues = converse(
        run, run.engine, scenarios, run.config.rollout.rollouts, run.config.training.seed, step
    )
    seconds, work = time.monotonic() - started, run.engine.counts.since(before)
    held = [row for group in dialogues for dialogue in group for row in dialogue.rows]
    metrics, parts = measure(
        run,
        scenarios,
        dialogues,
        seconds=seconds,
        tokens=sum(sum(row.sampled) for row in held),
        sizes=[len(row) for row in held],
        work=asdict(work),
    )
    if parts:
        sampled = sum(part["tokens"] for part in parts)
        sizes = [size for part in parts for size in part["sizes"]]
        cut = [turn["truncated"] for part in parts for _, told in part["dialogues"] for turn in told["turns"]]
        work = replace(work, **{name: sum(part["work"][name] for part in parts) for name in asdict(work)})
        waited = max(part["seconds"] - part["work"]["seconds"] for part in parts)
        metrics |= step_work(run.policy.config, run.config, sizes, sampled, work) | {
            "response_length/mean": sampled / max(1, len(cut)),
            "response_length/truncated": sum(cut) / max(1, len(cut)),
            "timing_s/environment": max(0.0, waited),
            "perf/tokens_per_second": sampled / max(part["seconds"] for part in parts),
            "perf/prefilled_share": work.prefilled / max(1, work.prefilled + work.copied),
            "perf/lanes_busy": work.sampled / max(1, work.steps * run.engine.lanes),
        }
    return dialogues, metrics


@phase("update")
def learn(
    run: Run, state: TrainState, dialogues: list[list[Dialogue]], step: int
) -> tuple[TrainState, dict[str, float]]:
    """Every turn gets its advantage, every token its turn's, and the weights move: one or more updates."""
    config = run.config
    cells = rows.make_cells(
        dialogues, config.rollout.max_turns, max_failed_share=config.environment.max_failed_share
    )
    # Statistics are over all processes' dialogues; from here on every process does the same.
    cells = rows.Cells(*run.hosts.gather((cells.positions, cells.valid, cells.scored)))
    _, advantages = run.credit(cells.positions, cells.valid, cells.scored)
    advantages = np.asarray(advantages)
    rows_each = rows_per_dialogue(config)
    own = run.hosts.share(config.rollout.scenarios)
    batch = rows.make_batch(
        dialogues,
        advantages[own],
        cells.scored[own],
        row_length(run, dialogues),
        rows_per_dialogue=rows_each,
    )
    batch = run.hosts.gather(batch)
    if config.algorithm.old_logprobs == "trainer":
        old = run.scorer(state.weights, place(batch, run.mesh))
        batch = replace(batch, old_logprobs=run.hosts.whole(old))
    updates = []
    for epoch in range(config.training.epochs):
        order = rows.scenario_order(
            config.training.seed, step, epoch, config.rollout.scenarios, config.training.minibatch_scenarios
        )
        for chosen in order:
            minibatch = rows.take_scenarios(batch, chosen, config.rollout.rollouts * rows_each)
            state, metrics = run.update(state, place(minibatch, run.mesh))
            updates.append(metrics)
    metrics = fetch(updates)
    if metrics["actor/skipped"]:
        raise UserError(
            f"the loss or gradient of step {step + 1} is not finite, so its update was not applied; start a "
            "new run from the last good weights with a lower optimizer.learning_rate: "
            f"model.path={run.folder} run.directory=NEW"
        )
    scored = advantages[cells.scored] if cells.scored.any() else np.zeros(1)
    return state, metrics | {
        "advantages/mean": float(scored.mean()),
        "advantages/std": float(scored.std()),
        "advantages/min": float(scored.min()),
        "advantages/max": float(scored.max()),
    }


def record(
    run: Run, done: int, dialogues: list[list[Dialogue]], metrics: dict[str, float], started: float
) -> None:
    """Puts a finished step on the disk and on the screen."""
    devices = run.mesh.devices
    metrics |= run.phases.take() | {
        "timing_s/step": time.monotonic() - started,
        "timing_s/compile": run.compiles.take_seconds(),
        "timing_s/unix": time.time(),
        "perf/compiled_programs": float(run.compiles.count),
    }
    if done % run.config.logging.dialogues_every == 0:
        write_dialogues(run, run.folder / "dialogues" / f"step_{done:06d}.jsonl", dialogues)
    if not run.hosts.first:
        return
    peak = peak_flops(devices.flat[0], run.config.logging.peak_flops)
    metrics |= utilization(metrics, devices=devices.size, peak=peak) | memory()
    run.writer.write(done, metrics)
    run.display.step(done, metrics)


@phase("evaluation")
def evaluate(run: Run, state: TrainState, done: int) -> None:
    """Holds the validation dialogues with the weights after `done` steps; the same seeds every time.

    Written whole to evaluations/step_N.json, so that a run which is killed here repeats or skips it exactly.
    Once training has begun, a live world that fails here costs this evaluation and no more.
    """
    file = run.folder / "evaluations" / f"step_{done:06d}.json"
    if run.hosts.exchange("before an evaluation", read_object(file) is not None)[
        0
    ]:  # a cut one is held again
        return
    config = run.config
    run.evaluator.load(run.sampling_weights(state.weights), done)
    seed = config.training.seed + EVALUATION_STREAM
    try:
        dialogues = converse(
            run, run.evaluator, run.validation, config.evaluation.rollouts, seed, 0, patient=done == 0
        )
    except WorldFailing as failing:  # training can do without, and waits for its own world if it must
        run.display.note(f"validation after {done} steps is left out: {printable(str(failing))}")
        return
    metrics, _ = measure(run, run.validation, dialogues)
    write_dialogues(run, file.with_suffix(".jsonl"), dialogues)
    if not run.hosts.first:
        return
    run.writer.write(done, {f"evaluation/{name}": value for name, value in metrics.items()})
    write_whole(file, json.dumps(metrics, indent=1))
    run.display.evaluation(done, metrics)
    if dialogues and done in (0, config.training.steps):
        run.display.note(transcript(dialogues[0][0].state, "before" if done == 0 else "after"))


@phase("calibration")
def inspect_judge(run: Run, done: int) -> None:
    """Scores the fixed calibration replies and probes with a live judge; warns of what a policy would learn.

    Written whole to evaluations/step_N_judge.json, as an evaluation is.
    """
    folder = run.folder / "evaluations"
    file = folder / f"step_{done:06d}_judge.json"
    if not run.world.live or run.hosts.exchange("before the judge's inspection", file.exists())[0]:
        return
    run.hosts.together("the judge's inspection", lambda: run.hosts.first and score_judge(run, folder, done))


def score_judge(run: Run, folder: Path, done: int) -> None:
    """The first process's part of `inspect_judge`."""
    file = folder / f"step_{done:06d}_judge.json"
    run.display.phase("judge")
    levels = run.world.score_calibration(run.config.training.seed + EVALUATION_STREAM + done, run.stop.check)
    beginning = folder / "step_000000_judge.json"
    metrics = health.summary(levels, read_object(beginning)) | run.world.metrics()
    run.writer.write(done, metrics)
    write_whole(file, json.dumps(levels, indent=1))
    for warning in health.warnings(metrics):
        run.display.note(warning)


def converse(
    run: Run,
    engine: Engine,
    scenarios: Sequence[Scenario],
    rollouts: int,
    seed: int,
    step: int,
    patient: bool = True,
) -> list[list[Dialogue]]:
    """This process's share of the dialogues of the policy with the world, [S / processes][rollouts].

    `patient` and what is raised as in `World.hold`; a world that fails one process fails all.
    """
    own = run.hosts.share(len(scenarios))
    total = (own.stop - own.start) * rollouts * run.limits.max_turns
    training = seed == run.config.training.seed
    name = "dialogues" if training else "validation"

    def progress(turns: int) -> None:
        run.stop.check()
        run.display.phase(name + run.world.status(), turns, total)

    def collection(journal: Journal | None) -> Awaitable[list[list[Dialogue]]]:
        return collect(
            scenarios,
            rollouts,
            engine,
            run.policy.chat,
            run.world.roles if training else run.world.evaluation_roles,
            run.limits,
            seed=seed,
            step=step,
            concurrency=run.config.environment.concurrency,
            own=own,
            on_turn=progress,
            journal=journal,
        )

    def hold() -> tuple[list[list[Dialogue]] | None, str | None]:
        try:
            dialogues = run.world.hold(
                collection,
                stream="train" if training else "evaluation",
                step=engine.version,
                check=run.stop.check,
                note=run.display.note,
                patient=patient,
            )
        except WorldFailing as failing:
            return None, str(failing)
        return dialogues, None

    dialogues, failing = run.hosts.together(name, hold)
    engine.unload()  # the update needs the memory
    if words := next(filter(None, run.hosts.exchange("the world", failing)), None):
        raise WorldFailing(words)
    return dialogues


def measure(
    run: Run, scenarios: Sequence[Scenario], dialogues: list[list[Dialogue]], **own: Any
) -> tuple[dict[str, float], list[dict[str, Any]] | None]:
    """The figures of all processes' dialogues: what they came to, what the replies were, what calls cost.

    No word of a dialogue travels for them. With more figures of this process's `own` come all processes'
    parts; other processes than the first get nothing.
    """
    held = [(dialogue.scenario, facts(dialogue.state)) for group in dialogues for dialogue in group]
    parts = run.hosts.report("figures", {"dialogues": held, "calls": run.world.drain(), **own})
    if parts is None:
        return {}, None
    states = [from_facts(scenarios[s], what) for part in parts for s, what in part["dialogues"]]
    calls = run.world.metrics([part["calls"] for part in parts])
    return summarize(states, run.config.algorithm.discount) | reading_metrics(states) | calls, parts


def row_length(run: Run, dialogues: list[list[Dialogue]]) -> int:
    """The length that all processes pad their rows to."""
    return max(run.hosts.exchange("rows", rows.row_length(dialogues, run.row_lengths)))


def write_dialogues(run: Run, file: Path, dialogues: list[list[Dialogue]]) -> None:
    """One JSON row per dialogue: enough to read it, re-score it, or replay its update.

    Every process writes those that it held, with several into a file of its own: step_000010-00001-of-00004.
    """
    lines = [json.dumps(dialogue.to_json()) for group in dialogues for dialogue in group]
    file = part_of(file, part_name(run.hosts.index, run.hosts.count))
    write_whole(file, "".join(f"{line}\n" for line in lines))


# --- Before the first step, and after the last. ---


@phase("warm_up")
def warm_up(run: Run, state: TrainState) -> None:
    """Compiles the sampler's programs before the first dialogue, so that no step waits for one; and on an
    accelerator the longest update, so that what does not fit costs no dialogue."""
    for engine in dict.fromkeys((run.engine, run.evaluator)):
        run.display.phase("compiling")
        engine.load(run.sampling_weights(state.weights), -1)
        engine.warm_up()
        engine.unload()  # a large model's memory holds the weights of one engine, and not of two
        run.hosts.together("compiling", run.stop.check)
    check_update(run.update, state, run.config, run.mesh)


def count_lost_time(run: Run) -> None:
    """Counts what an interruption cost: from the end of the step that the run goes on from until now."""
    finished = run.writer and run.writer.last("timing_s/unix")
    if finished is not None:
        run.phases.add("lost", max(0.0, time.time() - finished))


def conclude(run: Run, console: Console) -> None:
    """Prints what was learnt, against where it started and the good helper, and where everything lies."""
    files = [run.folder / "evaluations" / f"step_{step:06d}.json" for step in (0, run.config.training.steps)]
    states = [
        hold_dialogue(scenario, seed, good_helper, run.world.roles, run.limits)
        for scenario in run.validation
        for seed in range(run.config.evaluation.rollouts)
        if not run.world.live  # the helper speaks the scripted world's language
    ]
    helper = summarize(states, run.config.algorithm.discount) | reading_metrics(states)
    write_whole(run.folder / "evaluations" / "helper.json", json.dumps(helper, indent=1))
    first, last = map(read_object, files)
    if first is not None and last is not None:
        console.print(results_table(first, last, helper))
    elif last is None:
        console.print("the last validation could not be held; the same command tries it again")
    else:
        console.print(f"{files[0]} is missing or damaged, so before and after are not compared")
    try:
        if in_bucket(run.folder):
            raise UserError("it lies in a bucket; copy the folder to a disk")
        said = f"what it learnt to do, as a page for the browser: {write_report([run.folder])}"
    except Exception as error:  # the run is finished and whole; a page can be had later
        said = f"no report was written ({error}); try python -m mapo_jax.report --run {run.folder}"
    console.print(said, markup=False, soft_wrap=True)
    console.print(f"everything lies in {run.folder}/: metrics.jsonl, tensorboard/, dialogues/, evaluations/,")
    console.print("checkpoints/. Take the weights along with:")
    console.print(f"  python -m mapo_jax.export --run {run.folder} --output FOLDER", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (see commands.run_command)."""
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.train",
        description="Trains a dialogue policy with MAPO or one of its baselines. Without arguments: a tiny "
        "model in the scripted world, on the CPU, in minutes. The same command continues an unfinished run.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; without it the embedded defaults")
    parser.add_argument("--dry-run", action="store_true", help="print what a run would be, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=20")
    options = parser.parse_args(arguments)

    def command() -> None:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            console = Console(highlight=False, markup=False)
            console.print(forecast(config), markup=False, soft_wrap=True)
            if config.environment.family == "live":
                table = live_forecast(config, cards(config, "train"), len(cards(config, "validation")))
                console.print(table, markup=False, soft_wrap=True)
        else:
            train(config)

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
