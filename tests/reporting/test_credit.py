import json
from dataclasses import replace

import numpy as np

from mapo_jax.config import AlgorithmConfig
from mapo_jax.learning.batch import make_cells
from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
from mapo_jax.reporting.credit import credit_batch
from mapo_jax.reporting.folder import read_run
from mapo_jax.rollout.collect import Dialogue


def trainers_credit(file, scenarios, rollouts, turns, algorithm, share):
    rows = [Dialogue.from_json(json.loads(line)) for line in file.read_text().splitlines()]
    groups = [rows[s * rollouts : (s + 1) * rollouts] for s in range(scenarios)]
    cells = make_cells(groups, turns, max_failed_share=share)
    rewards = turn_rewards(cells.positions, cells.scored, algorithm=algorithm)
    returns = turn_returns(rewards, cells.valid, cells.scored, algorithm=algorithm)
    advantages = turn_advantages(rewards, returns, cells.valid, cells.scored, algorithm=algorithm)
    return cells.scored, np.asarray(rewards), np.asarray(advantages)


def test_it_is_the_credit_that_training_gave(run_folder):
    run = read_run(run_folder, dialogues=1000)
    for algorithm in (AlgorithmConfig(), AlgorithmConfig(estimator="grpo"), AlgorithmConfig(turn_weight=1.0)):
        for batch in run.training[:3]:
            file = run_folder / "dialogues" / f"step_{batch.step:06d}.jsonl"
            scored, rewards, advantages = trainers_credit(file, 3, 3, 5, algorithm, 0.25)
            credits = credit_batch(
                batch, algorithm, scenarios=4, rollouts=3, max_turns=8, max_failed_share=0.25
            )
            for dialogue, credit in zip(batch.dialogues, credits, strict=True):
                for t in range(len(dialogue.turns)):
                    place = (*dialogue.place, t)
                    if scored[place]:
                        assert abs(credit.rewards[t] - rewards[place]) < 1e-6
                        assert abs(credit.advantages[t] - advantages[place]) < 1e-5
                    else:
                        assert credit.advantages[t] is None


def test_the_advantage_mixes_the_two_terms(run_folder):
    batch = read_run(run_folder, dialogues=1000).training[0]
    for credit in credit_batch(batch, AlgorithmConfig(turn_weight=0.25)):
        for turn, level, mixed in zip(credit.turn_level, credit.batch_level, credit.advantages, strict=True):
            if mixed is not None:
                assert abs(0.25 * turn + 0.75 * level - mixed) < 1e-5


def test_returns_by_hand(run_folder):
    batch = read_run(run_folder, dialogues=1000).training[0]
    for dialogue, credit in zip(batch.dialogues, credit_batch(batch, AlgorithmConfig()), strict=True):
        scored = [reward for reward in credit.rewards if reward is not None]
        filled = [np.mean(scored) if reward is None else reward for reward in credit.rewards]
        later = 0.0
        for t in reversed(range(len(dialogue.turns))):
            later = filled[t] + 0.85 * later
            assert abs(credit.returns[t] - later) < 1e-5
            if credit.rewards[t] is not None:
                assert abs(credit.rewards[t] - (dialogue.distances[t] - dialogue.distances[t + 1])) < 1e-5


def test_nothing_is_learnt_from_validation(run_folder):
    batch = read_run(run_folder, dialogues=1000).validation[0]
    credit = credit_batch(batch, AlgorithmConfig())[0]
    assert credit.returns and credit.advantages == ()


def test_an_unknown_estimator_still_gives_rewards(run_copy):
    usual = read_run(run_copy, dialogues=1000)
    file = run_copy / "config.yaml"
    odd = file.read_text().replace("estimator: mapo", "estimator: of the future\n  of_the_future: 3")
    file.write_text(odd.replace("reward: incremental", "reward: unheard of"))
    run = read_run(run_copy, dialogues=1000)
    assert "estimator, of_the_future, reward" in run.notes[-1]
    batch = run.training[0]
    assert credit_batch(batch, run.algorithm)[0].rewards == credit_batch(batch, usual.algorithm)[0].rewards


def test_the_three_advantages_by_an_independent_calculation(run_folder):
    """Plain loops over the formulas, with a discount and a weight that are not the defaults."""
    discount, weight = 0.93, 0.6
    run = read_run(run_folder, dialogues=1000)
    batch = max(run.training, key=lambda b: sum(not turn.scored for d in b.dialogues for turn in d.turns))
    algorithm = AlgorithmConfig(discount=discount, turn_weight=weight)
    credits = credit_batch(batch, algorithm, max_failed_share=1.0)
    rewards, returns = {}, {}
    for dialogue in batch.dialogues:
        lack = [np.sqrt(sum(max(0.0, -1 - axis) ** 2 for axis in p)) for p in dialogue.state.positions]
        own = [
            lack[t] - lack[t + 1] if turn.levels is not None else None
            for t, turn in enumerate(dialogue.turns)
        ]
        middle = np.mean([reward for reward in own if reward is not None])
        later = 0.0
        for t in reversed(range(len(own))):
            later = (middle if own[t] is None else own[t]) + discount * later
            if own[t] is not None:
                rewards[(*dialogue.place, t)], returns[(*dialogue.place, t)] = own[t], later
    mean, deviation = np.mean(list(rewards.values())), np.std(list(rewards.values()))
    assert len(rewards) < sum(len(d.turns) for d in batch.dialogues)  # some turns are unscored
    for dialogue, credit in zip(batch.dialogues, credits, strict=True):
        for t in range(len(dialogue.turns)):
            place = (*dialogue.place, t)
            if place not in rewards:
                assert (credit.turn_level[t], credit.batch_level[t], credit.advantages[t]) == (None,) * 3
                continue
            cell = [g for (s, _, turn), g in returns.items() if (s, turn) == (place[0], t)]
            level = (returns[place] - np.mean(cell)) / (np.std(cell) + 1e-6) if len(cell) > 1 else 0.0
            wide = (rewards[place] - mean) / (deviation + 1e-6)
            found = (credit.turn_level[t], credit.batch_level[t], credit.advantages[t])
            np.testing.assert_allclose(found, (level, wide, weight * level + (1 - weight) * wide), atol=1e-4)


def test_the_size_of_the_indices_does_not_matter(run_folder):
    batch = read_run(run_folder, dialogues=1000).training[0]
    far = [replace(d, place=(30_000 * d.place[0] + 7, 40_000 * d.place[1] + 1)) for d in batch.dialogues]
    apart = replace(batch, dialogues=tuple(far))
    assert credit_batch(apart, AlgorithmConfig()) == credit_batch(batch, AlgorithmConfig())
