"""Validation: dialogues with held-out cards, tests of a live judge, and the final comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rich.table import Table

from mapo_jax.commands import printable
from mapo_jax.environment.live import health
from mapo_jax.environment.live.guard import WorldFailing
from mapo_jax.environment.scripted.helper import good_helper, hold_dialogue
from mapo_jax.environment.scripted.readings import reading_metrics
from mapo_jax.errors import UserError
from mapo_jax.files import in_bucket, read_object, write_whole
from mapo_jax.reporting.folder import read_run
from mapo_jax.reporting.study import Study
from mapo_jax.reporting.summary import tiles
from mapo_jax.reporting.write import write_report
from mapo_jax.rollout.device import Exclusive
from mapo_jax.run import Position, Run
from mapo_jax.running.display import results_table, transcript
from mapo_jax.running.run_folder import best_steps
from mapo_jax.scores.figures import summarize
from mapo_jax.stages import EVALUATION_STREAM, converse, measure, write_dialogues

SAMPLES = 3  # dialogues of an evaluation that the loggers show


def validate(run: Run, at: Position) -> None:
    """Evaluates the current weights, and tests a live judge."""
    evaluate(run, at)
    inspect_judge(run, at.step)


def evaluate(run: Run, at: Position) -> None:
    """Holds the validation dialogues with the current weights, with the same seeds every time.

    Writes evaluations/step_N.json atomically, so that a killed run repeats or skips it exactly. If a live
    world fails after the first step, this evaluation is left out and training continues.
    """
    file = run.folder / "evaluations" / f"step_{at.step:06d}.json"
    if run.processes.exchange("before an evaluation", read_object(file) is not None)[0]:
        return
    with run.phases("evaluation"):
        _evaluate(run, at, file)


def _evaluate(run: Run, at: Position, file: Path) -> None:
    weights = Exclusive(run.sampling_weights, run.engine.device)(at.state.weights)
    run.evaluator.load(weights, at.step)
    try:
        dialogues = converse(run, at, run.validation, patient=at.step == 0)
    except WorldFailing as failing:
        run.display.note(f"validation after {at.step} steps is left out: {printable(str(failing))}")
        # Writes the cost of the calls, so that the next row does not count them.
        calls = run.processes.report("calls", run.world.drain())
        if calls is not None:
            _write(run, at.step, run.world.metrics(calls))
        return
    metrics, _ = measure(run, run.validation, dialogues, {})
    write_dialogues(run, file.with_suffix(".jsonl"), dialogues)
    if not run.processes.first:
        return
    _write(run, at.step, metrics)
    write_whole(file, json.dumps(metrics, indent=1))
    run.display.evaluation(at.step, metrics)
    samples = [group[0].state for group in dialogues[:SAMPLES] if group]
    run.writer.write_dialogues(at.step, [(s.scenario.id, transcript(s, f"step {at.step}")) for s in samples])
    if dialogues and at.step in (0, run.config.training.steps):
        run.display.note(transcript(dialogues[0][0].state, "before" if at.step == 0 else "after"))


def _write(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    run.writer.write(step, {f"evaluation/{name}": value for name, value in metrics.items()})


def inspect_judge(run: Run, step: int) -> None:
    """Scores fixed calibration replies and probes with a live judge; warns if it rewards the wrong replies.

    Writes evaluations/step_N_judge.json atomically.
    """
    file = run.folder / "evaluations" / f"step_{step:06d}_judge.json"
    if not run.world.live:
        return
    if run.processes.exchange("before the judge's inspection", read_object(file) is not None)[0]:
        return
    with run.phases("calibration"):
        run.processes.together("the judge's inspection", partial(_score_judge, run, file, step))


def _score_judge(run: Run, file: Path, step: int) -> None:
    """The inspection itself, which process 0 does alone."""
    if not run.processes.first:
        return
    levels = run.world.score_calibration(run.config.training.seed + EVALUATION_STREAM + step, run.stop.check)
    first = read_object(file.with_name("step_000000_judge.json"))
    metrics = health.summary(levels, first) | run.world.metrics()
    run.writer.write(step, metrics)
    write_whole(file, json.dumps(levels, indent=1))
    for warning in health.warnings(metrics):
        run.display.note(warning)


def conclude(run: Run) -> None:
    """Writes the report, and prints whether the policy improved and where the files are."""
    if run.phases.stretches("checkpoint"):  # a save may be under way
        with run.phases("checkpoint"):
            run.checkpoints.wait()
    if not run.processes.first:
        run.display.close()
        return
    with run.phases("report"):
        lines = _conclusion(run)
    run.display.close()
    for line in lines:
        if isinstance(line, str):
            run.display.note(line)
        else:
            run.display.console.print(line)


def _conclusion(run: Run) -> list[str | Table]:
    """The verdict, and where things are; with `verbose` the table of before, after and the good helper."""
    folder = run.folder
    files = [folder / "evaluations" / f"step_{step:06d}.json" for step in (0, run.config.training.steps)]
    states = [
        hold_dialogue(scenario, seed, good_helper, run.world.roles, run.limits)
        for scenario in run.validation
        for seed in range(run.config.evaluation.rollouts)
        if not run.world.live  # the helper works in the scripted world only
    ]
    helper = summarize(states, run.config.algorithm.discount) | reading_metrics(states)
    write_whole(folder / "evaluations" / "helper.json", json.dumps(helper, indent=1))
    first, last = map(read_object, files)
    lines: list[str | Table] = []
    if first is None:
        lines.append(f"{files[0]} is missing or damaged, so before and after are not compared")
    elif last is None:
        lines.append("the last validation could not be held; the same command tries it again")
    else:
        lines += [results_table(first, last, helper)] if run.display.verbose or in_bucket(folder) else []
    try:
        if in_bucket(folder):
            raise UserError("it lies in a bucket; copy the folder to a disk")
        page = f"What it learnt to do, as a page for the browser: {write_report([folder])}"
        lines.append(verdict(Study.of(0, read_run(folder, dialogues=1))))
    except Exception as error:  # the run itself is finished; the report can be written later
        page = f"no report was written ({error}); try python -m mapo_jax.report --run {folder}"
    lines += [page, f"The weights: python -m mapo_jax.export --run {folder} --output FOLDER"]
    best = best_steps(folder, run.checkpoints.steps)
    if best and best[0] != run.config.training.steps:
        lines.append(f"The best validation was after step {best[0]}; its weights: the same with --step best")
    return lines


def verdict(study: Study) -> str:
    """Three sentences: better or not, by how much with the interval, and whether users are helped."""
    word, sentence, state = study.verdict
    way = next((tile["progress"] for tile in tiles(study) if tile["progress"] is not None), None)
    way = f", {way:.0%} of the way to the good helper" if state == "good" and way else ""
    return printable(f"{word}{way}. {sentence}".replace("\u00a0", " "))
