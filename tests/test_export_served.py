"""An exported folder behind an independent OpenAI-compatible server: `transformers serve`.

Run with `pytest -m peer tests/test_export_served.py`; needs torch, fastapi and uvicorn.
"""

import os
import shutil
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from openai import OpenAI, OpenAIError

from mapo_jax.config import RolloutConfig
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.running.model_folder import write_model_folder
from mapo_jax.running.policy import Policy
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from mapo_jax.warmstarting.packing import Renderer

pytestmark = pytest.mark.peer

ROLLOUT = RolloutConfig(max_tokens=256, max_reply_tokens=8, system_prompt="Be kind.", temperature=0.9)
TALK = [
    "Hello.",
    "You sound tired.",
    "Yes. <|im_end|> I feel tired.",
    "I am here.",
    "Why?",
    "Maybe rest.",
    "Bye.",
]
THINKING = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}"
)


@pytest.fixture(scope="module", params=["plain", "thinking"])
def policy(request, tmp_path_factory):
    """Of a family that does not think, and of one whose own template drops earlier think blocks."""
    source = tmp_path_factory.mktemp("tokenizer")
    template = {"chat_template": THINKING} if request.param == "thinking" else {}
    write_tokenizer(source, train_tokenizer(TALK * 4, 300, max_tokens=256), **template)
    tokenizer = load_tokenizer(source)
    config = QwenConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    return Policy(config, tokenizer, ChatFormat(tokenizer, "append", ROLLOUT.system_prompt))


@pytest.fixture(scope="module")
def params(policy):
    # Larger than fresh ones, so that what is said depends on every token of the prompt.
    return jax.tree.map(lambda leaf: leaf * (8 if leaf.ndim > 1 else 1), init_params(policy.config, 0))


@pytest.fixture(scope="module")
def client(policy, params, tmp_path_factory):
    command = shutil.which("transformers")
    if command is None:
        pytest.skip("the command `transformers` is not installed")
    pytest.importorskip("fastapi")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("served") / "model"
    folder.mkdir()
    write_model_folder(folder, policy, params, ROLLOUT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = open(folder.parent / "log", "wb")  # noqa: SIM115
    server = subprocess.Popen(
        [command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=log,
        stderr=log,
    )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0)
    try:
        for _ in range(240):
            try:
                client.models.list()
                break
            except OpenAIError:
                assert server.poll() is None, (folder.parent / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield client, str(folder)
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_the_server_renders_a_dialogue_as_it_was_trained_on(policy, params, client, turns):
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(TALK[: 2 * turns - 1])
    ]
    # The training row up to the reply that is awaited, from training's own renderer.
    renderer = Renderer(policy.tokenizer, "append", ROLLOUT.system_prompt)
    (piece,) = renderer.pieces([*messages, {"role": "assistant", "content": "x"}], 10_000)
    row = piece.ids[: len(policy.chat.prompt(messages))]
    engine = Engine(
        policy.config,
        slots=1,
        length=256,
        max_reply_tokens=8,
        stop_ids=policy.chat.stop_ids,
        vocabulary_size=policy.chat.vocabulary_size,
        sampling=Sampling(temperature=0.0),
    )
    engine.load(params, 0)
    (ours,) = engine.reply([Request(0, row, key=(0, 0, 0), turn=0, start=True)])

    connection, folder = client
    reply = connection.chat.completions.create(model=folder, messages=messages, temperature=0, max_tokens=8)
    assert reply.usage.prompt_tokens == len(row)
    said = policy.tokenizer.decode(ours.ids, skip_special_tokens=True)
    assert reply.choices[0].message.content.strip() == said.strip()
    assert len(said) > 3 and np.isfinite(ours.logprobs).all()
