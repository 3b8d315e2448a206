"""The warm start: supervised training of the policy that reinforcement learning starts from.

    python -m mapo_jax.warmstart [--config FILE] [key=value ...]

Without `model.path` a small Qwen3 and its tokenizer are built; with it, that model folder is trained. Without
`warmstart.data` the texts are synthetic dialogues of mixed quality with the scripted user. The replies are
learnt; of synthetic dialogues a fresh model learns the user's words, too, in the first half of the updates.
Then the policy holds dialogues on the validation cards; their figures are shown and saved. The result is a
Hugging Face folder in a cache. Its name is a hash of everything that determines it.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from mapo_jax.commands import Stopped, cache_folder, command_parser, prepare_jax, run_command, show
from mapo_jax.config import Config, OptimizerConfig, load_config, updated
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.files import damaged_file, read_object, write_checksums, write_whole
from mapo_jax.idle import unread
from mapo_jax.learning.optimizer import make_muon, make_optimizer
from mapo_jax.learning.train_state import create_state
from mapo_jax.learning.update import Scoring, make_supervised_update, place
from mapo_jax.model.backends import check_remat, decode_attention, row_attention
from mapo_jax.model.qwen import Params, init_params, parameter_shapes
from mapo_jax.model.sharding import make_mesh, param_shardings, row_shards
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.running.display import duration
from mapo_jax.running.forecast import fresh_model
from mapo_jax.running.model_folder import whole_folder, write_model_folder
from mapo_jax.running.policy import Policy, load_policy
from mapo_jax.running.stop import Check, Interrupted, StopRequest
from mapo_jax.settings import parse_settings
from mapo_jax.tokenizer import train_tokenizer
from mapo_jax.warmstarting.cache_key import cache_key, determinants
from mapo_jax.warmstarting.chats import Chat, read_chats, synthetic_chats
from mapo_jax.warmstarting.induction import with_induction_heads
from mapo_jax.warmstarting.measurement import gate, measure, measurement_table
from mapo_jax.warmstarting.packing import PackedRows, Renderer, batches, pack, with_prompts

RECORD = "warmstart.json"  # in the result's folder: determinants, loss curve, measurements
REPORT_EVERY = 10  # updates between reads of the loss: each read waits for the device
TOKENIZER_CHATS = 1000  # chats that the tokenizer is trained on: more only take more time
OPTIMIZER = OptimizerConfig(warmup=0.05, weight_decay=0.1, gradient_clip=1.0)
# Short: over a short training of a small model, old second moments are no estimate of the present ones.
B2 = 0.95


def run_warmstart(
    config: Config, *, console: Console | None = None, check: Check = lambda: None, mesh: Mesh | None = None
) -> Path:
    """Makes the warm start of a configuration, or takes it from the cache, and checks that it is good enough.

    Args:
      config: uses `model`, `warmstart`, `environment`, `rollout`, `mesh` and `training.seed`.
      console: where progress and figures are shown.
      check: called at safe points; may raise to stop. Then no file is left.
      mesh: the devices to train on; None: all devices, as `config.mesh` says.

    Returns:
      A Hugging Face folder with float32 weights and the record `warmstart.json`.

    Raises:
      UserError: bad data or a bad model folder, a full disk, or a result that is too weak to start from.
    """
    console = console or Console(highlight=False, markup=False)
    folder = Path(config.warmstart.cache or cache_folder("warmstart")) / cache_key(config)
    if (folder / RECORD).is_file():
        record = read_object(folder / RECORD)
        if (damaged := RECORD if record is None else damaged_file(folder)) is not None:
            raise UserError(
                f"the warm start in {folder} is damaged: {damaged} is missing or not as it was written; "
                "remove that folder, and the same command makes it again"
            )
        show(console, f"warm start: found finished in {folder}")
    else:
        record = _make(config, folder, console, check, mesh or make_mesh(config.mesh))
    console.print(measurement_table(record["measured"]))
    gate(record["measured"], config.warmstart.min_naming_ratio)
    return folder


def _make(config: Config, folder: Path, console: Console, check: Check, mesh: Mesh) -> dict[str, Any]:
    started = time.monotonic()
    show(console, "warm start: making dialogues, tokenizer and model")
    chats = _chats(config, console)
    policy, params = _start(config, chats, mesh)
    rows = _rows(config, policy, chats)
    size, vocabulary = config.warmstart.row_tokens, policy.chat.vocabulary_size
    show(
        console,
        f"warm start: {len(chats):,} dialogues in {len(rows):,} rows of {size} tokens, {rows.fill:.0%} full; "
        f"{vocabulary:,} tokens in the vocabulary",
    )
    prepared = time.monotonic()
    show(console, "warm start: compiling the update")
    params, curve, speed = _train(config, policy, params, rows, mesh, console, check)
    trained = time.monotonic()
    show(console, "warm start: measuring it in dialogues")
    measured = measure(config, policy, params, mesh, check)
    ended = time.monotonic()
    seconds = {"prepare": prepared - started, "train": trained - prepared, "measure": ended - trained}
    total = ended - started
    record = {
        "made_of": determinants(config),
        "rows": len(rows),
        "loss": curve,
        "tokens_per_second": speed,
        "measured": measured,
        "seconds": {**seconds, "total": total},
    }
    # Another process may have made the same warm start meanwhile; either result is good.
    with suppress(FileExistsError), whole_folder(folder) as temporary:
        write_model_folder(temporary, policy, params, config.rollout)
        write_whole(temporary / RECORD, json.dumps(record, indent=1) + "\n")
        write_checksums(temporary)
    show(console, f"warm start: {total:.0f} s, {speed:,.0f} tokens/s; saved in {folder}")
    return record


# --- Texts, model, rows. ---


def _chats(config: Config, console: Console) -> list[Chat]:
    if config.warmstart.data is not None:
        note = partial(show, console)
        return read_chats(config.warmstart.data, note)
    cards = load_scenarios(config.environment.scenarios, "train")
    count, seed = config.warmstart.dialogues, config.training.seed
    turns, opening = config.rollout.max_turns, config.environment.delayed_opening
    return synthetic_chats(cards, count, seed, turns=turns, delayed_opening=opening)


def _start(config: Config, chats: Sequence[Chat], mesh: Mesh) -> tuple[Policy, Params]:
    """The model to train: the folder `model.path`, or a fresh one with a tokenizer trained on the chats."""
    if config.model.path is not None:
        return load_policy(config.model.path, config.rollout, mesh=mesh)
    positions = max(config.rollout.max_tokens, config.warmstart.row_tokens)
    messages = chain.from_iterable(chats[:TOKENIZER_CHATS])
    # Roles are in every message of a dialogue, so each should be one token.
    texts = (text for message in messages for text in (message["role"], message["content"]))
    tokenizer = train_tokenizer(texts, config.model.fresh.vocabulary, max_tokens=positions)
    chat = ChatFormat(tokenizer, config.rollout.history, config.rollout.system_prompt)
    model = fresh_model(config.model.fresh, chat.vocabulary_size, positions)
    seed = config.training.seed
    params = with_induction_heads(init_params(model, seed), model, seed)
    params = jax.device_put(params, param_shardings(parameter_shapes(model), mesh))
    return Policy(model, tokenizer, chat), params


def _rows(config: Config, policy: Policy, chats: Sequence[Chat]) -> PackedRows:
    length = config.warmstart.row_tokens
    if length > policy.config.max_position_embeddings:
        raise UserError(
            f"`warmstart.row_tokens` is {length}; it must be at most the model's "
            f"{policy.config.max_position_embeddings} positions"
        )
    renderer = Renderer(policy.tokenizer, config.rollout.history, config.rollout.system_prompt)
    source, turns = config.warmstart.data or "synthetic dialogues", config.warmstart.turns or None
    numbered = enumerate(chats, start=1)
    pieces = (renderer.pieces(chat, length, turns, f"{source}, dialogue {n}") for n, chat in numbered)
    return pack(list(chain.from_iterable(pieces)), length)


# --- Training. ---


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises UserError unless the rows of an update can be split over the mesh."""
    if rows % (shards := row_shards(mesh)):
        raise UserError(
            f"`warmstart.rows` is {rows}; it must be a multiple of the {shards} shards "
            "(mesh.data x mesh.fsdp) that the rows are split over"
        )


def _train(
    config: Config,
    policy: Policy,
    params: Params,
    rows: PackedRows,
    mesh: Mesh,
    console: Console,
    check: Check,
) -> tuple[Params, list[list[float]], float]:
    """The trained weights, the loss curve as [update, loss] pairs, and tokens/s without compilation."""
    settings = config.warmstart
    # What the user says next tells what a reply did: to predict it is to learn to read a dialogue. A model
    # that others trained can read. One that learns it to the end says the user's sentences in its replies.
    # Given chats say themselves what is learnt: a reply of weight 0 must have no loss.
    fresh = config.model.path is None and config.warmstart.data is None
    reading = settings.steps // 2 if fresh else 0
    check_rows(settings.rows, mesh)
    check_remat(config.model.remat, mesh)
    decode_attention(config.rollout.cache, mesh, policy.config, config.model.dtype)  # measures the result
    own = updated(OPTIMIZER, {"learning_rate": settings.learning_rate})
    # Fresh weights need a third fewer updates with Muon; those that others trained go on with AdamW.
    make = make_muon if config.model.path is None else make_optimizer
    optimizer = make(own, settings.steps, b2=B2)
    scoring = Scoring(
        policy.config,
        vocabulary_size=policy.chat.vocabulary_size,
        dtype=config.model.dtype,
        remat=config.model.remat,
        loss_tokens=int((with_prompts(rows.batch) if reading else rows.batch).mask.sum(axis=1).max()),
        attention=row_attention(config.model.attention, mesh, policy.config, config.model.dtype, packed=True),
        mesh=mesh,
    )
    shardings = param_shardings(parameter_shapes(policy.config), mesh)
    update = make_supervised_update(scoring, optimizer, shardings=shardings)
    state = create_state(params, optimizer, shardings=shardings)
    batch = batches(rows, settings.rows, config.training.seed)
    curve: list[list[float]] = []
    tokens = settings.rows * settings.row_tokens
    began, speed = time.monotonic(), 0.0
    live = config.logging.progress and console.is_terminal
    bars = BarColumn(bar_width=16), MofNCompleteColumn()
    columns = ("{task.description}", *bars, "{task.fields[figures]}", TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not live, transient=True) as progress:
        task = progress.add_task("warm start: compiling", total=settings.steps, figures="")
        for step in range(1, settings.steps + 1):
            check()
            chosen = next(batch)
            state, metrics = update(state, place(with_prompts(chosen) if step <= reading else chosen, mesh))
            if step > 1 and step % REPORT_EVERY and step != settings.steps:
                continue
            loss = float(metrics["loss"])
            if float(metrics["skipped"]):
                raise UserError(
                    f"the loss or gradient of warm-start update {step} is not finite; "
                    f"lower `warmstart.learning_rate` ({settings.learning_rate})"
                )
            if step == 1:
                began = time.monotonic()  # the first update includes the compilation
            else:
                speed = (step - 1) * tokens / (time.monotonic() - began)
            curve.append([step, round(loss, 4)])
            figures = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
            progress.update(task, completed=step, description="warm start", figures=figures)
            if not live and step % (10 * REPORT_EVERY) == 0:
                left = duration((settings.steps - step) * (time.monotonic() - began) / (step - 1))
                show(console, f"warm start: update {step} of {settings.steps}, {figures}, {left} left")
    return state.params, curve, speed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input or too weak, 128 + n signal n."""
    parser = command_parser("warmstart", __doc__.split("\n")[0])
    parser.add_argument("--config", metavar="FILE|NAME", help="YAML file, or one of configs/ by name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. warmstart.steps=100")
    options = parse_settings(Config, parser, arguments, "warmstart")

    def command() -> None:
        config = load_config(options.config, options.overrides)
        if idle := unread("warmstart", options.overrides):
            print(f"no effect in a warm start: {', '.join(idle)}")
        prepare_jax(config.run.compilation_cache)
        with StopRequest(answer=print) as stop:
            try:
                run_warmstart(config, check=stop.check)
            except Interrupted as interruption:
                message = f"stopped by {interruption}: an unfinished warm start is not saved"
                raise Stopped(str(interruption), message) from interruption

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
