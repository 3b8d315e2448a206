"""A trained policy in Python: `mapo_jax.load`.

    model = mapo_jax.load("runs/tiny")                                # a run, a folder, or a Hugging Face id
    model.chat([{"role": "user", "content": "I could not sleep."}])   # its reply
    model.dialogue("career-white-hat").messages                       # a dialogue with the simulated user
    model.score(messages)                                             # log-probabilities of the replies

It also works in a notebook, where an event loop is running.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mapo_jax.commands import prepare_jax
from mapo_jax.config import Config
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.roles import limits_of
from mapo_jax.environment.scenario import Scenario, find_scenario
from mapo_jax.errors import UserError
from mapo_jax.evaluation.conversations import ReasoningHidden
from mapo_jax.evaluation.local import LENGTH_STEP, LocalModel
from mapo_jax.evaluation.subject import find_subject
from mapo_jax.idle import refuse_unread
from mapo_jax.learning.update import Scoring, SupervisedBatch, make_scorer, place
from mapo_jax.model.sharding import row_shards
from mapo_jax.rollout.collect import collect
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.warmstarting.chats import parse_chat
from mapo_jax.warmstarting.packing import Renderer
from mapo_jax.world import open_world

Messages = Sequence[Mapping[str, Any]]

# Of a model that is no run, as far as its positions allow.
_SIZES = ("rollout.max_tokens=4096", "rollout.max_reply_tokens=512")


def load(
    path: str | Path,
    *,
    step: int | str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Model:
    """Loads a policy onto the devices.

    Args:
      path: a run's folder, a Hugging Face folder or id (`org/name`, `org/name@revision`), or PEFT adapters.
      step: which checkpoint of a run, or "best", by its validation; the newest by default.
      config: a YAML file, or the name of one in `configs/`; by default the run's own, except for the servers
        and classes of a live world, which another person may have written.
      overrides: settings such as `rollout.max_reply_tokens=60`.

    Raises:
      UserError: no such model or step, or a bad setting.
    """
    refuse_unread("load", overrides)
    options = Namespace(
        model=str(path),
        step=step,
        config=config,
        overrides=list(overrides),
        endpoint=None,
        trust_run_world=False,
    )
    subject = find_subject(options, _SIZES)
    prepare_jax(subject.config.run.compilation_cache)
    return Model(subject.config, subject.load(), subject.unused_world)


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError('messages must be a list, such as [{"role": "user", "content": "Hello."}]')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"message {number} must be a mapping with `role` and `content`")
        if not isinstance(message.get("content"), str | list):
            raise UserError(f"message {number} has no text as `content`")


@dataclass(frozen=True)
class Model:
    """A policy on the devices; made by `load`.

    Attributes:
      config: settings of sampling and of the world.
    """

    config: Config
    _local: LocalModel = field(repr=False)
    _unused_world: str | None = field(default=None, repr=False)
    _engines: dict[tuple[float, int], Engine] = field(default_factory=dict, repr=False)  # the last one used

    def chat(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> str:
        """The reply to a conversation; the same seed gives the same one.

        Args:
          messages: `role` and `content` of each, the user's last.
          max_tokens: of the reply, as far as the row has room; by default `rollout.max_reply_tokens`.
          temperature: by default `evaluation.temperature`; 0 takes the most probable tokens.
          seed: of sampling.

        Raises:
          UserError: no messages, no room for a reply, or the last message is not the user's.
        """
        _check_messages(messages)
        if not messages or messages[-1]["role"] != "user":
            raise UserError("the last message must be the user's; add it, or leave the reply out")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"`max_tokens` is {max_tokens}; it must be at least 1")
        chat = self._local.policy.chat
        turn = sum(message["role"] == "assistant" for message in messages)
        request = Request(0, chat.prompt(messages), key=(seed % 2**32, 0, 0), turn=turn, start=True)
        (reply,) = self._engine(temperature, max_tokens).reply([request])
        return chat.decode(reply.ids)

    def dialogue(
        self, card: str | Scenario, *, temperature: float | None = None, seed: int = 0
    ) -> DialogueState:
        """A whole dialogue with the user, the judge and the director of the configured world.

        Args:
          card: a scenario card, or the id of one.
          temperature: by default `evaluation.temperature`.
          seed: of sampling and of the user.

        Returns:
          The dialogue: `messages`, `turns` with their judgements, `positions` (C, A, P) from the start on,
          `outcome`.

        Raises:
          UserError: no such card, or a world that cannot be opened.
        """
        if not isinstance(card, str | Scenario):
            raise UserError(f"the card must be a scenario or the id of one, not {card!r}")
        config, environment = self.config, self.config.environment
        if self._unused_world is not None:
            raise UserError(
                f"the run's world is live ({self._unused_world}), which is not used unless named; "
                "`load` with config='RUN/config.yaml', or with config='tiny' for the scripted world"
            )
        if isinstance(card, str):
            card = find_scenario(card, environment.scenarios, scripted=environment.family == "scripted")
        engine = self._engine(temperature, None)
        with open_world(config, None, self._local.mesh) as world:
            holding = collect(
                [card],
                1,
                engine,
                self._local.policy.chat,
                ReasoningHidden(world.evaluation_roles).roles,
                limits_of(config),
                seed=seed,
                step=0,
                concurrency=environment.concurrency,
            )
            [[dialogue]] = world.run(holding)
        return dialogue.state

    def score(self, messages: Messages) -> list[Float[np.ndarray, " tokens"]]:
        """Log-probabilities of the replies' tokens, in nats, at temperature 1.

        Args:
          messages: perhaps a system message, then user and assistant by turns, rendered as in training.

        Returns:
          An array for each reply, with an entry for each of its tokens and one for its end.

        Raises:
          UserError: messages in another order, without a reply, or too long for the model.
        """
        _check_messages(messages)
        chat, _ = parse_chat({"messages": list(messages)}, "the chat")
        policy, rollout = self._local.policy, self.config.rollout
        renderer = Renderer(policy.tokenizer, rollout.history, rollout.system_prompt)
        rows = renderer.pieces(chat, sys.maxsize)
        longest, most = max(map(len, rows)), policy.config.max_position_embeddings
        if longest > most:
            raise UserError(f"the chat has {longest} tokens, and the model {most} positions; shorten it")
        shards = row_shards(self._local.mesh)
        shape = (-(-len(rows) // shards) * shards, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        tokens, turns = np.zeros(shape, np.int32), np.full(shape, -1)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row.ids
            turns[i, : len(row)] = np.where(row.sampled, row.turn, -1)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = SupervisedBatch(tokens, positions, np.zeros(shape, np.int32), turns >= 0)
        logprobs = np.asarray(self._scorer(self._local.params, place(batch, self._local.mesh)))
        return [logprobs[turns == turn] for turn in range(turns.max() + 1)]

    @cached_property
    def _scorer(self) -> Callable[..., Any]:
        policy = self._local.policy
        return make_scorer(
            Scoring(
                policy.config,
                vocabulary_size=policy.chat.vocabulary_size,
                dtype=self._local.dtype,
                mesh=self._local.mesh,
            )
        )

    def _engine(self, temperature: float | None, reply_tokens: int | None) -> Engine:
        rollout = self.config.rollout
        length = min(rollout.max_tokens, self._local.policy.config.max_position_embeddings)
        wanted = rollout.max_reply_tokens if reply_tokens is None else reply_tokens
        reply_tokens = min(wanted, length - 1)
        temperature = self.config.evaluation.temperature if temperature is None else temperature
        key = (temperature, reply_tokens)
        if key not in self._engines:
            engine = self._local.engine(
                slots=1, length=length, max_reply_tokens=reply_tokens, temperature=temperature
            )
            self._engines.clear()
            self._engines[key] = engine
        return self._engines[key]
