"""Against transformers, which decodes the same prompts one by one."""

import pytest

from mapo_jax.config import Config
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Prompt
from mapo_jax.evaluation.local import EngineAnswerer, load_model

PROMPTS = [Prompt(f"p{i}", "Which feeling is it? " * (1 + 3 * i % 5), {"id": i}) for i in range(5)]


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, Config())


def answers(model, console, prompts=PROMPTS, slots=2, temperature=0.0, seed=0, max_tokens=6):
    found = {}
    answerer = EngineAnswerer(model, temperature, max_tokens, seed, console, slots)
    answerer.answer(prompts, lambda prompt, answer: found.__setitem__(prompt.id, answer))
    return found


def test_greedy_answers_are_those_of_transformers(model, model_folder, console):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    other = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    found = answers(model, console)
    assert found.keys() == {prompt.id for prompt in PROMPTS}
    for prompt in PROMPTS:
        row = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = other.generate(**row, max_new_tokens=6, do_sample=False)[0, row["input_ids"].shape[1] :]
        assert found[prompt.id].text == model.policy.chat.decode(out.tolist())
        assert found[prompt.id].truncated == (out[-1].item() not in model.policy.chat.stop_ids)


def test_sampled_answers_follow_from_seed_and_prompt_alone(model, console):
    all_at_once = answers(model, console, temperature=1.0)
    one = answers(model, console, prompts=PROMPTS[3:4], temperature=1.0)
    assert one["p3"] == all_at_once["p3"]
    assert answers(model, console, temperature=1.0, seed=1) != all_at_once


def test_longer_prompts_than_the_model_was_made_for_are_read_with_a_note(model, console, capsys):
    long = Prompt("long", "x" * 700, {"id": 0})
    assert answers(model, console, prompts=[long]).keys() == {"long"}
    assert "1 of 1 prompts may exceed the 512 positions" in capsys.readouterr().out


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a Hugging Face model folder"):
        load_model(tmp_path, Config())
