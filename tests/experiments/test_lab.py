"""The laboratory and the credit study: what they train and measure, on the smallest scale."""

import math
from dataclasses import replace
from functools import partialmethod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import credit, figures, lab, records, tables
from experiments import strategy_policy as policy
from experiments import strategy_world as world
from mapo_jax.environment.scenario import load_scenarios


def state_of(card, rules):
    return world.open_dialogue(jax.tree.map(lambda x: x[0], world.cards([card])), rules)


def reply(state, rules, *kinds):
    """Levels of a reply, and the state after the user's next message."""
    judged = world.judge(state, jnp.int32(world.bits(*kinds)), jnp.int32(0), rules)
    moved = world.settle(judged.state, judged.levels, judged.levels, rules)
    followed = world.direct(moved, jnp.float32(0.9), rules)
    return judged.levels.tolist(), world.hear(followed, world.speak(followed, jnp.int32(0), rules), rules)


@pytest.mark.parametrize("wait", [0, 2])
def test_trap_pays_at_once_and_closes_the_person_later(wait):
    rules = world.Rules(trap=world.Trap(wait=wait, turns=3))
    state = state_of(next(c for c in load_scenarios() if c.empathy_threshold == "medium"), rules)
    levels, state = reply(state, rules, "praise")
    assert levels == [0, 0, 2, 0, 0, 0]
    for _ in range(wait):
        assert not world.withdrawn(state, rules)
        _, state = reply(state, rules, "reflect_situation", "name_feeling")
    for kind in ("repair", "repair", "ask"):
        assert world.withdrawn(state, rules)
        levels, state = reply(state, rules, kind)
        assert levels == [0, 0, 0, -1, 0, 0]  # not even a repair helps
    assert state.sealed == 0
    # Elsewhere the same act harms at once.
    plain = world.Rules()
    state = state_of(load_scenarios()[0], plain)
    assert reply(state, plain, "praise")[0] == [0, 0, 0, -1, 0, -1]


def test_noise_moves_the_judge_and_not_the_truth():
    rules = world.Rules(judge_noise=1.0)
    cards = world.cards(load_scenarios(split="train"))
    states = lab.begin_dialogues(cards, jnp.arange(64)[None], 1, 1, rules)
    weights = policy.start_weights()[None, None]
    noisy, _ = policy.converse(weights, states, jax.random.key(0), rules, 4)
    quiet, _ = policy.converse(weights, states, jax.random.key(0), replace(rules, judge_noise=0.0), 4)
    np.testing.assert_array_equal(noisy.true_positions, quiet.true_positions)
    np.testing.assert_array_equal(quiet.positions, quiet.true_positions)
    assert np.mean(np.asarray(noisy.positions) != np.asarray(quiet.positions)) > 0.3


def test_training_improves_continues_and_collects(tmp_path, capsys):
    arguments = ["--world", "rollouts 2", "--study", "options", "--seeds", "12", "--steps", "6"]
    arguments += ["--folder", str(tmp_path / "raw"), "--json", str(tmp_path / "lab.json")]
    lab.main(arguments)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "raw").rglob("*.json")}
    found = records.read_json(tmp_path / "lab.json")["worlds"]["rollouts 2"]
    assert len(found) == len(files) == 3 * len(lab.FEWER_RATES)
    for record in found:
        assert len(record["final"]) == 12
        assert record["curve"][-1] > record["curve"][0] + 1.0, record["label"]
    # What exists is not computed again; what is missing is. In a smaller batch sums may round otherwise, so
    # only the return before the first update is sure to be the same.
    gone = next(iter(files))
    before = records.read_json(gone)
    gone.unlink()
    lab.main(arguments)
    after = records.read_json(gone)
    assert {name: after[name] for name in ("label", "rate", "size")} == {
        name: before[name] for name in ("label", "rate", "size")
    }
    assert after["curve"][0] == pytest.approx(before["curve"][0], abs=0.02)
    assert all(file.stat().st_mtime_ns == when for file, when in files.items() if file != gone)
    assert "turn leave-one-out" in capsys.readouterr().out


def test_advantages_are_the_projects_own():
    settings = lab.settings_of([lab.mapo(0.25)], lab.BASE, rescale=False)
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.normal(-10, 5, (len(settings), 1, lab.DIALOGUES, 9, 3)), jnp.float32)
    valid = jnp.ones((*positions.shape[:3], 8), bool)
    found = lab.advantages_program(lab.BASE, settings)(positions, valid)[0, 0]

    distance = np.linalg.norm(np.maximum(0, -1 - np.asarray(positions[0, 0], float)), axis=-1)
    rewards = (distance[:, :-1] - distance[:, 1:]).reshape(4, 8, 8)
    returns = np.zeros_like(rewards)
    for t in reversed(range(8)):
        returns[..., t] = rewards[..., t] + (0.85 * returns[..., t + 1] if t < 7 else 0)
    turn = (returns - returns.mean(1, keepdims=True)) / returns.std(1, keepdims=True)
    batch = (rewards - rewards.mean()) / rewards.std()
    # float32 against float64, of values around 1
    np.testing.assert_allclose(found, (0.25 * turn + 0.75 * batch).reshape(32, 8), atol=1e-4)


def test_effects_are_those_of_the_only_turn(monkeypatch):
    """In dialogues of one turn the effect of a reply is its reward minus the policy's mean reward."""
    monkeypatch.setattr(credit, "ESTIMATORS", {"dr_grpo": credit.ESTIMATORS["dr_grpo"]})
    place = replace(lab.BASE, rules=world.Rules(1, 1))
    weights = jnp.broadcast_to(policy.start_weights(), (1, 3, *policy.start_weights().shape))
    data = credit.measure(place, weights, credit.Size(3, 256))
    effect = data["effects"].mean(axis=0)[..., 0]
    rewards = data["mean"][0, ..., 0].reshape(3, 4, 8)
    # Within a group, effects and centred rewards differ by a constant; 256 branches leave an error of 0.2.
    gap = effect.reshape(3, 4, 8) - rewards
    assert np.abs(gap - gap.mean(axis=2, keepdims=True)).max() < 0.6
    assert np.allclose(data["scatter"], 0, atol=1e-6)


def test_bias_and_variance_of_a_known_estimate():
    rng = np.random.default_rng(0)
    effect, error = rng.normal(size=(2, 1, 20000, 1))
    targets = np.stack([effect + 0.5 * rng.normal(size=effect.shape) for _ in range(2)])
    found = credit.summary(
        2 * (effect + error), np.full(effect.shape, 8.0), targets, np.ones(effect.shape, bool), 10**9
    )
    # Estimate 2 (effect + error + noise), with variances 1, 1 and 2: correlation 1/2, best scale 1/8.
    assert found["correlation"] == pytest.approx(0.5, abs=0.02)
    assert found["systematic"] == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert found["variance"] == pytest.approx(8 / 64, abs=0.02)
    assert found["bias"] == pytest.approx(0.75 - 8 / 64, abs=0.03)


def test_credit_and_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(credit, "ESTIMATORS", {label: credit.ESTIMATORS[label] for label in figures.NAMES})
    monkeypatch.setattr(credit.Size, "__init__", partialmethod(credit.Size.__init__, steps=2))
    arguments = ["--world", "horizon 4", "--policies", "2", "--branches", "4"]
    arguments += ["--folder", str(tmp_path / "raw"), "--json", str(tmp_path / "credit.json")]
    credit.main(arguments)
    results = records.read_json(tmp_path / "credit.json")["results"]
    assert [result["stage"] for result in results] == list(credit.STAGES)
    assert set(results[0]["estimators"]["turn"]) == set(credit.POSITIONS)
    figures.main(["--results", str(tmp_path), "--output", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "credit_worlds.svg").stat().st_size > 1000
    assert "lab_worlds: no" in capsys.readouterr().out


def test_statistics():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.4, 1, 60), rng.normal(0, 1, 60)
    test, t = records.paired(one, other), scipy.stats.ttest_rel(one, other)
    assert test["p"] == pytest.approx(t.pvalue, abs=0.02)  # a sign-flip test is close to the t test here
    low, high = t.confidence_interval()
    assert (test["low"], test["high"]) == pytest.approx((low, high), abs=0.05)
    assert records.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_the_rate_is_chosen_by_other_seeds():
    settings = [
        {"label": "turn", "rate": 0.1, "final": [2.0, *[0.0] * 5]},
        {"label": "turn", "rate": 0.3, "final": [1.0, *[9.0] * 5]},
    ]
    rate, values = tables.at_best_rate(settings, "turn")
    assert (rate, values.tolist()) == (0.1, [0.0] * 5)
