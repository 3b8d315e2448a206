"""What the installed package must be able to do in any folder."""

from importlib.metadata import metadata

import jax.numpy as jnp

import mapo_jax

assert "site-packages" in mapo_jax.__file__, mapo_jax.__file__
assert mapo_jax.load_config("live").environment.family == "live"
assert {"tpu", "cuda", "serve", "dev"} <= set(metadata("mapo_jax").get_all("Provides-Extra"))
assert len(mapo_jax.load_scenarios()) > 90
assert callable(mapo_jax.train) and callable(mapo_jax.load)
rewards = jnp.array([[[1.0, -2.0, 0.5], [0.0, 1.0, 0.0]]])
valid = jnp.ones(rewards.shape, bool)
print(mapo_jax.advantages.mapo(rewards, valid, discount=0.85, turn_weight=1 / 3))
