"""MAPO in JAX: reinforcement learning of long, multi-turn dialogue.

The public names are below; docs/python.md describes them. They are imported when they are first used, so that
`import mapo_jax` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapo_jax.startup import begin as _begin

if TYPE_CHECKING:
    from mapo_jax import train
    from mapo_jax.algorithm import advantages
    from mapo_jax.api import Model, load
    from mapo_jax.commands import Stopped
    from mapo_jax.config import Config, load_config
    from mapo_jax.environment.scenario import load_scenarios
    from mapo_jax.errors import UserError

__version__ = "0.2.0"
__all__ = [
    "Config",
    "Model",
    "Stopped",
    "UserError",
    "advantages",
    "load",
    "load_config",
    "load_scenarios",
    "train",
]
_HOMES = {
    "Config": "config",
    "Model": "api",
    "Stopped": "commands",
    "UserError": "errors",
    "load": "api",
    "load_config": "config",
    "load_scenarios": "environment.scenario",
}
_MODULES = {"advantages": "algorithm.advantages", "train": "train"}

_begin()  # in a process of a command


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mapo_jax.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(import_module(f"mapo_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mapo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
