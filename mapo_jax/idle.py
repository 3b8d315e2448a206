"""Settings that cannot act in a training run: refused, or named in one line."""

from mapo_jax.config import (
    ENGINE,
    HELD_OUT,
    ROLES,
    Config,
    differing_keys,
    is_played,
    played_roles,
)
from mapo_jax.errors import UserError

_SERVER_KEYS = ("url", "key_variable", "requests_per_minute", "tokens_per_minute")


def refuse_unused_roles(config: Config) -> None:
    """Checks, for a training run, that every role with settings is played by what they describe.

    Raises:
      UserError: names the role's key and the remedy.
    """
    played = played_roles(config.environment)
    for dotted in _changed(config):
        name = dotted.split(".")[1]
        if not dotted.startswith("environment.") or name not in (*ROLES, HELD_OUT) or name in played:
            continue
        if is_played(getattr(config.environment, name)):
            raise UserError(
                f"`{dotted}` is set, but in the scripted world only judges can be replaced; set "
                "environment.family=live, or remove it"
            )
        raise UserError(
            f"`{dotted}` is set, but that role has no model; set environment.{name}.model, or remove it"
        )


def idle_settings(config: Config) -> list[str]:
    """The changed settings that have no effect in a training run, each with the setting that it needs."""
    algorithm, environment = config.algorithm, config.environment
    estimator, live = algorithm.estimator, bool(played_roles(environment))
    scripted = environment.family == "scripted"
    needs = {  # key or section -> (whether it acts, what it needs)
        "algorithm.turn_weight": (estimator == "mapo", "algorithm.estimator=mapo"),
        "algorithm.batch_scope": (estimator in ("mapo", "batch"), "algorithm.estimator=mapo or batch"),
        "algorithm.leave_one_out": (estimator in ("mapo", "turn"), "algorithm.estimator=mapo or turn"),
        "algorithm.importance_cap": (algorithm.old_logprobs == "trainer", "algorithm.old_logprobs=trainer"),
        "algorithm.kl_estimator": (algorithm.kl_coefficient > 0, "algorithm.kl_coefficient above 0"),
        "lora": (config.lora.rank > 0, "lora.rank above 0"),
        "model.fresh": (config.model.path is None, "an empty model.path"),
        "warmstart": (config.model.path is None, "an empty model.path"),
        "warmstart.dialogues": (config.warmstart.data is None, "an empty warmstart.data"),
        "environment.fault_rate": (scripted and not is_played(environment.judge), "the scripted judge"),
        "environment.delayed_opening": (scripted, "environment.family=scripted"),
        **{
            f"environment.{key}": (live, "environment.family=live")
            for key in ("call_seconds", "step_seconds", "failure_share", "pause_minutes")
        },
    }
    for name in played_roles(environment):
        role = getattr(environment, name)
        if role.model is None:
            keys = set(type(role).model_fields) - {"implementation"}
            needs |= {f"environment.{name}.{key}": (False, f"environment.{name}.model") for key in keys}
        elif role.model.startswith(ENGINE):
            needs |= {f"environment.{name}.{key}": (False, "a model on a server") for key in _SERVER_KEYS}
    return [
        f"{dotted} (needs {needed})"
        for dotted in _changed(config)
        for key, (acts, needed) in needs.items()
        if not acts and f"{dotted}.".startswith(f"{key}.")
    ]


def _changed(config: Config) -> list[str]:
    return differing_keys(Config(), config)
