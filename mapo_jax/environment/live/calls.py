"""`complete(messages) -> text`, all that a role is given: cached, checked, mended once, and recorded."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.call_cache import CallCache, address
from mapo_jax.environment.roles import Completion

FAILURES_FILE = "failures.jsonl"

Messages = Sequence[Mapping[str, str]]


class Complete(Protocol):
    """A language model, wherever it runs."""

    async def __call__(
        self,
        messages: Messages,
        *,
        seed: int = 0,
        schema: Mapping[str, Any] | None = None,
        check: Callable[[str], Any] | None = None,
        repair: Callable[[str], str] | None = None,
    ) -> str:
        """The text that the model answers with.

        Args:
          messages: a chat, as `{"role": ..., "content": ...}`.
          seed: of the dialogue. The same messages with the same seed are the same call, which is made once.
          schema: JSON schema that the answer must fit, if any.
          check: raises RoleFailure (malformed, out_of_range) for an answer that is of no use. Such an answer
            is recorded with its text, and never cached.
          repair: from the failure's detail, what the model is told before its one second attempt; None: none.

        Raises:
          RoleFailure: the call failed for good.
        """
        ...


@dataclass
class Tally:
    """What one role's calls came to since the last step."""

    calls: int = 0  # asked for, cached ones included
    cached: int = 0
    lost_attempts: int = 0  # that went over the wire and brought nothing
    repairs: int = 0  # answers that had to be asked for again
    failures: Counter[str] = field(default_factory=Counter)  # calls that failed for good, by kind
    seconds: list[float] = field(default_factory=list)  # of each attempt that went well
    spreads: list[float] = field(default_factory=list)  # of a judge with samples: range of the points
    input_tokens: int = 0
    output_tokens: int = 0


class CallLog:
    """Counts calls by role, and keeps every failure with its raw text in `failures.jsonl`."""

    def __init__(self, file: Path | None = None) -> None:
        """Args: file: where failures go; None for nowhere."""
        self._file = file
        self._tallies: dict[str, Tally] = {}
        # Turns and dialogues lost since the last `take`, by kind.
        self.lost: Counter[str] = Counter()

    def __getitem__(self, role: str) -> Tally:
        return self._tallies.setdefault(role, Tally())

    def failed(self, role: str, failure: RoleFailure, *, final: bool, seed: int) -> None:
        """Notes a failed call: one that a repair may still mend, or a final one."""
        if final:
            self[role].failures[failure.kind] += 1
        if self._file is None:
            return
        row = {
            "time": round(time.time(), 3),
            "role": role,
            "kind": failure.kind,
            "final": final,
            "detail": failure.detail,
            "seed": seed,
            "raw": failure.raw,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def drain(self) -> dict[str, Any]:
        """Everything since this was last called, as JSON values without text, and a new beginning."""
        roles = {
            role: {**vars(tally), "failures": dict(tally.failures)}
            for role, tally in sorted(self._tallies.items())
        }
        drained = {"roles": roles, "lost": dict(self.lost)}
        self._tallies.clear()
        self.lost.clear()
        return drained

    def take(self, prices: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The figures since the last call of this or of `drain`, and a new beginning; see `call_figures`."""
        return call_figures([self.drain()], prices)


def call_figures(
    drained: Sequence[Mapping[str, Any]], prices: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """The metrics of what one or several processes drained.

    Args:
      drained: of each process.
      prices: by role, of a million prompt and answer tokens.

    Returns:
      For each role that was called: `ROLE/{calls,cached,lost_attempts,call_failure_rate,repair_rate,
      latency_p50,latency_p95,tokens,cost}` and, for a judge with several samples, `judge/spread`; over
      all roles `environment/cost` and `failures/KIND`, turns and dialogues lost. Cached calls have no
      latency and no cost.
    """
    metrics: dict[str, float] = {}
    cost = 0.0
    for role in sorted({role for part in drained for role in part["roles"]}):
        tally = _merged([Tally(**part["roles"][role]) for part in drained if role in part["roles"]])
        if not tally.calls:
            continue
        input_price, output_price = prices.get(role, (0.0, 0.0))
        own = (tally.input_tokens * input_price + tally.output_tokens * output_price) / 1e6
        cost += own
        metrics |= {
            f"{role}/calls": float(tally.calls),
            f"{role}/cached": float(tally.cached),
            f"{role}/lost_attempts": float(tally.lost_attempts),
            f"{role}/call_failure_rate": sum(tally.failures.values()) / tally.calls,
            f"{role}/repair_rate": tally.repairs / tally.calls,
            f"{role}/tokens": float(tally.input_tokens + tally.output_tokens),
            f"{role}/cost": own,
        }
        if tally.seconds:
            for name, share in (("p50", 50), ("p95", 95)):
                metrics[f"{role}/latency_{name}"] = float(np.percentile(tally.seconds, share))
        if tally.spreads:
            metrics[f"{role}/spread"] = float(np.mean(tally.spreads))
    lost = sum((Counter(part["lost"]) for part in drained), Counter())
    metrics |= {f"failures/{kind}": float(count) for kind, count in sorted(lost.items())}
    return metrics | {"environment/cost": cost}


def _merged(tallies: Sequence[Tally]) -> Tally:
    merged = Tally()
    for tally in tallies:
        for name, value in vars(tally).items():
            value = Counter(value) if name == "failures" else value
            setattr(merged, name, getattr(merged, name) + value)
    return merged


@dataclass(frozen=True)
class Caller:
    """A role's `Complete` over a model, with cache, check, one repair, and a record of what went wrong."""

    role: str
    call: Callable[..., Awaitable[Completion]]  # (messages, seed=, schema=) -> Answer; raises RoleFailure
    settings: Mapping[str, Any]  # what else the answer depends on: model, temperature, ...
    log: CallLog
    cache: CallCache | None = None

    async def __call__(
        self,
        messages: Messages,
        *,
        seed: int = 0,
        schema: Mapping[str, Any] | None = None,
        check: Callable[[str], Any] | None = None,
        repair: Callable[[str], str] | None = None,
    ) -> str:
        """See Complete."""
        tally = self.log[self.role]
        tally.calls += 1
        messages = [_plain(message) for message in messages]
        try:
            return await self._once(tally, messages, seed, schema, check)
        except RoleFailure as failure:
            mendable = failure.kind in ("malformed", "out_of_range") and repair is not None
            self.log.failed(self.role, failure, final=not mendable, seed=seed)
            if not mendable:
                raise
            tally.repairs += 1
            messages = [
                *messages,
                _plain({"role": "assistant", "content": failure.raw or "(nothing)"}),
                _plain({"role": "user", "content": repair(failure.detail)}),
            ]
        try:
            return await self._once(tally, messages, seed, schema, check)
        except RoleFailure as failure:
            self.log.failed(self.role, failure, final=True, seed=seed)
            raise

    async def _once(
        self,
        tally: Tally,
        messages: Messages,
        seed: int,
        schema: Mapping[str, Any] | None,
        check: Callable[[str], Any] | None,
    ) -> str:
        where = address(
            role=self.role, settings=self.settings, messages=list(messages), schema=schema, seed=seed
        )
        if self.cache is not None and (kept := self.cache.get(where)) is not None:
            tally.cached += 1
            return kept.text
        answer = await self.call(messages, seed=seed, schema=schema)
        tally.input_tokens += answer.input_tokens
        tally.output_tokens += answer.output_tokens
        if check is not None:
            try:
                check(answer.text)
            except RoleFailure as failure:
                raise RoleFailure(failure.kind, failure.detail, answer.text) from None
        if self.cache is not None:
            self.cache.put(where, self.role, answer)
        return answer.text


def _plain(message: Mapping[str, str]) -> dict[str, str]:
    """A message that cannot spell a chat template's control token, such as <|im_end|>."""
    return {"role": message["role"], "content": message["content"].replace("<|", "<\u200b|")}
