"""Generation: slots with a KV cache that lives as long as a dialogue, and a few compiled programs over them.

The vocabulary is JetStream's. A *slot* holds one dialogue: the tokens of its row so far and their keys and
values. A new turn *prefills* the row's new tokens, in chunks and at each slot's own offset, and *generates*
the reply: a loop on the device that stops when every reply has ended. Slots that a call does not name are
left alone. The start that a group of dialogues shares is prefilled once and copied.

An example with two slots and a chunk of 4. Slot 0 goes on at position 9 with five new tokens, slot 1 starts
with three. The last new token of each is the first input of `generate`; `-` is padding, which is dropped:

    prefill   tokens     [[a b c d], [x y - -]]      positions [[9 10 11 12], [0 1 - -]]
    generate  tokens     [e, z]                      positions [13, 2], then 14 and 3, ...

All slots of a call run in lock-step, so that on one platform the same rows give the same tokens bit for bit,
however long users take to answer. Token ids in, token ids out: no text, no dialogue, no reward here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from mapo_jax.errors import UserError
from mapo_jax.model.head import logits
from mapo_jax.model.qwen import Cache, Params, QwenConfig, extend, init_cache
from mapo_jax.model.sharding import RULES
from mapo_jax.rollout.sampling import KEY_WORDS, Sampling, sample, uniforms


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


class Reply(NamedTuple):
    """What was sampled."""

    ids: tuple[int, ...]  # a stop id closes it, unless it was cut
    logprobs: tuple[float, ...]  # in the distribution sampled from; float32 values
    truncated: bool  # cut by its limit or by the end of the cache


@dataclass
class Counts:
    """Work done since the engine was made."""

    prefilled: int = 0  # tokens written to the cache by `prefill`
    sampled: int = 0  # tokens sampled
    steps: int = 0  # decode steps, each over all slots


def cache_lengths(length: int) -> tuple[int, ...]:
    """Lengths that the cache grows through: a half of `length`, in multiples of 32, and all of it.

    Decode reads the whole cache at every step. Measured on two CPU cores (Qwen3 of 1 M parameters, 64 slots
    of 640 tokens, 8 turns): 2,900 tokens a second with one length, 3,600 with two, hardly more with a quarter
    as well, which costs half as many programs again.
    """
    return tuple(sorted({min(length, -(-length // 2 // 32) * 32), length}))


class Engine:
    """Replies to dialogues, in `slots` slots of up to `length` tokens.

    Programs that are compiled, for each of the two `cache_lengths`: creation, two prefills (a half and the
    whole of `chunk`), copy, generate; and one that grows the cache from the first length to the second.
    `warm_up` compiles them all.

    Every program runs over all slots, idle ones too: a prefill of a few slots costs as much as one of all.
    """

    def __init__(
        self,
        config: QwenConfig,
        *,
        slots: int,
        length: int,
        max_reply_tokens: int,
        stop_ids: Sequence[int],
        vocabulary_size: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        dtype=jnp.float32,
        mesh: Mesh | None = None,
        chunk: int = 32,
        block: int | None = None,
    ):
        """Checks the sizes; allocates nothing before the first dialogue.

        Args:
          config: the model.
          slots: K, dialogues at once.
          length: C, longest row in tokens.
          max_reply_tokens: longest reply.
          stop_ids: ids that end a reply.
          vocabulary_size: ids from here on are never sampled.
          temperature, top_k, top_p, min_p: see `Sampling`.
          dtype: of computation and cache.
          mesh: where the weights lie; slots are cut over its row axes, KV heads over `tensor`.
          chunk: most tokens that one prefill program takes from each row.
          block: decode steps on the device before the host looks; None: a whole reply.

        Raises:
          UserError: a size that does not fit the model or the mesh, or a stop id outside the vocabulary.
        """
        for name, value in (
            ("slots", slots),
            ("length", length),
            ("max_reply_tokens", max_reply_tokens),
            ("chunk", chunk),
            ("block", 1 if block is None else block),
        ):
            if value < 1:
                raise UserError(f"the engine's `{name}` is {value}; it must be at least 1")
        if not 0 < vocabulary_size <= config.vocab_size:
            raise UserError(
                f"a vocabulary of {vocabulary_size} tokens does not fit the model's {config.vocab_size}; "
                "give the model its own tokenizer"
            )
        for stop in stop_ids:
            if not 0 <= stop < vocabulary_size:
                raise UserError(
                    f"stop id {stop} is outside the vocabulary of {vocabulary_size} tokens; "
                    "no reply would ever end with it"
                )
        if length > config.max_position_embeddings:
            raise UserError(
                f"dialogues of {length} tokens exceed the model's {config.max_position_embeddings} "
                "positions; lower `rollout.max_tokens`"
            )
        if max_reply_tokens >= length:
            raise UserError(
                f"replies of {max_reply_tokens} tokens leave no room for a prompt in {length} tokens; "
                "lower `rollout.max_reply_tokens` or raise `rollout.max_tokens`"
            )
        self.config = config
        self.slots = slots
        self.length = length
        self.max_reply_tokens = max_reply_tokens
        self.stop_ids = tuple(stop_ids)
        self.vocabulary_size = vocabulary_size
        self.sampling = Sampling(temperature, top_k, top_p, min_p)
        self.dtype = jnp.dtype(dtype)
        self.lengths = cache_lengths(length)
        self.chunks = tuple(sorted({max(1, chunk // 2), chunk}))
        self.block = min(block or max_reply_tokens, max_reply_tokens)
        self.version: int | None = None
        self.counts = Counts()
        self._params: Params | None = None
        self._compile(mesh)
        self.reset()

    def load(self, params: Params, version: int) -> None:
        """Takes new weights; every dialogue under way loses its cache and cannot be continued.

        Args:
          params: the weights; not copied (whoever donates them must load again).
          version: a number that tells these weights from others; the cache is kept if it is the loaded one.
        """
        if version != self.version:
            self.reset()
        self._params, self.version = params, version

    def reset(self) -> None:
        """Empties every slot and frees the cache."""
        self._rows: list[list[int]] = [[] for _ in range(self.slots)]
        self._cached = np.zeros(self.slots, int)  # how many tokens of each row are in the cache
        self._cache: Cache | None = None

    def row(self, slot: int) -> tuple[int, ...]:
        """The tokens of a slot: prompts, replies and all, as the model saw them."""
        return tuple(self._rows[slot])

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Starts a row in each of the slots and computes its cache; nothing is sampled.

        Raises:
          UserError: a prompt that leaves no room for a reply.
        """
        self._need_weights()
        for slot, ids in prompts.items():
            self._begin(slot, ids)
        self._write({slot: len(self._rows[slot]) for slot in prompts})

    def copy_prefix(self, copies: Mapping[int, Iterable[int]]) -> None:
        """Copies the row and cache of each slot (key) to other slots (values), whose own are dropped."""
        source = np.arange(self.slots)
        for origin, targets in copies.items():
            if self._cached[origin] == 0:
                raise StaleSlot(f"slot {origin} holds nothing to copy")
            for target in targets:
                source[target] = origin
                self._rows[target] = list(self._rows[origin])
                self._cached[target] = self._cached[origin]
        self._cache = self._copy(self._cache, source)

    def reply(self, requests: Sequence[Request]) -> list[Reply]:
        """Samples the next reply of each dialogue.

        Args:
          requests: at most one for each slot.

        Returns:
          A reply for each request, in their order.

        Raises:
          StaleSlot: a request continues a row that the slot does not hold (any more).
          UserError: a row that leaves no room for a reply.
        """
        self._need_weights()
        if len({request.slot for request in requests}) != len(requests):
            raise ValueError("two requests for one slot")
        for request in requests:
            if request.start:
                self._begin(request.slot, request.ids)
            elif self._cached[request.slot] == 0:
                raise StaleSlot(
                    f"slot {request.slot} holds no dialogue of weights version {self.version}: "
                    "its cache was dropped; start the row again"
                )
            else:
                self._rows[request.slot] += self._checked(request.ids)
                self._room(request.slot)
        slots = np.array([request.slot for request in requests], int)
        self._write({slot: len(self._rows[slot]) - 1 for slot in slots})
        return self._generate_replies(requests, slots)

    def warm_up(self) -> None:
        """Compiles every program, so that no later call compiles anything. Empties all slots."""
        self._need_weights()
        nothing = np.zeros(self.slots, np.int32)
        for length in self.lengths:
            if length > self.lengths[0]:
                self._grow(self._create(self.lengths[0]), length)
            cache = self._create(length)
            for chunk in self.chunks:
                padding = np.full((self.slots, chunk), length, np.int32)
                cache = self._prefill(self._params, cache, np.zeros_like(padding), padding)
            cache = self._copy(cache, np.arange(self.slots))
            words = np.zeros((self.slots, KEY_WORDS), np.uint32)
            self._generate(self._params, cache, words, nothing, nothing, nothing)
        self.reset()

    def _need_weights(self) -> None:
        if self._params is None:
            raise RuntimeError("the engine has no weights yet; call load first")

    def _begin(self, slot: int, ids: Sequence[int]) -> None:
        self._rows[slot], self._cached[slot] = self._checked(ids), 0
        if len(ids) == 0:
            raise ValueError("a row starts with at least one token")
        self._room(slot)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise ValueError(f"token id {i} is outside the model's {self.config.vocab_size}")
        return [int(i) for i in ids]

    def _room(self, slot: int) -> int:
        room = self.length - len(self._rows[slot])
        if room < 1:
            raise UserError(
                f"a prompt of {len(self._rows[slot])} tokens leaves no room for a reply in a cache of "
                f"{self.length}; raise `rollout.max_tokens` or shorten the prompt"
            )
        return room

    def _write(self, ends: Mapping[int, int]) -> None:
        """Puts the tokens of each row up to its end into the cache, chunk by chunk."""
        self._fit(max(ends.values(), default=1))
        while missing := max((end - self._cached[slot] for slot, end in ends.items()), default=0):
            chunk = next((size for size in self.chunks if size >= missing), self.chunks[-1])
            tokens = np.zeros((self.slots, chunk), np.int32)
            positions = np.full((self.slots, chunk), self.length, np.int32)  # beyond the cache: dropped
            for slot, end in ends.items():
                begin = int(self._cached[slot])
                count = min(chunk, end - begin)
                tokens[slot, :count] = self._rows[slot][begin : begin + count]
                positions[slot, :count] = np.arange(begin, begin + count)
                self._cached[slot] += count
                self.counts.prefilled += count
            self._cache = self._prefill(self._params, self._cache, tokens, positions)

    def _generate_replies(self, requests: Sequence[Request], slots: np.ndarray) -> list[Reply]:
        words = np.zeros((self.slots, KEY_WORDS), np.uint32)
        words[slots] = np.array([(*request.key, request.turn) for request in requests]).reshape(-1, KEY_WORDS)
        left = np.zeros(self.slots, np.int32)  # tokens that each reply may still have
        for request in requests:
            limit = self.max_reply_tokens if request.limit is None else request.limit
            left[request.slot] = min(limit, self.max_reply_tokens, self._room(request.slot))
        self._fit(max((len(self._rows[slot]) + left[slot] for slot in slots), default=1))
        ids: dict[int, list[int]] = {slot: [] for slot in slots}
        logprobs: dict[int, list[float]] = {slot: [] for slot in slots}
        while left.any():
            last = np.zeros(self.slots, np.int32)
            positions = np.zeros(self.slots, np.int32)
            for slot in slots:
                last[slot], positions[slot] = self._rows[slot][-1], len(self._rows[slot]) - 1
            limits = np.minimum(left, self.block)
            self._cache, *sampled = self._generate(self._params, self._cache, words, last, positions, limits)
            new_ids, new_logprobs, counts, steps = jax.device_get(sampled)
            self.counts.sampled += int(counts.sum())
            self.counts.steps += int(steps)
            for slot in slots:
                new = new_ids[slot, : counts[slot]].tolist()
                ids[slot] += new
                logprobs[slot] += new_logprobs[slot, : counts[slot]].tolist()
                self._rows[slot] += new
                self._cached[slot] += len(new)  # the last one sampled is not in it, the last one given is
                ended = bool(new) and new[-1] in self.stop_ids
                left[slot] = 0 if ended else left[slot] - len(new)
        return [
            Reply(
                tuple(ids[slot]), tuple(logprobs[slot]), not ids[slot] or ids[slot][-1] not in self.stop_ids
            )
            for slot in slots
        ]

    def _fit(self, tokens: int) -> None:
        """Makes the cache at least so long."""
        length = next(size for size in self.lengths if size >= tokens)
        if self._cache is None:
            self._cache = self._create(length)
        elif self._cache[0][0].shape[2] < length:
            self._cache = self._grow(self._cache, length)

    def _compile(self, mesh: Mesh | None) -> None:
        """Makes the jitted programs; each compiles when first called with a new shape."""
        cache_sharding = everywhere = None
        if mesh is not None:
            rows = int(np.prod([mesh.shape[axis] for axis in RULES["rows"]]))
            if self.slots % rows:
                raise UserError(
                    f"{self.slots} slots cannot be cut over the {rows} devices of the mesh's axes "
                    f"{' and '.join(RULES['rows'])}; choose a multiple of {rows}"
                )
            cache_sharding = NamedSharding(mesh, PartitionSpec(RULES["rows"], RULES["kv_heads"]))
            everywhere = NamedSharding(mesh, PartitionSpec())
        static = dict(config=self.config, dtype=self.dtype)
        create = functools.partial(init_cache, self.config, self.slots, dtype=self.dtype)
        self._create = jax.jit(create, static_argnums=0, out_shardings=cache_sharding)
        self._grow = jax.jit(_grow, static_argnums=1, out_shardings=cache_sharding)
        self._copy = jax.jit(_copy, donate_argnums=0, out_shardings=cache_sharding)
        prefill = functools.partial(_prefill, **static)
        self._prefill = jax.jit(prefill, donate_argnums=1, out_shardings=cache_sharding)
        generate = functools.partial(
            _generate,
            **static,
            stop_ids=self.stop_ids,
            vocabulary_size=self.vocabulary_size,
            sampling=self.sampling,
            block=self.block,
        )
        shardings = None if mesh is None else (cache_sharding, *(everywhere,) * 4)
        self._generate = jax.jit(generate, donate_argnums=1, out_shardings=shardings)


def _prefill(
    params: Params,
    cache: Cache,
    tokens: Int[Array, "K N"],
    positions: Int[Array, "K N"],
    *,
    config: QwenConfig,
    dtype,
) -> Cache:
    return extend(params, config, tokens, positions, cache, dtype=dtype)[1]


def _generate(
    params: Params,
    cache: Cache,
    words: UInt32[Array, "K 4"],
    tokens: Int[Array, " K"],
    positions: Int[Array, " K"],
    limits: Int[Array, " K"],
    *,
    config: QwenConfig,
    dtype,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    sampling: Sampling,
    block: int,
) -> tuple[Cache, Int[Array, "K N"], Float[Array, "K N"], Int[Array, " K"], Int[Array, ""]]:
    """Samples up to `limits` tokens for each slot (0: none); stops when all are done.

    Args:
      words: keys of the random numbers.
      tokens: the last token of each row, not in the cache yet.
      positions: its index in the row.

    Returns:
      (cache, ids, log-probabilities, how many of them each slot has, decode steps); N = `block`.
    """
    slots, length = len(tokens), cache[0][0].shape[2]
    numbers = uniforms(words, positions[:, None] + 1 + jnp.arange(block))

    def going(state):
        step, *_, done = state
        return (step < block) & ~jnp.all(done)

    def advance(state):
        step, cache, token, ids, logprobs, counts, done = state
        position = jnp.where(done, length, positions + step)
        hidden, cache = extend(params, config, token[:, None], position[:, None], cache, dtype=dtype)
        scores = logits(params, config, hidden[:, 0], vocabulary_size=vocabulary_size)
        token, logprob = sample(scores, numbers[:, step], sampling)
        counts = counts + ~done
        ids = ids.at[:, step].set(token)  # what a done slot samples lies beyond its count
        logprobs = logprobs.at[:, step].set(logprob)
        stopped = functools.reduce(jnp.logical_or, [token == stop for stop in stop_ids], done)
        return step + 1, cache, token, ids, logprobs, counts, stopped | (counts >= limits)

    start = (
        jnp.int32(0),
        cache,
        tokens,
        jnp.zeros((slots, block), jnp.int32),
        jnp.zeros((slots, block), jnp.float32),
        jnp.zeros(slots, jnp.int32),
        limits <= 0,
    )
    steps, cache, _, ids, logprobs, counts, _ = jax.lax.while_loop(going, advance, start)
    return cache, ids, logprobs, counts, steps


def _copy(cache: Cache, source: Int[Array, " K"]) -> Cache:
    return jax.tree.map(lambda array: array[source], cache)


def _grow(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens."""
    return jax.tree.map(
        lambda array: jnp.pad(array, ((0, 0), (0, 0), (0, length - array.shape[2]), (0, 0))), cache
    )
