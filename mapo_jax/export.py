"""Writes a run's checkpoint as a Hugging Face folder that others can load, with a model card.

    python -m mapo_jax.export --run RUN --output FOLDER [--step N|best] [--dtype float32|bfloat16] [--check]
                              [--part merged|adapters|base]

The folder holds weights (safetensors, in files of up to 5 GB), config.json, the tokenizer with the chat
template that renders dialogues as they were trained on, generation_config.json, README.md and, after two or
more evaluated steps, the curve of the return. Transformers 4 and 5 both read it. The weights go from the
checkpoint to the files one file at a time, so that a model larger than the memory can be exported. The folder
is written whole or not at all, and is read again and compared before it takes its name; `--check` also
compares the logits with those of transformers.

Of a run with adapters (`lora.rank`) the adapters are merged into the weights; or the adapters alone are
written, in PEFT's format, or the frozen weights beside them.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file, save_file

from mapo_jax.commands import command_parser, run_command, show
from mapo_jax.config import Config, load_config
from mapo_jax.errors import UserError
from mapo_jax.files import write_whole
from mapo_jax.hub import hub_id
from mapo_jax.model import peft
from mapo_jax.model.head import logits
from mapo_jax.model.huggingface import differing_tensor
from mapo_jax.model.lora import split
from mapo_jax.model.qwen import hidden_states, parameter_shapes
from mapo_jax.model.tensor_names import Reader
from mapo_jax.reporting.model_card import CURVE_FILE, draw_curve, model_card
from mapo_jax.running.checkpoint import open_params
from mapo_jax.running.metrics import METRICS_FILE
from mapo_jax.running.model_folder import whole_folder, write_model_folder
from mapo_jax.running.policy import Policy, load_policy, open_weights, read_policy
from mapo_jax.running.run_folder import (
    BASE_FOLDER,
    CONFIG_FILE,
    checkpoint_folder,
    step_option,
)
from mapo_jax.tokenizer import write_tokenizer
from mapo_jax.warmstarting.packing import Renderer

DTYPES = ("float32", "bfloat16")
PARTS = ("merged", "adapters", "base")
LOGIT_TOLERANCE = 1e-3  # of the largest logit
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
    step: int | str | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    part: str = "merged",
) -> int:
    """Writes the policy of a run's checkpoint to `output`.

    Args:
      run: run folder.
      output: a folder that does not exist yet, or an empty one.
      step: which checkpoint: the latest by default, or `best`, the one with the best validation return.
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
    if part != "merged" and policy.config.lora is None:
        raise UserError(f"{run} trained all weights (lora.rank=0) and has no part {part!r}; leave out --part")
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
            if part != "base":
                _write_card(temporary, run, policy, config, step, dtype, adapters=part == "adapters")
    except FileExistsError as error:
        raise UserError(f"the output {output} was filled by another program; give another folder") from error
    return step


def _write_card(
    folder: Path, run: Path, policy: Policy, config: Config, step: int, dtype: str, *, adapters: bool
) -> None:
    curve = draw_curve(run / METRICS_FILE, step)
    if curve is not None:
        write_whole(folder / CURVE_FILE, curve)
    card = model_card(run, config, policy.config, step, dtype, curve=curve is not None, adapters=adapters)
    write_whole(folder / "README.md", card)


def _write_adapters(folder: Path, run: Path, policy: Policy, config: Config, step: int) -> None:
    """Writes adapters in PEFT's format, reads them again and compares; and the tokenizer."""
    read = open_params(checkpoint_folder(run, step), split(parameter_shapes(policy.config))[0])
    tensors = peft.adapter_tensors(read, policy.config)
    base, revision = config.model.path, None
    if base is not None:
        model = hub_id(base)
        base, revision = (model.repo, model.revision) if model else (Path(base).name, None)
    peft.write_adapter_config(folder, policy.config.lora, base, revision)
    save_file(tensors, folder / peft.WEIGHTS, metadata={"format": "pt"})
    again = load_file(folder / peft.WEIGHTS)
    if name := next((name for name in tensors if not np.array_equal(tensors[name], again.get(name))), None):
        raise UserError(f"the exported tensor {name} reads back differently; check the disk of {folder}")
    write_tokenizer(folder, policy.tokenizer, policy.chat.template)


def verify(folder: Path, policy: Policy, read: Reader, config: Config) -> None:
    """Reads the folder again and compares it with the policy.

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
    """Compares the logits that transformers and we compute of a dialogue with an exported folder.

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
        raise UserError("--check compares with transformers, which needs torch: pip install torch") from error
    from transformers import AutoModelForCausalLM

    policy, params = load_policy(folder, config.rollout)
    tokens = np.array([_sample_row(policy, config)], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    ours = np.asarray(logits(params, policy.config, hidden_states(params, policy.config, tokens, positions)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    difference = float(np.abs(ours - theirs).max())
    # Both compute in float32, with sums in another order: a hundredth of what would change a token's rank.
    if not difference <= LOGIT_TOLERANCE * max(1.0, float(np.abs(theirs).max())):
        raise UserError(
            f"transformers computes other logits with {folder} than we do: they differ by {difference:.2g}"
        )
    return difference


def _sample_row(policy: Policy, config: Config) -> tuple[int, ...]:
    """The row of a dialogue in training."""
    renderer = Renderer(policy.tokenizer, config.rollout.history, config.rollout.system_prompt)
    return renderer.pieces(_SAMPLE, sys.maxsize)[-1].ids


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input."""
    parser = command_parser("export", "Writes a run's policy as a Hugging Face folder.")
    option = parser.add_argument
    option("--run", required=True, metavar="RUN", help="run folder")
    option("--output", required=True, metavar="FOLDER", help="new or empty folder")
    option(
        "--step", type=step_option, metavar="N|best", help="checkpoint (default: latest; best: by validation)"
    )
    option("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    option(
        "--part",
        choices=PARTS,
        default="merged",
        help="of a run with adapters: merged into the weights (default), alone for PEFT, or the base",
    )
    option("--shard-gb", type=float, default=5.0, metavar="GB", help="most of one weights file (default: 5)")
    option("--check", action="store_true", help="compare logits with transformers' (in memory; needs torch)")
    options = parser.parse_args(arguments)

    def command() -> None:
        console = Console()
        if options.check and options.part == "adapters":
            raise UserError("--check computes with a whole model; leave it out with --part adapters")
        if options.part == "adapters" and (options.dtype, options.shard_gb) != ("float32", 5.0):
            raise UserError(
                "--dtype and --shard-gb have no effect with --part adapters, which are one file in float32; "
                "leave them out"
            )
        if not options.shard_gb > 0:
            raise UserError(f"--shard-gb is {options.shard_gb:g}; it must be above 0")
        chosen = {"step": options.step, "dtype": options.dtype, "part": options.part}
        step = export(options.run, options.output, max_shard_bytes=options.shard_gb * 1e9, **chosen)
        show(console, f"step {step} of {options.run} is in {options.output}: read again and found the same")
        if options.check:
            difference = check_logits(options.output, load_config(Path(options.run) / CONFIG_FILE))
            show(console, f"transformers computes the same logits: they differ by at most {difference:.1e}")

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
