import re
from dataclasses import replace

import pytest

from mapo_jax.environment.scripted.grammar import KINDS
from mapo_jax.reporting.behaviour import MEANINGS, behaviour, changes, levels_of, typical_pair
from mapo_jax.reporting.charts import format_value
from mapo_jax.reporting.credit import credit_batch
from mapo_jax.reporting.folder import read_run


@pytest.fixture(scope="module")
def sides(run_folder):
    run = read_run(run_folder, dialogues=1000)
    first, last = run.validation[0], run.validation[-1]
    return (
        run,
        (first, credit_batch(first, run.algorithm)),
        (last, credit_batch(last, run.algorithm)),
    )


def test_levels_are_shares_of_scored_turns(sides):
    _, (batch, _), _ = sides
    scored = [turn.levels for d in batch.dialogues for turn in d.turns if turn.levels is not None]
    feeling = levels_of(batch)[1]
    assert feeling.axis == "A"
    assert feeling.progress == (
        sum(levels[2] == 1 for levels in scored) / len(scored),
        sum(levels[2] == 2 for levels in scored) / len(scored),
    )
    assert feeling.harm[0] == sum(levels[3] == -2 for levels in scored) / len(scored)


def test_an_improvement_is_described(sides):
    run, before, after = sides
    found = behaviour(run, before, after)
    assert found.steps == (0, 6)
    text = " ".join(found.sentences)
    assert "Fewer replies do harm" in text and "More replies help" in text
    assert found.headline.startswith("Fewer replies harm (")
    for share in ("before", "after"):
        assert sum(getattr(kind, share) for kind in found.kinds) == pytest.approx(1.0)
    situation = next(entry for entry in found.naming if entry.what == "situation")
    assert situation.after == run.evaluations[6]["naming/situation"] and situation.chance == 0.25


def test_every_rate_has_its_count_and_the_good_helper_beside_it(sides):
    run, before, after = sides
    helper = {"kind/most": 0.5, "kind/reframe": 0.5, "naming/situation": 0.875, "naming/situation_rate": 0.2}
    helper |= {"dialogues/left_out": 0.0, "turns/mean": 5.0, "judge/failure_rate": 0.0}
    run = replace(run, helper=helper)
    found = behaviour(run, before, after)
    assert found.replies[1] == sum(turn.scored for d in after[0].dialogues for turn in d.turns)
    for side, share in enumerate(("before", "after")):
        assert sum(kind.counts[side] for kind in found.kinds) == found.replies[side]
        for kind in found.kinds:
            assert kind.counts[side] == pytest.approx(getattr(kind, share) * found.replies[side])
    assert {k.name: k.helper for k in found.kinds}["reframe"] == 0.5
    situation = next(entry for entry in found.naming if entry.what == "situation")
    assert situation.helper == 0.875 and situation.helper_count == 8
    assert found.helper_replies == 5 * len(after[0].dialogues) == 40
    assert behaviour(replace(run, helper={}), before, after).helper_replies == 0
    for text in found.sentences:
        rates = re.findall(r"\d\u00a0% \((\d+) of (\d+)", text)
        assert len(rates) == text.count("%") > 0, text
    harms = [turn.levels and min(turn.levels[1::2]) < 0 for d in after[0].dialogues for turn in d.turns]
    harm = sum(filter(None, harms)) / found.replies[1]
    first = found.headline.split(" and ")[0]
    assert first.endswith(f"→ {format_value(harm, 'share')} of {found.replies[1]})"), first
    assert found.replies[0] != found.replies[1]  # else the number stands once for both
    assert found.headline.count("%") == found.headline.count(" of ") > 0


def test_every_kind_of_the_scripted_world_has_an_explanation(sides):
    assert set(KINDS) <= set(MEANINGS)
    found = behaviour(*sides)
    after = [
        turn.reply
        for d in sides[2][0].dialogues
        for turn in d.turns
        if turn.reading and turn.reading["kind"] == "name_feeling"
    ]
    kind = next(kind for kind in found.kinds if kind.name == "name feeling")
    assert kind.meaning == MEANINGS["name_feeling"]
    assert after.count(kind.example) == max(map(after.count, after))


def test_the_typical_pair_is_the_median_one(sides):
    _, before, after = sides
    pairs = changes(before, after)
    i, j, standing = typical_pair(before, after)
    change = after[1][j].first_return - before[1][i].first_return
    below = sum(other < change for other, _, _ in pairs)
    assert below == (len(pairs) - 1) // 2
    assert str(len(pairs)) in standing
    assert before[0].dialogues[i].card == after[0].dialogues[j].card
