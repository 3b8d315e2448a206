"""Generation: slots with a KV cache that lives as long as a dialogue, and lanes that decode some of them.

The vocabulary is JetStream's. A *slot* holds one dialogue: the tokens of its row so far and their keys and
values. A new turn *prefills* the row's new tokens, in chunks and at each slot's own offset; a start that
another slot has already is *inserted* by copying. Then the dialogue takes a *lane*, and *generate* decodes
all lanes together: a loop on the device of up to `block` steps, after which the host looks. A reply that has
ended leaves its lane to the next dialogue that waits; one whose user is thinking holds a slot and no lane.

An example with two rows and a chunk of 4. Slot 0 goes on at position 9 with five new tokens, slot 1 starts
with three. The last new token of each is the first input of `generate`; `-` is padding, which is dropped:

    prefill   tokens     [[a b c d], [x y - -]]      positions [[9 10 11 12], [0 1 - -]]
    generate  tokens     [e, z]                      positions [13, 2], then 14 and 3, ...

Every program has a fixed width (lanes, prefill rows), and on a CPU what a row gives does not depend on its
place in a program nor on its neighbours (tested): so a dialogue's tokens are the same bit for bit, in
whatever order users answer. Token ids in, token ids out: no text, no dialogue, no reward here.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from mapo_jax.errors import UserError
from mapo_jax.model.head import logits
from mapo_jax.model.qwen import Cache, Params, QwenConfig, extend, init_cache
from mapo_jax.model.sharding import RULES
from mapo_jax.rollout.sampling import KEY_WORDS, Sampling, penalise, sample, uniforms


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

    prefilled: int = 0  # tokens computed by `prefill`
    copied: int = 0  # tokens taken over from another slot, or kept from the slot's row before
    sampled: int = 0  # tokens sampled
    steps: int = 0  # decode steps, each over all lanes

    def since(self, before: Counts) -> Counts:
        """What was done after `before` was copied."""
        return Counts(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


@dataclass
class _Going:
    """A reply under way."""

    request: Request
    left: int  # tokens that it may still have
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def cache_lengths(length: int) -> tuple[int, ...]:
    """Lengths that the cache grows through: `length`, and below it two significant bits (256, 384, 512, ...).

    Decode reads the whole cache at every step, so a longer one costs time before it is needed; each length
    costs a set of compiled programs. The shortest is 256, or half of `length` if that is less. All are
    multiples of 32: then sums over the cache run in the same order at every length.
    """

    def up(size: int) -> int:
        return -(-size // 32) * 32

    if length <= 256:
        return tuple(sorted({up(-(-length // 2)), up(length)}))
    lengths, size = {up(length)}, 256
    while size < length:
        lengths |= {size, size + size // 2} if size + size // 2 < length else {size}
        size *= 2
    return tuple(sorted(lengths))


class Engine:
    """Replies to dialogues: `slots` caches of up to `length` tokens, `lanes` of them decoded at a time.

    Programs that are compiled, for each of the `cache_lengths`: prefill, insert, generate; one that makes the
    cache, and one that grows it for each step between two lengths. `warm_up` compiles them all.
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
        sampling: Sampling | None = None,
        lanes: int | None = None,
        prefill_rows: int | None = None,
        chunk: int = 32,
        block: int = 8,
        dtype=jnp.float32,
        mesh: Mesh | None = None,
    ):
        """Checks the sizes; allocates nothing before the first dialogue.

        Args:
          config: the model.
          slots: K, dialogues whose caches are held at once.
          length: C, longest row in tokens.
          max_reply_tokens: longest reply.
          stop_ids: ids that end a reply.
          vocabulary_size: ids from here on are never sampled.
          sampling: the distribution; by default at temperature 1, unfiltered.
          lanes: M <= K, dialogues decoded at once; None: all slots. With as many lanes as slots the caches
            are decoded in place; with fewer, those in the lanes are copied out for a block.
          prefill_rows: rows of one prefill program; None: a quarter of the lanes.
          chunk: most tokens that one prefill program takes from each row.
          block: decode steps on the device before the host looks.
          dtype: of computation and cache.
          mesh: where the weights lie; slots and lanes are cut over its row axes, KV heads over `tensor`.

        Raises:
          UserError: a size that does not fit the model, the mesh or the device's memory, or a stop id
            outside the vocabulary.
        """
        shards = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in RULES["rows"]]))
        lanes = slots if lanes is None else lanes
        if prefill_rows is None:
            prefill_rows = max(1, lanes // 4 // shards) * shards
        _check_sizes(
            config, shards, length, max_reply_tokens, tuple(stop_ids), vocabulary_size,
            slots=slots, lanes=lanes, prefill_rows=prefill_rows, chunk=chunk, block=block,
        )  # fmt: skip
        self.config = config
        self.slots = slots
        self.lanes = lanes
        self.length = length
        self.max_reply_tokens = max_reply_tokens
        self.stop_ids = tuple(stop_ids)
        self.vocabulary_size = vocabulary_size
        self.sampling = sampling or Sampling()
        self.dtype = jnp.dtype(dtype)
        self.lengths = cache_lengths(length)
        self.prefill_rows, self.chunk = prefill_rows, chunk
        self.block = min(block, max_reply_tokens)
        self.version: int | None = None
        self.counts = Counts()
        self._shards = shards
        self._params: Params | None = None
        _check_memory(config, slots, lanes, length, self.dtype, mesh)
        self._compile(mesh)
        self.reset()

    # --- Weights and rows. ---

    def load(self, params: Params, version: int) -> None:
        """Takes new weights; every dialogue under way loses its cache and cannot be continued.

        Args:
          params: the weights; not copied (whoever donates them must load again).
          version: a number that tells these weights from others; the cache is kept if it is the loaded one.
        """
        if version != self.version:
            self.reset()
        self._params, self.version = params, version

    def unload(self) -> None:
        """Lets go of the weights and the cache, so that their memory is free until the next `load`."""
        self.reset()
        self._params = self.version = None

    def reset(self) -> None:
        """Empties every slot, forgets every reply under way, and frees the cache."""
        self._rows: list[list[int]] = [[] for _ in range(self.slots)]
        self._cached = np.zeros(self.slots, int)  # how many tokens of each row are in the cache
        self._submitted: deque[Request] = deque()
        self._going: dict[int, _Going] = {}  # by slot, in the order of their turn for a lane
        self._under_way: set[int] = set()  # slots of both
        self._cache: Cache | None = None

    def row(self, slot: int) -> tuple[int, ...]:
        """The tokens of a slot: prompts, replies and all, as the model saw them."""
        return tuple(self._rows[slot])

    # --- Replies. ---

    @property
    def busy(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._under_way)

    def reply(self, requests: Sequence[Request]) -> list[Reply]:
        """Samples the next reply of each dialogue; arguments and errors as of `submit`.

        Returns:
          A reply for each request, in their order.
        """
        if len({request.slot for request in requests}) != len(requests):
            raise ValueError("two requests for one slot")
        for request in requests:
            self.submit(request)
        replies: dict[int, Reply] = {}
        while self.busy:
            replies |= self.advance()
        return [replies[request.slot] for request in requests]

    def submit(self, request: Request) -> None:
        """Puts a request in line; `advance` will answer it. May be called while `advance` runs elsewhere.

        Raises:
          StaleSlot: a request continues a row that the slot does not hold (any more).
          UserError: a row that leaves no room for a reply.
          ValueError: no tokens to start with, a token outside the model, a limit below 1, or a slot that has
            a reply under way.
        """
        self._need_weights()
        slot, row = request.slot, self._rows[request.slot]
        if slot in self._under_way:
            raise ValueError(f"slot {slot} has a reply under way")
        if request.limit is not None and request.limit < 1:
            raise ValueError(f"a reply of at most {request.limit} tokens")
        for i in request.ids:
            if not 0 <= i < self.config.vocab_size:
                raise ValueError(f"token id {i} is outside the model's {self.config.vocab_size}")
        if request.start and len(request.ids) == 0:
            raise ValueError("a row starts with at least one token")
        if not request.start and self._cached[slot] == 0:
            raise StaleSlot(
                f"slot {slot} holds no dialogue of weights version {self.version}: "
                "its cache was dropped; start the row again"
            )
        size = len(request.ids) + (0 if request.start else len(row))
        if size >= self.length:
            raise UserError(
                f"a prompt of {size} tokens leaves no room for a reply in a cache of {self.length}; "
                "raise `rollout.max_tokens` or shorten the prompt"
            )
        self._under_way.add(slot)
        self._submitted.append(request)

    def advance(self) -> dict[int, Reply]:
        """Takes in what was submitted, runs one block of decode steps, and returns the replies that ended.

        Returns:
          Replies by slot. Their slots are free for the next request, of the same dialogue or another.
        """
        self._admit()
        return self._decode()

    def warm_up(self) -> None:
        """Compiles every program, so that no later call compiles anything. Empties all slots."""
        self._need_weights()
        cache = self._create(self.lengths[0])
        for length in self.lengths:
            if length > self.lengths[0]:
                cache = self._grow(cache, length)
            rows = np.full(self.prefill_rows, self.slots, np.int32)
            padding = np.full((self.prefill_rows, self.chunk), length, np.int32)
            cache = self._prefill(self._params, cache, rows, np.zeros_like(padding), padding)
            nowhere = np.full(self.slots, self.slots, np.int32)
            cache = self._insert(cache, nowhere, nowhere)
            cache, *_ = self._generate(self._params, cache, *self._lane_inputs([]))
        jax.block_until_ready(cache)
        self.reset()

    # --- Taking in. ---

    def _admit(self) -> None:
        """Prefills what was submitted: a start that another slot holds, or is about to hold, is copied."""
        requests = [self._submitted.popleft() for _ in range(len(self._submitted))]
        if not requests:
            return
        later, leaders = [], set()
        for request in requests:
            leader = (self._shard(request.slot), tuple(request.ids))
            if request.start and leader in leaders:
                later.append(request)
            elif request.start:
                leaders.add(leader)
        first = [request for request in requests if request not in later]
        for some in (first, later):
            # Every source is looked up before any row changes; and starts are copied before rows go on.
            sources = {r.slot: self._prefix(r) for r in some if r.start}
            for request in some:
                self._rows[request.slot] = [
                    *(() if request.start else self._rows[request.slot]),
                    *(int(i) for i in request.ids),
                ]
            self._copy(sources)
            self._write({request.slot: len(self._rows[request.slot]) - 1 for request in some})
        for request in requests:
            left = min(request.limit or self.max_reply_tokens, self.max_reply_tokens)
            left = min(left, self.length - len(self._rows[request.slot]))
            self._going[request.slot] = _Going(request, left)

    def _prefix(self, request: Request) -> tuple[int, int]:
        """The slot that holds most of a new row's start, and how many tokens of it; its last is never taken.

        Only slots on the same devices are looked at, so that no cache travels between them.
        """
        ids, best, most = list(request.ids), request.slot, 0
        head = ids[: self.chunk]
        shard = self._shard(request.slot)
        for slot in (request.slot, *range(shard * self._local, (shard + 1) * self._local)):
            row, cached = self._rows[slot], min(int(self._cached[slot]), len(ids) - 1)
            if cached <= most or row[: len(head)] != head:
                continue
            same = next((i for i in range(cached) if row[i] != ids[i]), cached)
            if same < len(ids) - 1:
                same -= same % self.chunk  # so that the chunks are cut as if nothing had been there
            if same > most:
                best, most = slot, same
        return best, most

    def _copy(self, sources: dict[int, tuple[int, int]]) -> None:
        """Fills slots (keys) with the first tokens of others: values are (slot, how many tokens)."""
        source, target = np.full((2, self.slots), self.slots, np.int32)
        for slot, (origin, count) in sources.items():
            self._cached[slot] = count
            self.counts.copied += count
            if count and origin != slot:
                source[slot], target[slot] = origin, slot
        if (target < self.slots).any():
            self._cache = self._insert(self._cache, source, target)

    def _write(self, ends: dict[int, int]) -> None:
        """Puts the tokens of each row up to its end into the cache, chunk by chunk."""
        self._fit(max(ends.values(), default=0) + 1)
        waiting = deque(slot for slot, end in ends.items() if end > self._cached[slot])
        width = self.prefill_rows // self._shards
        while waiting:
            slots = np.full(self.prefill_rows, self.slots, np.int32)
            tokens = np.zeros((self.prefill_rows, self.chunk), np.int32)
            positions = np.full_like(tokens, self.lengths[-1])  # beyond the cache: dropped
            taken = [0] * self._shards
            for _ in range(len(waiting)):
                slot = waiting.popleft()
                shard = self._shard(slot)
                if taken[shard] == width:
                    waiting.append(slot)
                    continue
                place = shard * width + taken[shard]
                taken[shard] += 1
                begin = int(self._cached[slot])
                count = min(self.chunk, ends[slot] - begin)
                slots[place] = slot
                tokens[place, :count] = self._rows[slot][begin : begin + count]
                positions[place, :count] = np.arange(begin, begin + count)
                self._cached[slot] += count
                self.counts.prefilled += count
                if self._cached[slot] < ends[slot]:
                    waiting.append(slot)
            self._cache = self._prefill(self._params, self._cache, slots, tokens, positions)

    # --- Decoding. ---

    def _decode(self) -> dict[int, Reply]:
        """Runs a block over the lanes and keeps its tokens."""
        width, taken, chosen = self.lanes // self._shards, [0] * self._shards, []
        for slot in self._going:
            shard = self._shard(slot)
            if taken[shard] < width:
                chosen.append((shard * width + taken[shard], slot))
                taken[shard] += 1
        if not chosen:
            return {}
        if self.lanes == self.slots:
            chosen = [(slot, slot) for _, slot in chosen]
        self._fit(max(len(self._rows[slot]) + min(self.block, self._going[slot].left) for _, slot in chosen))
        self._cache, *sampled = self._generate(self._params, self._cache, *self._lane_inputs(chosen))
        for array in sampled:
            array.copy_to_host_async()
        ids, logprobs, counts, steps = map(np.asarray, sampled)
        self.counts.sampled += int(counts.sum())
        self.counts.steps += int(steps)
        ended = {}
        for lane, slot in chosen:
            going, count = self._going[slot], int(counts[lane])
            going.ids += ids[lane, :count].tolist()
            going.logprobs += logprobs[lane, :count].tolist()
            going.left -= count
            self._rows[slot] += going.ids[len(going.ids) - count :]
            self._cached[slot] += count  # the last one sampled is not in it, the last one given is
            closed = going.ids[-1] in self.stop_ids
            if closed or going.left == 0:
                ended[slot] = Reply(tuple(going.ids), tuple(going.logprobs), not closed)
                del self._going[slot]
                self._under_way.remove(slot)
        return ended

    def _lane_inputs(self, chosen: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Arguments of `generate` after the cache, for (lane, slot) pairs; the other lanes stay idle."""
        slots = np.full(self.lanes, self.slots, np.int32)
        words = np.zeros((self.lanes, KEY_WORDS), np.uint32)
        tokens, positions, limits = np.zeros((3, self.lanes), np.int32)
        for lane, slot in chosen:
            row, going = self._rows[slot], self._going[slot]
            slots[lane] = slot
            words[lane] = (*going.request.key, going.request.turn)
            tokens[lane], positions[lane] = row[-1], len(row) - 1
            limits[lane] = min(going.left, self.block)
        inputs = [slots, words, tokens, positions, limits]
        if self.sampling.repetition_penalty != 1:
            seen = np.zeros((self.lanes, self.config.vocab_size), bool)
            for lane, slot in chosen:
                seen[lane, self._rows[slot]] = True
            inputs.append(seen)
        return inputs

    def _need_weights(self) -> None:
        if self._params is None:
            raise RuntimeError("the engine has no weights yet; call load first")

    @property
    def _local(self) -> int:
        return self.slots // self._shards

    def _shard(self, slot: int) -> int:
        return slot // self._local

    def _fit(self, tokens: int) -> None:
        """Makes the cache at least so long."""
        length = next(size for size in self.lengths if size >= tokens)
        if self._cache is None:
            self._cache = self._create(self.lengths[0])
        while self._cache[0][0].shape[2] < length:
            longer = self.lengths[self.lengths.index(self._cache[0][0].shape[2]) + 1]
            self._cache = self._grow(self._cache, longer)

    def _compile(self, mesh: Mesh | None) -> None:
        """Makes the jitted programs; each compiles when first called with a new shape."""
        cache_sharding = everywhere = None
        if mesh is not None:
            cache_sharding = NamedSharding(mesh, PartitionSpec(RULES["rows"], RULES["kv_heads"]))
            everywhere = NamedSharding(mesh, PartitionSpec())
        static = dict(config=self.config, dtype=self.dtype)
        create = functools.partial(init_cache, self.config, self.slots, dtype=self.dtype)
        self._create = jax.jit(create, static_argnums=0, out_shardings=cache_sharding)
        self._grow = jax.jit(_grow, static_argnums=1, out_shardings=cache_sharding)
        insert = functools.partial(_insert, shards=self._shards)
        self._insert = jax.jit(insert, donate_argnums=0, out_shardings=cache_sharding)
        prefill = functools.partial(_prefill, **static, shards=self._shards)
        self._prefill = jax.jit(prefill, donate_argnums=1, out_shardings=cache_sharding)
        generate = functools.partial(
            _generate,
            **static,
            shards=self._shards,
            in_place=self.lanes == self.slots,
            stop_ids=self.stop_ids,
            vocabulary_size=self.vocabulary_size,
            sampling=self.sampling,
            block=self.block,
        )
        shardings = None if mesh is None else (cache_sharding, *(everywhere,) * 4)
        self._generate = jax.jit(generate, donate_argnums=1, out_shardings=shardings)


# --- Sizes. ---


def _check_sizes(
    config: QwenConfig,
    shards: int,
    length: int,
    max_reply_tokens: int,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    **sizes: int,
) -> None:
    for name, value in {**sizes, "length": length, "max_reply_tokens": max_reply_tokens}.items():
        if value < 1:
            raise UserError(f"the engine's `{name}` is {value}; it must be at least 1")
    if sizes["lanes"] > sizes["slots"]:
        raise UserError(f"{sizes['lanes']} lanes are more than the {sizes['slots']} slots; lower the lanes")
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
    for name in ("slots", "lanes", "prefill_rows"):
        if sizes[name] % shards:
            raise UserError(
                f"{sizes[name]} {name} cannot be cut over the {shards} devices of the mesh's axes "
                f"{' and '.join(RULES['rows'])}; choose a multiple of {shards}"
            )


def cache_bytes(config: QwenConfig, slots: int, lanes: int, length: int, dtype) -> int:
    """Bytes of the caches: every slot's, and the copies of those in the lanes where they are fewer."""
    token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return token * length * (slots + (lanes if lanes < slots else 0))


def _check_memory(config, slots, lanes, length, dtype, mesh: Mesh | None) -> None:
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    needed = cache_bytes(config, slots, lanes, length, dtype) / len(devices)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and devices[0].platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    if limit is not None and needed > limit:
        raise UserError(
            f"the caches of {slots} slots of {length} tokens need {needed / 2**30:.1f} GiB on each device, "
            f"which has {limit / 2**30:.1f} GiB; lower `rollout.slots` or `rollout.max_tokens`"
        )


# --- Programs. ---


def _local_rows(slots: Int[Array, " M"], total: int, shards: int) -> Int[Array, "D M/D"]:
    """Slots as rows of their own shard's part; idle ones (`total`) stay out of range."""
    part = total // shards
    local = slots.reshape(shards, -1) - part * jnp.arange(shards)[:, None]
    return jnp.where(slots.reshape(shards, -1) < total, local, part)


def _take(array: Array, rows: Int[Array, "D M/D"]) -> Array:
    """Rows of a cache array, each shard's from its own part; what an idle row gives does not matter."""
    shards, count = rows.shape
    parts = array.reshape(shards, -1, *array.shape[1:])
    return jax.vmap(lambda part, index: part.at[index].get(mode="clip"))(parts, rows).reshape(
        shards * count, *array.shape[1:]
    )


def _put(array: Array, rows: Int[Array, "D M/D"], positions: Int[Array, "M N"], new: Array) -> Array:
    """Writes `new` [M, N, G, E] at positions of rows; idle rows and positions beyond the end are dropped."""
    shards = rows.shape[0]
    parts = array.reshape(shards, -1, *array.shape[1:])

    def put(part, index, position, value):
        return part.at[index[:, None], :, position].set(value.astype(part.dtype), mode="drop")

    return jax.vmap(put)(
        parts, rows, *(value.reshape(shards, -1, *value.shape[1:]) for value in (positions, new))
    ).reshape(array.shape)


def _new_entries(cache: Cache, positions: Int[Array, "M N"]) -> Cache:
    """Keys and values that lie at the positions: [M, N, G, E] each."""
    rows = jnp.arange(positions.shape[0])[:, None]
    return jax.tree.map(lambda array: array.at[rows, :, positions].get(mode="clip"), cache)


def _write_back(cache: Cache, work: Cache, rows: Int[Array, "D M/D"], positions: Int[Array, "M N"]) -> Cache:
    return jax.tree.map(
        lambda array, new: _put(array, rows, positions, new), cache, _new_entries(work, positions)
    )


def _prefill(
    params: Params,
    cache: Cache,
    slots: Int[Array, " P"],
    tokens: Int[Array, "P N"],
    positions: Int[Array, "P N"],
    *,
    config: QwenConfig,
    dtype,
    shards: int,
) -> Cache:
    rows = _local_rows(slots, cache[0][0].shape[0], shards)
    work = jax.tree.map(lambda array: _take(array, rows), cache)
    _, work = extend(params, config, tokens, positions, work, dtype=dtype)
    return _write_back(cache, work, rows, positions)


def _generate(
    params: Params,
    cache: Cache,
    slots: Int[Array, " M"],
    words: UInt32[Array, "M 4"],
    tokens: Int[Array, " M"],
    positions: Int[Array, " M"],
    limits: Int[Array, " M"],
    seen: Bool[Array, "M V"] | None = None,
    *,
    config: QwenConfig,
    dtype,
    shards: int,
    in_place: bool,
    stop_ids: tuple[int, ...],
    vocabulary_size: int,
    sampling: Sampling,
    block: int,
) -> tuple[Cache, Int[Array, "M N"], Float[Array, "M N"], Int[Array, " M"], Int[Array, ""]]:
    """Samples up to `limits` tokens in each lane (0: none); stops when all are done.

    Args:
      slots: which slot each lane decodes.
      words: keys of the random numbers.
      tokens: the last token of each row, not in the cache yet.
      positions: its index in the row.
      seen: tokens that the row holds; for the repetition penalty alone.

    Returns:
      (cache, ids, log-probabilities, how many of them each lane has, decode steps); N = `block`.
    """
    lanes, length = len(tokens), cache[0][0].shape[2]
    numbers = uniforms(words, positions[:, None] + 1 + jnp.arange(block))
    rows = _local_rows(slots, cache[0][0].shape[0], shards)
    work = cache if in_place else jax.tree.map(lambda array: _take(array, rows), cache)

    def going(state):
        step, *_, done = state
        return (step < block) & ~jnp.all(done)

    def advance(state):
        step, work, token, seen, ids, logprobs, counts, done = state
        position = jnp.where(done, length, positions + step)
        hidden, work = extend(params, config, token[:, None], position[:, None], work, dtype=dtype)
        scores = logits(params, config, hidden[:, 0], vocabulary_size=vocabulary_size)
        if seen is not None:
            scores = penalise(scores, seen, sampling.repetition_penalty)
        token, logprob = sample(scores, numbers[:, step], sampling)
        if seen is not None:
            seen = seen.at[jnp.arange(lanes), token].set(True)
        counts = counts + ~done
        ids = ids.at[:, step].set(token)  # what a done lane samples lies beyond its count
        logprobs = logprobs.at[:, step].set(logprob)
        stopped = functools.reduce(jnp.logical_or, [token == stop for stop in stop_ids], done)
        return step + 1, work, token, seen, ids, logprobs, counts, stopped | (counts >= limits)

    start = (
        jnp.int32(0),
        work,
        tokens,
        seen,
        jnp.zeros((lanes, block), jnp.int32),
        jnp.zeros((lanes, block), jnp.float32),
        jnp.zeros(lanes, jnp.int32),
        limits <= 0,
    )
    steps, work, _, _, ids, logprobs, counts, _ = jax.lax.while_loop(going, advance, start)
    if in_place:
        return work, ids, logprobs, counts, steps
    written = positions[:, None] + jnp.arange(block)
    written = jnp.where(jnp.arange(block) < counts[:, None], written, length)
    return _write_back(cache, work, rows, written), ids, logprobs, counts, steps


def _insert(cache: Cache, source: Int[Array, " K"], target: Int[Array, " K"], *, shards: int) -> Cache:
    """Copies whole rows; `source` and `target` are slots of one shard each, K where there is nothing."""
    total = cache[0][0].shape[0]
    sources, targets = (_local_rows(slots, total, shards) for slots in (source, target))

    def insert(array):
        parts = array.reshape(shards, -1, *array.shape[1:])
        copied = _take(array, sources).reshape(parts.shape)
        put = jax.vmap(lambda part, index, new: part.at[index].set(new, mode="drop"))
        return put(parts, targets, copied).reshape(array.shape)

    return jax.tree.map(insert, cache)


def _grow(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens."""
    return jax.tree.map(
        lambda array: jnp.pad(array, ((0, 0), (0, 0), (0, length - array.shape[2]), (0, 0))), cache
    )
