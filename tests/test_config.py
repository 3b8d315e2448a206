"""The configuration: reading, overriding, and the error message for each kind of bad input."""

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from mapo_jax import settings, train, warmstart
from mapo_jax.config import (
    GONE,
    Config,
    describe_keys,
    differing_keys,
    distinct_keys,
    known_keys,
    load_config,
    to_yaml,
    updated,
    value_of,
)
from mapo_jax.errors import UserError
from mapo_jax.idle import READS, idle_settings, refuse_unread, refuse_unused_roles, unread

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

LIVE = ["environment.family=live"] + [
    f"environment.{role}.model=engine:x" for role in ("user", "judge", "director")
]
SERVED = ["environment.judge.model=m", "environment.judge.url=http://x/v1"]


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


def test_a_hundred_keys_at_most_and_each_has_a_meaning():
    # A role's keys are written once and configure four roles.
    others = tuple(f"environment.{name}." for name in ("user", "director", "held_out_judge"))
    repeated = sum(key.startswith(others) for key in known_keys())
    assert len(known_keys()) - repeated == len(distinct_keys()) <= 100
    for key, field in settings.fields(Config).items():
        assert field.description, key


def test_the_list_of_keys_has_all_of_them_with_default_and_meaning(capsys):
    assert train.main(["--keys"]) == 0
    shown = capsys.readouterr().out
    assert shown == describe_keys() + "\n"
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for key in distinct_keys():
        default = value_of(Config(), key)
        assert f"{key} = {default if isinstance(default, str) else json.dumps(default)}\n" in shown
        assert settings.fields(Config)[key].description in words
    assert "collect-and-update steps (a whole number, at least 1)" in words
    assert "Validation during training." in words


def test_the_schema_for_editors_is_what_the_models_give():
    schema = json.loads((CONFIGS / "schema.json").read_text())
    remedy = "run `python -m mapo_jax.config > configs/schema.json`"
    assert schema == settings.json_schema(Config), remedy
    algorithm = schema["$defs"]["AlgorithmConfig"]
    assert algorithm["additionalProperties"] is False
    discount = algorithm["properties"]["discount"]
    assert (discount["minimum"], discount["maximum"], discount["description"]) == (0, 1, "gamma per turn")
    assert "rloo" in algorithm["properties"]["estimator"]["enum"]
    for file in CONFIGS.glob("*.yaml"):
        assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), file


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.step=3"], ["training.step", "training.steps"]),
        (["algoritm.discount=0.9"], ["algorithm.discount"]),
        (["optimizer.lr=1e-3"], ["`optimizer.learning_rate`"]),
        (["lr=1e-3"], ["`optimizer.learning_rate`"]),
        (["steps=3"], ["`training.steps`"]),
        (["algorithm.gamma=1"], ["`algorithm.discount`"]),
        (["training.steps=many"], ["training.steps", "whole number", "many"]),
        (["training.steps=2.5"], ["training.steps", "whole number"]),
        (["training.steps=true"], ["training.steps", "whole number"]),
        (["logging.wandb=3"], ["logging.wandb", "true or false"]),
        (["logging.wandb=null"], ["logging.wandb", "true or false"]),
        (["rollout.copy_weights=1"], ["rollout.copy_weights", "true or false or null"]),
        (["rollout.slots=true"], ["rollout.slots", "a whole number or null"]),
        (["training=3"], ["section", "training.steps"]),
        (["steps"], ["key=value"]),
        (["rollout.top_p=0.9"], ["rollout.top_p", "0.9", "gone", "whole distribution"]),
        (["rollout.top_k=0"], ["rollout.top_k", "gone", "whole distribution"]),
        (["rollout={lanes: 4}"], ["rollout.lanes", "gone", "rollout.slots"]),
        (["rollout.temperature=0"], ["rollout.temperature", "above 0"]),
        (["rollout.rollouts=1"], ["rollout.rollouts", "at least 2", "mapo"]),
        (["algorithm.estimator=gpro"], ["grpo", "one of"]),
        (["training.minibatch_scenarios=3"], ["divisor of rollout.scenarios (8)"]),
        (["rollout.min_turns=9"], ["rollout.max_turns (8)"]),
        (["rollout.max_reply_tokens=512"], ["rollout.max_tokens (512)"]),
        (["mesh.data=-1"], ["at most one axis"]),
        (["mesh.tensor=0"], ["mesh.tensor"]),
        (["algorithm.discount=1.5"], ["between 0 and 1"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate", "nan"]),
        (["model.fresh.kv_heads=3"], ["model.fresh.kv_heads", "gone", "model.fresh.heads / 2"]),
        (["model.fresh.heads=6"], ["model.fresh.heads", "6", "divisor of half of model.fresh.hidden (128)"]),
        (["training.steps.more=3"], ["training.steps", "whole number"]),
        (["run.directory={}"], ["run.directory", "text"]),
        (["logging.progress=[]"], ["logging.progress", "true or false"]),
        (["algorithm.reward=3"], ["algorithm.reward", "one of", "incremental"]),
        (["optimizer.learning_rate=true"], ["optimizer.learning_rate", "a number", "True"]),
        (["lora.targets=[q,q]"], ["lora.targets", "differ"]),
        (["lora.targets=[]"], ["lora.targets", "some of q, k, v"]),
        (["environment.judge.prices=[1,many]"], ["environment.judge.prices", "a list of numbers", "many"]),
        (["run.directory=[a]"], ["run.directory", "text"]),
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


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("- a\n- b\n", ""),
        ("a: [\n", ", line 2: not valid YAML"),
        ("training: 3\n", ""),
        ("training:\n  steps: 3\n seed: 1\n", ", line 3: not valid YAML"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, content, place):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert f"broken.yaml{place}" in str(caught.value)


@pytest.mark.parametrize(
    ("command", "words", "setting"),
    [
        (train, ["--steps", "3"], "training.steps=3"),
        (train, ["--training.steps=3"], "training.steps=3"),
        (train, ["training.seed=1", "--steps", "3"], "training.steps=3"),
        (train, ["--model", "org/name"], "model.path=org/name"),
        (train, ["--run", "my runs/1"], "'run.directory=my runs/1'"),
        (train, ["--lr=1e-4"], "optimizer.learning_rate=1e-4"),
        (warmstart, ["--steps", "3"], "warmstart.steps=3"),
        (warmstart, ["--data=chats.jsonl"], "warmstart.data=chats.jsonl"),
        (warmstart, ["--seed=3"], "training.seed=3"),
    ],
)
def test_a_setting_written_as_an_option_is_told_its_form(command, words, setting, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"write the setting {setting}\n" in error


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_a_message_points_at_the_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("training:\n  seed: 1\n  steps: many\nrollout:\n  rollout: 3\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 5: unknown key `rollout.rollout`"):
        load_config(file)
    file.write_text("training:\n  seed: 1\n  steps: many\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 3: `training.steps` must be a whole number"):
        load_config(file)
    assert load_config(file, ["training.steps=3"]).training.steps == 3
    with pytest.raises(UserError, match=r"^`training.steps` is 0; it must be at least 1"):
        load_config(file, ["training.steps=0"])
    file.write_text("training: {seed: 1}\ntraining: {steps: 2}\n")
    with pytest.raises(UserError, match=rf"^{file}, line 2: `training` is there a second time; remove one"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("7", "run.directory", "7"),
        ("007", "run.directory", "007"),
        ("2024-01-31", "run.directory", "2024-01-31"),
        ("2024-31-31", "run.directory", "2024-31-31"),
        ("'null'", "run.directory", "null"),
        ("null", "model.path", None),
        ("1e-3", "optimizer.learning_rate", 1e-3),
        ("3", "optimizer.learning_rate", 3.0),
        ("[1e-3, 2]", "environment.user.prices", [1e-3, 2.0]),
        ("{a: {b: 1}}", "environment.user.extra_body", {"a": {"b": 1}}),
    ],
)
def test_values_are_taken_as_they_are_meant(text, key, value):
    taken = value_of(load_config(None, [f"{key}={text}"]), key)
    assert taken == value and type(taken) is type(value)


def test_mappings_of_a_key_are_merged(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "environment: {user: &role {extra_body: {slots: 16, tokens: 1024}}, judge: *role}\nmodel:\n"
    )
    environment = load_config(file, ["environment.user.extra_body.tokens=4096"]).environment
    assert environment.user.extra_body == {"slots": 16, "tokens": 4096}
    assert environment.judge.extra_body == {"slots": 16, "tokens": 1024}


# --- Settings that cannot act. ---


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["algorithm.estimator=grpo", "algorithm.turn_weight=0.5"], ["(needs algorithm.estimator=mapo"]),
        (["algorithm.estimator=turn", "algorithm.leave_one_out=true"], []),
        (["lora.alpha=8", "lora.rank=2"], []),
        (["model.path=x", "lora.alpha=8", "warmstart.steps=3"], ["lora.alpha", "warmstart.steps"]),
        (["environment.call_seconds=3"], ["environment.call_seconds (needs environment.family=live)"]),
        ([*LIVE, "environment.call_seconds=3", "environment.fault_rate=0.1"], ["environment.fault_rate"]),
        ([*LIVE, "environment.judge.requests_per_minute=3"], ["(needs a model on a server)"]),
        (["environment.judge.implementation=a:B", "environment.judge.samples=3"], ["judge.samples (needs"]),
        (
            ["environment.judge.implementation=a:B", "environment.judge.samples=3", *SERVED],
            ["judge.samples (needs our own judge)"],
        ),
        ([*SERVED, "environment.judge.seconds=3"], ["judge.seconds (needs a role"]),
        ([*SERVED, "environment.judge.samples=3"], []),
        ([*LIVE, *SERVED, "environment.judge.seconds=3", "environment.concurrency=8"], []),
        (["environment.concurrency=8"], ["environment.concurrency"]),
        (["environment.max_failed_share=0.1"], ["(needs calls that can fail"]),
        (["environment.fault_rate=0.1", "environment.max_failed_share=0.1"], []),
        (["evaluation.scenarios=100"], ["evaluation.scenarios (needs more validation cards than the 16"]),
        (["evaluation.scenarios=15", "rollout.slots=31", "rollout.ahead=1"], []),
        (["rollout.slots=32"], ["rollout.slots (needs fewer than the 32"]),
        (["rollout.ahead=1", "training.steps=1"], ["rollout.ahead (needs training.steps above 1)"]),
        (["run.join_seconds=9", "run.silent_seconds=9"], ["(needs several processes)"] * 2),
        (
            ["algorithm.turn_weight=0", "algorithm.leave_one_out=true", "algorithm.discount=0.5"],
            ["algorithm.discount", "algorithm.leave_one_out"],
        ),
        (["algorithm.turn_weight=0", "algorithm.batch_scope=group"], []),
        (["algorithm.turn_weight=1", "algorithm.batch_scope=group"], ["algorithm.batch_scope"]),
        (["algorithm.turn_weight=1", "algorithm.leave_one_out=true", "algorithm.discount=0.5"], []),
        (["algorithm.estimator=turn", "algorithm.batch_scope=group"], ["algorithm.batch_scope"]),
        (["algorithm.estimator=batch", "algorithm.discount=0.5"], ["only the reported returns change"]),
        (["algorithm.estimator=grpo", "algorithm.discount=0.5"], ["only the reported returns change"]),
        (["algorithm.estimator=reinforce_plus_plus", "algorithm.discount=0.5"], []),
        (["algorithm.old_logprobs=trainer", "algorithm.clip_low=0.1"], []),
        (
            ["algorithm.old_logprobs=trainer", "algorithm.clip_low=0.1", "training.minibatch_scenarios=8"],
            ["algorithm.clip_low (needs several updates a step"],
        ),
        ([*LIVE, "environment.delayed_opening=false"], []),  # the warm start makes dialogues
        ([*LIVE, "environment.delayed_opening=false", "model.path=x"], ["environment.delayed_opening"]),
    ],
)  # fmt: skip
def test_changed_settings_without_effect_are_told(overrides, told):
    config = load_config(None, overrides)
    refuse_unused_roles(config)
    idle = idle_settings(config, validation=16)
    assert len(idle) == len(told) and all(part in text for part, text in zip(told, idle, strict=True)), idle


def test_several_processes_have_their_limits():
    assert idle_settings(load_config(None, ["run.join_seconds=9"]), validation=16, processes=2) == []


@pytest.mark.parametrize("command", READS)
def test_a_command_refuses_settings_that_it_does_not_read(command):
    for key in READS[command]:
        assert any(known == key or known.startswith(key) for known in settings.fields(Config)), key
    assert unread(command, ["nonsense.key=1", *(f"{key}=1" for key in READS[command])]) == []
    with pytest.raises(
        UserError, match=rf"`optimizer.learning_rate` has no effect in {command}; leave it out"
    ):
        refuse_unread(command, ["optimizer={learning_rate: 1.0}"])


@pytest.mark.parametrize("words", [["--dry-run", "--verbose"], ["--keys", "training.steps=3"], ["--full"]])
def test_options_of_training_that_cannot_go_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(words)
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["environment.judge.url=http://x/v1"], "`environment.judge.url` is set, .*environment.judge.model"),
        (["environment.user.model=engine:x"], "`environment.user.model` is set, .*environment.family=live"),
        ([*LIVE, "environment.held_out_judge.prices=[1,2]"], "`environment.held_out_judge.prices` is set"),
    ],
)
def test_a_run_refuses_settings_of_a_role_that_nobody_plays(overrides, words, tmp_path):
    config = load_config(None, [*overrides, f"run.directory={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=words):
        train.train(config)
    assert not (tmp_path / "run").exists()


# --- Keys of version 0.1 that are gone. ---


def old_file(folder, **changes):
    """The configuration file of a run of version 0.1 with default values."""
    content = Config().model_dump()
    old = {key: gone.value(Config()) for key, gone in GONE.items()} | changes
    for key, value in old.items():
        *sections, name = key.split(".")
        inner = content
        for section in sections:
            inner = inner[section]
        inner[name] = value
    file = folder / "config.yaml"
    file.write_text(json.dumps(content, indent=1))
    return file


def test_a_run_folder_of_version_0_1_is_read_where_nothing_changes(tmp_path):
    assert load_config(old_file(tmp_path)) == Config()
    with pytest.raises(
        UserError, match=r"line \d+: `rollout.lanes` \(16\) is gone: .*rollout.slots"
    ) as caught:
        load_config(old_file(tmp_path, **{"rollout.lanes": 16}))
    assert "top_p" not in str(caught.value)
    wide = {"model.fresh.hidden": 256}  # with the old width of the MLP
    with pytest.raises(UserError, match=r"`model.fresh.intermediate` \(384\) is gone"):
        load_config(old_file(tmp_path, **wide))
    derived = {"model.fresh.intermediate": 768, "model.fresh.head_size": 64}
    assert load_config(old_file(tmp_path, **wide, **derived)).model.fresh.hidden == 256


def test_a_configuration_of_version_0_1_is_told_of_all_that_is_gone(tmp_path):
    file = old_file(tmp_path).rename(tmp_path / "mine.yaml")
    with pytest.raises(UserError) as caught:
        load_config(file)
    message = str(caught.value)
    assert "mine.yaml, line " in message and "\n" not in message
    for key in GONE:
        assert f"`{key}`" in message
    assert not set(GONE) & set(known_keys())


def test_one_rollout_is_enough_where_nothing_compares_rollouts():
    assert load_config(None, ["rollout.rollouts=1", "algorithm.estimator=batch"]).rollout.rollouts == 1


def test_differing_keys_are_dotted():
    config = Config()
    other = updated(config, {"training.seed": 4})
    assert differing_keys(config, other.model_dump()) == ["training.seed"]


def test_updated_changes_what_exists_alone():
    config = updated(Config(), {"rollout.max_turns": 3, "training.seed": 2})
    assert differing_keys(config, Config()) == ["rollout.max_turns", "training.seed"]
    assert (config.rollout.max_turns, config.training.seed, Config().rollout.max_turns) == (3, 2, 8)
    with pytest.raises(KeyError, match="turns"):
        updated(Config(), {"rollout.turns": 3})


def test_tiny_yaml_spells_out_the_defaults():
    file = CONFIGS / "tiny.yaml"
    assert load_config(file) == Config()
    lines, (_, places) = file.read_text().splitlines(), settings.read_yaml(file)
    for key, field in settings.fields(Config).items():
        if key.startswith("environment.held_out_judge."):
            continue  # the keys of the judge
        comment = lines[int(places[key].split()[-1].strip(": ")) - 1].partition("# ")[2]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        named = f" ({', '.join(choices)})" if choices else ""
        assert comment == f"{field.description}{named}", key
