"""The director, played by a language model: one of seven function calls."""

from dataclasses import dataclass

from mapo_jax.environment.card_schema import PERIODS
from mapo_jax.environment.dialogue import LEVEL_NAMES, Action, DialogueState, RoleFailure
from mapo_jax.environment.live.calls import Complete, ask
from mapo_jax.environment.live.forms import DirectionForm, read
from mapo_jax.environment.live.prompts import Messages, chat, render
from mapo_jax.environment.live.user import revealed
from mapo_jax.environment.state import AXES

SCHEMA = DirectionForm.model_json_schema()
LONGEST_GUIDANCE = 800  # characters; the prompt asks for two sentences
_REMEMBERED_CALLS = 6


@dataclass(frozen=True)
class LiveDirector:
    """Never ends a dialogue: success does that before the director is called."""

    complete: Complete
    max_turns: int  # of a dialogue

    async def act(self, state: DialogueState) -> Action:
        """One of dialogue.ACTIONS; its guidance includes what it reveals."""

        def parse(text: str) -> Action:
            replies = "\n".join(turn.reply for turn in state.turns)
            return to_action(read(text, DirectionForm, quoted=replies), state)

        messages = director_messages(state, self.max_turns)
        return await ask(self.complete, state.scenario, messages, parse, seed=state.seed, schema=SCHEMA)


def director_messages(state: DialogueState, max_turns: int) -> Messages:
    """The prompt of the model that plays the director."""
    card, last = state.scenario, state.turns[-1]
    actions = [turn.action for turn in state.turns if turn.action is not None]
    revealed_stages, memories = revealed(actions)
    levels = () if last.judgement is None else zip(LEVEL_NAMES, last.judgement.levels, strict=True)
    return chat(
        render(card.language, "director_system", max_turns=max_turns),
        render(
            card.language,
            "director_turn",
            card=card,
            turns=state.turns,
            told=revealed_stages,
            memories=memories,
            max_turns=max_turns,
            judgement=", ".join(f"{name} {level}" for name, level in levels),
            lacking=[round(max(0.0, -value)) for value in state.position],
            start=[round(-value) for value in card.start_position],
            calls=[a.kind for a in actions[-_REMEMBERED_CALLS:]],
        ),
    )


def to_action(form: DirectionForm, state: DialogueState) -> Action:
    """The function call as an action; stages count from 1 for the model, from 0 in `Action.target`.

    Raises:
      RoleFailure: malformed; a call that is not available now, or that has a wrong target.
    """
    card = state.scenario
    revealed_stages, _ = revealed([turn.action for turn in state.turns if turn.action is not None])
    # Guidance is a single line in the user's prompt, so it cannot imitate another part of the prompt.
    kind, target, guidance = form.function, form.target, " ".join(form.guidance.split())

    def malformed(problem: str) -> RoleFailure:
        return RoleFailure("malformed", problem)

    if len(guidance) > LONGEST_GUIDANCE:
        raise malformed(f"guidance has {len(guidance)} characters; at most {LONGEST_GUIDANCE}")
    if not guidance and kind in ("shift_focus", "turning_point", "observe"):
        raise malformed(f"{kind}: guidance is empty, and the actor hears nothing else")
    if kind == "reveal_stage":
        upcoming = max(revealed_stages) + 1
        if upcoming >= len(card.story.stages):
            raise malformed("reveal_stage: every stage is told already")
        if target != str(upcoming + 1):
            raise malformed(f"reveal_stage: the next stage is {upcoming + 1}, not {target}")
        return Action(kind, str(upcoming), _join(card.story.stages[upcoming].telling, guidance))
    if kind == "reveal_memory":
        if target not in PERIODS:
            raise malformed(f"reveal_memory: target must be one of {', '.join(PERIODS)}")
        return Action(kind, target, _join(card.history[PERIODS.index(target)], guidance))
    if kind == "shift_focus":
        if target not in AXES:
            raise malformed("shift_focus: target must be C, A or P")
        return Action(kind, target, guidance)
    if target is not None:
        raise malformed(f"{kind}: target must be null")
    if kind == "end":
        raise malformed("end: not available, the need is not met")
    return Action(kind, None, guidance)


def _join(*texts: str) -> str:
    return " ".join(text for text in texts if text)
