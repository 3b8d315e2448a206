"""Exit statuses and the one sentence on standard error."""

import pytest

from mapo_jax.commands import Stopped, cache_folder, run_command
from mapo_jax.errors import UserError


def test_bad_input_is_one_sentence_and_status_2(capsys):
    def command():
        raise UserError("`training.steps` is 0; it must be at least 1")

    assert run_command(command) == 2
    output = capsys.readouterr()
    assert output.err == "error: `training.steps` is 0; it must be at least 1\n" and not output.out


def test_a_signal_gives_the_shells_status(capsys):
    def command():
        raise Stopped("SIGTERM", "saved after step 3")

    assert run_command(command) == 143
    assert capsys.readouterr().err == "saved after step 3\n"


def test_our_own_defects_keep_their_traceback():
    def command():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command)


def test_success_is_0_and_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert run_command(lambda: None) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("programs") == tmp_path / "mapo_jax" / "programs"


def test_text_from_models_cannot_steer_a_terminal():
    from mapo_jax.commands import printable

    hostile = "a\x1b[2Jb\x07\u202ec\r\x9bd\u2028\ud800"
    assert printable(hostile) == "a\\x1b[2Jb\\x07\\u202ec\\r\\x9bd\\u2028\\ud800"
    kind = "caf\u00e9 \u4f60\n[bold]x[/bold] \U0001f600"
    assert printable(kind) == kind
