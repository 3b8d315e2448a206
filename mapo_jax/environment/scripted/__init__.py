"""The scripted world: offline, deterministic by seed, thousands of turns a second, no model."""

from mapo_jax.config import EnvironmentConfig
from mapo_jax.environment.roles import Roles
from mapo_jax.environment.scripted.director import ScriptedDirector
from mapo_jax.environment.scripted.judge import ScriptedJudge
from mapo_jax.environment.scripted.user import ScriptedUser


def scripted_roles(config: EnvironmentConfig) -> Roles:
    """User, judge and director of the scripted world."""
    opening = config.delayed_opening
    return Roles(ScriptedUser(opening), ScriptedJudge(opening, config.fault_rate), ScriptedDirector(opening))
