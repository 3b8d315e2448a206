"""A model behind an OpenAI-compatible server, called with bounded concurrency, timeouts and retries."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from mapo_jax.config import RoleConfig
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.keys import read_key
from mapo_jax.environment.live.limits import allow_connections
from mapo_jax.environment.roles import Messages
from mapo_jax.errors import UserError
from mapo_jax.evaluation.answers import Answer, Prompt
from mapo_jax.rollout.collect import derive_seed

KEY = "OPENAI_API_KEY"  # the environment variable with the server's key, if it needs one
PATIENCE = 5  # consecutive failed calls after which the evaluation ends
HOPELESS = (401, 403, 404)  # HTTP status with which every later call would fail too

T = TypeVar("T")
Ask = Callable[[Messages, int], Awaitable[Answer | None]]


@dataclass(frozen=True)
class Endpoint:
    """A server's model and how it is called. The key is that of the environment's OPENAI_API_KEY, if any."""

    url: str  # of the API, up to and including /v1
    model: str  # its name on the server
    temperature: float
    max_tokens: int  # of an answer
    seed: int
    concurrency: int = 8  # calls at once
    timeout: float = 120.0  # seconds for one attempt of a call
    retries: int = 3  # further attempts after a failure that may be temporary

    def answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        """See `Answerer`.

        Raises:
          UserError: as of `connected`.
        """
        asyncio.run(self._answer(prompts, save))

    async def _answer(self, prompts: Sequence[Prompt], save: Callable[[Prompt, Answer], None]) -> None:
        async with self.connected() as ask:

            async def work(prompt: Prompt) -> None:
                answer = await ask(prompt.messages, derive_seed(self.seed, prompt.id))
                if answer is not None:
                    save(prompt, answer)

            await for_each(prompts, work, self.concurrency)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Ask]:
        """Connects; yields a function of messages and seed that returns the answer, or None after a failure.

        Raises:
          UserError: the key or the URL is invalid, the process may not open so many connections, PATIENCE
            calls in a row failed, or one with a status in HOPELESS; at the end, if any call failed.
        """
        # Slow imports, not needed for a local model.
        from mapo_jax.environment.live.client import Connections, Server

        allow_connections(self.concurrency, "--concurrency")
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        role = RoleConfig(url=self.url, model=self.model, **sampling)
        failed = in_a_row = 0
        last = ""

        def error() -> UserError:
            return UserError(f"the endpoint {self.url} failed {failed} calls to {self.model} (last: {last})")

        async def ask(messages: Messages, seed: int) -> Answer | None:
            nonlocal failed, in_a_row, last
            try:
                completion = await server.ask(messages, seed=seed % 2**31 if self.temperature > 0 else None)
            except RoleFailure as failure:
                if getattr(failure, "answered", False):  # a completion without text is no answer, no failure
                    in_a_row = 0
                    return Answer(None, False)
                failed, in_a_row, last = failed + 1, in_a_row + 1, str(failure)
                if getattr(failure, "status", None) in HOPELESS or in_a_row >= PATIENCE:
                    raise error() from None
                return None
            in_a_row = 0
            return Answer(completion.text, completion.cut)

        key, seconds, attempts = read_key(KEY), self.timeout, self.retries + 1
        connections = Connections(self.url, concurrency=self.concurrency, call_seconds=seconds)
        server = Server(role, connections, key=key, call_seconds=seconds, attempts=attempts)
        async with aclosing(connections):
            yield ask
        if failed:
            raise error()


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Awaits `work` for every item, `concurrency` at once; the first error cancels the rest and is raised."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    tasks = [asyncio.ensure_future(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def only_model(url: str) -> str:
    """The name of the one model that a server offers.

    Raises:
      UserError: the server cannot be reached, or offers no or several models, or the key is invalid.
    """
    from mapo_jax.environment.live.client import CallFailed, Connections, Server

    async def offered() -> list[str]:
        key = read_key(KEY)
        async with aclosing(Connections(url, concurrency=1, call_seconds=10)) as connections:
            server = Server(RoleConfig(url=url), connections, key=key, call_seconds=10, attempts=2)
            return await server.models()

    try:
        names = asyncio.run(offered())
    except CallFailed as failure:
        raise UserError(
            f"the endpoint {url} does not say which models it has ({failure}); is the server up, and does "
            "the URL end with /v1? Name one with --endpoint-model"
        ) from None
    if len(names) != 1:
        raise UserError(f"the endpoint {url} offers {', '.join(names) or 'no model'}; use --endpoint-model")
    return names[0]
