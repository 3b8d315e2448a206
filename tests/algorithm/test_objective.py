"""Expected values are worked out by hand or by the literal formulas in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.algorithm import objective
from mapo_jax.config import AlgorithmConfig

NAN = float("nan")
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
B, L = 4, 6


def batch(seed=0):
    """Rows with 3, 6, 0 and 2 loss tokens, ratios from 0.2 to 30, advantages of both signs."""
    rng = np.random.default_rng(seed)
    old = rng.uniform(-4, -0.1, (B, L)).astype(np.float32)
    new = old + rng.uniform(-1.5, 3.4, (B, L)).astype(np.float32)
    advantages = rng.normal(0, 1.5, (B, L)).astype(np.float32)
    mask = np.zeros((B, L), bool)
    mask[0, [1, 2, 5]] = mask[1] = mask[3, [0, 3]] = True
    return new, old, advantages, mask


def literal_surrogate(ratio, advantage):
    """The formula as it is written, one token at a time."""
    clipped = min(max(ratio, 1 - 0.2), 1 + 0.28)
    value = min(ratio * advantage, clipped * advantage)
    return -max(value, 10.0 * advantage) if advantage < 0 else -value


def literal_loss(new, old, advantages, mask, aggregation, length=12):
    rows = []
    for b in range(B):
        rows.append(
            [
                literal_surrogate(float(np.exp(new[b, k] - old[b, k])), float(advantages[b, k]))
                for k in range(L)
                if mask[b, k]
            ]
        )
    rows = [row for row in rows if row]
    if aggregation == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregation == "sequence-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * length)


@functools.cache
def compiled(**options):
    """Loss, metrics and gradient with respect to the log-probabilities, jitted once per choice of options."""
    function = functools.partial(objective.policy_loss, **options)
    return jax.jit(jax.value_and_grad(function, has_aux=True))


AGGREGATIONS = [
    ("token-mean", {}),
    ("sequence-mean", {}),
    ("constant-length", {"constant_length": 12}),
]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # slope: d loss / d log ratio = -ratio * advantage where no bound holds
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),
        (1.5, 2.0, -2.56, 0.0),  # the upper clip, 1.28
        (0.5, 2.0, -1.0, -1.0),  # a good token that became rarer is always pulled back
        (1.0, -2.0, 2.0, 2.0),
        (0.7, -2.0, 1.6, 0.0),  # the lower clip, 0.8
        (3.0, -2.0, 6.0, 6.0),  # a bad token that became likelier is pushed down ...
        (12.0, -2.0, 20.0, 0.0),  # ... but no harder than the dual clip lets
        (12.0, 0.0, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(ratio, advantage, loss, slope):
    def token(log_ratio):
        ratio = objective.importance_ratio(log_ratio, jnp.zeros(()))
        return objective.clipped_surrogate(ratio, jnp.float32(advantage), **CLIPS).loss

    value, gradient = jax.value_and_grad(token)(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose([value, gradient], [loss, slope], rtol=1e-5)


def test_at_the_clip_edges():
    """Exactly on a bound a token is not clipped, and the gradient is the inner one, not half of it."""
    ratio = np.array([1.28, 0.8, 10.0], np.float32)
    advantages = np.array([1.0, -1.0, -1.0], np.float32)

    def slopes(ratio):
        return jax.grad(lambda x: objective.clipped_surrogate(x, advantages, **CLIPS).loss.sum())(ratio)

    np.testing.assert_array_equal(slopes(ratio), -advantages)
    outwards = np.nextafter(ratio, np.array([2, 0, 11], np.float32))
    np.testing.assert_array_equal(slopes(outwards), 0)
    _, clipped, dual_clipped = objective.clipped_surrogate(outwards, advantages, **CLIPS)
    np.testing.assert_array_equal(clipped, [True, True, False])
    np.testing.assert_array_equal(dual_clipped, [False, False, True])


@pytest.mark.parametrize(("aggregation", "options"), AGGREGATIONS)
def test_loss_and_gradient_against_the_literal_formula(aggregation, options):
    """Gradient by central differences of the float64 formula; no token lies on a kink."""
    new, old, advantages, mask = batch()
    (loss, _), gradient = compiled(aggregation=aggregation, **options)(new, old, advantages, mask)
    arguments = (old.astype(np.float64), advantages, mask, aggregation)
    assert loss == pytest.approx(literal_loss(new.astype(np.float64), *arguments), rel=1e-5)
    expected = np.zeros((B, L))
    for b, k in np.ndindex(B, L):
        step = np.zeros((B, L))
        step[b, k] = 1e-5
        expected[b, k] = (literal_loss(new + step, *arguments) - literal_loss(new - step, *arguments)) / 2e-5
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert (expected[mask] == 0).any() and (expected[mask] != 0).any()  # both sides of the bounds occur


@pytest.mark.parametrize(("aggregation", "options"), AGGREGATIONS)
def test_microbatches_add_up_to_the_minibatch(aggregation, options):
    new, old, advantages, mask = batch(1)
    reference, entropy = old - 0.3, np.abs(old)
    weights = np.exp(0.1 * new)
    loss = compiled(aggregation=aggregation, kl_coefficient=0.05, entropy_coefficient=0.01)
    total = objective.loss_denominator(mask, aggregation=aggregation, **options)

    def part(rows):
        return loss(
            new[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            weights=weights[rows],
            reference_logprobs=reference[rows],
            entropy=entropy[rows],
            denominator=total,
        )

    (whole, metrics), gradient = part(slice(0, 4))
    parts = [part(slice(0, 2)), part(slice(2, 4))]  # 9 loss tokens here, 2 there, and an empty row
    assert sum(loss for (loss, _), _ in parts) == pytest.approx(float(whole), rel=1e-6)
    np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-6)
    stacked = {name: jnp.stack([m[name] for (_, m), _ in parts]) for name in metrics}
    combined = objective.combine_metrics(stacked)
    assert combined.keys() == metrics.keys()
    for name, value in metrics.items():
        assert combined[name] == pytest.approx(float(value), rel=1e-5), name


def test_aggregations_by_hand():
    values = np.array([[1.0, 2.0, NAN], [6.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    expected = {"token-mean": 9 / 3, "sequence-mean": (1.5 + 6) / 2, "constant-length": 9 / (2 * 10)}
    for aggregation, value in expected.items():
        total = objective.loss_denominator(mask, aggregation=aggregation, constant_length=10)
        assert total.tokens == 3
        assert objective.aggregate(values, mask, total.loss, aggregation=aggregation) == pytest.approx(value)


def test_metrics_by_hand():
    ratio = np.array([[1.0, 1.5, 0.5, 12.0]])
    advantages = np.array([[1.0, 1.0, -1.0, -1.0]])
    _, metrics = objective.policy_loss(
        np.log(ratio), np.zeros((1, 4)), advantages, np.ones((1, 4), bool), entropy=np.full((1, 4), 0.7)
    )
    expected = {
        "clip_fraction": 0.5,
        "dual_clip_fraction": 0.25,
        "ratio_mean": 15 / 4,
        "ratio_max": 12.0,
        "approx_kl": (15 - 4 - np.log(1.5 * 0.5 * 12)) / 4,
        "pg_loss": (-1.0 - 1.28 + 0.8 + 10.0) / 4,
        "entropy": 0.7,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_on_policy_the_gradient_is_the_policy_gradient():
    """With rho = 1 every token's slope is -A over the count of tokens, whatever the clips."""
    _, old, advantages, mask = batch(2)
    (loss, metrics), gradient = compiled()(old, old, advantages, mask)
    np.testing.assert_allclose(gradient, np.where(mask, -advantages / mask.sum(), 0), rtol=1e-6)
    assert loss == pytest.approx(-advantages[mask].mean(), rel=1e-5)
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0


def test_what_stands_outside_the_mask_has_no_influence():
    arrays = batch(3)
    mask = arrays[3]
    options = {"kl_coefficient": 0.1, "entropy_coefficient": 0.1}

    def run(fill):
        new, old, advantages = (np.where(mask, array, np.float32(fill)) for array in arrays[:3])

        def loss(new, entropy):
            weights = objective.truncated_importance_weights(old - 0.1, old, mask, 2.0)
            return objective.policy_loss(
                new,
                old,
                advantages,
                mask,
                weights=np.where(mask, weights, np.float32(fill)),
                reference_logprobs=old,
                entropy=entropy,
                **options,
            )[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(new, np.where(mask, -new, np.float32(fill)))

    value, gradients = run(0.0)
    for fill in (NAN, -np.inf, 1e30):
        other, others = run(fill)
        assert other == value
        for one, two in zip(gradients, others, strict=True):
            np.testing.assert_array_equal(one, two)
            assert not np.asarray(two)[~mask].any()


def test_the_gradient_flows_through_the_trained_policy_alone():
    new, old, advantages, mask = batch(5)

    def loss(old, advantages, weights, reference):
        return objective.policy_loss(
            new,
            old,
            advantages,
            mask,
            weights=weights,
            reference_logprobs=reference,
            kl_coefficient=0.1,
        )[0]

    constants = (old, advantages, np.ones_like(old), old)
    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*constants):
        assert not gradient.any()


def test_no_loss_tokens_at_all():
    new, old, advantages, mask = batch()
    (loss, metrics), gradient = compiled()(new, old, advantages, np.zeros_like(mask))
    assert loss == 0 and not gradient.any() and not any(metrics.values())


def test_extreme_ratios_stay_finite():
    new, old = np.array([[-0.1, -200.0]]), np.array([[-200.0, -0.1]])
    for advantage in (1.0, -1.0, 0.0):
        (loss, _), gradient = jax.value_and_grad(objective.policy_loss, has_aux=True)(
            new, old, np.full((1, 2), advantage), np.ones((1, 2), bool)
        )
        assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_kl_estimators_by_hand_and_in_expectation():
    """Over a full distribution: E[k1] = E[k3] = KL exactly; k2's gradient is KL's, k1's is 0, k3's is that
    of the KL the other way round.
    """
    reference = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    start = jnp.array([0.3, -0.2, 0.4])
    p, q = jax.nn.softmax(start), jnp.exp(reference)
    forward, backward = jnp.sum(p * jnp.log(p / q)), jnp.sum(q * jnp.log(q / p))

    def expected(logits, name):
        """The expectation over tokens of the sampling policy, which has no gradient of its own."""
        return jnp.sum(p * objective.kl_divergence(jax.nn.log_softmax(logits), reference, name))

    assert expected(start, "k1") == pytest.approx(float(forward), rel=1e-5)
    assert expected(start, "k3") == pytest.approx(float(forward), rel=1e-5)
    x = np.log(np.asarray(p / q))
    assert expected(start, "k2") == pytest.approx(float((p * x**2 / 2).sum()), rel=1e-5)

    def exact(logits):
        return jnp.sum(jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - reference))

    def reverse(logits):
        return jnp.sum(q * (reference - jax.nn.log_softmax(logits)))

    assert reverse(start) == pytest.approx(float(backward), rel=1e-5)
    for name, truth in (("k1", 0 * start), ("k2", jax.grad(exact)(start)), ("k3", jax.grad(reverse)(start))):
        np.testing.assert_allclose(jax.grad(expected)(start, name), truth, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_and_entropy_enter_the_loss(estimator):
    new, old, advantages, mask = batch(4)
    reference, entropy = new - 0.5, np.full_like(new, 2.0)
    plain, _ = objective.policy_loss(new, old, advantages, mask)
    loss, metrics = objective.policy_loss(
        new,
        old,
        advantages,
        mask,
        reference_logprobs=reference,
        kl_coefficient=0.05,
        kl_estimator=estimator,
        entropy=entropy,
        entropy_coefficient=0.01,
    )
    kl = {"k1": 0.5, "k2": 0.125, "k3": np.exp(-0.5) - 0.5}[estimator]
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert loss == pytest.approx(float(plain) + 0.05 * kl - 0.01 * 2.0, rel=1e-5)
    assert metrics["pg_loss"] == pytest.approx(float(plain), rel=1e-6)


def test_truncated_importance_weights_by_hand():
    trainer = np.log(np.array([[0.5, 0.9, 0.2, 0.3]]))
    sampler = np.log(np.array([[0.5, 0.1, 0.4, 0.1]]))
    mask = np.array([[True, True, True, False]])
    weights = objective.truncated_importance_weights(trainer, sampler, mask, 2.0)
    np.testing.assert_allclose(weights, [[1.0, 2.0, 0.5, 1.0]], rtol=1e-6)
    advantages, new = np.ones((1, 4)), trainer.copy()
    loss, metrics = objective.policy_loss(new, trainer, advantages, mask, weights=weights)
    assert loss == pytest.approx(-(1 + 2 + 0.5) / 3)
    assert metrics["weight_mean"] == pytest.approx(3.5 / 3)


def test_options_of_the_configuration():
    options = objective.objective_options(AlgorithmConfig(clip_low=0.1, kl_coefficient=0.05))
    assert options["clip_low"] == 0.1 and options["kl_coefficient"] == 0.05
    new, old, advantages, mask = batch()
    options = objective.objective_options(AlgorithmConfig(entropy_coefficient=0.0))
    assert objective.policy_loss(new, old, advantages, mask, **options)[0] == pytest.approx(
        float(objective.policy_loss(new, old, advantages, mask)[0])
    )


def test_what_is_refused():
    new, old, advantages, mask = batch()
    refused = [
        ({"kl_coefficient": 0.1}, "reference_logprobs"),
        ({"entropy_coefficient": 0.1}, "entropy"),
        ({"aggregation": "row-sum"}, "aggregation"),
        ({"aggregation": "constant-length"}, "constant_length"),
        ({"reference_logprobs": old, "kl_estimator": "k4"}, "k1, k2, k3"),
        ({"weights": old[:2]}, "does not fit"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            objective.policy_loss(new, old, advantages, mask, **options)
    with pytest.raises(ValueError, match="boolean"):
        objective.policy_loss(new, old, advantages, mask.astype(np.float32))
