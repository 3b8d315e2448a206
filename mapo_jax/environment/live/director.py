"""The director, played by a language model: one function call out of the seven."""

from __future__ import annotations

from mapo_jax.environment.card_schema import PERIODS
from mapo_jax.environment.dialogue import LEVEL_NAMES, Action, DialogueState, RoleFailure
from mapo_jax.environment.live.calls import Complete
from mapo_jax.environment.live.forms import DirectionForm, read
from mapo_jax.environment.live.prompts import Messages, chat, render
from mapo_jax.environment.live.user import revealed
from mapo_jax.environment.state import AXES

SCHEMA = DirectionForm.model_json_schema()
LONGEST_GUIDANCE = 800  # characters: two sentences, and room for a talkative model
_REMEMBERED_CALLS = 6


class LiveDirector:
    """Never ends a dialogue: success does that, before the director is asked."""

    def __init__(self, complete: Complete, max_turns: int) -> None:
        """Args: complete: the model that plays the director. max_turns: of a dialogue."""
        self._complete, self._max_turns = complete, max_turns

    async def act(self, state: DialogueState) -> Action:
        """One of dialogue.ACTIONS, with what it reveals added to its guidance."""
        text = await self._complete(
            director_messages(state, self._max_turns),
            seed=state.seed,
            schema=SCHEMA,
            check=lambda text: to_action(read(text, DirectionForm), state),
            repair=lambda problem: render(state.scenario.language, "json_repair", problem=problem),
        )
        return to_action(read(text, DirectionForm), state)


def director_messages(state: DialogueState, max_turns: int) -> Messages:
    """What the model that plays the director is asked."""
    card, last = state.scenario, state.turns[-1]
    actions = [turn.action for turn in state.turns if turn.action is not None]
    told, memories = revealed(actions)
    levels = () if last.judgement is None else zip(LEVEL_NAMES, last.judgement.levels, strict=True)
    return chat(
        render(card.language, "director_system", max_turns=max_turns),
        render(
            card.language,
            "director_turn",
            card=card,
            turns=state.turns,
            told=told,
            memories=memories,
            max_turns=max_turns,
            judgement=", ".join(f"{name} {level}" for name, level in levels),
            lacking=[round(max(0.0, -value)) for value in state.position],
            start=[round(-value) for value in card.start_position],
            calls=[a.kind for a in actions[-_REMEMBERED_CALLS:]],
        ),
    )


def to_action(form: DirectionForm, state: DialogueState) -> Action:
    """The call as an action; stages count from 1 for the model and from 0 in `Action.target`.

    Raises:
      RoleFailure: malformed; a call that is not available now, or whose target does not fit it.
    """
    card = state.scenario
    told, _ = revealed([turn.action for turn in state.turns if turn.action is not None])
    # In the user's prompt it is one line of its own, so that it cannot pass for another part of it.
    kind, target, guidance = form.function, form.target, " ".join(form.guidance.split())
    if len(guidance) > LONGEST_GUIDANCE:
        problem = f"guidance has {len(guidance)} characters; at most {LONGEST_GUIDANCE}"
        raise RoleFailure("malformed", problem)
    if not guidance and kind in ("shift_focus", "turning_point", "observe"):
        raise RoleFailure("malformed", f"{kind}: guidance is empty, and the actor hears nothing else")
    if kind == "reveal_stage":
        upcoming = max(told) + 1
        if upcoming >= len(card.story.stages):
            raise RoleFailure("malformed", "reveal_stage: every stage is told already")
        if target != str(upcoming + 1):
            raise RoleFailure("malformed", f"reveal_stage: the next stage is {upcoming + 1}, not {target}")
        return Action(kind, str(upcoming), _join(card.story.stages[upcoming].telling, guidance))
    if kind == "reveal_memory":
        if target not in PERIODS:
            raise RoleFailure("malformed", f"reveal_memory: target must be one of {', '.join(PERIODS)}")
        return Action(kind, target, _join(card.history[PERIODS.index(target)], guidance))
    if kind == "shift_focus":
        if target not in AXES:
            raise RoleFailure("malformed", "shift_focus: target must be C, A or P")
        return Action(kind, target, guidance)
    if target is not None:
        raise RoleFailure("malformed", f"{kind}: target must be null")
    if kind == "end":
        raise RoleFailure("malformed", "end: not available, the need is not met")
    return Action(kind, None, guidance)


def _join(*texts: str) -> str:
    return " ".join(text for text in texts if text)
