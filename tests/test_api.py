"""The package's use from Python, also inside a running event loop, as in a notebook."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import mapo_jax
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.event_loop import open_runner
from mapo_jax.model.head import logits
from mapo_jax.model.qwen import hidden_states
from mapo_jax.running.stop import Interrupted, StopRequest
from mapo_jax.world import _watched

SETTINGS = [
    "rollout.max_reply_tokens=8",
    "rollout.max_tokens=256",
    "rollout.max_turns=2",
    "rollout.min_turns=1",
]
CHAT = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "You feel tired."},
    {"role": "user", "content": "Yes."},
    {"role": "assistant", "content": "Tell me."},
]


@pytest.fixture(scope="module")
def model(model_folder):
    return mapo_jax.load(model_folder, overrides=SETTINGS)


def test_importing_the_package_imports_nothing():
    script = (
        "import sys, mapo_jax; print(mapo_jax.__version__, len(dir(mapo_jax)) > 5, 'jax' in sys.modules);"
        "mapo_jax.UserError; print('jax' in sys.modules); mapo_jax.advantages.mapo; mapo_jax.train.main"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [mapo_jax.__version__, "True", "False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mapo_jax.nothing  # noqa: B018


def test_train_is_a_function_and_a_module(monkeypatch):
    import mapo_jax.train as module

    assert mapo_jax.train is module and callable(module)
    calls = []
    monkeypatch.setattr(module, "train", lambda *arguments, **options: calls.append((*arguments, options)))
    mapo_jax.train("configuration")
    assert calls == [("configuration", None, {"verbose": False})]


@pytest.mark.parametrize("name", mapo_jax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(mapo_jax, name).__doc__


def test_a_reply_follows_from_the_seed(model):
    replies = [model.chat(CHAT[:3], seed=seed) for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]
    assert len(model.chat(CHAT[:1], max_tokens=1, temperature=0)) < len(model.chat(CHAT[:1], temperature=0))
    with pytest.raises(mapo_jax.UserError, match="leaves no room for a reply"):
        model.chat([{"role": "user", "content": "word " * 400}])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: mapo_jax.train("tiny"), "train takes a configuration, not 'tiny'"),
        (lambda model: model.chat("hello"), "messages must be a list"),
        (lambda model: model.chat(5), "messages must be a list"),
        (lambda model: model.chat(CHAT[0]), "messages must be a list"),
        (lambda model: model.chat(["hello"]), "message 1 must be a mapping"),
        (lambda model: model.chat([{"content": "Hm."}]), "message 1 must be a mapping"),
        (lambda model: model.chat([*CHAT[:2], {"role": "user"}]), "message 3 has no text"),
        (lambda model: model.chat([{"role": "user", "content": None}]), "message 1 has no text"),
        (lambda model: model.chat([]), "the last message must be the user's"),
        (lambda model: model.chat(CHAT[:2]), "the last message must be the user's"),
        (lambda model: model.score("hello"), "messages must be a list"),
        (lambda model: model.dialogue(5), "the card must be a scenario or the id of one, not 5"),
    ],
)
def test_what_is_no_conversation_is_one_sentence(model, call, words):
    with pytest.raises(mapo_jax.UserError, match=words):
        call(model)


def test_scores_are_the_log_probabilities_of_the_replies(model):
    """Against the logits of the whole row, of which the replies' columns are searched by their ids."""
    policy, params = model._local.policy, model._local.params
    ids = policy.tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    row = jnp.array([ids])
    hidden = hidden_states(params, policy.config, row, jnp.arange(len(ids))[None])
    scores = np.asarray(logits(params, policy.config, hidden, vocabulary_size=policy.chat.vocabulary_size))[0]
    every = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    found = model.score(CHAT)
    for reply, logprobs in zip(CHAT[1::2], found, strict=True):
        own = [*policy.tokenizer.encode(reply["content"]), *policy.chat.end_of_turn]
        start = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)
        expected = [every[start + i - 1, token] for i, token in enumerate(own)]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)  # float32, another order of summation
    with pytest.raises(mapo_jax.UserError, match="the chat, message 1: the role"):
        model.score(CHAT[1:])


def test_a_dialogue_inside_a_running_loop_is_the_same(model):
    card = load_scenarios()[0]
    outside = model.dialogue(card.id, seed=3)

    async def notebook():
        loop = asyncio.get_running_loop()
        inside = model.dialogue(card, seed=3)
        assert asyncio.get_running_loop() is asyncio.get_event_loop() is loop
        return inside

    assert asyncio.run(notebook()) == outside
    assert outside.turn_count == 2 and outside.outcome and outside.messages[1]["role"] == "assistant"
    with pytest.raises(mapo_jax.UserError, match="there is no scenario 'nobody'"):
        model.dialogue("nobody")


def test_a_runner_passes_errors_on():
    async def fail():
        raise ValueError("inside")

    def work():
        with open_runner() as runner:
            runner.run(fail())

    async def notebook():
        work()

    for run in (work, lambda: asyncio.run(notebook())):
        with pytest.raises(ValueError, match="inside"):
            run()


def test_an_interrupt_reaches_a_run_inside_a_running_loop():
    """As when the kernel of a notebook is interrupted."""

    async def notebook():
        with StopRequest() as stop, open_runner() as runner:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            runner.run(_watched(asyncio.sleep(60), stop.check))

    with pytest.raises(Interrupted, match="SIGINT"):
        asyncio.run(notebook())


def test_a_configuration_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mapo_jax.load_config("live").environment.family == "live"
    assert mapo_jax.load_config("qwen2.5_7b_v5p.yaml").mesh.fsdp
    (tmp_path / "live").mkdir()  # a folder is no configuration
    (tmp_path / "tiny").write_text("training: {steps: 7}")  # a file wins
    assert mapo_jax.load_config("tiny").training.steps == 7
    assert mapo_jax.load_config("live").environment.family == "live"
    with pytest.raises(
        mapo_jax.UserError, match=r"there is no file lave; .* live-engine, live-small, live, "
    ):
        mapo_jax.load_config("lave")
