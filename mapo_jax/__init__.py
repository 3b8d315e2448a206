"""MAPO in JAX: reinforcement learning of long, multi-turn dialogue."""

__version__ = "0.2.0"
