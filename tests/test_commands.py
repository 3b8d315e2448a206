"""Exit statuses and the one sentence on standard error."""

import errno
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import mapo_jax
from mapo_jax import __main__, chat, draft, evaluate, export, rate, serve, train
from mapo_jax.commands import Stopped, cache_folder, run_command
from mapo_jax.errors import UserError
from mapo_jax.startup import command_of
from tests.forked import run_forked


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


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk that holds /d/file is full; free some space"),
        (errno.EDQUOT, "the quota of the disk that holds /d/file is used up"),
        (errno.EROFS, "/d/file lies on a disk that is read-only"),
        (errno.EACCES, "/d/file may not be used by this user"),
        (errno.EIO, "/d/file could not be read or written"),
    ],
)
def test_what_a_disk_refuses_is_one_sentence_that_names_the_file(capsys, code, words):
    def command():
        raise OSError(code, os.strerror(code), "/d/file")

    assert run_command(command) == 2
    assert words in capsys.readouterr().err


def test_other_errors_of_the_system_are_defects():
    def command():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with pytest.raises(ConnectionRefusedError):
        run_command(command)


def test_output_that_cannot_be_printed_is_one_sentence():
    script = """
        import sys
        from mapo_jax.commands import run_command
        sys.exit(run_command(lambda: print("x" * 100)))
    """
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "standard output is full" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_standard_output_cannot_show_is_replaced(encoding):
    script = r"""
        import sys
        from rich.console import Console
        from rich.table import Table
        from mapo_jax.commands import run_command
        from mapo_jax.running.display import Display, plot

        def command():
            console = Console(highlight=False)
            table = Table("a", "b")
            table.add_row("\u4f60", "\u2192 \ud83d")
            console.print(table)
            print("plain \u2192 \ud83d", plot([0.0, 1.0]))
            with Display("mapo \u00b7 run", 3, live=True, console=Console(force_terminal=True)) as display:
                display.note("\u2713 done")

        sys.exit(run_command(command))
    """
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, env=environment
    )
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()
    assert b"plain ?" in result.stdout or encoding == "utf-8"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cuda", "train.train(load_config(None, ['run.directory=' + sys.argv[1]]))"),
        ("nonsense", "train.main(['--dry-run']) and sys.exit(2)"),
        ("tpu", "jax.devices()"),
        ("gpu", "jax.devices()"),
        ("cpu,nonsense", "jax.devices()"),
    ],
)
def test_a_platform_that_is_not_there_is_one_sentence(name, call, tmp_path):
    script = f"""
        import os, sys, jax
        from mapo_jax import train
        from mapo_jax.commands import run_command
        from mapo_jax.config import load_config
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # as importing jax does
        sys.exit(run_command(lambda: {call}))
    """
    environment = os.environ | {"JAX_PLATFORMS": name}
    result = run_forked(textwrap.dedent(script), [tmp_path / "run"], env=environment)
    if result.returncode == 0:
        pytest.skip(f"jax has the platform {name} here")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert f"JAX_PLATFORMS={name} names a platform that jax cannot use here" in line


def test_training_says_at_once_that_it_starts():
    command = [sys.executable, "-m", "mapo_jax.train", "rollout.rollout=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.stderr.startswith("mapo_jax.train: starting\n") and not result.stdout
    assert result.returncode == 2 and "rollout.rollouts" in result.stderr


@pytest.mark.parametrize("way", ["module", "script"])
def test_a_command_says_first_that_it_starts_and_ends_at_once_on_ctrl_c(way, tmp_path):
    script = tmp_path / "mapo-export"
    script.write_text("from mapo_jax.export import main\nraise SystemExit(main())\n")
    words = ["-u", "-m", "mapo_jax.export"] if way == "module" else [str(script)]
    process = subprocess.Popen(
        [sys.executable, *words, "--run", "x", "--output", "y"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # A shell's background job ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline() == "mapo_jax.export: starting\n"
    process.send_signal(signal.SIGINT)  # in the midst of the imports
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (130, "", "stopped by SIGINT\n")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("python -m mapo_jax.train a=1", "mapo_jax.train"),
        ("python3.11 -X dev -u -m mapo_jax.serve -h", "mapo_jax.serve"),
        ("python /usr/bin/mapo-chat --model m", "mapo_jax.chat"),
        ("python -m mapo_jax", None),
        ("python -m pytest -m mapo_jax.train", None),
        ("python", None),
        ("python -c import", None),
        ("python work.py -m mapo_jax.train", None),
    ],
)
def test_only_commands_have_a_first_line(words, command):
    assert command_of(words.split()) == command


def test_ctrl_c_is_one_line(capsys):
    def command():
        raise KeyboardInterrupt

    assert run_command(command) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


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
        step = jax.jit(lambda x: (jnp.outer(x, x) @ x).sum())
        x = jnp.arange(4096.0)
        step(x).block_until_ready()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            step(x).block_until_ready()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """

    def faults(*arguments):
        done = run_forked(textwrap.dedent(script), arguments)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults(tmp_path) < 2000
    assert faults() > 3 * 10_000  # else the setting is no longer needed, and can go


def test_every_command_is_listed_with_its_first_sentence(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.strip() == mapo_jax.__version__
    monkeypatch.setenv("COLUMNS", "80")
    __main__.main([])
    listed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in listed.splitlines())
    package = Path(mapo_jax.__file__).parent
    commands = [file.stem for file in package.glob("[a-z]*.py") if "\ndef main(" in file.read_text()]
    assert len(commands) >= 11
    # `config` prints the JSON schema, for the project's own use.
    for command in set(commands) - {"config"}:
        assert re.search(rf"mapo_jax\.{command} +\w+", listed), command
        with pytest.raises(SystemExit) as ended:
            import_module(f"mapo_jax.{command}").main(["--version"])
        assert ended.value.code == 0 and capsys.readouterr().out.strip() == mapo_jax.__version__


def test_settings_may_stand_before_and_after_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default folder may hold a run
    config = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
    settings = ["training.steps=3", "--config", str(config), "training.seed=8", "--dry-run"]
    assert train.main(settings) == 0
    shown = capsys.readouterr().out
    assert "  steps: 3\n" in shown and "  seed: 8\n" in shown

    parsed = evaluate._parse(["empa", "a.b=1", "--model", "x", "--seed", "3", "c.d=2", "e.f=3"])
    assert parsed.overrides == ["a.b=1", "c.d=2", "e.f=3"] and (parsed.model, parsed.seed) == ("x", 3)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["empa", "a=1", "--model", "x", "b=2", "--nonsense"])
    assert ended.value.code == 2 and "unrecognized arguments: --nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (chat.main, ["--model", "x", "training.steps=3"]),
        (chat.main, ["--model", "x", "--trust-run-world"]),
        (serve.main, ["--model", "x", "training.steps=3"]),
        (evaluate.main, ["empa", "--model", "x", "training.steps=3"]),
        (evaluate.main, ["empa", "--model", "x", "--timeout", "3"]),
        (evaluate.main, ["empa", "--model", "x", "--split", "train", "--cards", "y"]),
        (evaluate.main, ["empa", "--endpoint", "http://x/v1", "--step", "3"]),
        (evaluate.main, ["empa", "--trajectories", "x", "rollout.max_turns=3"]),
        (evaluate.main, ["empa", "--trajectories", "x", "--split", "train"]),
        (evaluate.main, ["eqbench", "--questions", "q", "--answers", "x", "--temperature", "0.5"]),
        (evaluate.main, ["dialogues", "--transcripts", "x", "lora.rank=3"]),
        (rate.main, ["x", "--output", "y.jsonl", "environment.user.model=m"]),
        (draft.main, ["x", "--output", "y.yaml", "rollout.max_turns=3"]),
        (export.main, ["--run", "x", "--output", "y", "--part", "adapters", "--dtype", "bfloat16"]),
        (lambda arguments: run_command(lambda: mapo_jax.load("x", overrides=arguments)), ["lora.rank=3"]),
    ],
)
def test_what_a_command_cannot_use_is_one_sentence(main, arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search("ha(s|ve) no effect", error), error


NOBODY = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("main", "mode", "arguments", "idle"),
    [
        (
            evaluate.main,
            "evaluate empa --endpoint",
            ["empa", "--endpoint", NOBODY],
            "rollout.system_prompt=Hm.",
        ),
        (
            evaluate.main,
            "evaluate eqbench",
            ["eqbench", "--questions", "q", "--model", "x"],
            "rollout.max_turns=3",
        ),
        (evaluate.main, "evaluate dialogues", ["dialogues", "--transcripts", "x"], "evaluation.rollouts=3"),
        (chat.main, "chat without --scenario", ["--model", "x"], "environment.judge.model=m"),
    ],
)
def test_settings_of_another_mode_of_a_command_are_named(main, mode, arguments, idle, capsys):
    assert main([*arguments, idle]) == 2  # nothing of all this is there
    assert capsys.readouterr().out == f"no effect in {mode}: {idle.partition('=')[0]}\n"


@pytest.mark.parametrize(
    "parse", [lambda words: evaluate._parse(["empa", *words]), serve._parser().parse_args]
)
def test_the_best_checkpoint_can_be_named(parse, capsys):
    assert [parse(["--model", "x", "--step", step]).step for step in ("best", "30")] == ["best", 30]
    with pytest.raises(SystemExit):
        parse(["--model", "x", "--step", "worst"])
    assert "'worst' is neither a step nor best" in capsys.readouterr().err
    assert chat.main(["--model", "x", "--step", "best"]) == 2  # it is an option of chat, too
    assert "no model folder or run x" in capsys.readouterr().err
