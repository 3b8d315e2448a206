"""Distributions against numpy arithmetic and transformers' processors; keys; what must never be sampled."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mapo_jax.errors import UserError
from mapo_jax.rollout.sampling import (
    IN_PROMPT,
    LaneSampling,
    RequestSampling,
    Sampling,
    alternatives,
    count_tokens,
    penalise,
    penalise_each,
    sample,
    sample_each,
    shape,
    uniforms,
)

ROWS, VOCABULARY = 4096, 23  # one shape for all: compilation is most of these tests' cost


@functools.cache
def compiled(sampling):
    return jax.jit(functools.partial(sample, sampling=sampling))


@pytest.fixture(scope="module")
def scores():
    return np.random.default_rng(0).normal(scale=2, size=VOCABULARY).astype(np.float32)


def draw(scores, sampling, seed=1):
    uniform = np.random.default_rng(seed).random(ROWS, np.float32)
    ids, logprobs = compiled(sampling)(np.tile(scores, (ROWS, 1)), uniform)
    return np.asarray(ids), np.asarray(logprobs)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference(scores, sampling):
    """The filters one after the other on float64 probabilities, written as their definitions read."""
    p = softmax(scores.astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        p = np.where(p >= np.sort(p)[-sampling.top_k], p, 0)
        p /= p.sum()
    if sampling.top_p < 1:
        kept, held = np.zeros_like(p), 0.0
        for i in np.argsort(-p):
            kept[i], held = p[i], held + p[i]
            if held >= sampling.top_p:
                break
        p = kept / kept.sum()
    if sampling.min_p:
        p = np.where(p >= sampling.min_p * p.max(), p, 0)
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_distribution(scores, sampling):
    """Pearson's chi-square over the tokens with an expected count of 5 or more, and the log-probabilities."""
    ids, logprobs = draw(scores, sampling)
    expected = reference(scores, sampling)
    counts = np.bincount(ids, minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    likely = expected * ROWS >= 5
    statistic = np.sum((counts - expected * ROWS)[likely] ** 2 / (expected * ROWS)[likely])
    freedom = likely.sum()
    # Mean f, variance 2f: five standard deviations are exceeded by chance once in some 10^5 seeds; this
    # seed is fixed.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    # float32 softmax against float64: both logits and logsumexp carry a few units of the last place.
    np.testing.assert_allclose(logprobs, np.log(expected[ids]), atol=2e-6)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_p=0.7),
        Sampling(min_p=0.15),
        Sampling(repetition_penalty=1.7),
        Sampling(repetition_penalty=0.6, temperature=1.4, top_k=15, top_p=0.85, min_p=0.04),
    ],
    ids=str,
)
def test_equals_transformers_processors(sampling):
    """In the order in which its `generate` applies them: the same tokens are left, equally probable."""
    import torch
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    numbers = np.random.default_rng(7)
    logits = numbers.normal(scale=2.5, size=(64, VOCABULARY)).astype(np.float32)
    rows = numbers.integers(0, VOCABULARY, (64, 9))  # what was said before, some of it twice
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, rows, True, axis=1)

    processors = LogitsProcessorList([theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(theirs.MinPLogitsWarper(sampling.min_p))
    expected = torch.log_softmax(processors(torch.tensor(rows), torch.tensor(logits)), dim=-1).numpy()

    penalised = penalise(logits, seen, sampling.repetition_penalty)
    found = np.asarray(jax.nn.log_softmax(shape(penalised, sampling), axis=-1))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    assert np.isfinite(found).all() == (not filtered)
    # Both in float32, a few operations on numbers below 16.
    np.testing.assert_allclose(found, expected, atol=5e-6)
    ids, logprobs = sample(penalised, numbers.random(64, np.float32), sampling)
    np.testing.assert_allclose(logprobs, expected[np.arange(64), ids], atol=5e-6)


def test_greedy(scores):
    ids, logprobs = draw(scores, Sampling(temperature=0))
    assert (ids == scores.argmax()).all() and (logprobs == 0).all()


@pytest.mark.parametrize("masked", ["tail", "head", "all but one"])
def test_masked_ids_are_never_sampled(scores, masked):
    """Also at the ends of the unit interval, where rounding could step over the last possible token."""
    scores = scores.copy()
    forbidden = {"tail": slice(17, None), "head": slice(0, 6), "all but one": slice(1, None)}[masked]
    scores[forbidden] = -1e30
    uniform = np.random.default_rng(2).random(ROWS, np.float32)
    uniform[:2] = 0.0, np.float32(1 - 2**-24)
    ids, logprobs = compiled(Sampling())(np.tile(scores, (ROWS, 1)), uniform)
    assert np.isin(np.asarray(ids), np.arange(VOCABULARY)[scores > -1e30]).all()
    assert np.isfinite(logprobs).all()


def test_inverse_is_monotone(scores):
    """The quantile function itself: never steps back, and every token has its share."""
    uniform = (np.arange(ROWS) / ROWS).astype(np.float32)
    ids = np.asarray(compiled(Sampling())(np.tile(scores, (ROWS, 1)), uniform)[0])
    assert (np.diff(ids) >= 0).all()
    edges = np.searchsorted(np.cumsum(softmax(scores.astype(np.float64))), uniform, side="right")
    assert np.mean(ids != edges) < 2e-3  # a number within rounding of an edge may fall on either side


def test_keys():
    """Every word of the key and the position matter; the row and its neighbours do not."""
    numbers = jax.jit(uniforms)
    words = np.array(list(itertools.product((0, 7), repeat=4)), np.uint32)
    positions = np.tile(np.arange(40, 48), (16, 1))
    values = np.asarray(numbers(words, positions))
    assert len(np.unique(values)) == values.size
    assert ((values >= 0) & (values < 1)).all()
    np.testing.assert_array_equal(np.asarray(numbers(words[::-1], positions))[::-1], values)
    np.testing.assert_array_equal(np.asarray(numbers(words, positions + 1))[:, :-1], values[:, 1:])


def test_uniform():
    """Kolmogorov-Smirnov: the largest gap to the uniform distribution, against its 0.1 % point."""
    words = np.zeros((64, 4), np.uint32)
    words[:, 2] = np.arange(64)
    values = np.sort(np.asarray(jax.jit(uniforms)(words, np.tile(np.arange(64), (64, 1)))).ravel())
    gap = np.abs(values - (np.arange(values.size) + 0.5) / values.size).max()
    assert gap < 1.95 / np.sqrt(values.size)


def test_filters_keep_the_most_probable():
    """However small the share asked for, one token stays."""
    scores = jnp.array([[0.0, 3.0, 1.0]])
    for sampling in (Sampling(top_p=1e-6), Sampling(top_k=1), Sampling(min_p=1.0)):
        assert np.isfinite(np.asarray(shape(scores, sampling))).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_bad_values(name, value):
    with pytest.raises(UserError, match=name):
        Sampling(**{name: value})


class TestEachLane:
    SETTINGS = (
        RequestSampling(),
        RequestSampling(temperature=0),
        RequestSampling(temperature=0.7, top_k=3),
        RequestSampling(top_p=0.6),
        RequestSampling(temperature=1.4, top_k=9, top_p=0.8, min_p=0.05),
        RequestSampling(min_p=0.3),
        RequestSampling(top_k=1000),
    )

    def test_every_lane_has_its_own_distribution(self):
        rng = np.random.default_rng(5)
        row = jnp.asarray(rng.normal(size=(1, 60)) * 2, jnp.float32)
        scores = jnp.repeat(row, len(self.SETTINGS), axis=0)
        lanes = LaneSampling.of(self.SETTINGS)
        each, one = jax.jit(sample_each), jax.jit(sample, static_argnums=2)
        for number in rng.uniform(size=20).astype(np.float32):
            ids, logprobs = each(scores, jnp.full(len(self.SETTINGS), number), lanes)
            for index, settings in enumerate(self.SETTINGS):
                alone = one(row, jnp.full(1, number), settings)
                assert ids[index] == alone[0][0]
                assert logprobs[index] == pytest.approx(float(alone[1][0]), abs=1e-6)

    def test_penalties_by_hand(self):
        # Row: prompt 1 1 2, reply 2 3 3; the vocabulary has five tokens, the row is padded with a sixth.
        counts = count_tokens(jnp.array([[1, 1, 2, 2, 3, 3, 5, 5]]), jnp.array([3]), 5)
        assert (counts % IN_PROMPT).tolist() == [[0, 0, 1, 2, 0]]
        assert (counts > 0).tolist() == [[False, True, True, True, False]]
        settings = RequestSampling(repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25)
        scores = penalise_each(jnp.array([[1.0, 1, 1, -1, -1]]), counts, LaneSampling.of([settings]))
        assert scores.tolist() == [[1, 0.5, 0.5 - 0.75, -2 - 1.0, -1]]

    def test_alternatives(self):
        scores = np.log([[0.1, 0.2, 0.4, 0.3]]) + 3
        logprob, ids, logprobs = alternatives(jnp.asarray(scores), jnp.array([1]), 3)
        assert ids.tolist() == [[2, 3, 1]]
        np.testing.assert_allclose(np.exp(logprobs), [[0.4, 0.3, 0.2]], rtol=1e-5)
        assert float(logprob[0]) == pytest.approx(math.log(0.2), abs=1e-5)

    @pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
    def test_out_of_range(self, name):
        with pytest.raises(UserError, match=name):
            RequestSampling(**{name: 2.5})
