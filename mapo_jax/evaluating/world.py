"""The world that evaluations talk to: its roles, and what runs coroutines that call them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mapo_jax.config import Config
from mapo_jax.environment.dialogue import Roles
from mapo_jax.environment.scripted import scripted_roles


@dataclass(frozen=True)
class World:
    """Roles whose calls belong to one event loop."""

    family: str  # `environment.family`
    roles: Roles
    run: Callable[[Coroutine[Any, Any, Any]], Any]  # awaits a coroutine on that loop


@contextmanager
def open_world(config: Config) -> Iterator[World]:
    """The world that a configuration describes."""
    with asyncio.Runner() as runner:
        yield World(config.environment.family, scripted_roles(config.environment), runner.run)
