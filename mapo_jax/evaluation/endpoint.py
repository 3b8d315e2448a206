"""A model behind an OpenAI-compatible server, asked with bounded concurrency, time and patience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mapo_jax.config import RoleConfig
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.keys import read_key
from mapo_jax.environment.live.limits import allow_connections
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Answer, Messages, Prompt
from mapo_jax.rollout.collect import derive_seed

if TYPE_CHECKING:
    from mapo_jax.environment.live.client import Server

KEY = "OPENAI_API_KEY"  # the environment variable with the server's key, if it wants one
PATIENCE = 5  # calls running that fail for good before the rest is given up
HOPELESS = (401, 403, 404)  # no later call would fare better


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

    def connected(self) -> Server:
        """A client, to be closed by its context.

        Raises:
          UserError: the key or the URL cannot be one, or the process may not open so many connections.
        """
        from mapo_jax.environment.live.client import Server  # imports that a local model need not pay

        allow_connections(self.concurrency, "--concurrency")
        return Server(
            RoleConfig(
                url=self.url, model=self.model, temperature=self.temperature, max_tokens=self.max_tokens
            ),
            key=read_key(KEY),
            call_seconds=self.timeout,
            concurrency=self.concurrency,
            attempts=self.retries + 1,
        )

    async def complete(self, client: Server, messages: Messages, seed: int) -> Answer:
        """One answer. Raises RoleFailure when the tries are used up."""
        said = await client.ask(messages, seed=seed % 2**31 if self.temperature > 0 else None)
        return Answer(said.text, said.cut)


@dataclass
class Calls:
    """The calls of one evaluation: counts those that failed, and gives up when going on is pointless."""

    endpoint: Endpoint
    client: Server | None = None
    failed: int = 0
    running: int = 0  # failures since the last answer
    reason: str = ""

    async def ask(self, messages: Messages, seed: int) -> Answer | None:
        """An answer, or None where there was none to be had.

        Raises:
          UserError: too many calls running failed, or one in a way that all will.
        """
        assert self.client is not None
        try:
            answer = await self.endpoint.complete(self.client, messages, seed)
        except RoleFailure as failure:
            self.failed += 1
            self.running += 1
            self.reason = str(failure)
            if getattr(failure, "status", None) in HOPELESS or self.running >= PATIENCE:
                raise self._error() from None
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
      UserError: it cannot be reached, or offers none or several, or the key cannot be one.
    """
    from mapo_jax.environment.live.client import CallFailed, Server

    async def names() -> list[str]:
        async with Server(
            RoleConfig(url=url), key=read_key(KEY), call_seconds=10, concurrency=1, attempts=2
        ) as server:
            return await server.models()

    try:
        found = asyncio.run(names())
    except CallFailed as failure:
        raise UserError(
            f"the endpoint {url} does not say which models it has ({failure}); is the server up, and does "
            "the URL end with /v1? Name one with --endpoint-model"
        ) from None
    if len(found) != 1:
        raise UserError(
            f"the endpoint {url} offers {', '.join(found) or 'no model'}; choose by --endpoint-model"
        )
    return found[0]
