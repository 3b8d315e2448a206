"""A model on our own engine: loaded from a Hugging Face folder or a run; answers prompts in batches."""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from mapo_jax.commands import show
from mapo_jax.config import Config, updated
from mapo_jax.evaluation.answers import Answer, Prompt
from mapo_jax.model.qwen import Params
from mapo_jax.model.sharding import make_mesh
from mapo_jax.rollout.collect import derive_seed
from mapo_jax.rollout.engine import Engine
from mapo_jax.rollout.requests import Request
from mapo_jax.rollout.sampling import Sampling
from mapo_jax.running.policy import Policy, load_policy

SLOTS = 32  # prompts at once
CHUNK = 128  # tokens of a prefill program; prompts are longer than the turns of a dialogue
LENGTH_STEP = 64  # cache lengths are multiples of it, so that other prompts reuse compiled programs


@dataclass(frozen=True)
class LocalModel:
    """A policy with its weights on the devices."""

    policy: Policy
    params: Params
    mesh: Mesh
    dtype: str

    def engine(self, *, slots: int, length: int, max_reply_tokens: int, temperature: float) -> Engine:
        """A sampler with these weights. Rows may be longer than the model's trained positions."""
        config = self.policy.config
        if length > config.max_position_embeddings:
            config = replace(config, max_position_embeddings=length)
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        engine = Engine(
            config,
            slots=-(-slots // devices) * devices,
            length=length,
            max_reply_tokens=max_reply_tokens,
            stop_ids=self.policy.chat.stop_ids,
            vocabulary_size=self.policy.chat.vocabulary_size,
            sampling=Sampling(temperature=temperature),
            dtype=self.dtype,
            mesh=self.mesh,
            chunk=CHUNK,
        )
        engine.load(self.params, 0)
        return engine


def load_model(path: Path | str, config: Config, *, step: int | None = None) -> LocalModel:
    """Loads a Hugging Face folder, or a run's checkpoint.

    Args:
      config: uses `mesh`, `model.dtype`, `rollout.history` and `rollout.system_prompt`.
      step: checkpoint of a run; the latest by default.

    Raises:
      UserError: neither kind of folder, or one that cannot be read.
    """
    mesh = make_mesh(config.mesh)
    # Lengths are checked later, when the prompts or dialogues are known.
    rollout = updated(config.rollout, {"max_reply_tokens": 1, "max_tokens": 2})
    policy, params = load_policy(path, rollout, mesh=mesh, step=step)
    policy.tokenizer.model_max_length = sys.maxsize  # else it warns about every long prompt
    return LocalModel(policy, params, mesh, config.model.dtype)


@dataclass(frozen=True)
class EngineAnswerer:
    """Answers prompts with the engine, the longest first."""

    model: LocalModel
    temperature: float
    max_tokens: int  # of an answer
    seed: int
    console: Console
    slots: int = SLOTS

    def answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        """See `Answerer`. A sample depends on the seed and the prompt alone, not on the other prompts."""
        chat = self.model.policy.chat
        rows = [(chat.prompt(prompt.messages), prompt) for prompt in prompts]
        # Longest first: the cache has its final length at once, and programs are compiled only for that.
        rows.sort(key=lambda row: (-len(row[0]), row[1].id))
        longest = len(rows[0][0]) + self.max_tokens
        positions = self.model.policy.config.max_position_embeddings
        too_long = sum(len(ids) + self.max_tokens > positions for ids, _ in rows)
        if too_long:
            show(
                self.console,
                f"note: {too_long} of {len(rows)} prompts may exceed the {positions} positions that the "
                "model was made for; they are answered all the same",
            )
        sampling = {"max_reply_tokens": self.max_tokens, "temperature": self.temperature}
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        engine = self.model.engine(slots=min(self.slots, len(rows)), length=length, **sampling)
        waiting, free = iter(rows), list(range(engine.slots))
        running: dict[int, Prompt] = {}  # by slot
        while True:
            for ids, prompt in itertools.islice(waiting, len(free)):
                slot = free.pop()
                running[slot] = prompt
                key = (self.seed % 2**32, 0, derive_seed(prompt.id))
                engine.submit(Request(slot, ids, key=key, turn=0, start=True))
            if not running:
                return
            for slot, reply in engine.advance().items():
                save(running.pop(slot), Answer(chat.decode(reply.ids), reply.truncated))
                free.append(slot)
