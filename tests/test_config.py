"""The configuration: reading, overriding, and every sentence a user gets for bad input."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mapo_jax import config as configuration
from mapo_jax.config import Config, differing_keys, known_keys, load_config, to_yaml
from mapo_jax.errors import UserError

LIVE = ["environment.family=live"] + [
    f"environment.{role}.model=engine:x" for role in ("user", "judge", "director")
]


def test_a_changed_configuration_survives_yaml(tmp_path):
    config = load_config(
        None, ["training.steps=7", "optimizer.learning_rate=1e-3", "model.path=somewhere", "mesh.tensor=2"]
    )
    assert (config.training.steps, config.optimizer.learning_rate, config.model.path) == (
        7,
        1e-3,
        "somewhere",
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("training: {steps: 5, seed: 3}\n")
    config = load_config(file, ["training.steps=9"])
    assert (config.training.steps, config.training.seed) == (9, 3)


def test_about_a_hundred_fields_at_most_and_each_has_a_doc_line():
    # A role's fields are written once and configure four roles.
    others = tuple(f"environment.{name}." for name in ("user", "director", "held_out_judge"))
    repeated = sum(key.startswith(others) for key in known_keys())
    assert len(known_keys()) - repeated <= 110
    source = Path(configuration.__file__).read_text().split("def load_config")[0]
    for key in known_keys():
        name = key.rsplit(".", 1)[1]
        lines = [line for line in source.splitlines() if line.strip().startswith(f"{name}: ")]
        lines = [line for line in lines if "Config = field(" not in line]  # a section of that name
        assert lines, key
        assert all("#" in line for line in lines), key


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.step=3"], ["training.step", "training.steps"]),
        (["algoritm.discount=0.9"], ["algorithm.discount"]),
        (["training.steps=many"], ["training.steps", "whole number", "many"]),
        (["training.steps=2.5"], ["training.steps", "whole number"]),
        (["training.steps=true"], ["training.steps", "whole number"]),
        (["logging.wandb=3"], ["logging.wandb", "true or false"]),
        (["logging.wandb=null"], ["logging.wandb", "true or false"]),
        (["rollout.copy_weights=1"], ["rollout.copy_weights", "true or false or null"]),
        (["rollout.slots=true"], ["rollout.slots", "a whole number or null"]),
        (["training=3"], ["section", "training.steps"]),
        (["steps"], ["key=value"]),
        (["rollout.top_p=0.9"], ["rollout.top_p", "evaluation and serving"]),
        (["rollout.top_k=5"], ["rollout.top_k", "evaluation and serving"]),
        (["rollout.temperature=0"], ["rollout.temperature", "above 0"]),
        (["rollout.rollouts=1"], ["rollout.rollouts", "at least 2", "mapo"]),
        (["algorithm.estimator=gpro"], ["grpo", "one of"]),
        (["training.minibatch_scenarios=3"], ["divisor of rollout.scenarios (8)"]),
        (["rollout.min_turns=9"], ["rollout.max_turns (8)"]),
        (["rollout.max_reply_tokens=448"], ["rollout.max_tokens (448)"]),
        (["mesh.data=-1"], ["at most one axis"]),
        (["mesh.tensor=0"], ["mesh.tensor"]),
        (["algorithm.discount=1.5"], ["between 0 and 1"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate", "nan"]),
        (["model.fresh.kv_heads=3"], ["divisor of model.fresh.heads"]),
        (["environment.family=live"], ["environment.user.model", "engine:FOLDER"]),
        (["environment.judge.extra_body=3"], ["environment.judge.extra_body", "mapping"]),
        ([*LIVE, "environment.judge.url=judge.example"], ["environment.judge.url", "http"]),
        ([*LIVE, "environment.judge.url=https://me:secret@judge.example/v1"], ["key_variable"]),
        ([*LIVE, "environment.judge.url=https://judge.example/v1?key=secret"], ["key_variable"]),
        ([*LIVE, "environment.judge.key_variable=sk-secret"], ["the name of an environment variable"]),
        ([*LIVE, "environment.judge.implementation=Judge"], ["package.module:Class"]),
        ([*LIVE, "environment.judge.prices=[1]"], ["environment.judge.prices", "two numbers"]),
        (["environment.judge.prices=dear"], ["environment.judge.prices", "a list of numbers"]),
        ([*LIVE, "environment.judge.samples=0"], ["environment.judge.samples", "at least 1"]),
        ([*LIVE, "environment.user.temperature=-1"], ["environment.user.temperature", "at least 0"]),
    ],
)
def test_bad_input_names_key_value_and_remedy(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message and "secret" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "training: 3\n"])
def test_a_broken_file_is_one_clear_error(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(file)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_one_rollout_is_enough_where_nothing_compares_rollouts():
    assert load_config(None, ["rollout.rollouts=1", "algorithm.estimator=batch"]).rollout.rollouts == 1


def test_differing_keys_are_dotted():
    config = Config()
    other = replace(config, training=replace(config.training, seed=4))
    assert differing_keys(config, asdict(other)) == ["training.seed"]


def test_tiny_yaml_spells_out_the_defaults():
    file = Path(configuration.__file__).resolve().parents[1] / "configs" / "tiny.yaml"
    assert load_config(file) == Config()
    text = file.read_text()
    for key in known_keys():
        assert f"{key.rsplit('.', 1)[1]}: " in text, key
