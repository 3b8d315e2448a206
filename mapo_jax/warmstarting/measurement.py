"""The figures of a warm start with the validation cards, and the gate before reinforcement learning."""

from collections.abc import Mapping

from jax.sharding import Mesh
from rich.table import Table

from mapo_jax.config import Config
from mapo_jax.environment.roles import limits_of
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.environment.scripted.grammar import HELPFUL, KINDS
from mapo_jax.environment.scripted.readings import NAMED, reading_metrics, readings
from mapo_jax.errors import UserError
from mapo_jax.event_loop import open_runner
from mapo_jax.model.qwen import Params
from mapo_jax.rollout.collect import collect
from mapo_jax.running.policy import Policy, make_engine
from mapo_jax.running.stop import Check
from mapo_jax.scores.figures import summarize

MEASURE_STREAM = 2_000_003  # added to the seed: no dialogue is also one of training or evaluation


def measure(
    config: Config, policy: Policy, params: Params, mesh: Mesh, check: Check = lambda: None
) -> dict[str, float]:
    """Holds dialogues with the validation cards and returns their figures.

    It holds twice as many dialogues as a training step, with the sampler of training: enough turns for the
    rarest kinds of reply to occur.

    Returns:
      The figures of `summarize` and `reading_metrics`, `truncated` (share of replies cut by the token limit),
      and for every kind `act/KIND`, the share of replies with an act of this kind.
    """
    rollout = config.rollout
    count = 2 * rollout.scenarios * rollout.rollouts
    cards = load_scenarios(config.environment.scenarios, "validation")[:count]
    model = policy.config, policy.chat.stop_ids, policy.chat.vocabulary_size
    engine = make_engine(*model, rollout, rollout.temperature, dtype=config.model.dtype, mesh=mesh)
    engine.load(params, 0)
    with open_runner() as runner:
        groups = runner.run(
            collect(
                cards,
                count // len(cards),
                engine,
                policy.chat,
                scripted_roles(config.environment),
                limits_of(config),
                seed=config.training.seed + MEASURE_STREAM,
                step=0,
                concurrency=config.environment.concurrency,
                on_turn=lambda *_: check(),
            )
        )
    states = [dialogue.state for group in groups for dialogue in group]
    turns = [turn for state in states for turn in state.turns]
    acts = [set(reading["acts"]) for reading in readings(states)]
    return {
        **summarize(states, config.algorithm.discount),
        **reading_metrics(states),
        "truncated": sum(turn.truncated for turn in turns) / len(turns),
        **{f"act/{kind}": sum(kind in reply for reply in acts) / max(1, len(acts)) for kind in KINDS},
    }


def measurement_table(measured: Mapping[str, float]) -> Table:
    """The figures to look at before reinforcement learning starts."""
    table = Table(title="the warm start with the validation cards", title_justify="left")
    for heading, justify in (("", "left"), ("", "right"), ("chance", "right")):
        table.add_column(heading, justify=justify)

    def row(label: str, name: str, form: str) -> None:
        if name in measured:
            chance = measured.get(f"{name}_chance")
            table.add_row(label, form.format(measured[name]), "" if chance is None else form.format(chance))

    row("reward per turn (mean IDR)", "reward/mean", "{:+.2f}")
    row("return of a dialogue", "return/mean", "{:+.2f}")
    row("EPM-Q", "epm_q", "{:.1f}")
    for what in NAMED:
        row(f"{what} named right", f"naming/{what}", "{:.0%}")
    row("replies cut by the token limit", "truncated", "{:.0%}")
    table.add_section()
    for name in sorted(name for name in measured if name.startswith("kind/") and measured[name]):
        label = "largest share of one kind" if name == "kind/most" else f"share of {name[5:]}"
        row(label, name, "{:.0%}")
    return table


def gate(measured: Mapping[str, float], min_naming_ratio: float) -> None:
    """Refuses a policy with which reinforcement learning would collapse to replies that name nothing.

    Situation and feeling must be named correctly `min_naming_ratio` times as often as by chance, and every
    kind of reply that helps must occur: what is never sampled is never reinforced. A ratio of 0 disables the
    check.

    Raises:
      UserError: the policy is too weak; names the figure and the remedy.
    """
    if min_naming_ratio == 0:
        return
    remedy = "raise warmstart.steps or warmstart.dialogues, or lower warmstart.min_naming_ratio (0: no check)"
    for what in ("situation", "feeling"):
        accuracy = measured.get(f"naming/{what}")
        if accuracy is None:
            raise UserError(f"the warm start is too weak: it never names the user's {what}; {remedy}")
        needed = min(1.0, min_naming_ratio * measured[f"naming/{what}_chance"])
        if accuracy < needed:
            raise UserError(
                f"the warm start is too weak: it names the user's {what} right {accuracy:.0%} of the time, "
                f"where {needed:.0%} ({min_naming_ratio:g} times chance) are needed; {remedy}"
            )
    missing = ", ".join(kind for kind in (*HELPFUL, "repair") if not measured.get(f"act/{kind}"))
    if missing:
        raise UserError(
            f"the warm start is too narrow: no reply of the kind {missing} was measured; {remedy}"
        )
