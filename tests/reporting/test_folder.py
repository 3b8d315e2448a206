import json

import pytest
import yaml

from mapo_jax.errors import UserError
from mapo_jax.reporting import folder as reporting_folder
from mapo_jax.reporting.folder import choose_steps, read_run
from mapo_jax.running.metrics import METRICS_FILE
from mapo_jax.running.run_folder import CONFIG_FILE


def test_it_reads_a_finished_run_whole(run_folder):
    run = read_run(run_folder, dialogues=1000)
    assert run.notes == ()
    assert run.finished and run.done == run.planned == 6
    assert [batch.step for batch in run.training] == [1, 2, 3, 4, 5, 6]
    assert [batch.step for batch in run.validation] == [0, 3, 6]
    assert all(len(batch.dialogues) == 9 for batch in run.training)
    saved = json.loads((run_folder / "dialogues" / "step_000001.jsonl").read_text().splitlines()[4])
    dialogue = run.training[0].dialogues[4]
    assert dialogue.place == (saved["scenario"], saved["rollout"])
    assert [turn.reply for turn in dialogue.turns] == [turn["reply"] for turn in saved["state"]["turns"]]
    assert dialogue.rows[0].logprob.tolist() == saved["row"]["logprob"]  # float32 values survive
    assert run.series("return/mean")[0] == [1, 2, 3, 4, 5, 6]
    assert run.evaluated("epm_q")[0] == [0, 3, 6]


def test_its_file_names_are_the_trainers():
    assert (reporting_folder.CONFIG_FILE, reporting_folder.METRICS_FILE) == (CONFIG_FILE, METRICS_FILE)


def test_an_unfinished_run_shows_its_progress(run_copy):
    for file in [*run_copy.glob("*/step_000005.*"), *run_copy.glob("*/step_000006.*")]:
        file.unlink()
    lines = (run_copy / METRICS_FILE).read_text().splitlines(keepends=True)
    (run_copy / METRICS_FILE).write_text("".join(line for line in lines if json.loads(line)["step"] < 5))
    run = read_run(run_copy, dialogues=1000)
    assert not run.finished
    assert "4 of 6 steps" in run.notes[0]


def test_torn_and_foreign_rows_are_left_out_and_counted(run_copy):
    file = run_copy / "dialogues" / "step_000002.jsonl"
    lines = file.read_bytes().splitlines()
    wrong_level = json.loads(lines[1])
    wrong_level["state"]["turns"][0]["judgement"] = {
        "levels": [7, 0, 0, 0, 0, 0],
        "evidence": [""] * 6,
        "reasons": [""] * 6,
    }
    lines[1] = json.dumps(wrong_level).encode()
    lines[3] = b"[1, 2"
    lines[5] = b'{"state": null}'
    lines[-1] = lines[-1][:100]
    file.write_bytes(b"\n".join(lines) + b"\n\xff\xfe\n")
    with (run_copy / METRICS_FILE).open("ab") as metrics:
        metrics.write(b'{"step": 9, "retu')
    run = read_run(run_copy, dialogues=1000)
    batch = run.training[1]
    assert (len(batch.dialogues), batch.broken) == (5, 5)
    assert any("5 rows of dialogues/step_000002.jsonl" in note for note in run.notes)
    assert any("1 row of metrics.jsonl" in note for note in run.notes)


def test_a_folder_in_the_place_of_a_file_is_noted(run_copy):
    for file in (run_copy / "dialogues" / "step_000001.jsonl", run_copy / "evaluations" / "step_000000.json"):
        file.unlink()
        file.mkdir()
    run = read_run(run_copy, dialogues=1000)
    assert [batch.step for batch in run.training] == [2, 3, 4, 5, 6]
    for name in ("dialogues/step_000001.jsonl", "step_000000.json"):
        assert any(f"{name} cannot be read" in note for note in run.notes)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("config.yaml", "the settings are unknown"),
        ("metrics.jsonl", "there are no curves"),
        ("dialogues", "no dialogues of training"),
        ("evaluations", "no validation dialogues"),
    ],
)
def test_what_is_missing_is_noted(run_copy, gone, said):
    (run_copy / gone).rename(run_copy / "elsewhere")
    run = read_run(run_copy, dialogues=1000)
    assert any(said in note for note in run.notes)


@pytest.mark.parametrize("content", ["[1, 2", "just text", "algorithm: 3", "algorithm: {discount: high}"])
def test_a_broken_configuration_is_no_reason_to_stop(run_copy, content):
    (run_copy / "config.yaml").write_text(content)
    assert read_run(run_copy, dialogues=1000).algorithm.discount == 0.85


def test_a_key_that_is_gone_is_no_fault_with_the_value_that_acts(run_copy):
    file = run_copy / "config.yaml"
    content = yaml.safe_load(file.read_text())
    for value, said in ((2, False), (3, True)):
        content["algorithm"]["min_group"] = value
        file.write_text(yaml.safe_dump(content))
        assert any("min_group" in note for note in read_run(run_copy, dialogues=1000).notes) == said


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nowhere", dialogues=10)
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path, dialogues=10)


def test_whole_steps_are_chosen_evenly_with_both_ends(tmp_path):
    files = {}
    for step in range(1, 11):
        files[step] = [tmp_path / f"{step}-{part}" for part in range(2)]  # of two processes
        for part in files[step]:
            part.write_text("x\n" * 2)
    assert choose_steps(files, 100) == list(range(1, 11))
    assert choose_steps(files, 16) == [1, 4, 7, 10]
    assert choose_steps(files, 1) == [1, 10]
    assert choose_steps({}, 10) == []
