"""A model behind an OpenAI-compatible server, asked with bounded concurrency, time and patience."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Answer, Messages, Prompt
from mapo_jax.rollout.collect import derive_seed

PATIENCE = 5  # calls running that fail for good before the rest is given up
HOPELESS = (401, 403, 404)  # no later call would fare better
LONGEST_WAIT = 60.0  # seconds that the client waits before another try, if a server asks it to


@dataclass(frozen=True)
class Endpoint:
    """A server's model and how it is asked. The key is that of the environment's OPENAI_API_KEY, if any."""

    url: str  # of the API, up to and including /v1
    model: str  # as the server calls it
    temperature: float
    max_tokens: int  # of an answer
    seed: int
    concurrency: int = 8  # calls under way at once
    timeout: float = 120.0  # seconds for one try of a call
    retries: int = 3  # further tries of a call that failed in a way that may pass

    def answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        """See `Answerer`.

        Raises:
          UserError: several calls running failed for good, or some did and the others are answered.
        """
        asyncio.run(self._answer(prompts, save))

    async def _answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        waiting = iter(prompts)
        calls = Calls(self)

        async def work() -> None:
            for prompt in waiting:
                answer = await calls.ask(prompt.messages, derive_seed(self.seed, prompt.id))
                if answer is not None:
                    save(prompt, answer)

        async with self.connected() as calls.client:
            await together([work() for _ in range(min(self.concurrency, len(prompts)))])
        calls.conclude()

    @property
    def longest(self) -> float:
        """Seconds that a call may take with all its tries. `timeout` alone does not bound a try: it begins
        anew with every byte that comes."""
        return (self.retries + 1) * (self.timeout + LONGEST_WAIT)

    def connected(self):
        """A client, to be closed by its context."""
        from openai import AsyncOpenAI  # a second of imports that a local model need not pay

        return AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=self.retries,
        )

    async def complete(self, client, messages: Messages, seed: int) -> Answer:
        """One answer. Raises openai.OpenAIError when the tries are used up."""
        options = {"seed": seed % 2**31} if self.temperature > 0 else {}
        reply = await client.chat.completions.create(
            model=self.model,
            messages=list(messages),
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            **options,
        )
        choice = reply.choices[0]
        return Answer(choice.message.content or "", choice.finish_reason == "length")


@dataclass
class Calls:
    """The calls of one evaluation: counts those that failed, and gives up when going on is pointless."""

    endpoint: Endpoint
    client: object = None
    failed: int = 0
    running: int = 0  # failures since the last answer
    reason: str = ""

    async def ask(self, messages: Messages, seed: int) -> Answer | None:
        """An answer, or None where there was none to be had.

        Raises:
          UserError: too many calls running failed, or one in a way that all will.
        """
        from openai import APIStatusError, OpenAIError

        try:
            async with asyncio.timeout(self.endpoint.longest):
                answer = await self.endpoint.complete(self.client, messages, seed)
        except (OpenAIError, TimeoutError, IndexError, AttributeError, TypeError) as error:
            self.failed += 1
            self.running += 1
            self.reason = _reason(error)
            hopeless = isinstance(error, APIStatusError) and error.status_code in HOPELESS
            if hopeless or self.running >= PATIENCE:
                raise self._error() from error
            return None
        self.running = 0
        return answer

    def conclude(self) -> None:
        """Raises UserError if any call failed."""
        if self.failed:
            raise self._error()

    def _error(self) -> UserError:
        return UserError(
            f"the endpoint {self.endpoint.url} failed {self.failed} calls to {self.endpoint.model} "
            f"(last: {self.reason})"
        )


def _reason(error: Exception) -> str:
    cause = f": {error.__cause__}" if error.__cause__ is not None and str(error.__cause__) else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())[:300]


async def together(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Awaits all; if one fails, the others are cancelled and its own error is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def only_model(url: str) -> str:
    """The name of the one model that a server offers.

    Raises:
      UserError: it cannot be reached, or offers none or several.
    """
    from openai import OpenAI, OpenAIError

    try:
        key = os.environ.get("OPENAI_API_KEY") or "none"
        with OpenAI(base_url=url, api_key=key, timeout=10, max_retries=1) as client:
            names = [model.id for model in client.models.list()]
    except OpenAIError as error:
        raise UserError(
            f"the endpoint {url} does not say which models it has ({_reason(error)}); is the server up, and "
            "does the URL end with /v1? Name one with --endpoint-model"
        ) from error
    if len(names) != 1:
        raise UserError(
            f"the endpoint {url} offers {', '.join(names) or 'no model'}; choose by --endpoint-model"
        )
    return names[0]
