import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mapo_jax
from mapo_jax import warmstart
from mapo_jax.config import load_config
from mapo_jax.environment.scripted.grammar import KINDS
from mapo_jax.errors import UserError
from mapo_jax.model.huggingface import load_params, read_config
from mapo_jax.running.policy import load_policy
from mapo_jax.warmstarting.cache_key import cache_key
from mapo_jax.warmstarting.chats import write_chats
from mapo_jax.warmstarting.measurement import gate, measurement_table
from mapo_jax.warmstarting.packing import with_prompts

TINY = [
    "model.fresh.vocabulary=400",
    "model.fresh.hidden=16",
    "model.fresh.layers=1",
    "model.fresh.heads=2",
    "warmstart.steps=12",
    "warmstart.rows=2",
    "warmstart.row_tokens=240",
    "warmstart.turns=1",
    "warmstart.dialogues=6",
    "warmstart.min_naming_ratio=0",
    "rollout.scenarios=2",
    "rollout.rollouts=1",
    "rollout.max_turns=2",
    "rollout.min_turns=1",
    "rollout.max_tokens=256",
    "rollout.max_reply_tokens=4",
    "training.minibatch_scenarios=2",
    "training.microbatch_tokens=0",
    "logging.progress=false",
    "algorithm.estimator=reinforce_plus_plus",
    "run.directory=unused",
]


def _config(cache, *changes):
    return load_config(None, [*TINY, f"warmstart.cache={cache}", *changes])


def _quiet():
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def read_batches():
    """Batches of which the user's words were learnt."""
    return []


@pytest.fixture(scope="module")
def made(cache, read_batches):
    def counted(batch):
        read_batches.append(batch)
        return with_prompts(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmstart, "with_prompts", counted)
        return warmstart.run_warmstart(_config(cache), console=_quiet())


def test_a_fresh_model_learns_the_users_words_in_half_of_the_updates(made, read_batches):
    assert [len(batch.tokens) for batch in read_batches if len(batch.tokens) == 2] == [2] * 6


def test_the_result_is_a_model_folder_with_a_record(made):
    config = _config("unused")
    policy, params = load_policy(made, config.rollout)
    assert policy.config.family == "qwen3"
    assert policy.config.max_position_embeddings == 256
    assert params["embed"]["embedding"].dtype == np.float32
    record = json.loads((made / "warmstart.json").read_text())
    assert record["loss"][0][0] == 1
    assert record["loss"][-1][0] == 12
    assert record["loss"][-1][1] < record["loss"][0][1]
    assert record["measured"]["turns/mean"] == 2.0
    assert {f"act/{kind}" for kind in KINDS} <= set(record["measured"])
    assert (made / "generation_config.json").is_file()
    assert [len(policy.tokenizer.encode(role)) for role in ("user", "assistant")] == [1, 1]


def test_it_is_found_again_whatever_does_not_determine_it(made, cache, monkeypatch):
    def make_nothing(*arguments):
        raise AssertionError("made again")

    monkeypatch.setattr(warmstart, "_make", make_nothing)
    for change in ("training.steps=7", "algorithm.discount=0.5", "rollout.rollouts=2"):
        assert warmstart.run_warmstart(_config(cache, change), console=_quiet()) == made
    for change in ("training.seed=1", "warmstart.steps=13", "model.fresh.hidden=24", "rollout.max_turns=3"):
        with pytest.raises(AssertionError, match="made again"):
            warmstart.run_warmstart(_config(cache, change), console=_quiet())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "warmstart.json", "checksums.json"])
def test_a_damaged_one_is_refused_by_its_file(made, cache, name):
    file = made / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])
    try:
        with pytest.raises(
            UserError, match=rf"{name} is missing or not as it was written; remove that folder"
        ):
            warmstart.run_warmstart(_config(cache), console=_quiet())
    finally:
        file.write_bytes(whole)


def test_the_gate_is_asked_for_a_finished_one_too(made, cache):
    with pytest.raises(UserError, match="too weak"):
        warmstart.run_warmstart(_config(cache, "warmstart.min_naming_ratio=2"), console=_quiet())


def test_cards_and_data_are_part_of_the_name(tmp_path):
    def key(*changes):
        return cache_key(_config(tmp_path, *changes))

    embedded = Path(mapo_jax.__file__).parent / "environment" / "scenarios"
    cards = tmp_path / "cards"
    cards.mkdir()
    for file in embedded.glob("*.yaml"):
        (cards / file.name).write_bytes(file.read_bytes())
    same = key(f"environment.scenarios={cards}")
    assert same == key()  # the same cards in another place
    (cards / "life.yaml").write_bytes((cards / "life.yaml").read_bytes() + b"# changed\n")
    assert key(f"environment.scenarios={cards}") != same

    data = tmp_path / "chats.jsonl"
    data.write_text("one")
    first = key(f"warmstart.data={data}")
    (tmp_path / "copy.jsonl").write_text("one")
    data.write_text("two")
    assert key(f"warmstart.data={data}") != first
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        key(f"warmstart.data={tmp_path / 'nowhere'}")


def test_own_chats_train_an_existing_model(made, tmp_path, monkeypatch):
    monkeypatch.delattr(warmstart, "with_prompts")  # the user's words are not learnt
    chats = [
        [{"role": "user", "content": "I feel tired."}, {"role": "assistant", "content": "You sound tired."}]
    ] * 12
    write_chats(tmp_path / "chats.jsonl", chats)
    config = _config(tmp_path, f"model.path={made}", f"warmstart.data={tmp_path / 'chats.jsonl'}")
    folder = warmstart.run_warmstart(config, console=_quiet())
    assert folder.parent == tmp_path
    shape = read_config(made)
    assert read_config(folder) == shape
    before, after = (load_params(place, shape)["embed"]["embedding"] for place in (made, folder))
    assert not np.array_equal(before, after)
    record = json.loads((folder / "warmstart.json").read_text())
    assert record["loss"][-1][1] < record["loss"][0][1]


def test_a_stop_leaves_nothing_behind(tmp_path):
    class Stop(Exception):
        pass

    def check():
        raise Stop

    with pytest.raises(Stop):
        warmstart.run_warmstart(_config(tmp_path), console=_quiet(), check=check)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_sentence(made, tmp_path, capsys):
    assert warmstart.main([*TINY, f"warmstart.cache={tmp_path}", "warmstart.row_tokens=20"]) == 2
    assert "synthetic dialogues, dialogue 1: turn 1 has" in capsys.readouterr().err
    config = _config(tmp_path, f"model.path={made}", "warmstart.row_tokens=300")
    with pytest.raises(UserError, match=r"`warmstart.row_tokens` is 300; it must be at most the model's 256"):
        warmstart.run_warmstart(config, console=_quiet())
    with pytest.raises(UserError, match="which is no folder"):
        warmstart.run_warmstart(_config(tmp_path, f"model.path={tmp_path / 'nowhere'}"), console=_quiet())


GOOD = {
    "naming/situation": 0.6,
    "naming/situation_chance": 0.25,
    "naming/feeling": 0.3,
    "naming/feeling_chance": 0.1,
    **{f"act/{kind}": 0.01 for kind in KINDS},
}


def test_the_gate_lets_a_good_warm_start_through():
    gate(GOOD, 2.0)
    gate({}, 0)
    perfect = {**GOOD, "naming/situation": 1.0, "naming/feeling": 1.0}
    gate(perfect, 20)  # nobody can be right more often than always


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"naming/situation": 0.49}, "the user's situation right 49% of the time, where 50%"),
        ({"naming/feeling": 0.19}, "the user's feeling right 19% of the time, where 20%"),
        ({"naming/feeling": None}, "it never names the user's feeling"),
        (
            {"act/offer_step": 0.0, "act/repair": None, "act/advise": 0.0},
            "no reply of the kind offer_step, repair was measured",
        ),
    ],
)
def test_the_gate_names_what_is_too_weak(change, message):
    measured = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        gate(measured, 2.0)
    assert "warmstart.steps" in str(caught.value)


def test_the_table_shows_naming_beside_chance():
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(measurement_table({**GOOD, "kind/ask": 0.125, "reward/mean": -1.5}))
    text = console.export_text()
    assert [cell.strip() for line in text.splitlines() if "situation" in line for cell in line.split("│")][
        1:4
    ] == ["situation named right", "60%", "25%"]
    assert "-1.50" in text
    assert "12%" in text
