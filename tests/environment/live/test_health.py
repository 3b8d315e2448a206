"""The calibration set, drift computed by hand, and probes that exploit a judge."""

import asyncio
from types import SimpleNamespace

import pytest

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.health import GRADES, calibration_set, score_all, summary, warnings

PROBES = {"praise", "template", "flattery", "length", "farewell"}


def by_kind(**levels):
    """Scores that depend only on the kind of the reply."""
    return {item.name: levels.get(item.kind, (0,) * 6) for item in calibration_set()}


GOOD, BAD = (1, 0, 2, 0, 1, 0), (0, -1, 0, -1, 0, -1)  # +5 and -6 points
FAIR = by_kind(good=GOOD, harmful=BAD, praise=BAD, template=BAD, flattery=BAD, length=BAD, farewell=BAD)


def test_the_set_is_complete():
    items = calibration_set()
    contexts = {item.state.scenario.id for item in items}
    assert len(contexts) == 4 and len(items) == 4 * (3 + 5)
    assert {item.kind for item in items} == PROBES | set(GRADES)
    assert len({item.name for item in items}) == len(items)
    for item in items:
        assert item.reply and item.state.user
        if item.kind == "template":
            assert all(turn.reply == item.reply for turn in item.state.turns)
    lengths = {item.kind: len(item.reply) for item in items}
    assert lengths["length"] > 2 * max(v for k, v in lengths.items() if k != "length")


def test_a_fair_judge_raises_no_warning():
    metrics = summary(FAIR, FAIR)
    assert metrics["calibration/good"] == 5 and metrics["calibration/harmful"] == -6
    assert metrics["probe/praise"] == -6 and metrics["calibration/ordered"] == 1
    assert metrics["calibration/drift"] == 0 and metrics["calibration/failure_rate"] == 0
    assert warnings(metrics) == []


def test_drift_by_hand():
    moved = dict(FAIR)
    name = next(item.name for item in calibration_set() if item.kind == "good")
    moved[name] = (2, -1, 2, 0, 1, 0)  # two of its six levels, by one each
    assert summary(moved, FAIR)["calibration/drift"] == pytest.approx(2 / (32 * 6))
    moved[name] = None
    metrics = summary(moved, FAIR)
    assert metrics["calibration/drift"] == 0 and metrics["calibration/failure_rate"] == 1 / 32


@pytest.mark.parametrize("probe", sorted(PROBES))
def test_a_probe_that_beats_good_replies_is_named(probe):
    (sentence,) = warnings(summary({**FAIR, **by_kind_only(probe, (2, 0, 2, 0, 2, 0))}))
    assert f"`{probe}`" in sentence and "+9.0" in sentence and "+5.0" in sentence


def by_kind_only(kind, levels):
    return {item.name: levels for item in calibration_set() if item.kind == kind}


def test_a_judge_that_cannot_rank_or_answer_is_named():
    assert (
        "rank" in warnings(summary(by_kind(**dict.fromkeys(GRADES, GOOD), **dict.fromkeys(PROBES, BAD))))[0]
    )
    assert "failed" in warnings(summary(dict.fromkeys(FAIR)))[0]


def test_every_reply_is_scored_with_the_seed_and_failures_are_none():
    heard = []

    class Judge:
        async def score(self, state, reply):
            heard.append((state.seed, reply))
            if reply.startswith("You are right"):
                raise RoleFailure("timeout")
            return SimpleNamespace(levels=GOOD)

    levels = asyncio.run(score_all(Judge(), 77, asyncio.Semaphore(4)))
    assert len(heard) == 32 and {seed for seed, _ in heard} == {77}
    assert {item.kind for item in calibration_set() if levels[item.name] is None} == {"flattery"}
