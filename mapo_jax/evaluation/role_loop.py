"""The world as evaluations need it: roles, and what runs coroutines that call them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from mapo_jax.environment.roles import Roles


@dataclass(frozen=True)
class RoleLoop:
    """Roles whose calls belong to one event loop."""

    roles: Roles
    run: Callable[[Coroutine[Any, Any, Any], Callable[[], None]], Any]
    """Awaits a coroutine on that loop; the function is called now and then, and may raise to end it."""
