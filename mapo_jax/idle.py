"""Settings that cannot act in a training run, or in another command: refused, or named in one line."""

from collections.abc import Sequence

from rich.console import Console

from mapo_jax.commands import show
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
from mapo_jax.settings import fields, read_override

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


def idle_settings(config: Config, validation: int, processes: int = 1) -> list[str]:
    """The changed settings that have no effect in a training run, each with the setting that it needs.

    Args:
      validation: number of cards of an evaluation.
      processes: of the run.
    """
    algorithm, environment, rollout = config.algorithm, config.environment, config.rollout
    estimator, live = algorithm.estimator, bool(played_roles(environment))
    scripted, training = environment.family == "scripted", config.training
    makes_dialogues = config.model.path is None and config.warmstart.data is None  # the warm start does
    dialogues = rollout.scenarios * rollout.rollouts
    weight = {"mapo": algorithm.turn_weight, "turn": 1.0, "batch": 0.0}.get(estimator)
    turn_level, batch_level = weight not in (None, 0.0), weight not in (None, 1.0)
    corrected = algorithm.old_logprobs == "trainer"
    updates = training.epochs * rollout.scenarios > training.minibatch_scenarios  # more than one a step
    needs = {  # key or section -> (whether it acts, what it needs)
        "run.join_seconds": (processes > 1, "several processes"),
        "run.silent_seconds": (processes > 1, "several processes"),
        "rollout.slots": (
            rollout.slots is None or rollout.slots < dialogues,
            f"fewer than the {dialogues} dialogues of a step",
        ),
        "rollout.ahead": (training.steps > 1, "training.steps above 1"),
        "evaluation.scenarios": (
            config.evaluation.scenarios <= validation,
            f"more validation cards than the {validation} there are",
        ),
        "algorithm.turn_weight": (estimator == "mapo", "algorithm.estimator=mapo"),
        "algorithm.batch_scope": (batch_level, "algorithm.estimator=batch, or mapo with turn_weight below 1"),
        "algorithm.leave_one_out": (turn_level, "algorithm.estimator=turn, or mapo with turn_weight above 0"),
        "algorithm.discount": (
            turn_level or estimator == "reinforce_plus_plus",
            "an estimator of returns; here only the reported returns change, and the best checkpoint by them",
        ),
        **{
            f"algorithm.{key}": (updates or not corrected, "several updates a step, or old_logprobs=sampler")
            for key in ("clip_low", "clip_high", "dual_clip")
        },
        "algorithm.importance_cap": (corrected, "algorithm.old_logprobs=trainer"),
        "algorithm.kl_estimator": (algorithm.kl_coefficient > 0, "algorithm.kl_coefficient above 0"),
        "lora": (config.lora.rank > 0, "lora.rank above 0"),
        "model.fresh": (config.model.path is None, "an empty model.path"),
        "warmstart": (config.model.path is None, "an empty model.path"),
        "warmstart.dialogues": (config.warmstart.data is None, "an empty warmstart.data"),
        "environment.fault_rate": (scripted and not is_played(environment.judge), "the scripted judge"),
        "environment.delayed_opening": (scripted or makes_dialogues, "environment.family=scripted"),
        "environment.max_failed_share": (
            live or environment.fault_rate > 0,
            "calls that can fail (environment.family=live or environment.fault_rate)",
        ),
        **{
            f"environment.{key}": (live, "environment.family=live")
            for key in ("call_seconds", "step_seconds", "failure_share", "pause_minutes", "concurrency")
        },
    }
    for name in played_roles(environment):
        role = getattr(environment, name)
        if role.model is None:
            keys = set(type(role).model_fields) - {"implementation", "model"}
            needs |= {f"environment.{name}.{key}": (False, f"environment.{name}.model") for key in keys}
        elif role.model.startswith(ENGINE):
            needs |= {f"environment.{name}.{key}": (False, "a model on a server") for key in _SERVER_KEYS}
        estimated = name in ROLES and not scripted
        needs[f"environment.{name}.seconds"] = (estimated, "a role of training with environment.family=live")
        needs[f"environment.{name}.samples"] = (role.implementation is None, "our own judge")
    return [
        f"{dotted} (needs {needed})"
        for dotted in _changed(config)
        for key, (acts, needed) in needs.items()
        if not acts and f"{dotted}.".startswith(f"{key}.")
    ]


def _changed(config: Config) -> list[str]:
    return differing_keys(Config(), config)


# --- Other commands. ---

_MODEL = ("run.compilation_cache", "mesh.", "model.dtype", "rollout.history", "rollout.system_prompt")
_DIALOGUES = ("evaluation.temperature", "rollout.max_reply_tokens", "rollout.min_turns", "rollout.max_turns")
_TALK = (*_MODEL, *_DIALOGUES, "rollout.max_tokens")
_ENGINE = ("mesh.", "model.dtype")  # of roles
_ASKED = (*_ENGINE, "environment.judge.", "environment.concurrency", "environment.call_seconds")
# Keys, and sections with their dot, that a command reads, or a mode of it. The modes of a command are often
# called with the same settings: those that only another mode reads are named, all others are refused.
READS = {
    "load": (*_TALK, "environment."),
    "chat": (*_TALK, "environment."),
    "chat without --scenario": _TALK,
    "evaluate": (*_TALK, "evaluation.rollouts", "environment."),
    "evaluate empa": (*_TALK, "evaluation.rollouts", "environment."),
    "evaluate empa --endpoint": (*_ENGINE, *_DIALOGUES, "evaluation.rollouts", "environment."),
    "evaluate emobench": _MODEL,
    "evaluate eqbench": _MODEL,
    "evaluate emobench --endpoint": (),
    "evaluate eqbench --endpoint": (),
    "evaluate dialogues": (*_ENGINE, "environment."),
    "serve": (*_MODEL, "rollout.max_tokens", "rollout.max_reply_tokens", "environment.scenarios"),
    "serve without a run": (*_MODEL, "environment.scenarios"),
    "rate": _ASKED,
    "draft": _ASKED,
    "warmstart": (
        *("run.compilation_cache", "mesh.", "model.", "rollout.", "warmstart.", "training.seed"),
        *(
            f"environment.{key}"
            for key in ("scenarios", "fault_rate", "delayed_opening", "success_tolerance")
        ),
        *("algorithm.discount", "logging.progress"),
    ),
}


def unread(command: str, overrides: Sequence[str]) -> list[str]:
    """The keys of `key=value` overrides that a command does not read. Raises UserError for other forms."""
    keys = (key for override in overrides for key in read_override(Config, override))
    return [key for key in keys if key in fields(Config) and not key.startswith(READS[command])]


def show_unread(console: Console, mode: str, overrides: Sequence[str]) -> None:
    """Names the overrides that a mode of a command does not read, if there are any."""
    if keys := unread(mode, overrides):
        show(console, f"no effect in {mode}: {', '.join(keys)}")


def refuse_unread(command: str, overrides: Sequence[str]) -> None:
    """Raises UserError for an override that the command does not read."""
    if keys := unread(command, overrides):
        raise UserError(f"`{keys[0]}` has no effect in {command}; leave it out")
