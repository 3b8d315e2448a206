"""From a run's checkpoint to a Hugging Face folder that others can load, with a model card.

    python -m mapo_jax.export --run RUN --output FOLDER [--step N] [--dtype float32|bfloat16] [--check]
                              [--part merged|adapters|base]

The folder holds weights (safetensors, in files of up to 5 GB), config.json, the tokenizer with the chat
template that renders dialogues as they were trained on, generation_config.json, README.md and, once a run has
some steps behind it, the curve of its return. Transformers 4 and 5 both read it. The weights go from the
checkpoint to the files tensor by tensor, so that a model larger than the memory can be exported. The folder
is written whole or not at all, and read again and compared before it takes its name; `--check` also lets
transformers compute with it.

Of a run with adapters (`lora.rank`) they are merged into the weights; or the adapters alone are written, in
PEFT's format, or the frozen weights beside them.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save_file

from mapo_jax.commands import run_command
from mapo_jax.config import Config, load_config, to_yaml, updated
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.files import read_object, write_whole
from mapo_jax.model import peft
from mapo_jax.model.head import logits
from mapo_jax.model.huggingface import (
    Reader,
    adapter_tensors,
    differing_tensor,
)
from mapo_jax.model.lora import split
from mapo_jax.model.qwen import hidden_states, parameter_count, parameter_shapes
from mapo_jax.running.checkpoint import open_params
from mapo_jax.running.metrics import METRICS_FILE, read_rows
from mapo_jax.running.model_folder import whole_folder, write_model_folder
from mapo_jax.running.policy import Policy, load_policy, open_weights, read_policy
from mapo_jax.running.run_folder import BASE_FOLDER, CONFIG_FILE, checkpoint_folder
from mapo_jax.tokenizer import write_tokenizer
from mapo_jax.warmstarting.packing import Renderer

DTYPES = ("float32", "bfloat16")
PARTS = ("merged", "adapters", "base")
LOGIT_TOLERANCE = 1e-3  # of the largest logit
CURVE_FILE = "curve.png"
_SAMPLE = [
    {"role": "user", "content": "I keep thinking about the night shifts."},
    {"role": "assistant", "content": "You live with the night shifts every day."},
    {"role": "user", "content": "Yes. I feel tired."},
    {"role": "assistant", "content": "It makes sense that you feel tired."},
]


def export(
    run: Path | str,
    output: Path | str,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    part: str = "merged",
) -> int:
    """Writes the policy of a run's checkpoint to `output`.

    Args:
      run: run folder.
      output: a folder that does not exist yet, or an empty one.
      step: which checkpoint; the latest by default.
      dtype: of the written weights; the run's own are float32.
      max_shard_bytes: of one weights file.
      part: one of PARTS: the policy's weights; its adapters alone; or the frozen weights beside them.

    Returns:
      The step that was exported.

    Raises:
      UserError: no run, no such checkpoint, no adapters where they are asked for, an occupied output folder,
        a full disk, or a written folder that does not reproduce the policy.
    """
    run, output = Path(run), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output {output} is not empty; export never overwrites: give another folder")
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is no run folder (no {CONFIG_FILE}); give the folder of a training run")
    config = load_config(run / CONFIG_FILE)
    step = int(checkpoint_folder(run, step).name)
    policy = read_policy(run, config.rollout)
    lora = policy.config.lora
    if part != "merged" and lora is None:
        raise UserError(
            f"{run} trained all weights (lora.rank=0), so there is no part {part!r}; leave out --part"
        )
    plain = replace(policy, config=replace(policy.config, lora=None))
    try:
        with whole_folder(output) as temporary:
            if part == "adapters":
                _write_adapters(temporary, run, policy, config, step)
            else:
                if part == "base":
                    read = open_params(run / BASE_FOLDER, parameter_shapes(plain.config))
                else:
                    read = open_weights(run, policy.config, step=step)
                write_model_folder(
                    temporary, plain, read, config.rollout, dtype=dtype, max_shard_bytes=max_shard_bytes
                )
                verify(temporary, plain, read, config)
            if part == "base":
                return step
            curve = draw_curve(run / METRICS_FILE, step)
            if curve is not None:
                write_whole(temporary / CURVE_FILE, curve)
            alone = part == "adapters"
            card = model_card(run, config, policy, step, dtype, curve=curve is not None, adapters=alone)
            write_whole(temporary / "README.md", card)
    except FileExistsError as error:
        raise UserError(
            f"the output {output} was filled by someone else meanwhile; give another folder"
        ) from error
    return step


def _write_adapters(folder: Path, run: Path, policy: Policy, config: Config, step: int) -> None:
    """The adapters as PEFT has them, read again and compared, and the tokenizer with the rows' template."""
    read = open_params(checkpoint_folder(run, step), split(parameter_shapes(policy.config))[0])
    tensors = adapter_tensors(read, policy.config)
    peft.write_adapter_config(folder, policy.config.lora, config.model.path and Path(config.model.path).name)
    save_file(tensors, folder / peft.WEIGHTS, metadata={"format": "pt"})
    again = load_file(folder / peft.WEIGHTS)
    if name := next((name for name in tensors if not np.array_equal(tensors[name], again.get(name))), None):
        raise UserError(f"the exported tensor {name} reads back differently; check the disk of {folder}")
    write_tokenizer(folder, policy.tokenizer, policy.chat.template)


def verify(folder: Path, policy: Policy, read: Reader, config: Config) -> None:
    """Reads the folder again and compares it with what was to be written.

    Every weight must be there bit for bit (in the written precision), the architecture must be the same, and
    the tokenizer's own chat template must render a dialogue to the row that training would have.

    Raises:
      UserError: names what differs.
    """
    again = read_policy(folder, config.rollout)
    if again.config != policy.config:
        raise UserError(f"the exported config.json reads back as {again.config}, not as {policy.config}")
    if name := differing_tensor(folder, read, policy.config):
        raise UserError(f"the exported tensor {name} reads back differently; check the disk of {folder}")
    row = _sample_row(policy, config)
    rendered = again.tokenizer.apply_chat_template(_SAMPLE, tokenize=True, return_dict=False)
    if tuple(rendered[: len(row)]) != row:
        raise UserError(
            "the exported chat template does not render a dialogue as it was trained on; "
            f"row {list(row)}, template {list(rendered)}"
        )


def check_logits(folder: Path | str, config: Config) -> float:
    """Lets transformers compute the logits of a dialogue with an exported folder, beside ours.

    Args:
      folder: an exported folder, whose weights are those of the run (see `verify`).
      config: of the run.

    Returns:
      The largest difference of any token's logits, in float32 on both sides.

    Raises:
      UserError: torch is not installed, or the difference exceeds LOGIT_TOLERANCE of the largest logit.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "--check lets transformers compute with the model and needs torch: pip install torch"
        ) from error
    from transformers import AutoModelForCausalLM

    policy, params = load_policy(folder, config.rollout)
    tokens = np.array([_sample_row(policy, config)], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    ours = np.asarray(logits(params, policy.config, hidden_states(params, policy.config, tokens, positions)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    difference = float(np.abs(ours - theirs).max())
    # Both compute in float32, in another order of sums: a hundredth of what would change a token's rank.
    if not difference <= LOGIT_TOLERANCE * max(1.0, float(np.abs(theirs).max())):
        raise UserError(
            f"transformers computes other logits with {folder} than we do: they differ by up to "
            f"{difference:.2g}"
        )
    return difference


def _sample_row(policy: Policy, config: Config) -> tuple[int, ...]:
    """A dialogue as training would have it."""
    renderer = Renderer(policy.tokenizer, config.rollout.history, config.rollout.system_prompt)
    return renderer.pieces(_SAMPLE, sys.maxsize)[-1].ids


# --- The model card. ---


def model_card(
    run: Path,
    config: Config,
    policy: Policy,
    step: int,
    dtype: str,
    *,
    curve: bool = False,
    adapters: bool = False,
) -> str:
    """README.md of the exported folder: what it is, how it was made, what it scores, what it is not for.

    Args:
      curve: whether CURVE_FILE lies beside it.
      adapters: whether the folder holds adapters alone.
    """
    loading = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ]
    if adapters:
        loading[0] = "from peft import PeftModel\n" + loading[0]
        loading[3] = (
            'base = AutoModelForCausalLM.from_pretrained("BASE")  # what the run started from\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")'
        )
    first, last = _scores(run / METRICS_FILE, step)
    model, rollout, algorithm = policy.config, config.rollout, config.algorithm
    base = f"`{Path(config.model.path).name}`" if config.model.path else "a fresh model, warm-started"
    world = "the embedded scenario cards" if config.environment.scenarios is None else "other scenario cards"
    adapted = "all" if model.lora is None else f"adapters of rank {model.lora.rank}"
    recipe = [
        ("starts from", base),
        ("trained", adapted),
        ("architecture", f"{model.family}, {model.num_layers} layers, width {model.hidden_size}"),
        ("parameters", f"{parameter_count(replace(model, lora=None)):,}"),
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
        f"library_name: {'peft' if adapters else 'transformers'}",
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
        _public_yaml(config),
        "```",
        "",
        "## What it was trained on",
        "",
        f"Conversations with simulated users of the family `{config.environment.family}`, made from {world} "
        f"(split `train`{_split_sizes(config)}). "
        + (_WARMSTART_DATA if config.model.path is None else "The data of the start model is its own story."),
        "",
        "## Scores",
        "",
        *_score_table(first, last),
        *_benchmark_lines(run, step),
        *(["", f"![return of a dialogue over the steps]({CURVE_FILE})"] if curve else []),
        "",
        "## Use",
        "",
        "```python",
        *loading,
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


def _public_yaml(config: Config) -> str:
    """The run's configuration; of paths only the last part, since the card travels."""
    for section, key in (
        ("run", "directory"),
        ("run", "compilation_cache"),
        ("model", "path"),
        ("environment", "scenarios"),
        ("warmstart", "data"),
        ("warmstart", "cache"),
    ):
        if path := getattr(getattr(config, section), key):
            config = updated(config, {f"{section}.{key}": Path(path).name})
    return to_yaml(config).rstrip()


def _scores(file: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first evaluation of a run, and its last one up to `step`; `step` among their entries."""
    rows = []
    for row in read_rows(file):
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


def _split_sizes(config: Config) -> str:
    """How many cards each split has, while the cards can still be found."""
    try:
        cards = load_scenarios(config.environment.scenarios)
    except UserError:
        return ""
    sizes = Counter(card.split for card in cards)
    return (
        f", {sizes['train']} cards; {sizes['validation']} for validation and {sizes['test']} for tests are "
        "kept apart and never trained on"
    )


def _benchmark_lines(run: Path, step: int) -> list[str]:
    """What `mapo_jax.evaluate` found of this checkpoint, where it was asked."""
    lines = []
    for name, title, line in _BENCHMARKS:
        file = run / "evaluations" / f"{name}_step_{step:06d}" / "scores.json"
        if (scores := read_object(file)) is None:
            continue
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # not as the benchmark writes them
            lines.append(f"- {title}: {line(scores)}")
    return ["", "Benchmarks, as `python -m mapo_jax.evaluate` reports them:", "", *lines] if lines else []


def _empa_line(scores: Mapping[str, Any]) -> str:
    (found,) = scores.values()
    return f"EPM-Q {found['epm_q']:.1f}, {found['passed']} of {found['dialogues']} passed"


def _eqbench_line(scores: Mapping[str, Any]) -> str:
    value = "no parseable answer" if scores["score"] is None else f"{scores['score']:.2f}"
    return f"{value} ({scores['parseable']} of {scores['questions']} answers parseable)"


def _emobench_line(scores: Mapping[str, Any]) -> str:
    tasks = [f"{task} {100 * scores[task]['accuracy']:.1f} %" for task in ("EA", "EU") if task in scores]
    return f"{', '.join(tasks)} ({scores['unparseable']} of {scores['answers']} answers unparseable)"


_BENCHMARKS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("empa", "EMPA with this project's cards and simulated user and judge", _empa_line),
    ("emobench", "EmoBench, accuracy", _emobench_line),
    ("eqbench", "EQ-Bench v2", _eqbench_line),
)


def draw_curve(file: Path, step: int) -> bytes | None:
    """The mean return of a step's dialogues over the steps up to `step`, as PNG; None with fewer than two.

    Args:
      file: the run's metrics.
    """
    rows = read_rows(file)
    training, validation = (
        [(row["step"], row[name]) for row in rows if row["step"] <= step and row.get(name) is not None]
        for name in ("return/mean", "evaluation/return/mean")
    )
    if max(len(training), len(validation)) < 2:
        return None
    from matplotlib.figure import Figure  # the object, not pyplot: no display, no state

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color="#8ab", label="training dialogues")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#a31515", label="validation cards")
    axes.set(xlabel="step", ylabel="return of a dialogue")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.export", description="Writes a run's policy as a Hugging Face folder."
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new or empty folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint; without it the latest")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="merged",
        help="of a run with adapters: merged into the weights (default), alone for PEFT, or what was frozen",
    )
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="most of one weights file (default: 5)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare logits with transformers' (loads the model; needs torch)",
    )
    options = parser.parse_args(arguments)

    def command() -> None:
        say = partial(Console(highlight=False).print, soft_wrap=True, markup=False)
        if options.check and options.part == "adapters":
            raise UserError("--check computes with a whole model; leave it out with --part adapters")
        if not options.shard_gb > 0:
            raise UserError(f"--shard-gb is {options.shard_gb:g}; it must be above 0")
        step = export(
            options.run,
            options.output,
            step=options.step,
            dtype=options.dtype,
            max_shard_bytes=options.shard_gb * 1e9,
            part=options.part,
        )
        say(f"step {step} of {options.run} is in {options.output}: read again and found the same")
        if options.check:
            difference = check_logits(options.output, load_config(Path(options.run) / CONFIG_FILE))
            say(f"transformers computes the same logits: they differ by at most {difference:.1e}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
