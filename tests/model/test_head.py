import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.model import head


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def setting(request, qwen3):
    config = dataclasses.replace(qwen3, tie_word_embeddings=request.param)
    rng = np.random.default_rng(0)
    shape = (config.vocab_size, config.hidden_size)
    params = {"embed": {"embedding": rng.standard_normal(shape).astype(np.float32)}}
    if not config.tie_word_embeddings:
        params["head"] = {"kernel": rng.standard_normal(shape[::-1]).astype(np.float32)}
    hidden = rng.standard_normal((3, 7, config.hidden_size)).astype(np.float32) / 4
    targets = rng.integers(0, 120, (3, 7))
    return config, params, hidden, targets


def naive(params, config, hidden, targets, temperature, vocabulary_size):
    """Log-softmax over the whole [B, L, V] array, cut to the vocabulary first."""
    kernel = params["embed"]["embedding"].T if config.tie_word_embeddings else params["head"]["kernel"]
    logprobs = jax.nn.log_softmax((hidden @ kernel / temperature)[..., :vocabulary_size])
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


@pytest.mark.parametrize("chunk", [4, 512])  # 21 tokens: neither divides
def test_token_logprobs_and_entropy_equal_log_softmax(setting, chunk):
    config, params, hidden, targets = setting
    options = {"temperature": 0.7, "vocabulary_size": 121}

    def weighted(function):
        def loss(params, hidden):
            logprobs, entropy = function(params, config, hidden, targets, **options)
            weights = jnp.cos(jnp.arange(logprobs.size, dtype=jnp.float32)).reshape(logprobs.shape)
            return jnp.sum(weights * logprobs + jnp.sin(weights) * entropy), (logprobs, entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def chunked(*arguments, **keywords):
        return head.token_logprobs(*arguments, chunk=chunk, **keywords)

    (_, found), found_gradient = weighted(chunked)(params, hidden)
    (_, expected), expected_gradient = weighted(naive)(params, hidden)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=1e-5)
    jax.tree.map(
        # sums of 21 tokens' gradients, in another order
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4),
        found_gradient,
        expected_gradient,
    )


def test_ids_beyond_the_vocabulary_have_probability_zero(setting):
    config, params, hidden, _ = setting
    scores = head.logits(params, config, hidden, vocabulary_size=121)
    assert scores.shape == (3, 7, config.vocab_size) and scores.dtype == jnp.float32
    probabilities = jax.nn.softmax(scores)
    assert (np.asarray(probabilities[..., 121:]) == 0).all()
    np.testing.assert_allclose(probabilities[..., :121].sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(scores[..., :121], head.logits(params, config, hidden)[..., :121])


def operations(function, *arguments):
    """How many there are in a function's program, loops and branches counted once."""
    return str(jax.make_jaxpr(function)(*arguments)).count(" = ")


def test_an_entropy_that_is_only_reported_has_no_backward_pass(setting):
    config, params, hidden, targets = setting

    def gradient(weight, scores=head.token_logprobs):
        def loss(params, hidden):
            logprobs, entropy = scores(params, config, hidden, targets)
            entropy = entropy if weight else jax.lax.stop_gradient(entropy)
            return jnp.sum(logprobs) + (weight * jnp.sum(entropy) if weight else 0.0), entropy

        return jax.grad(loss, argnums=(0, 1), has_aux=True)

    def without(*arguments):
        logprobs, entropy = head.token_logprobs(*arguments)
        return logprobs, jnp.zeros_like(entropy)

    trained, reported, unused = (
        operations(one, params, hidden) for one in (gradient(0.1), gradient(0.0), gradient(0.0, without))
    )
    assert trained - reported > 10
    # What is reported costs at most to be reported.
    assert abs(reported - unused) <= 2

    def entropy_alone(hidden):
        return jnp.sum(head.token_logprobs(params, config, hidden, targets)[1])

    plain = jax.grad(
        lambda hidden: jnp.sum(naive(params, config, hidden, targets, 1.0, config.vocab_size)[1])
    )
    np.testing.assert_allclose(jax.grad(entropy_alone)(hidden), plain(hidden), atol=1e-5)
