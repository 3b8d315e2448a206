"""The curve, the panel, the table and a dialogue on the terminal."""

import io

import numpy as np
from rich.console import Console

from mapo_jax.running.display import Display, plot, results_table

METRICS = {
    "return/mean": -1.5,
    "reward/mean": -0.25,
    "turns/mean": 7.0,
    "actor/entropy": 1.0,
    "actor/grad_norm": 0.5,
    "timing_s/step": 2.0,
}


def dots(picture):
    """Rows of lit dots, top to bottom, of a picture in braille."""
    lines = [line[8:] for line in picture.split("\n")]
    bits = ((0, 3), (1, 4), (2, 5), (6, 7))
    return np.array(
        [
            [ord(cell) - 0x2800 >> bit & 1 for cell in line for bit in bits[row]]
            for line in lines
            for row in range(4)
        ]
    )


def test_a_rising_line_is_drawn_from_bottom_left_to_top_right():
    picture = dots(plot([0.0, 1.0], width=10, height=5))
    assert picture.shape == (20, 20)
    assert (picture.sum(axis=0) == 1).all()
    rows = picture.argmax(axis=0)
    assert rows[0] == 19 and rows[-1] == 0 and (np.diff(rows) <= 0).all()


def test_the_labels_are_the_range_and_what_is_not_finite_is_left_out():
    lines = plot([float("nan"), -2.0, 3.5, float("inf")], width=8, height=3).split("\n")
    assert lines[0].startswith("  +3.50") and lines[-1].startswith("  -2.00")
    assert plot([float("nan")]) == "" and plot([]) == ""


def test_one_value_and_more_values_than_dots_are_drawn_too():
    assert dots(plot([1.0], width=4, height=2)).sum() == 8
    assert dots(plot(np.sin(np.arange(1000)), width=5, height=2)).shape == (8, 10)


def test_without_a_terminal_every_step_is_one_plain_line():
    console = Console(file=io.StringIO(), width=160)
    with Display("title", 3, live=True, console=console) as display:
        display.phase("dialogues", 1, 8)
        display.step(1, METRICS)
        display.step(2, METRICS)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2 and "\x1b" not in console.file.getvalue()
    assert "step    2/3" in lines[1] and "-1.50" in lines[1]


def test_without_a_terminal_every_phase_is_named_and_long_ones_are_told_with_the_time_left():
    console, clock = Console(file=io.StringIO(), width=160), [0.0]
    with Display("title", 3, live=True, console=console, now=lambda: clock[0]) as display:
        for phase in ("warm_up", "checkpoint", "evaluation", "rollout", "update"):
            display.enter(phase)
        display.announce("compiling the update of rows of 64 tokens")
        for clock[0] in (0.0, 10.0, 20.0, 40.0, 45.0, 80.0):
            display.phase("dialogues", int(clock[0]), 100, counted=f"{int(clock[0]) // 20}/5")
        display.step(1, METRICS)
        for phase in ("rollout", "update", "checkpoint", "evaluation"):
            display.enter(phase, [9.0, 0.5 if phase == "checkpoint" else 5.0])
        display.step(2, METRICS | {"timing_s/step": 30.0})
        display.enter("report")
    assert console.file.getvalue().splitlines() == [
        "compiling the sampler ...",
        "saving ...",
        "validation ...",
        "dialogues ...",
        "update ...",
        "compiling the update of rows of 64 tokens ...",
        "dialogues: 2/5, 1 min 00 s left",
        "dialogues: 4/5, 20 s left",
        "step    1/3  return  -1.50  reward -0.25  turns 7.0  2.0 s, 4 s left",
        "validation ...",
        "step    2/3  return  -1.50  reward -0.25  turns 7.0  30.0 s, 30 s left",
        "writing the report ...",
    ]


def test_a_continued_run_shows_the_steps_before(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    rows = [
        {"step": 0, "evaluation/return/mean": 1.0},
        {"step": 1, "return/mean": -9.25, "timing_s/step": 4.0},
    ]
    with Display("title", 3, live=True, console=console) as display:
        display.continue_after(rows)
        display.step(2, METRICS)
    text = console.file.getvalue()
    assert "-9.25" in text and "-1.50" in text and "2/3" in text


def test_nothing_breaks_inside_words_at_80_columns():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    words, path = "validation improved considerably " * 6, "/a/long/folder" * 8
    evaluated = {"return/mean": -12.25, "reward/mean": -1.5, "epm_q": 100.5, "turns/mean": 8.0}
    with Display("title", 12_000, live=True, console=console) as display:
        display.step(11_000, METRICS | {"timing_s/step": 20.0})
        display.note(words)
        display.note(f"the run in {path} is finished :key: [bold]")
        display.evaluation(45, evaluated)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 or line == path for line in lines if "\x1b" not in line) and path in lines
    assert "is finished :key: [bold]" in lines
    assert (
        "validation after 45 steps: return -12.25  reward -1.50  EPM-Q 100.5  turns 8.0"
        in console.file.getvalue()
    )
    shown = " ".join(line for line in lines if "validation" in line or "improved" in line)
    assert set(shown.split()) >= {"validation", "improved", "considerably"} and "consider " not in shown


def test_on_a_terminal_there_is_a_panel_with_the_curve():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display("mapo [not markup]", 3, live=True, console=console) as display:
        display.step(1, METRICS)
        display.step(2, METRICS | {"return/mean": 0.5})
    text = console.file.getvalue()
    assert "[not markup]" in text and "+0.50" in text and "-1.50" in text


def test_the_way_made_is_a_share_of_the_way_to_the_helper():
    console = Console(file=io.StringIO(), width=120)
    figures = {
        "return/mean": -6.0,
        "reward/mean": -1.0,
        "epm_q": 25.0,
        "turns/mean": 7.5,
        "naming/feeling": 0.5,
    }
    after = figures | {"return/mean": -1.0, "kind/ask": 0.25}
    helper = figures | {"return/mean": 9.0}
    console.print(results_table(figures, after, helper))
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if "return" in line)
    assert "33%" in row and "-6.00" in row and "+9.00" in row
    assert "feeling named right" in text and "share of ask" in text
