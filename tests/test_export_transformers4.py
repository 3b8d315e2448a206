"""What is exported, read by the newest transformers 4 in an environment of its own, and by the installed one.

Run with `pytest -m peer tests/test_export_transformers4.py`; pip fetches `transformers<5` (once a session).
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mapo_jax.config import RolloutConfig
from mapo_jax.model import peft
from mapo_jax.model.lora import LoRA
from mapo_jax.model.peft import adapter_tensors
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.running.model_folder import write_model_folder
from mapo_jax.running.policy import Policy
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer

pytestmark = pytest.mark.peer

ROLLOUT = RolloutConfig(max_tokens=256, max_reply_tokens=8, system_prompt="Be kind.", temperature=0.9)
TEXTS = [
    "Hello, you sound tired.",
    " two  spaces\n\n\n\t1234 e\u0301 \u4f60\u597d <|im_end|> <think> <tool>",
    "",
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "\u4f60"}}}
TALK = [
    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo <|im_end|>"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "content": "a wall"},
    {"role": "assistant", "content": "You sound tired."},
    {"role": "user", "content": "Yes."},
]
# Prints what this version of transformers makes of the folders, as JSON.
READ = """
import json, sys
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

job = json.loads(sys.argv[1])
out = {"version": transformers.__version__}
for folder in job["tokenizers"]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    render = lambda messages, **options: tokenizer.apply_chat_template(messages, tokenize=False, **options)
    extra = "extra_special_tokens" if int(transformers.__version__[0]) > 4 else "additional_special_tokens"
    out[folder] = {
        "ids": [tokenizer.encode(text) for text in job["texts"]],
        "back": [tokenizer.decode(tokenizer.encode(text)) for text in job["texts"]],
        "skipped": [tokenizer.decode(tokenizer.encode(t), skip_special_tokens=True) for t in job["texts"]],
        "rendered": [render(job["talk"]), render(job["talk"], add_generation_prompt=True)],
        "row": tokenizer.apply_chat_template(job["talk"], tokenize=True, return_dict=False),
        "special": [tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token],
        "extra": [str(token) for token in getattr(tokenizer, extra)],
        "named": getattr(tokenizer, "image_token", None),
        "length": [len(tokenizer), tokenizer.model_max_length, tokenizer.padding_side],
    }
for folder in job["models"]:
    config, sampling = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    rope = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    names = "hidden_size num_hidden_layers head_dim rms_norm_eps vocab_size tie_word_embeddings eos_token_id"
    more = "temperature top_p top_k do_sample max_new_tokens eos_token_id pad_token_id"
    out[folder + " settings"] = [
        type(config).__name__, rope, str(config.dtype).removeprefix("torch."),
        [getattr(config, name) for name in names.split()],
        {name: getattr(sampling, name) for name in more.split()},
    ]
if job["torch"]:
    import torch

    tokens = torch.tensor(job["tokens"])
    load = lambda f: transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval()
    with torch.no_grad():
        for folder in job["models"]:
            out[folder + " logits"] = load(folder)(tokens).logits.tolist()
        if job["adapters"]:
            from peft import PeftModel

            for folder in job["adapters"]:
                model = PeftModel.from_pretrained(load(job["models"][0]), folder).eval()
                out[folder + " logits"] = model(tokens).logits.tolist()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def python4(tmp_path_factory):
    """A Python with transformers 4, and with everything else that this one has."""
    folder = tmp_path_factory.mktemp("transformers4") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    with open(f"{where.stdout.strip()}/behind.pth", "w") as paths:
        paths.write(sysconfig.get_path("purelib") + "\n")
    got = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "transformers<5"],
        capture_output=True, text=True,
    )  # fmt: skip
    if got.returncode:
        pytest.skip(f"pip cannot fetch transformers<5: {(got.stderr.strip().splitlines() or [''])[-1]}")
    return python


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folders as they leave a run: three kinds of tokenizers, two families of models, adapters."""
    root = tmp_path_factory.mktemp("exports")
    plain, foreign = root / "plain", root / "foreign"
    built = train_tokenizer([*TEXTS, "assistant user system tool"] * 3, 330, max_tokens=256)
    built.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>", "<tool>")])
    write_tokenizer(plain, built)
    # What was not of the Qwen2 class to begin with, and has a token with a name.
    PreTrainedTokenizerFast(
        tokenizer_object=built.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        extra_special_tokens={"image_token": "<tool>"},
    ).save_pretrained(foreign)
    tokenizers, models, adapters = [], [], []
    for source, family, history in ((plain, "qwen3", "append"), (foreign, "qwen2", "append")):
        tokenizer = load_tokenizer(source)
        lora = LoRA(3, 7.0, ("q", "down"))
        shape = QwenConfig(
            vocab_size=len(tokenizer) + 3,
            hidden_size=24,
            intermediate_size=40,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            rope_theta=5e5,
            max_position_embeddings=256,
            tie_word_embeddings=family == "qwen3",
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            family=family,
        )
        policy = Policy(shape, tokenizer, ChatFormat(tokenizer, history, ROLLOUT.system_prompt))
        folder = root / family
        folder.mkdir()
        write_model_folder(folder, policy, init_params(shape, 0), ROLLOUT)
        models.append(str(folder))
        tokenizers.append(str(folder))
        if family == "qwen3":
            config = QwenConfig(**{**vars(shape), "lora": lora})
            rng = np.random.default_rng(0)
            sizes = {"q": (24, 32), "down": (40, 24)}

            def read(path, layer, sizes=sizes, rng=rng):
                rows, columns = sizes[path.split("/")[-2]]
                return rng.standard_normal((rows, 3) if path.endswith("a") else (3, columns))

            (root / "adapters").mkdir()
            peft.write_adapter_config(root / "adapters", lora, folder.name)
            save_file(
                adapter_tensors(read, config), root / "adapters" / peft.WEIGHTS, metadata={"format": "pt"}
            )
            write_tokenizer(root / "adapters", tokenizer, policy.chat.template)
            adapters.append(str(root / "adapters"))
            tokenizers.append(str(root / "adapters"))
    return {
        "tokenizers": tokenizers,
        "models": models,
        "adapters": adapters,
        "texts": TEXTS,
        "talk": TALK,
        "tokens": np.random.default_rng(0).integers(0, 300, (2, 20)).tolist(),
    }


def read_with(python, job):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", READ, json.dumps(job)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_versions_read_the_same(python4, job):
    def has(name):
        return not subprocess.run([python4, "-c", f"import {name}"], capture_output=True).returncode

    job = job | {"torch": has("torch"), "adapters": job["adapters"] if has("peft") else []}
    old, new = read_with(python4, job), read_with(sys.executable, job)
    assert (old.pop("version")[0], new.pop("version")[0]) == ("4", "5")
    assert old.keys() == new.keys() and len(old) >= 6
    for name in old:
        if name.endswith("logits"):
            # float32 on both sides; sums of a few hundred terms, perhaps in another order.
            np.testing.assert_allclose(old[name], new[name], rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            assert old[name] == new[name], name
    assert "<tool_call>" in old[job["models"][0]]["rendered"][0]
    assert old[job["models"][1]]["named"] == "<tool>"
    if job["adapters"]:
        bare, adapted = (np.array(old[f"{name} logits"]) for name in (job["models"][0], job["adapters"][0]))
        assert np.abs(bare - adapted).max() > 0.1
