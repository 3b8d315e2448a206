"""The scripted judge: parses the reply with the grammar and scores it against what the user has said."""

import random
from dataclasses import dataclass

from mapo_jax.environment.dialogue import FAILURE_KINDS, DialogueState, Judgement, RoleFailure
from mapo_jax.environment.scripted.fold import assess_reply


@dataclass(frozen=True)
class ScriptedJudge:
    """Pure given the state, its seed and the reply."""

    delayed_opening: bool = True
    fault_rate: float = 0.0  # share of calls that fail

    async def score(self, state: DialogueState, reply: str) -> Judgement:
        """The judgement, or a failure at the configured rate, drawn with the dialogue's seed.

        Raises:
          RoleFailure: an injected fault.
        """
        if self.fault_rate > 0:
            rng = random.Random(f"{state.seed}:{state.turn_count}:{reply}:fault")
            if rng.random() < self.fault_rate:
                raise RoleFailure(rng.choice(FAILURE_KINDS), "injected")
        return assess_reply(state, reply, self.delayed_opening).judgement
