"""Exit statuses and the one sentence on standard error."""

import os
import platform
import subprocess
import sys
import textwrap

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_memory_of_programs_is_kept(tmp_path):
    """A program that works in 64 MiB: without our setting each run has its 16,384 pages cleared anew."""
    script = """
        import resource, sys
        import jax, jax.numpy as jnp
        from mapo_jax.commands import prepare_jax

        if sys.argv[1:]:
            prepare_jax(sys.argv[1])
        step = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=1).sum())
        x = jnp.arange(4096.0)
        step(x).block_until_ready()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            step(x).block_until_ready()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """

    def faults(*arguments):
        command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return int(subprocess.check_output(command, env=environment, text=True, timeout=300))

    assert faults(str(tmp_path)) < 2000
    assert faults() > 3 * 10_000  # else the setting is no longer needed, and can go
