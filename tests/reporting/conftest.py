"""Run folders as training writes them, with dialogues of scripted speakers instead of a model."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mapo_jax.config import Config, RolloutConfig, TrainingConfig, to_yaml, updated
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.environment.scripted.helper import hold_dialogue, speaker
from mapo_jax.environment.scripted.readings import reading_metrics
from mapo_jax.environment.state import Limits
from mapo_jax.rollout.collect import Dialogue
from mapo_jax.rollout.rows import Row
from mapo_jax.scores.figures import summarize
from mapo_jax.tokenizer import train_tokenizer, write_tokenizer

HOSTILE = (
    '</script><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>\u202e\u0000\ud800'
)


@dataclass(frozen=True)
class Shape:
    """Size of a generated run."""

    steps: int = 6
    scenarios: int = 3
    rollouts: int = 3
    turns: int = 5
    every: int = 3  # steps between evaluations
    cards: int = 4  # validation cards
    fault_rate: float = 0.05
    seed: int = 0


def write_run(folder: Path, shape: Shape = Shape()) -> Path:
    """A run folder in which the replies get better step by step; no checkpoints."""
    config = Config(
        rollout=RolloutConfig(
            scenarios=shape.scenarios, rollouts=shape.rollouts, max_turns=shape.turns, min_turns=3
        ),
        training=TrainingConfig(steps=shape.steps, minibatch_scenarios=1, seed=shape.seed),
    )
    config = updated(
        config,
        {
            "evaluation.every": shape.every,
            "evaluation.scenarios": shape.cards,
            "evaluation.rollouts": 2,
            "environment.fault_rate": shape.fault_rate,
        },
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    roles = scripted_roles(config.environment)
    limits = Limits(3, shape.turns)
    cards = load_scenarios(split="train")
    validation = load_scenarios(split="validation")[: shape.cards]
    texts = [line for card in cards for stage in card.story.stages for line in stage.line]
    tokenizer = train_tokenizer(texts, 600, max_tokens=480)
    write_tokenizer(folder / "model", tokenizer)
    numbers = np.random.default_rng(shape.seed)

    def held(group, rollouts, step, skill):
        return [
            [
                Dialogue(
                    state := hold_dialogue(
                        card,
                        1000 * step + r + shape.seed,
                        lambda state: speaker(state, random.Random(f"{state.seed}{state.turn_count}"), skill),
                        roles,
                        limits,
                    ),
                    token_row(tokenizer, state, numbers),
                    scenario=s,
                    rollout=r,
                    step=step,
                    weight_version=step,
                )
                for r in range(rollouts)
            ]
            for s, card in enumerate(group)
        ]

    def measured(dialogues):
        states = [d.state for group in dialogues for d in group]
        return summarize(states, config.algorithm.discount) | reading_metrics(states)

    def save(file, dialogues):
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(d.to_json()) + "\n" for group in dialogues for d in group))

    lines = []
    for done in range(shape.steps + 1):
        skill = 0.1 + 0.8 * done / shape.steps
        if done:
            batch = random.Random(done).sample(cards, shape.scenarios)
            dialogues = held(batch, shape.rollouts, done - 1, skill)
            save(folder / "dialogues" / f"step_{done:06d}.jsonl", dialogues)
            lines.append({"step": done} | measured(dialogues) | machinery(numbers, done, shape.steps))
        if done % shape.every == 0 or done == shape.steps:
            dialogues = held(validation, 2, 0, skill)
            metrics = measured(dialogues)
            save(folder / "evaluations" / f"step_{done:06d}.jsonl", dialogues)
            (folder / "evaluations" / f"step_{done:06d}.json").write_text(json.dumps(metrics))
            lines.append({"step": done} | {f"evaluation/{k}": v for k, v in metrics.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def machinery(numbers, step, steps):
    """Made-up metrics of the update."""
    return {
        "actor/entropy": 0.8 - 0.5 * step / steps + 0.02 * numbers.normal(),
        "actor/approx_kl": 0.01 + 0.002 * numbers.normal(),
        "actor/clip_fraction": 0.05 + 0.01 * numbers.normal(),
        "actor/grad_norm": 0.8 + 0.1 * numbers.normal(),
        "actor/pg_loss": -0.01 * numbers.normal(),
        "actor/skipped": 0.0,
        "actor/lr": 5e-4 * (1 - step / steps),
        "sampler/logprob_diff_mean": 2e-7,
        "sampler/logprob_diff_max": 2e-6,
        "response_length/mean": 11.0,
        "response_length/truncated": 0.0,
        "timing_s/rollout": 2.0,
        "timing_s/update": 2.5,
        "timing_s/step": 4.5,
        "perf/tokens_per_second": 800.0,
        "perf/compiled_programs": 12.0,
    }


def token_row(tokenizer, state, numbers):
    """The dialogue as ChatML tokens; log-probabilities are made up."""
    row = Row()
    for index, turn in enumerate(state.turns):
        opening = "\n" if index else ""
        prompt = f"{opening}<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n"
        row = row.with_prompt(tokenizer.encode(prompt))
        ids = tokenizer.encode(turn.reply + "<|im_end|>")
        row = row.with_reply(
            ids, [float(np.float32(-x)) for x in numbers.exponential(0.5, len(ids))], index, ()
        )
    return row


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A small finished run; read only."""
    return write_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def run_copy(run_folder, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(run_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def poison():
    """Puts hostile text into every text of every file of a run."""
    return _poison


def _poison(folder):
    """Puts hostile text into every text of every file of a run."""

    def changed(value):
        if isinstance(value, str):
            return value + HOSTILE
        if isinstance(value, list):
            return [changed(entry) for entry in value]
        if isinstance(value, dict):
            return {key: entry if key == "outcome" else changed(entry) for key, entry in value.items()}
        return value

    for file in folder.glob("*/step_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            for turn in row["state"]["turns"]:
                turn["failure"] = turn["failure"] or "x"
        file.write_text("".join(json.dumps(changed(row)) + "\n" for row in rows))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, HOSTILE: 1.0, f"evaluation/{HOSTILE}": 1.0} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = (folder / "config.yaml").read_text().replace("path: null", f"path: {json.dumps(HOSTILE[:-3])}")
    (folder / "config.yaml").write_text(config)
