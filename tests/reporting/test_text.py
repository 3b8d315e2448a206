from rich.console import Console

from mapo_jax.reporting.folder import read_run
from mapo_jax.reporting.text import plain, render_text


def printed(*folders):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_text([read_run(folder, dialogues=1000) for folder in folders]))
    return console.export_text()


def test_it_prints_the_verdict_the_checks_and_some_dialogues(run_folder):
    text = printed(run_folder)
    assert "It got better" in text and "is anything suspicious?" in text
    assert "Fewer replies harm" in text and "To look at: judge." in text
    assert "what it learnt to do" in text and "most improved" in text
    reply = read_run(run_folder, dialogues=1000).validation[0].dialogues[0].turns[0].user
    assert text.count("return of a dialogue, step by step") == 1
    assert reply.split()[0] in text


def test_a_text_cannot_steer_the_terminal():
    assert plain("a\x1b[2Jb\x07\u202ec\nd") == r"a\x1b[2Jb\x07\u202ec d"


def test_hostile_text_is_no_markup_and_several_runs_are_compared(run_folder, run_copy, poison):
    poison(run_copy)
    text = printed(run_folder, run_copy)
    assert text.startswith("broken and small ")
    assert "evil.example" in text and "\u202e" not in text and "\x1b" not in text


def test_an_incomplete_run_is_printed(run_copy):
    (run_copy / "evaluations").rename(run_copy / "elsewhere")
    text = printed(run_copy)
    assert "Not known yet" in text and "missing: " in text
