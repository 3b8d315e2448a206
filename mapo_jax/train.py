"""The training loop of MAPO: hold dialogues, assign credit to every turn, update the weights.

    python -m mapo_jax.train [--config configs/NAME.yaml] [key=value ...] [--dry-run]

The loop in `train` is the method. Each stage is one call; S scenarios, R rollouts of each, T turns:

    dialogues   [S][R]        the policy talks with a simulated user, a judge scores every turn
    rewards     [S, R, T]     decrease of the empathetic distance (algorithm/rewards.py)
    returns     [S, R, T]     Monte Carlo, one discount per turn (algorithm/returns.py)
    advantages  [S, R, T]     turn level and batch level, mixed (algorithm/advantages.py)
    rows        [B, L]        tokens, loss mask, log-probabilities, the advantage of each token's turn
    update                    clipped policy gradient (algorithm/objective.py, learning/update.py)

The same command started again continues the run from its newest whole checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import ModuleType

from rich.console import Console

from mapo_jax import stages
from mapo_jax.commands import command_parser, prepare_jax, run_command, show
from mapo_jax.config import Config, describe_keys, load_config
from mapo_jax.dry_run import dry_run
from mapo_jax.errors import UserError
from mapo_jax.learning.batch import minibatches
from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
from mapo_jax.learning.update import place
from mapo_jax.run import Position, begin, checkpoint_due, evaluation_due, open_run, save, scenario_deck
from mapo_jax.running.stop import Interrupted
from mapo_jax.settings import parse_settings
from mapo_jax.validation import conclude, validate


def train(config: Config, console: Console | None = None, *, verbose: bool = False) -> None:
    """Starts or continues the run of `config`; it writes below `run.directory` only.

    Raises:
      UserError: bad input, a failing disk or device, or an update that is not finite. Saved files stay whole.
      Stopped: a stop request; the last finished step is saved.
    """
    if not isinstance(config, Config):
        raise UserError(f"train takes a configuration, not {config!r}; mapo_jax.load_config reads one")
    prepare_jax(config.run.compilation_cache)
    algorithm, training = config.algorithm, config.training
    with open_run(config, console, verbose=verbose) as run:
        deck = scenario_deck(config)
        at = begin(run, deck)
        try:
            if at.step < training.steps:
                stages.warm_up(run, at)
            if evaluation_due(config, at.step):
                validate(run, at)
            while at.step < training.steps:
                started = time.monotonic()
                with run.phases("rollout"):
                    dialogues, metrics = stages.hold_dialogues(run, at, deck)

                with run.phases("update"):
                    cells = stages.lay_out_cells(run, dialogues)
                    valid, scored = cells.valid, cells.scored
                    rewards = turn_rewards(cells.positions, scored, algorithm=algorithm)
                    returns = turn_returns(rewards, valid, scored, algorithm=algorithm)
                    advantages = turn_advantages(rewards, returns, valid, scored, algorithm=algorithm)

                    rows = stages.lay_out_rows(run, dialogues, advantages, scored)
                    stages.save_before_compiling(run, at, rows)
                    rows = stages.rescore(run, at.state, rows)
                    state, updates = at.state, []
                    for minibatch in minibatches(
                        rows,
                        seed=training.seed,
                        step=at.step,
                        epochs=training.epochs,
                        scenarios=config.rollout.scenarios,
                        minibatch_scenarios=training.minibatch_scenarios,
                    ):
                        state, update = run.update(state, place(minibatch, run.mesh))
                        updates.append(update)
                    metrics |= stages.finish_update(run, at, updates, advantages, scored)

                at = Position(at.step + 1, state, deck.get_state())
                stages.record(run, at, dialogues, metrics, started)
                if checkpoint_due(config, at.step):
                    save(run, at)
                run.processes.together("the end of a step", run.stop.check)
                if evaluation_due(config, at.step):
                    validate(run, at)
        except Interrupted as interruption:
            run.leave(interruption, at)
        conclude(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (see commands.run_command)."""
    parser = command_parser(
        "train",
        "Trains a dialogue policy with MAPO or one of its baselines. Without arguments: a tiny "
        "model in the scripted world, on the CPU, in minutes. The same command continues an unfinished run.",
    )
    parser.add_argument("--config", metavar="FILE|NAME", help="YAML file, or one of configs/ by name")
    parser.add_argument("--keys", action="store_true", help="print all keys with their meaning, and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print what a run would be, and exit"
    )
    parser.add_argument("--full", action="store_true", help="with --dry-run: all settings and tables")
    parser.add_argument("--verbose", action="store_true", help="more figures, and a table at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=20")
    options = parse_settings(Config, parser, arguments)
    if options.full and not options.dry_run:
        parser.error("--full belongs to --dry-run; add it, or leave --full out")
    if options.verbose and options.dry_run:
        parser.error("--verbose has no effect with --dry-run; --full prints all tables")
    if options.keys and (options.config or options.overrides or options.dry_run or options.verbose):
        parser.error("--keys prints all keys and does nothing else; leave the rest out")

    def command() -> None:
        if options.keys:
            print(describe_keys())
            return
        config = load_config(options.config, options.overrides)
        if not options.dry_run:
            train(config, verbose=options.verbose)
            return
        show(Console(), dry_run(config, full=options.full))

    return run_command(command)


class _Callable(ModuleType):
    """Makes `mapo_jax.train(config)` a call of `train`, while `mapo_jax.train` stays this module."""

    def __call__(self, config: Config, console: Console | None = None, *, verbose: bool = False) -> None:
        train(config, console, verbose=verbose)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    raise SystemExit(main())
