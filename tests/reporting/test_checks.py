from dataclasses import replace

import pytest

from mapo_jax.reporting.checks import check_run, ends
from mapo_jax.reporting.comparison import Difference
from mapo_jax.reporting.diversity import Diversity, Repeat
from mapo_jax.reporting.folder import read_run


@pytest.fixture(scope="module")
def sound(run_folder):
    run = read_run(run_folder, dialogues=1000)
    return replace(run, steps=tuple({**row, "judge/failure_rate": 0.0} for row in run.steps))


def state(run, name, diversity=(), change=None):
    return next(check.state for check in check_run(run, diversity, change) if check.name == name)


def with_series(run, **series):
    """The run with other values of some metrics; `__` stands for `/`."""
    rows = [dict(row) for row in run.steps]
    for name, values in series.items():
        for row, value in zip(rows, values, strict=True):
            row[name.replace("__", "/")] = value
    return replace(run, steps=tuple(rows))


@pytest.mark.parametrize(
    ("name", "metric", "values", "expected"),
    [
        ("Entropy", "actor__entropy", [1.0, 0.9, 0.8, 0.8, 0.7, 0.7], "fine"),
        ("Entropy", "actor__entropy", [1.0, 0.9, 0.7, 0.5, 0.3, 0.3], "look"),
        ("Entropy", "actor__entropy", [1.0, 0.5, 0.1, 0.1, 0.05, 0.01], "alarm"),
        ("Reply length", "response_length__mean", [10, 10, 11, 12, 13, 14], "look"),
        ("Reply length", "response_length__mean", [10, 12, 15, 18, 20, 30], "alarm"),
        ("Judge", "judge__failure_rate", [0, 0, 0.05, 0, 0, 0], "look"),
        ("Judge", "judge__failure_rate", [0, 0, 0.5, 0, 0, 0], "alarm"),
        ("Sampler and trainer", "sampler__logprob_diff_mean", [2e-7] * 6, "fine"),
        ("Sampler and trainer", "sampler__logprob_diff_mean", [2e-7] * 5 + [2e-4], "look"),
        ("Sampler and trainer", "sampler__logprob_diff_mean", [2e-7] * 5 + [0.1], "alarm"),
        ("Gradients", "actor__grad_norm", [1, 1, 1, 1, 1, 30], "look"),
        ("Gradients", "actor__skipped", [0, 0, 0, 0, 0, 1], "alarm"),
        ("How dialogues end", "outcome__failure", [0, 0, 0.1, 0.2, 0.3, 0.3], "look"),
    ],
)
def test_each_check_detects_its_fault(sound, name, metric, values, expected):
    assert state(with_series(sound, **{metric: values}), name) == expected


def test_what_was_not_logged_is_unknown_not_fine(sound):
    bare = replace(sound, steps=tuple({"step": row["step"]} for row in sound.steps), evaluations={})
    assert {check.state for check in check_run(bare, (), None)} == {"unknown"}


def test_templates(sound):
    def step(share, own=0.0):
        return Diversity(1, 10, (None,) * 3, (Repeat("i am so sorry", 3, share, 0.0, 0.0),), (), own, None)

    assert state(sound, "Templates", [step(0.1), step(0.2)]) == "fine"
    assert state(sound, "Templates", [step(0.1), step(0.4)]) == "look"
    assert state(sound, "Templates", [step(0.1), step(0.9)]) == "alarm"
    assert state(sound, "Templates", [step(0.1), step(0.1, own=0.4)]) == "look"
    assert state(sound, "Templates", [step(0.1), step(0.1, own=0.7)]) == "alarm"


def test_variety(sound):
    def step(distinct, own=0.0):
        return Diversity(1, 10, (None, None, distinct), (), (), own, None)

    assert state(sound, "Variety", [step(0.5), step(0.4)]) == "fine"
    assert state(sound, "Variety", [step(0.5), step(0.3)]) == "look"
    assert state(sound, "Variety", [step(0.5), step(0.1)]) == "alarm"
    assert state(sound, "Variety", [step(0.5), step(0.5, own=0.3)]) == "look"
    assert state(sound, "Variety", [step(None), step(None)]) == "unknown"


def figure(run, name, diversity=()):
    found = next(check.figure for check in check_run(run, diversity, None) if check.name == name)
    return found.replace("\u00a0", " ")


def test_every_share_has_its_count(sound):
    """Steps of 3 scenarios x 3 rollouts; the first and the last fifth are one step each."""
    rows = with_series(
        sound,
        dialogues__left_out=[1 / 9, 0, 0, 0, 0, 0],
        turns__mean=[5.0] * 6,
        outcome__failure=[0.25, 0, 0, 0, 0, 1 / 3],
        judge__failure_rate=[0.05, 0, 0.2, 0, 0, 0],
        response_length__truncated=[0, 0, 0, 0, 0, 1 / 15],
    )
    assert figure(rows, "How dialogues end").startswith("failures 25 % (2 of 8) → 33 % (3 of 9), ")
    assert figure(rows, "Judge") == "4.2 % (11 of 265) of turns unscored, 20 % (9 of 45) in the worst step"
    assert figure(rows, "Reply length").endswith("6.7 % (3 of 45) cut")
    steps = [
        Diversity(1, 40, (None, None, 0.5), (Repeat("so sorry", 8, share, 0.0, 0.0),), (), own, None)
        for share, own in ((0.1, 0.05), (0.2, 0.25))
    ]
    assert "opening 10 % (4 of 40) → 20 % (8 of 40) of replies; 25 % (10 of 40)" in figure(
        rows, "Templates", steps
    )
    alike = with_series(rows, kind__most=[0.0] * 5 + [0.8])
    assert figure(alike, "Templates", steps).endswith("of their dialogue; 80 % (36 of 45) are of one kind")
    assert state(alike, "Templates", steps) == "look"
    assert figure(rows, "Variety", steps).endswith("their dialogue 5.0 % (2 of 40) → 25 % (10 of 40)")
    # Without the settings the number of dialogues is unknown.
    assert figure(replace(rows, config={}), "How dialogues end").startswith("failures 25 % → 33 %, ")


def test_a_return_that_rises_without_the_score_is_suspicious(sound):
    rising = Difference(0.0, 2.0, 2.0, 1.0, 3.0, 5)
    falls = replace(sound, evaluations={0: {"epm_q": 30.0}, 6: {"epm_q": 25.0}})
    assert state(falls, "Return and score", change=rising) == "look"
    rises = replace(sound, evaluations={0: {"epm_q": 30.0}, 6: {"epm_q": 35.0}})
    assert state(rises, "Return and score", change=rising) == "fine"


def test_the_worst_comes_first(sound):
    checks = check_run(with_series(sound, actor__entropy=[1, 1, 1, 0.1, 0.01, 0.01]), (), None)
    assert checks[0].name == "Entropy"


def test_ends_by_hand():
    assert ends([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 11.0]) == (1.5, 10.0)
    assert ends([1.0]) is None
