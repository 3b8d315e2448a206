"""What the engine is asked for and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from mapo_jax.rollout.sampling import RequestSampling


class StaleSlot(RuntimeError):
    """A dialogue was continued whose cache is gone: newer weights were loaded, or the slot was reset."""


@dataclass(frozen=True)
class Request:
    """The next reply of one dialogue."""

    slot: int
    ids: Sequence[int]  # the row's tokens since the last sampled one; all of them if `start`
    key: tuple[int, int, int]  # (seed, step, dialogue), each below 2^32
    turn: int
    limit: int | None = None  # most tokens of this reply; None: the engine's `max_reply_tokens`
    start: bool = False  # begin a new row in this slot
    sampling: RequestSampling | None = None  # only for an engine made with `per_request`; None: its defaults
    alternatives: bool = False  # the same: report `Reply.alternatives`


class Alternatives(NamedTuple):
    """A token's place in the model's own distribution: at temperature 1, unfiltered, without penalties."""

    logprob: float  # of the sampled token
    ids: tuple[int, ...]  # the most probable tokens, the most probable first
    logprobs: tuple[float, ...]


class Reply(NamedTuple):
    """A sampled reply, or a part of one."""

    ids: tuple[int, ...]  # a stop id ends it, unless it was cut
    logprobs: tuple[float, ...]  # in the distribution sampled from; float32 values
    truncated: bool  # cut by its limit or by the end of the cache
    alternatives: tuple[Alternatives, ...] = ()  # of each token, if requested

    def part(self, start: int) -> Reply:
        """The reply from its token `start` on."""
        return Reply(self.ids[start:], self.logprobs[start:], self.truncated, self.alternatives[start:])


@dataclass
class Counts:
    """Work done since the engine was made."""

    prefilled: int = 0  # tokens computed by `prefill`
    copied: int = 0  # tokens copied from another slot, or kept from the slot's earlier row
    sampled: int = 0  # tokens sampled
    steps: int = 0  # decode steps, each over all lanes
    seconds: float = 0.0  # in `advance`, the device's work included
    parked: int = 0  # caches moved to the host's memory

    def since(self, before: Counts) -> Counts:
        """The work done after `before` was copied."""
        return Counts(**{name: value - getattr(before, name) for name, value in asdict(self).items()})
