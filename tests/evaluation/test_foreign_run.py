"""A run folder by somebody else, whose config.yaml asks for requests, keys, code and secrets."""

import json
import sys

import jax
import pytest
import yaml

from mapo_jax import export, report
from mapo_jax.config import Config, OptimizerConfig, RolloutConfig, load_config, to_yaml
from mapo_jax.environment.scenario import load_scenarios, to_mapping
from mapo_jax.errors import UserError
from mapo_jax.evaluate import main
from mapo_jax.learning.optimizer import make_optimizer
from mapo_jax.learning.train_state import create_state
from mapo_jax.running.checkpoint import Checkpoints
from mapo_jax.running.policy import load_policy, save_model_files
from mapo_jax.tokenizer import load_tokenizer

SECRET = "wJalrXUtnFEMI0123456789"
SHORT = ["rollout.min_turns=2", "rollout.max_turns=2", "rollout.max_reply_tokens=6", "rollout.max_tokens=300"]
SHORT += ["evaluation.rollouts=1"]


@pytest.fixture(scope="module")
def weights(model_folder, tmp_path_factory):
    """A run folder without a configuration."""
    folder = tmp_path_factory.mktemp("runs") / "theirs"
    policy, params = load_policy(model_folder, RolloutConfig())
    save_model_files(folder, policy)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, create_state(params, make_optimizer(OptimizerConfig(), 1)), {})
    return folder


@pytest.fixture
def run(weights, serve, well_formed, tmp_path, monkeypatch):
    """The run with a hostile configuration: `server` hears what it sends, `marker` shows its code ran."""

    class Run:
        folder, marker, server = weights, tmp_path / "marker", serve(well_formed)

        def configure(self, **changes):
            role = {"model": "m", "url": self.server.url, "key_variable": "AWS_SECRET_ACCESS_KEY"}
            content = yaml.safe_load(to_yaml(Config()))
            content["environment"] |= {name: role for name in ("user", "director")}
            content["environment"] |= {
                "family": "live",
                "judge": role | {"implementation": "their_judge:Judge"},
            }
            content["run"]["compilation_cache"] = str(tmp_path / "programs")
            for key, value in changes.items():
                section, name = key.split("__")
                content[section][name] = value
            (weights / "config.yaml").write_text(yaml.safe_dump(content))
            return str(weights)

    (tmp_path / "their_judge.py").write_text(
        f"open({str(Run.marker)!r}, 'w').close()\n"
        "from mapo_jax.environment.dialogue import Judgement\n"
        "class Judge:\n"
        "    def __init__(self, complete):\n"
        "        pass\n"
        "    async def score(self, state, reply):\n"
        "        return Judgement((1, 0, 0, 0, 0, 0), ('e',) * 6, ('r',) * 6)\n"
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Run()
    sys.modules.pop("their_judge", None)


def untouched(run, tmp_path):
    return run.server.count == 0 and not run.marker.exists() and not runs_programs_of(tmp_path)


def runs_programs_of(folder):
    """Whether the folder of compiled programs that the run names is in use."""
    return jax.config.jax_compilation_cache_dir == str(folder / "programs")


def empa(run, tmp_path, *options, **changes):
    command = ["empa", "--model", run.configure(**changes), "--output", str(tmp_path / "out")]
    return main([*command, *SHORT, *options])


def test_nobody_whom_a_run_names_is_asked_or_imported(run, tmp_path, capsys):
    assert empa(run, tmp_path) == 0
    assert untouched(run, tmp_path)
    shown = capsys.readouterr().out
    assert "judge their_judge:Judge at http://127.0.0.1" in shown and "--trust-run-world" in shown
    assert "scripted world" in shown and (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("confirmed", ["flag", "config"])
def test_who_is_confirmed_is_asked(run, tmp_path, confirmed):
    options = ["--trust-run-world"] if confirmed == "flag" else ["--config", f"{run.configure()}/config.yaml"]
    assert empa(run, tmp_path, *options) == 0
    assert run.marker.exists() and run.server.count
    assert all(SECRET in head for head in run.server.headers)
    assert runs_programs_of(tmp_path) == (confirmed == "config")
    assert SECRET not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json*"))


def test_cards_that_the_scripted_world_cannot_play_are_refused(run, tmp_path, capsys):
    card = to_mapping(load_scenarios(split="test")[0])
    del card["value"], card["story"]["strengths"], card["story"]["steps"]
    card["story"]["stages"] = [{"telling": stage["telling"]} for stage in card["story"]["stages"]]
    (tmp_path / "cards.jsonl").write_text(json.dumps(card))
    assert empa(run, tmp_path, environment__scenarios=str(tmp_path / "cards.jsonl")) == 2
    error = capsys.readouterr().err
    assert "used only with --trust-run-world or --config" in error and "has no phrases" in error
    assert untouched(run, tmp_path)


def test_a_world_on_the_command_line_takes_nothing_of_the_runs(run, tmp_path, capsys):
    assert empa(run, tmp_path, "environment.family=live", "environment.user.model=m") == 2
    error = capsys.readouterr().err
    assert "`environment.user.url` is None" in error and "--trust-run-world" in error
    assert untouched(run, tmp_path)


def test_the_flag_is_refused_where_it_cannot_act(run, model_folder, tmp_path, capsys):
    flag = ["--trust-run-world", *SHORT]
    assert main(["empa", "--model", str(model_folder), *flag]) == 2
    assert "is for --model RUN" in capsys.readouterr().err
    assert empa(run, tmp_path, "--trust-run-world", "--config", f"{run.folder}/config.yaml") == 2
    assert "leave one out" in capsys.readouterr().err


def test_prompts_reports_and_exports_ask_and_import_nobody(run, tmp_path):
    prompt = "Rate.\n\nFirst pass scores:\nA: <score>\n\nCritique: x\n\nRevised scores:\nA: <score>\n\n"
    prompt += "[End of answer] Then critique your answer. Finally, give your revised scores."
    reference = {f"emotion{i}": name for i, name in enumerate("ABCD", 1)}
    reference |= {f"emotion{i}_score": 1 for i in range(1, 5)}
    questions = {"1": {"prompt": prompt, "reference_answer_fullscale": reference}}
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    command = ["eqbench", "--questions", "questions.json", "--model", run.configure()]
    assert main([*command, "--max-tokens", "3", "--output", str(tmp_path / "out")]) == 0
    assert export.main(["--run", run.configure(), "--output", str(tmp_path / "exported")]) == 0
    assert "family `live`" in (tmp_path / "exported" / "README.md").read_text()
    assert report.main(["--run", run.configure(), "--output", str(tmp_path / "report.html")]) == 0
    load_policy(run.folder, RolloutConfig())  # as train model.path=RUN does
    assert untouched(run, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout__system_prompt", "${oc.env:AWS_SECRET_ACCESS_KEY}"),
        ("model__path", "base-${oc.env:AWS_SECRET_ACCESS_KEY}"),
        ("rollout__system_prompt", "\\${oc.env:AWS_SECRET_ACCESS_KEY}"),
    ],
)
def test_a_runs_configuration_reads_no_environment_variable(run, tmp_path, capsys, key, value):
    empa(run, tmp_path, "--trust-run-world", **{key: value})
    export.main(["--run", str(run.folder), "--output", str(tmp_path / "exported")])
    assert report.main(["--run", str(run.folder), "--output", str(tmp_path / "report.html")]) == 0
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size < 10**7]
    assert not any(SECRET.encode() in file.read_bytes() for file in written)
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: &a {directory: *a}", "is not valid YAML"),
        ("run: {directory: " + "[" * 3000, "is not valid YAML"),
        ("run: {directory: 2001-99-99}", "is not valid YAML"),
        ("training: {steps: " + "9" * 5000 + "}", "is not valid YAML"),
    ],
)
def test_a_configuration_that_is_none_is_one_sentence(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "config.yaml")


def test_a_tokenizer_of_its_own_code_is_refused(model_folder, tmp_path, monkeypatch):
    for file in model_folder.iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "theirs.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\nclass Theirs: pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "marker").exists()
