"""Validation: dialogues with cards that a run never trains on, the judge's health, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path

from mapo_jax.commands import printable
from mapo_jax.environment.live import health
from mapo_jax.environment.live.guard import WorldFailing
from mapo_jax.environment.scripted.helper import good_helper, hold_dialogue
from mapo_jax.environment.scripted.readings import reading_metrics
from mapo_jax.errors import UserError
from mapo_jax.files import in_bucket, read_object, write_whole
from mapo_jax.reporting.write import write_report
from mapo_jax.run import Position, Run
from mapo_jax.running.display import results_table, transcript
from mapo_jax.scores.figures import summarize
from mapo_jax.stages import converse, measure, write_dialogues

EVALUATION_STREAM = 1_000_003  # added to the seed: evaluation's dialogues are never training's


def validate(run: Run, at: Position) -> None:
    """Evaluates the weights as they stand, and a live judge with them."""
    with run.phases("evaluation"):
        evaluate(run, at)
    with run.phases("calibration"):
        inspect_judge(run, at.step)


def evaluate(run: Run, at: Position) -> None:
    """Holds the validation dialogues with the weights as they stand; the same seeds every time.

    Written whole to evaluations/step_N.json, so that a run which is killed here repeats or skips it exactly.
    Once training has begun, a live world that fails here costs this evaluation and no more.
    """
    file = run.folder / "evaluations" / f"step_{at.step:06d}.json"
    if run.processes.exchange("before an evaluation", read_object(file) is not None)[0]:
        return
    config = run.config
    run.evaluator.load(run.sampling_weights(at.state.weights), at.step)
    seed = config.training.seed + EVALUATION_STREAM
    rollouts, patient = config.evaluation.rollouts, at.step == 0
    try:
        dialogues = converse(run, at, run.evaluator, run.validation, rollouts, seed, 0, patient=patient)
    except WorldFailing as failing:  # training can do without, and waits for its own world if it must
        run.display.note(f"validation after {at.step} steps is left out: {printable(str(failing))}")
        write_lost_calls(run, at.step)
        return
    metrics, _ = measure(run, run.validation, dialogues)
    write_dialogues(run, file.with_suffix(".jsonl"), dialogues)
    if not run.processes.first:
        return
    run.writer.write(at.step, {f"evaluation/{name}": value for name, value in metrics.items()})
    write_whole(file, json.dumps(metrics, indent=1))
    run.display.evaluation(at.step, metrics)
    if dialogues and at.step in (0, config.training.steps):
        run.display.note(transcript(dialogues[0][0].state, "before" if at.step == 0 else "after"))


def write_lost_calls(run: Run, step: int) -> None:
    """Writes what the calls of an abandoned evaluation cost, or the next step would count them."""
    calls = run.processes.report("calls", run.world.drain())
    if calls is not None:
        run.writer.write(step, {f"evaluation/{name}": x for name, x in run.world.metrics(calls).items()})


def inspect_judge(run: Run, step: int) -> None:
    """Scores the fixed calibration replies and probes with a live judge; warns of what a policy would learn.

    Written whole to evaluations/step_N_judge.json, as an evaluation is.
    """
    folder = run.folder / "evaluations"
    file = folder / f"step_{step:06d}_judge.json"
    if not run.world.live:
        return
    if run.processes.exchange("before the judge's inspection", read_object(file) is not None)[0]:
        return
    run.processes.together(
        "the judge's inspection", lambda: run.processes.first and _score_judge(run, folder, step)
    )


def _score_judge(run: Run, folder: Path, step: int) -> None:
    """The first process's part of `inspect_judge`."""
    file = folder / f"step_{step:06d}_judge.json"
    run.display.phase("judge")
    levels = run.world.score_calibration(run.config.training.seed + EVALUATION_STREAM + step, run.stop.check)
    first = read_object(folder / "step_000000_judge.json")
    metrics = health.summary(levels, first) | run.world.metrics()
    run.writer.write(step, metrics)
    write_whole(file, json.dumps(levels, indent=1))
    for warning in health.warnings(metrics):
        run.display.note(warning)


def conclude(run: Run) -> None:
    """Prints what was learnt, against where it started and the good helper, and where everything lies."""
    run.checkpoints.wait()
    run.display.close()
    if not run.processes.first:
        return
    console = run.display.console
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
    if first is None:
        console.print(f"{files[0]} is missing or damaged, so before and after are not compared")
    elif last is None:
        console.print("the last validation could not be held; the same command tries it again")
    else:
        console.print(results_table(first, last, helper))
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
