"""Calls of a language model that plays a role: cached, checked, repaired once, and logged."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.call_cache import CallCache, address
from mapo_jax.environment.live.forms import excerpt, whole_characters
from mapo_jax.environment.live.prompts import render
from mapo_jax.environment.roles import Completion, Messages, Schema
from mapo_jax.environment.scenario import Scenario

FAILURES_FILE = "failures.jsonl"

Complete = Callable[..., Awaitable[str]]  # with the arguments of `Caller.__call__`, on any model
Check = Callable[[str], Any]  # raises RoleFailure for an unusable answer
T = TypeVar("T")


@dataclass
class Tally:
    """Figures of one role's calls since the last step."""

    calls: int = 0  # including cached ones
    cached: int = 0
    lost_attempts: int = 0  # failed requests to a server
    repairs: int = 0  # second requests after an unusable answer
    failures: Counter[str] = field(default_factory=Counter)  # calls that finally failed, by kind
    seconds: list[float] = field(default_factory=list)  # of each successful attempt
    spreads: list[float] = field(default_factory=list)  # of a judge with samples: range of the points
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class CallLog:
    """Counts calls by role, and writes every failure with an excerpt of its text to `failures.jsonl`."""

    def __init__(self, file: Path | None = None) -> None:
        """Args: file: for failures; None: they are only counted."""
        self._file = file
        self._tallies: dict[str, Tally] = {}
        # Turns and dialogues lost since the last `drain`, by kind.
        self.lost: Counter[str] = Counter()

    def __getitem__(self, role: str) -> Tally:
        return self._tallies.setdefault(role, Tally())

    def failed(self, role: str, failure: RoleFailure, *, final: bool, seed: int) -> None:
        """Logs a failed call; `final` is false if it is to be repaired."""
        if final:
            self[role].failures[failure.kind] += 1
        if self._file is None:
            return
        row = {
            "time": round(time.time(), 3),
            "role": role,
            "kind": failure.kind,
            "final": final,
            "detail": excerpt(failure.detail),
            "seed": seed,
            "raw": excerpt(failure.raw),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def drain(self) -> dict[str, Any]:
        """All figures since the last `drain`, as JSON values without text; resets them."""
        tallies, self._tallies = self._tallies, {}  # first: another thread may be counting
        lost, self.lost = self.lost, Counter()
        roles = {role: {**vars(tally), "failures": dict(tally.failures)} for role, tally in tallies.items()}
        return {"roles": roles, "lost": dict(lost)}


def call_figures(
    drained: Sequence[Mapping[str, Any]], prices: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """The metrics of one or several processes.

    Args:
      drained: `CallLog.drain()` of each process.
      prices: by role, of a million prompt and answer tokens.

    Returns:
      For each role that was called: `ROLE/{calls,cached,lost_attempts,call_failure_rate,repair_rate,
      latency_p50,latency_p95,tokens,cost}` and, for a judge with several samples, `judge/spread`; over
      all roles `environment/cost` and `failures/KIND`, turns and dialogues lost. Cached calls have no
      latency and no cost.
    """
    metrics: dict[str, float] = {}
    total_cost = 0.0
    for role in sorted({role for process in drained for role in process["roles"]}):
        rows = [process["roles"][role] for process in drained if role in process["roles"]]
        tally = sum((Tally(**row | {"failures": Counter(row["failures"])}) for row in rows), Tally())
        if not (tally.calls or tally.input_tokens or tally.failures):
            continue
        begun = max(1, tally.calls)  # a call may end after the row in which it began
        input_price, output_price = prices.get(role, (0.0, 0.0))
        cost = (tally.input_tokens * input_price + tally.output_tokens * output_price) / 1e6
        total_cost += cost
        metrics |= {
            f"{role}/calls": float(tally.calls),
            f"{role}/cached": float(tally.cached),
            f"{role}/lost_attempts": float(tally.lost_attempts),
            f"{role}/call_failure_rate": sum(tally.failures.values()) / begun,
            f"{role}/repair_rate": tally.repairs / begun,
            f"{role}/tokens": float(tally.input_tokens + tally.output_tokens),
            f"{role}/cost": cost,
        }
        if tally.seconds:
            for share in (50, 95):
                metrics[f"{role}/latency_p{share}"] = float(np.percentile(tally.seconds, share))
        if tally.spreads:
            metrics[f"{role}/spread"] = float(np.mean(tally.spreads))
    lost = sum((Counter(process["lost"]) for process in drained), Counter())
    metrics |= {f"failures/{kind}": float(count) for kind, count in sorted(lost.items())}
    return metrics | {"environment/cost": total_cost}


@dataclass(eq=False)
class Caller:
    """A role's model, with cache, check, one repair, and a log."""

    role: str
    call: Callable[..., Awaitable[Completion]]  # (messages, seed=, schema=); raises RoleFailure
    settings: Mapping[str, Any]  # what else the answer depends on: model, temperature, ...
    log: CallLog
    cache: CallCache | None = None

    async def __call__(
        self,
        messages: Messages,
        *,
        seed: int = 0,
        schema: Schema | None = None,
        check: Check | None = None,
        repair: Callable[[str], str] | None = None,
    ) -> str:
        """The text of the model's answer.

        Args:
          messages: a chat, as `{"role": ..., "content": ...}`.
          seed: of the dialogue. Equal messages with equal seeds are one call, which is made once.
          schema: JSON schema of the answer, if any.
          check: raises RoleFailure (malformed, out_of_range) for an unusable answer. Such an answer is logged
            with an excerpt of its text, and never cached; an empty answer is always unusable.
          repair: message for the second and last attempt, from the failure's detail; None: no second attempt.

        Raises:
          RoleFailure: the call finally failed.
        """
        self.log[self.role].calls += 1
        messages = [_plain(message["role"], message["content"]) for message in messages]
        for repair_message in (repair, None):
            try:
                return await self._attempt(messages, seed, schema, check)
            except RoleFailure as failure:
                final = repair_message is None or failure.kind not in ("malformed", "out_of_range")
                self.log.failed(self.role, failure, final=final, seed=seed)
                if final:
                    raise
                self.log[self.role].repairs += 1
                answer = _plain("assistant", excerpt(failure.raw) or "(nothing)")
                messages = [*messages, answer, _plain("user", repair_message(excerpt(failure.detail)))]
        raise AssertionError("unreachable")

    async def _attempt(
        self, messages: Messages, seed: int, schema: Schema | None, check: Check | None
    ) -> str:
        key = address(role=self.role, settings=self.settings, messages=messages, schema=schema, seed=seed)
        cached = None if self.cache is None else self.cache.get(key)
        if cached is not None and _problem(cached.text, check) is None:
            self.log[self.role].cached += 1
            return cached.text
        completion = await self.call(messages, seed=seed, schema=schema)
        completion = completion._replace(text=whole_characters(completion.text))
        tally = self.log[self.role]  # not before: `drain` may have replaced it during the call
        tally.input_tokens += completion.input_tokens
        tally.output_tokens += completion.output_tokens
        if problem := _problem(completion.text, check):
            raise problem
        if self.cache is not None:
            self.cache.put(key, self.role, completion)
        return completion.text


async def ask(
    complete: Complete,
    card: Scenario,
    messages: Messages,
    parse: Callable[[str], T],
    repair_prompt: str = "json_repair",
    **options: Any,
) -> T:
    """Asks a role's model and parses the answer; if that fails, asks once more with the repair prompt.

    Args:
      complete: the model.
      card: its language is that of the prompt.
      messages: the chat.
      parse: raises RoleFailure for an unusable answer.
      repair_prompt: name of the prompt file.
      options: seed and schema.

    Raises:
      RoleFailure: the call finally failed.
    """

    def repair(problem: str) -> str:
        return render(card.language, repair_prompt, problem=problem)

    return parse(await complete(messages, check=parse, repair=repair, **options))


def _problem(text: str, check: Check | None) -> RoleFailure | None:
    """Why an answer is unusable; None if it is not."""
    if not text.strip():
        return RoleFailure("malformed", "it is empty", text)
    try:
        if check is not None:
            check(text)
    except RoleFailure as failure:
        return RoleFailure(failure.kind, failure.detail, text)
    return None


def _plain(role: str, text: str) -> dict[str, str]:
    """A message of whole characters without a chat template's control tokens, such as <|im_end|>."""
    return {"role": role, "content": whole_characters(text).replace("<|", "<\u200b|")}
