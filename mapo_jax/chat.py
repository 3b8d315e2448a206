"""Talks with a policy in the terminal, or watches the scripted user do it.

    python -m mapo_jax.chat --model FOLDER|ID|RUN [--scenario ID] [--user person|scripted]

With a scenario the judge scores every reply: its levels, the person's state and the energy are shown beside
the text. Ctrl-D ends the conversation.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mapo_jax.commands import command_parser, prepare_jax, printable, run_command, show
from mapo_jax.environment.dialogue import LEVEL_NAMES, Action, DialogueState
from mapo_jax.environment.roles import Roles, take_turn
from mapo_jax.environment.scenario import Scenario, find_scenario
from mapo_jax.environment.state import AXES, norm
from mapo_jax.errors import UserError
from mapo_jax.evaluation.conversations import ReasoningHidden, limits_of
from mapo_jax.evaluation.subject import TRUST, Subject, add_step, find_subject
from mapo_jax.files import encodable
from mapo_jax.idle import refuse_unread, show_unread
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.serving.text import ReplyText
from mapo_jax.world import World, open_judge, open_world


class RowFull(Exception):
    """No further reply fits the model's row."""


@dataclass
class Talker:
    """The policy in one conversation."""

    engine: Engine
    chat: ChatFormat
    seed: int
    turn: int = 0
    closing: tuple[int, ...] = ()  # what ends the last reply, if it was cut

    def reply(self, messages: Sequence[dict[str, str]], show: Callable[[str], None]) -> tuple[str, bool]:
        """The next reply and whether it was cut; `show` gets the text as it grows.

        Raises:
          RowFull: no room for a reply is left.
        """
        start = self.turn == 0 or self.chat.history == "per_turn"
        ids = (
            self.chat.prompt(messages)
            if start
            else self.closing + self.chat.next_user(messages[-1]["content"])
        )
        if len(ids) + (0 if start else len(self.engine.row(0))) >= self.engine.length - 1:
            raise RowFull
        self.engine.submit(Request(0, ids, key=(self.seed, 0, 0), turn=self.turn, start=start))
        text = ReplyText(self.chat.decode, self.chat.stop_ids, ())
        while not (finished := self.engine.advance()):
            if part := self.engine.sampled(0, len(text.ids)):
                text.add(part.ids, last=False)
                show(text.text)
        text.add(finished[0].ids[len(text.ids) :], last=True)
        show(text.text)
        self.turn += 1
        self.closing = () if finished[0].ids[-1] in self.chat.end_of_turn else self.chat.end_of_turn
        return self.chat.decode(finished[0].ids), finished[0].truncated


class _AtTheKeyboard:
    """User and director, where a person types: the message is read outside of the world."""

    async def reply(self, state: DialogueState) -> str:
        return "..."

    async def act(self, state: DialogueState) -> Action:
        return Action("continue")


def converse(
    console: Console,
    card: Scenario | None,
    world: World | None,
    subject: Subject,
    talker: Talker,
    scripted: bool,
) -> None:
    """Holds the conversation until the person, the rules or the row end it."""
    limits = limits_of(subject.config)
    messages: list[dict[str, str]] = []
    state = roles = None
    if card is not None:
        roles = world.evaluation_roles
        if not scripted:
            roles = Roles(_AtTheKeyboard(), roles.judge, _AtTheKeyboard())
            _show_card(console, card)
        opening = world.run(roles.user.open(card, talker.seed)) if scripted else ""
        state = DialogueState(card, talker.seed, (), opening)
    while state is None or state.outcome is None:
        if scripted:
            said = state.user
            line = Text("you> ", style="bold") + printable(said)
            console.print(line, soft_wrap=not console.is_terminal)
        elif not (said := _read(console)):
            return
        messages.append({"role": "user", "content": said})
        with Live(console=console, auto_refresh=False) as live:

            def present(text: str, beside: Text | None = None, live: Live = live) -> None:
                grid = Table.grid(padding=(0, 2), expand=True)
                grid.add_column(ratio=3)
                grid.add_column(ratio=1, min_width=22)
                grid.add_row(Text("model> ", style="bold") + printable(text), beside or Text())
                live.update(grid, refresh=True)

            try:
                reply, cut = talker.reply(messages, present)
            except RowFull:
                show(console, "the conversation is over: no further reply fits the model's row")
                return
            messages.append({"role": "assistant", "content": reply})
            if state is not None:
                state = replace(state, user=said)
                state = world.run(
                    take_turn(state, reply, ReasoningHidden(roles).roles, limits, truncated=cut)
                )
                present(reply, _beside(state))
        if not console.is_terminal:
            console.print()  # a live display ends its line only on a terminal
    show(console, f"the conversation is over: {state.outcome}" + (f" ({state.rule})" if state.rule else ""))


def _read(console: Console) -> str:
    """What the person types, U+FFFD for bytes of another encoding; empty at the end."""
    while True:
        try:
            said = encodable(console.input("[bold]you> [/bold]", markup=True).strip())
        except EOFError:
            console.print()
            return ""
        if said:
            return said


def _show_card(console: Console, card: Scenario) -> None:
    show(console, f"You are {card.person.name}, {card.person.age}: {card.topic}")
    show(console, f"{card.situation} You hope: {card.hope}", "dim")


def _beside(state: DialogueState) -> Text:
    """The judge's levels of the last turn, and where the person stands."""
    turn = state.turns[-1]
    lines = []
    if turn.judgement is None:
        lines.append(f"not judged: {turn.failure}")
    else:
        found = zip(LEVEL_NAMES, turn.judgement.levels, strict=True)
        lines += [f"{name} {level:+d}" for name, level in found if level] or ["no level but 0"]
    position = ", ".join(f"{axis} {value:g}" for axis, value in zip(AXES, state.position, strict=True))
    distance, energy, needed = norm(state.position), state.energy, norm(state.scenario.start_position)
    lines += [position, f"distance {distance:.1f}", f"energy {energy:.1f} of {needed:.1f}"]
    if turn.action is not None and turn.action.kind != "continue":
        lines.append(f"director: {turn.action.kind}")
    return Text("\n".join(map(printable, lines)), style="dim")


def run(options: argparse.Namespace, console: Console) -> None:
    """Loads the model, opens the world, talks."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what a person types may be of another encoding
    scripted = options.user == "scripted"
    if scripted and options.scenario is None:
        raise UserError("--user scripted plays a person on a card; name it with --scenario ID")
    if options.trust_run_world and options.scenario is None:
        raise UserError(f"{TRUST} has no effect without --scenario; leave it out")
    refuse_unread("chat", options.overrides)
    if options.scenario is None:
        show_unread(console, "chat without --scenario", options.overrides)
    subject = find_subject(options)
    config, card = subject.config, None
    if options.scenario is not None:
        environment = config.environment
        scripted_cards = environment.family == "scripted"
        card = find_scenario(options.scenario, environment.scenarios, scripted=scripted_cards)
    prepare_jax(config.run.compilation_cache)
    model = subject.load()
    positions = model.policy.config.max_position_embeddings
    length = min(config.rollout.max_tokens, positions)
    temperature = config.evaluation.temperature if options.temperature is None else options.temperature
    engine = model.engine(
        slots=1,
        length=length,
        max_reply_tokens=min(config.rollout.max_reply_tokens, length - 1),
        temperature=temperature,
    )
    talker = Talker(engine, model.policy.chat, options.seed % 2**32)
    with ExitStack() as stack:
        world = None
        if card is not None:
            opened = open_world if scripted else open_judge
            world = stack.enter_context(opened(config, None, model.mesh))
        converse(console, card, world, subject, talker, scripted)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser("chat", __doc__.split("\n\n")[0].replace("\n", " "))
    option = parser.add_argument
    option(
        "--model",
        required=True,
        metavar="FOLDER|ID|RUN",
        help="model folder or id, PEFT adapters, or a run",
    )
    add_step(option)
    option("--scenario", metavar="ID", help="of the card that the user plays (default: a free talk)")
    option(
        "--user",
        choices=("person", "scripted"),
        default="person",
        help="scripted: as in the configured world",
    )
    option("--temperature", type=float, metavar="T", help="of sampling; 0 is greedy")
    option("--seed", type=int, default=0, help="of sampling and of the scripted user (default: 0)")
    option("--config", metavar="FILE|NAME", help="configuration (default: a run's own, else the defaults)")
    option(
        TRUST, action="store_true", help="of a run with a live world: use the servers and classes it names"
    )
    option("overrides", nargs="*", metavar="key=value", help="such as rollout.max_reply_tokens=60")
    parser.set_defaults(endpoint=None, endpoint_model=None)
    options = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False, markup=False)
    return run_command(lambda: run(options, console))


if __name__ == "__main__":
    raise SystemExit(main())
