"""From a run's checkpoint to a Hugging Face folder that others can load, with a model card.

    python -m mapo_jax.export --run RUN --output FOLDER [--step N] [--dtype float32|bfloat16]

The folder holds weights (safetensors), config.json, the tokenizer with the chat template that renders
dialogues as they were trained on, generation_config.json and README.md. It is written whole or not at all,
and loaded again and checked before it takes its name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from rich.console import Console

from mapo_jax.commands import run_command
from mapo_jax.config import Config, load_config
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.model.qwen import Params, parameter_count
from mapo_jax.training.checkpoint import CONFIG_FILE, checkpoint_folder
from mapo_jax.training.metrics import METRICS_FILE
from mapo_jax.training.model_folder import whole_folder, write_model_folder
from mapo_jax.training.policy import Policy, load_policy
from mapo_jax.warmstarting.rows import Renderer

DTYPES = ("float32", "bfloat16")
_SAMPLE = (
    ("I keep thinking about the night shifts.", "You live with the night shifts every day."),
    ("Yes. I feel tired.", "It makes sense that you feel tired."),
)


def export(run: Path | str, output: Path | str, *, step: int | None = None, dtype: str = "float32") -> int:
    """Writes the policy of a run's checkpoint to `output`.

    Args:
      run: run folder.
      output: a folder that does not exist yet, or an empty one.
      step: which checkpoint; the latest by default.
      dtype: of the written weights; the run's own are float32.

    Returns:
      The step that was exported.

    Raises:
      UserError: no run, no such checkpoint, an occupied output folder, a full disk, or a written folder that
        does not reproduce the policy.
    """
    run, output = Path(run), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output {output} is not empty; export never overwrites: give another folder")
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is no run folder (no {CONFIG_FILE}); give the folder of a training run")
    config = load_config(run / CONFIG_FILE)
    step = int(checkpoint_folder(run, step).name)
    policy, params = load_policy(run, config.rollout, step=step)
    try:
        with whole_folder(output) as temporary:
            write_model_folder(temporary, policy, params, config.rollout, dtype=dtype)
            write_whole(temporary / "README.md", model_card(run, config, policy, step, dtype))
            check(temporary, policy, params, config, dtype)
    except FileExistsError as error:
        raise UserError(
            f"the output {output} was filled by someone else meanwhile; give another folder"
        ) from error
    return step


def check(folder: Path, policy: Policy, params: Params, config: Config, dtype: str) -> None:
    """Loads the folder again and compares it with what was to be written.

    Every weight must come back bit for bit (in the written precision), the architecture must be the same, and
    the tokenizer's own chat template must render a dialogue to the row that training would have.

    Raises:
      UserError: names what differs.
    """
    again, weights = load_policy(folder, config.rollout)
    if again.config != policy.config:
        raise UserError(f"the exported config.json reads back as {again.config}, not as {policy.config}")
    written = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(weights), strict=True
    ):
        expected = np.asarray(one).astype(written).astype(np.float32)
        if expected.tobytes() != np.asarray(other).tobytes():
            name = jax.tree_util.keystr(path)
            raise UserError(f"the exported weights {name} read back differently; check the disk of {folder}")
    messages = [
        {"role": role, "content": text}
        for exchange in _SAMPLE
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    renderer = Renderer(policy.tokenizer, config.rollout.history, config.rollout.system_prompt)
    row = renderer.pieces(messages, sys.maxsize)[-1].ids
    rendered = again.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    if tuple(rendered[: len(row)]) != row:
        raise UserError(
            "the exported chat template does not render a dialogue as it was trained on; "
            f"row {list(row)}, template {list(rendered)}"
        )


# --- The model card. ---


def model_card(run: Path, config: Config, policy: Policy, step: int, dtype: str) -> str:
    """README.md of the exported folder: what it is, how it was made, what it scores, what it is not for."""
    first, last = _scores(run / METRICS_FILE, step)
    model, rollout, algorithm = policy.config, config.rollout, config.algorithm
    base = f"`{Path(config.model.path).name}`" if config.model.path else "a fresh model, warm-started"
    world = "the embedded scenario cards" if config.environment.scenarios is None else "other scenario cards"
    recipe = [
        ("starts from", base),
        ("architecture", f"{model.family}, {model.num_layers} layers, width {model.hidden_size}"),
        ("parameters", f"{parameter_count(model):,}"),
        ("weights", dtype),
        ("estimator", f"{algorithm.estimator} (turn weight {algorithm.turn_weight:g})"),
        ("reward", f"{algorithm.reward} distance, discount {algorithm.discount:g} per turn"),
        ("steps", f"{step} of {config.training.steps}, seed {config.training.seed}"),
        ("dialogues per step", f"{rollout.scenarios} scenarios x {rollout.rollouts} rollouts"),
        ("turns", f"{rollout.min_turns} to {rollout.max_turns}"),
        ("learning rate", f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}"),
        ("sampling", f"temperature {rollout.temperature:g}, up to {rollout.max_reply_tokens} tokens a reply"),
        ("history", rollout.history),
    ]
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mapo, dialogue, reinforcement-learning]",
        "---",
        "",
        f"# {run.name}, step {step}",
        "",
        "A dialogue policy trained with mapo_jax: reinforcement learning of multi-turn conversation in which "
        "every turn gets its own credit.",
        "",
        "## Recipe",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in recipe),
        "",
        "The complete configuration:",
        "",
        "```yaml",
        _public_yaml(run / CONFIG_FILE),
        "```",
        "",
        "## What it was trained on",
        "",
        f"Conversations with simulated users of the family `{config.environment.family}`, made from {world} "
        "(split `train`). "
        + (_WARMSTART_DATA if config.model.path is None else "The data of the start model is its own story."),
        "",
        "## Scores",
        "",
        *_score_table(first, last),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'messages = [{"role": "user", "content": "I keep thinking about the night shifts."}]',
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "reply = model.generate(**prompt)",
        'print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        "The chat template renders a dialogue to the very tokens that the policy was trained on; with "
        "another template it answers worse.",
        "",
        "## Limits",
        "",
        "- It was rewarded by a simulated judge. Whether people feel helped was not measured.",
        "- It is no counsellor and must not be used as one.",
        "- The scores come from cards of the same make as the training cards, not from an outside benchmark.",
        *(
            ["- It knows the small language of its scripted world and little else."]
            if config.model.path is None
            else []
        ),
        "",
    ]
    return "\n".join(parts)


_WARMSTART_DATA = (
    "Before that it was warm-started by supervised training on synthetic dialogues of mixed quality with the "
    "same simulated users, or on the chats named in the configuration (`warmstart.data`)."
)


def _public_yaml(file: Path) -> str:
    """The run's configuration; of paths only the last part, since the card travels."""
    import yaml

    content = yaml.safe_load(file.read_text())
    for section, key in (
        ("run", "directory"),
        ("run", "compilation_cache"),
        ("model", "path"),
        ("environment", "scenarios"),
        ("warmstart", "data"),
        ("warmstart", "cache"),
    ):
        if content.get(section, {}).get(key):
            content[section][key] = Path(content[section][key]).name
    return yaml.safe_dump(content, sort_keys=False).rstrip()


def _scores(file: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first evaluation of a run, and its last one up to `step`; `step` among their entries."""
    rows = []
    if file.is_file():
        for line in file.read_text().splitlines():
            row = json.loads(line)
            figures = {name[11:]: value for name, value in row.items() if name.startswith("evaluation/")}
            if figures and row["step"] <= step:
                rows.append({"step": row["step"], **figures})
    return (rows[0], rows[-1]) if rows else ({}, {})


_SCORES = (
    ("reward per turn (incremental distance)", "reward/mean", "{:+.2f}"),
    ("discounted return of a dialogue", "return/mean", "{:+.2f}"),
    ("EPM-Q", "epm_q", "{:.1f}"),
    ("situation named right", "naming/situation", "{:.0%}"),
    ("feeling named right", "naming/feeling", "{:.0%}"),
    ("largest share of one kind of reply", "kind/most", "{:.0%}"),
)


def _score_table(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    if not last:
        return ["The run was not evaluated up to this step."]
    lines = [
        "Validation cards, which training does not use; sampled as in training.",
        "",
        f"| | step {first['step']} | step {last['step']} |",
        "|---|---:|---:|",
    ]
    for label, name, form in _SCORES:
        cells = ["" if row.get(name) is None else form.format(row[name]) for row in (first, last)]
        if any(cells):
            lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.export", description="Writes a run's policy as a Hugging Face folder."
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint; without it the latest")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    options = parser.parse_args(arguments)

    def command() -> None:
        step = export(options.run, options.output, step=options.step, dtype=options.dtype)
        Console(highlight=False).print(
            f"step {step} of {options.run} is in {options.output}: loaded again and found the same",
            soft_wrap=True,
            markup=False,
        )

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
