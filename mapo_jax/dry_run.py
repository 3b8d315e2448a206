"""The dry run (`python -m mapo_jax.train --dry-run`): the checks of a run, and a summary of it."""

from __future__ import annotations

import statistics
from functools import reduce

import yaml

from mapo_jax.config import Config, differing_keys, played_roles, updated
from mapo_jax.environment.live.cost import live_forecast, run_load
from mapo_jax.environment.scenario import Scenario
from mapo_jax.files import as_path
from mapo_jax.hub import cached, hub_id
from mapo_jax.idle import idle_settings, refuse_unused_roles
from mapo_jax.model.sharding import make_mesh
from mapo_jax.role_models import check_roles
from mapo_jax.rollout.completion import role_engines
from mapo_jax.run import cards, cards_of_run
from mapo_jax.running.display import duration
from mapo_jax.running.forecast import details, forecast, summary_rows
from mapo_jax.running.metrics import METRICS_FILE, import_wandb, read_rows
from mapo_jax.running.run_folder import (
    CONFIG_FILE,
    refuse_folder,
    refuse_lost_checkpoints,
    refuse_unwritable,
    whole_steps,
)
from mapo_jax.settings import merged, nested, value_at
from mapo_jax.warmstart import check_rows
from mapo_jax.warmstarting.chats import read_chats


def dry_run(config: Config, *, full: bool = False) -> str:
    """Checks what a run checks before its first step, and describes it. Sends no request and leaves no file.

    Args:
      full: also the whole configuration, shardings, memory by kind, and calls and cost by role.

    Raises:
      UserError: as the run.
    """
    refuse_unused_roles(config)
    if config.logging.wandb:
        import_wandb()
    training, validation = cards_of_run(config)
    played = played_roles(config.environment)
    check_roles(config, played)
    if config.model.path is None:
        check_rows(config.warmstart.rows, make_mesh(config.mesh))
        if config.warmstart.data is not None:
            read_chats(config.warmstart.data)
    folder = as_path(config.run.directory)
    refuse_folder(folder, config)
    refuse_unwritable(folder)
    continues = bool(whole_steps(folder))
    if (folder / CONFIG_FILE).exists() and not continues:
        refuse_lost_checkpoints(folder, config)
    absent = _absent_models(config, continues=continues)
    idle = idle_settings(config, len(validation))
    rows = {
        "cards": f"{len(training)} for training, {len(validation)} for validation, "
        f"{config.evaluation.rollouts} dialogues with each",
        "world": _world(config, played, training),
        "folder": _folder(config),
        **({"weights": f"not here; the run fetches them, or {', '.join(absent)}"} if absent else {}),
        **({"no effect": ", ".join(idle)} if idle else {}),
    }
    counted = updated(config, {"evaluation.scenarios": len(validation)})
    parts = [_differing(config), f"{forecast(counted)}\n{summary_rows(rows)}"]
    if full:
        parts.append(details(config))
        if played:
            parts.append(live_forecast(config, training, len(cards(config, "validation"))))
    else:
        parts.append("--full shows all settings, shardings, memory by kind, and calls by role")
    return "\n\n".join(parts)


def _differing(config: Config) -> str:
    """The settings that differ from the defaults, as YAML."""
    keys = differing_keys(Config(), config)
    if not keys:
        return "all settings have their defaults"
    tree = reduce(merged, (nested(key, value_at(config.model_dump(), key)) for key in keys))
    return f"settings that differ from the defaults\n{yaml.safe_dump(tree, sort_keys=False).rstrip()}"


def _world(config: Config, played: tuple[str, ...], training: list[Scenario]) -> str:
    if not played:
        return "scripted: no model, no cost"
    loads = run_load(config, training, len(cards(config, "validation")))
    players = []
    for name in played:
        role = getattr(config.environment, name)
        player = " ".join(filter(None, (role.implementation, role.model, role.url and f"at {role.url}")))
        cost = float(loads[name][1:] @ role.prices) / 1e6 if name in loads else 0.0
        price = f", {cost:,.2f} at its prices" if cost else ""
        players.append(f"{name} {player} ({loads[name][0]:,.0f} calls at most{price})")
    rest = "" if config.environment.family == "live" else "; the others scripted"
    return f"{'; '.join(players)}{rest}. No request was sent"


def _absent_models(config: Config, *, continues: bool) -> list[str]:
    """The commands that fetch the models which are not in Hugging Face's cache."""
    own = [config.model.path] if config.model.path and not continues else []
    names = dict.fromkeys((*own, *(engine.folder for engine in role_engines(config.environment))))
    return [hub_id(name).command for name in names if cached(name) is None]


def _folder(config: Config) -> str:
    folder = as_path(config.run.directory)
    steps = whole_steps(folder)
    if not steps:
        return f"{folder}: a new run"
    left = config.training.steps - steps[-1]
    if not left:
        return f"{folder}: this run is finished"
    seconds = [row["timing_s/step"] for row in read_rows(folder / METRICS_FILE) if "timing_s/step" in row]
    pace = f", about {duration(left * statistics.median(seconds))} at its pace" if seconds else ""
    return f"{folder}: continues after step {steps[-1]}, {left} steps left{pace}"
