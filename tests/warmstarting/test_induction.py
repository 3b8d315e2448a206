import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mapo_jax.model.head import token_logprobs
from mapo_jax.model.qwen import QwenConfig, hidden_states, init_params
from mapo_jax.warmstarting.induction import with_induction_heads

CONFIG = QwenConfig(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    max_position_embeddings=128,
)


def test_an_untrained_model_continues_what_it_has_read():
    """Random rows said twice: the second time almost every token follows from the first, by copying alone."""
    half = 40
    tokens = np.tile(np.random.default_rng(0).integers(0, 300, (4, half)), (1, 2)).astype(np.int32)
    positions = np.tile(np.arange(2 * half, dtype=np.int32), (4, 1))

    @jax.jit
    def logprobs(params):
        hidden = hidden_states(params, CONFIG, tokens[:, :-1], positions[:, :-1])
        return token_logprobs(params, CONFIG, hidden, jnp.asarray(tokens[:, 1:]))[0]

    plain = init_params(CONFIG, 0)
    with_heads = np.asarray(logprobs(with_induction_heads(plain, CONFIG, 0)))
    without = np.asarray(logprobs(plain))
    # Chance is log(1/300) = -5.7. Half of the way to certainty leaves room for the choice of constants.
    assert with_heads[:, half:].mean() > -2.9
    assert with_heads[:, : half - 1].mean() < -5.0
    assert without[:, half:].mean() < -5.0


def test_the_given_weights_are_left_alone_and_the_seed_decides():
    plain = init_params(CONFIG, 0)
    before = np.asarray(plain["embed"]["embedding"]).copy()
    one, same, other = (with_induction_heads(plain, CONFIG, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(plain["embed"]["embedding"], before)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one["layers"]["attention"]["v"]["kernel"] != other["layers"]["attention"]["v"]["kernel"]).any()
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) for params in (one, plain)]
    assert shapes[0] == shapes[1]


def test_an_architecture_without_room_keeps_its_weights():
    qwen2 = {"family": "qwen2", "qk_norm": False, "qkv_bias": True}
    for change in ({"num_layers": 1}, {"hidden_size": 16}, qwen2, {"tie_word_embeddings": False}):
        config = dataclasses.replace(CONFIG, **change)
        params = {"embed": {"embedding": np.zeros(1)}}  # never looked at
        assert with_induction_heads(params, config, 0) is params
