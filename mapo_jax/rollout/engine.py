"""Generation: slots with a KV cache that lives as long as a dialogue, and lanes that decode some of them.

The vocabulary is JetStream's. A *slot* holds one dialogue: the tokens of its row so far and their keys and
values. A new turn *prefills* the row's new tokens, in chunks and at each slot's own offset; if another slot
already has the start of a new row, it is *inserted* by copying. Then the dialogue takes a *lane*, and
*generate* decodes all lanes together: a loop of up to `block` steps on the device, then a check on the host.
A finished reply frees its lane for the next dialogue in line; a dialogue that waits for its user holds a slot
and no lane. Where the device has no room for the caches of all slots, the caches that have been idle longest
are *parked* in the host's memory when others need the room.

An example with two rows and a chunk of 4. Slot 0 continues at position 9 with five new tokens, slot 1 starts
with three. The last new token of each is the first input of `generate`; `-` is padding, which is dropped:

    prefill   tokens     [[a b c d], [x y - -]]      positions [[9 10 11 12], [0 1 - -]]
    generate  tokens     [e, z]                      positions [13, 2], then 14 and 3, ...

Every program has a fixed width (lanes, prefill rows), and on a CPU a row's result does not depend on its
place in a program nor on the other rows (tested): so a dialogue's tokens are the same bit for bit, in
whatever order users answer. The engine knows token ids only: no text, no dialogue, no reward.

The module is longer than others so that the slots' state and everything that changes it are in one place.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mapo_jax.errors import UserError
from mapo_jax.model.attention import cached_attention
from mapo_jax.model.cache import Cache
from mapo_jax.model.qwen import CacheAttention, Params, QwenConfig
from mapo_jax.model.sharding import row_shards
from mapo_jax.rollout.capacity import cache_lengths, check_memory, check_sizes, copies_weights
from mapo_jax.rollout.decoding import PerRequest, make_programs
from mapo_jax.rollout.device import Device, Exclusive
from mapo_jax.rollout.requests import Alternatives, Counts, Reply, Request, StaleSlot
from mapo_jax.rollout.sampling import KEY_WORDS, LaneSampling, RequestSampling, Sampling


@dataclass
class _ActiveReply:
    """A reply that is being decoded."""

    request: Request
    left: int  # tokens that it may still have
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)

    def reply(self, start: int = 0, truncated: bool = False) -> Reply:
        """What was sampled from token `start` on."""
        return Reply(
            tuple(self.ids[start:]),
            tuple(self.logprobs[start:]),
            truncated,
            tuple(self.alternatives[start:]),
        )


class Engine:
    """Replies to dialogues: `slots` caches of up to `length` tokens, `lanes` of them decoded at a time.

    Compiled programs for each of the `cache_lengths`: prefill, insert, generate, and, if not all slots are
    resident, park and restore; one that prepares the weights, one that creates the cache, and one that grows
    it for each step between two lengths. `load` and `warm_up` compile them all.
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
        per_request: bool = False,
        resident: int | None = None,
        lanes: int | None = None,
        prefill_rows: int | None = None,
        chunk: int | None = None,
        block: int | None = None,
        copy_weights: bool | None = None,
        dtype=jnp.float32,
        cache_dtype=None,
        attention: CacheAttention = cached_attention,
        mesh: Mesh | None = None,
        device: Device | None = None,
    ):
        """Checks the sizes; allocates nothing before the first dialogue.

        Args:
          config: the model.
          slots: dialogues at once.
          length: C, longest row in tokens.
          max_reply_tokens: longest reply.
          stop_ids: ids that end a reply.
          vocabulary_size: ids from here on are never sampled.
          sampling: the distribution; by default at temperature 1, unfiltered.
          per_request: every request has a distribution of its own, `sampling` is not used, and a request may
            ask for alternatives.
          resident: K <= slots, caches on the device at once; None: all. The others lie in the host's memory.
          lanes: M <= K, dialogues decoded at once; None: all resident ones. With M = K the caches are decoded
            in place; with fewer lanes, those in the lanes are copied out for a block.
          prefill_rows: rows of one prefill program; None: a quarter of the lanes.
          chunk: most tokens that one prefill program takes from each row; None: a sixteenth of the length,
            but between 32 and 512.
          block: decode steps on the device between two checks on the host; None: a sixteenth of the longest
            reply, but between 8 and 32.
          copy_weights: sample with a copy of the weights, cast and cut by layer once; else every step casts
            and cuts, and there is no second copy. The results are the same, bit for bit. None: a copy on CPU
            only.
          dtype: of computation.
          cache_dtype: of the cache; None: `dtype`; int8: in 8 bits, with a scale per token and head.
          attention: of a decoded token to its cache.
          mesh: where the weights lie; slots, caches and lanes are cut over its row axes, KV heads over
            `tensor`.
          device: shared with other threads that run programs; None: there are none.

        Raises:
          UserError: a size that does not fit the model, the mesh or the device's memory, or a stop id
            outside the vocabulary.
        """
        shards = row_shards(mesh)
        resident = slots if resident is None else resident
        lanes = resident if lanes is None else lanes
        if prefill_rows is None:
            prefill_rows = max(1, lanes // 4 // shards) * shards
        chunk = min(max(length // 16, 32), 512) if chunk is None else chunk
        block = min(max(max_reply_tokens // 16, 8), 32) if block is None else block
        check_sizes(
            config, shards, length, max_reply_tokens, tuple(stop_ids), vocabulary_size,
            slots=slots, resident=resident, lanes=lanes, prefill_rows=prefill_rows, chunk=chunk, block=block,
        )  # fmt: skip
        self.config, self.slots, self.length = config, slots, length
        self.resident, self.lanes, self.prefill_rows = resident, lanes, prefill_rows
        self.chunk, self.block = chunk, min(block, max_reply_tokens)
        self.copy_weights = copies_weights(copy_weights, mesh)
        self.max_reply_tokens = max_reply_tokens
        self.stop_ids = tuple(stop_ids)
        self.vocabulary_size = vocabulary_size
        self.sampling = sampling or Sampling()
        self.per_request = per_request
        self.dtype = jnp.dtype(dtype)
        self.lengths = cache_lengths(length)
        self.version: int | None = None
        self.counts = Counts()
        self.device = device or Device()
        self._shards = shards
        self._slots_per_shard = slots // shards
        self._params: Params | None = None
        cache_dtype = jnp.dtype(cache_dtype or dtype)
        check_memory(config, resident, lanes, length, cache_dtype, mesh)
        self._programs = make_programs(
            config,
            resident=resident,
            lanes=lanes,
            block=self.block,
            stop_ids=self.stop_ids,
            vocabulary_size=vocabulary_size,
            sampling=self.sampling,
            per_request=per_request,
            dtype=self.dtype,
            cache_dtype=cache_dtype,
            attention=attention,
            mesh=mesh,
        )
        self.reset()

    def twin(self) -> Engine:
        """Another engine with the same programs and sizes, and with slots, caches and weights of its own."""
        twin = copy.copy(self)
        twin.counts = Counts()
        twin.unload()
        return twin

    # --- Weights and rows. ---

    def load(self, params: Params, version: int) -> None:
        """Loads new weights; every dialogue loses its cache and cannot be continued.

        Args:
          params: the weights; copied in the engine's dtype, or, with `copy_weights` off, used as they are:
            after they are donated to another program, load again.
          version: number of these weights; the cache is kept if this version is loaded already.

        Raises:
          RuntimeError: replies of another version are unfinished.
        """
        if version != self.version:
            if self.busy:
                raise RuntimeError("new weights while replies are under way: advance to their end, or reset")
            self.reset()
        self._params = None  # free the old copy before the new one is made
        ready = Exclusive(self._programs.ready, self.device)
        self._params, self.version = ready(params) if self.copy_weights else params, version

    def reset(self) -> None:
        """Empties every slot, drops every unfinished reply, and frees the cache."""
        self._rows: list[list[int]] = [[] for _ in range(self.slots)]
        self._cached = np.zeros(self.slots, int)  # how many tokens of each row are in the cache
        self._started = np.zeros(self.slots, int)  # how many of them were prefilled as the row's start
        self._place = np.full(self.slots, -1, np.int32)  # row of the cache for each slot; -1: none
        places = self.resident // self._shards
        self._free = [list(range((s + 1) * places - 1, s * places - 1, -1)) for s in range(self._shards)]
        self._idle: dict[int, None] = {}  # slots with a place and no unfinished reply, longest idle first
        self._parked: dict[int, Cache] = {}  # by slot: numpy arrays
        self._released: set[int] = set()  # slots whose dialogue has ended
        self._submitted: deque[Request] = deque()
        self._active: dict[int, _ActiveReply] = {}  # by slot, in the order in which they get a lane
        self._unfinished: set[int] = set()  # slots of both
        self._cache: Cache | None = None

    def unload(self) -> None:
        """Frees the memory of the weights and the cache until the next `load`."""
        self.reset()
        self._params = self.version = None

    def row(self, slot: int) -> tuple[int, ...]:
        """All tokens of a slot, prompts and replies, as the model saw them."""
        return tuple(self._rows[slot])

    # --- Replies. ---

    @property
    def busy(self) -> bool:
        """Whether a reply is unfinished."""
        return bool(self._unfinished)

    def reply(self, requests: Sequence[Request]) -> list[Reply]:
        """Samples the next reply of each dialogue; arguments and errors as of `submit`.

        Returns:
          A reply for each request, in their order.
        """
        if len({request.slot for request in requests}) != len(requests):
            raise ValueError("two requests for one slot")
        for request in requests:  # all before the first is submitted
            self._check(request)
        for request in requests:
            self.submit(request)
        replies: dict[int, Reply] = {}
        while self.busy:
            replies |= self.advance()
        return [replies[request.slot] for request in requests]

    def submit(self, request: Request) -> None:
        """Queues a request for `advance`. May be called while `advance` runs in another thread.

        Raises:
          StaleSlot: a request continues a row that the slot does not hold (any more).
          UserError: a row that leaves no room for a reply.
          ValueError: no tokens to start with, a token outside the model, a limit below 1, no such slot, or
            a slot with an unfinished reply.
        """
        self._check(request)
        self._released.discard(request.slot)
        self._unfinished.add(request.slot)
        self._submitted.append(request)

    def release(self, slot: int) -> None:
        """Ends the dialogue of a slot: others may have the place of its cache, which is not parked for them.

        Until then the start of its row can be copied. May be called while `advance` runs in another thread.
        """
        self._released.add(slot)
        if self._place[slot] < 0:
            self._forget(slot)

    def _check(self, request: Request) -> None:
        self._need_weights()
        slot, ids = request.slot, request.ids
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} is none of the engine's {self.slots}")
        if slot in self._unfinished:
            raise ValueError(f"slot {slot} has a reply under way")
        if (request.sampling or request.alternatives) and not self.per_request:
            raise ValueError("a request has a distribution of its own; make the engine with `per_request`")
        if request.limit is not None and request.limit < 1:
            raise ValueError(f"a reply of at most {request.limit} tokens")
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise ValueError(f"token id {i} is outside the model's {self.config.vocab_size}")
        if request.start and len(ids) == 0:
            raise ValueError("a row starts with at least one token")
        if not request.start and self._cached[slot] == 0:
            raise StaleSlot(
                f"slot {slot} holds no dialogue of weights version {self.version}: "
                "its cache was dropped; start the row again"
            )
        size = len(ids) + (0 if request.start else len(self._rows[slot]))
        if size >= self.length:
            raise UserError(
                f"a prompt of {size} tokens leaves no room for a reply in a cache of {self.length}; "
                "raise `rollout.max_tokens` or shorten the prompt"
            )

    def sampled(self, slot: int, start: int = 0) -> Reply | None:
        """The unfinished reply of a slot from its token `start` on; None before its first block.

        Not while `advance` runs, as `cancel`.
        """
        active = self._active.get(slot)
        return active and active.reply(start)

    def cancel(self, slot: int) -> None:
        """Ends the unfinished reply of a slot, if there is one; its row keeps what was sampled."""
        if slot not in self._unfinished:
            return
        self._submitted = deque(request for request in self._submitted if request.slot != slot)
        if self._active.pop(slot, None) is not None:
            self._idle[slot] = None
        self._unfinished.remove(slot)

    def continued(self, slots: Iterable[int], ids: Sequence[int]) -> int | None:
        """The slot among `slots` whose row is the longest start of `ids`, and shorter; None without any.

        A request there continues the row with `ids[len(row):]` and computes nothing twice.
        """
        ids, best, longest = list(ids), None, 0
        for slot in slots:
            row = self._rows[slot]
            if longest < len(row) < len(ids) and self._cached[slot] and ids[: len(row)] == row:
                best, longest = slot, len(row)
        return best

    def advance(self, most: int | None = None) -> dict[int, Reply]:
        """Prefills the submitted requests, runs one block of decode steps, and returns the finished replies.

        Args:
          most: steps of the block at most; None: the engine's `block`.

        Returns:
          Replies by slot; each slot is free for the next request, of the same dialogue or another.
        """
        with self.device:
            started = time.monotonic()
            self._admit()
            replies = self._decode(min(most or self.block, self.block))
            self.counts.seconds += time.monotonic() - started
        return replies

    def warm_up(self) -> None:
        """Compiles every program, so that no later call compiles anything. Empties all slots."""
        self._need_weights()
        cache = self._programs.create(self.lengths[0])
        for length in self.lengths:
            if length > self.lengths[0]:
                cache = [self._programs.grow(entry, length) for entry in cache]
            rows = np.full(self.prefill_rows, self.resident, np.int32)
            padding = np.full((self.prefill_rows, self.chunk), length, np.int32)
            cache = self._programs.prefill(self._params, cache, rows, np.zeros_like(padding), padding)
            nowhere = np.full(self.resident, self.resident, np.int32)
            cache = self._programs.insert(cache, nowhere, nowhere)
            if self.resident < self.slots:
                place = np.int32(0)
                parked = jax.tree.map(np.asarray, self._programs.park(cache, place))
                cache = self._programs.restore(cache, place, parked)
            cache, *_ = self._programs.generate(self._params, cache, *self._lane_inputs([], length))
        jax.block_until_ready(cache)
        self.reset()

    def abstract_programs(self, params: Params) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The programs at the longest cache, for compilation without arrays.

        Args:
          params: the weights as `jax.ShapeDtypeStruct`s with shardings.

        Returns:
          Of prefill and generate: the jitted function and its arguments, as `warm_up` would give them.
        """
        create, ready = self._programs.create, self._programs.ready
        cache = create.eval_shape(self.lengths[-1])
        weights = ready.eval_shape(params) if self.copy_weights else params
        rows = np.zeros(self.prefill_rows, np.int32)
        padding = np.zeros((self.prefill_rows, self.chunk), np.int32)
        return {
            "prefill": (self._programs.prefill, (weights, cache, rows, padding, padding)),
            "generate": (self._programs.generate, (weights, cache, *self._lane_inputs([], self.lengths[-1]))),
        }

    # --- Prefill. ---

    def _admit(self) -> None:
        """Prefills the submitted requests; a start that another slot has, or is about to have, is copied."""
        requests, waiting = [], []
        for _ in range(len(self._submitted)):
            request = self._submitted.popleft()
            (requests if self._seat(request.slot) else waiting).append(request)
        self._submitted.extendleft(reversed(waiting))
        if not requests:
            return
        leaders, first, later = set(), [], []
        for request in requests:
            start = (self._shard(request.slot), tuple(request.ids))
            (later if request.start and start in leaders else first).append(request)
            if request.start:
                leaders.add(start)
        for group in (first, later):
            # Every source is looked up before any row changes, and starts are copied before rows grow.
            sources = {request.slot: self._prefix(request) for request in group if request.start}
            for request in group:
                row = [] if request.start else self._rows[request.slot]
                self._rows[request.slot] = [*row, *map(int, request.ids)]
            self._copy(sources)
            self._write({request.slot: len(self._rows[request.slot]) - 1 for request in group})
        for request in requests:
            left = min(request.limit or self.max_reply_tokens, self.max_reply_tokens)
            left = min(left, self.length - len(self._rows[request.slot]))
            self._active[request.slot] = _ActiveReply(request, left)

    def _seat(self, slot: int) -> bool:
        """Gives a slot's cache a place on the device; False if all places belong to unfinished replies."""
        if self._place[slot] < 0:
            free = self._free[self._shard(slot)]
            if not free:
                idle = (s for s in self._idle if self._shard(s) == self._shard(slot))
                idle = [s for s in idle if s not in self._unfinished]
                if not idle:
                    return False
                ended = next((s for s in idle if s in self._released), None)
                if ended is None:
                    self._park(idle[0])
                else:
                    self._vacate(ended)
                    self._forget(ended)
            self._place[slot] = free.pop()
            if slot in self._parked:  # the cache on the device may have grown meanwhile
                length = self._cache[0].length
                entries = [entry.grown(length, np) for entry in self._parked.pop(slot)]
                self._cache = self._programs.restore(self._cache, self._place[slot], entries)
        self._idle.pop(slot, None)
        return True

    def _park(self, slot: int) -> None:
        """Moves a cache to the host's memory."""
        self._parked[slot] = jax.tree.map(np.asarray, self._programs.park(self._cache, self._place[slot]))
        self._vacate(slot)
        self.counts.parked += 1

    def _forget(self, slot: int) -> None:
        self._rows[slot], self._cached[slot], self._started[slot] = [], 0, 0
        self._parked.pop(slot, None)

    def _vacate(self, slot: int) -> None:
        self._free[self._shard(slot)].append(int(self._place[slot]))
        self._place[slot] = -1
        del self._idle[slot]

    def _prefix(self, request: Request) -> tuple[int, int]:
        """The slot that holds most of a new row's start, and how many tokens of it, the last one excluded.

        Only slots on the same devices are searched, so that no cache moves between devices; and only tokens
        of their starts, since decoded entries differ from prefilled ones in rounding.
        """
        ids, best, most = list(request.ids), request.slot, 0
        head = ids[: self.chunk]
        first = self._shard(request.slot) * self._slots_per_shard
        for slot in (request.slot, *range(first, first + self._slots_per_shard)):
            row, cached = self._rows[slot], min(int(self._started[slot]), len(ids) - 1)
            if self._place[slot] < 0 or cached <= most or row[: len(head)] != head:
                continue
            same = next((i for i in range(cached) if row[i] != ids[i]), cached)
            if same < len(ids) - 1:
                same -= same % self.chunk  # so that the chunks are cut as without a copy
            if same > most:
                best, most = slot, same
        return best, most

    def _copy(self, sources: dict[int, tuple[int, int]]) -> None:
        """Fills slots (keys) with the first tokens of others: values are (slot, how many tokens)."""
        source, target = np.full((2, self.resident), self.resident, np.int32)
        for slot, (origin, count) in sources.items():
            self._cached[slot] = count
            self._started[slot] = len(self._rows[slot]) - 1
            self.counts.copied += count
            if count and origin != slot:
                place = self._place[slot]
                source[place], target[place] = self._place[origin], place
        if (target < self.resident).any():
            self._cache = self._programs.insert(self._cache, source, target)

    def _write(self, ends: dict[int, int]) -> None:
        """Prefills each row up to its end, chunk by chunk."""
        self._fit(max(ends.values(), default=0) + 1)
        waiting = [slot for slot, end in ends.items() if end > self._cached[slot]]
        while waiting:
            places = np.full(self.prefill_rows, self.resident, np.int32)
            tokens = np.zeros((self.prefill_rows, self.chunk), np.int32)
            positions = np.full_like(tokens, self.lengths[-1])  # beyond the cache: dropped
            for line, slot in self._assign(waiting, self.prefill_rows):
                begin = int(self._cached[slot])
                count = min(self.chunk, ends[slot] - begin)
                places[line] = self._place[slot]
                tokens[line, :count] = self._rows[slot][begin : begin + count]
                positions[line, :count] = np.arange(begin, begin + count)
                self._cached[slot] += count
                self.counts.prefilled += count
            waiting = [slot for slot in waiting if self._cached[slot] < ends[slot]]
            self._cache = self._programs.prefill(self._params, self._cache, places, tokens, positions)

    def _assign(self, slots: Iterable[int], lines: int) -> list[tuple[int, int]]:
        """(line, slot) pairs of a program whose lines are cut over the shards; slots without a line are left
        out."""
        width, used, pairs = lines // self._shards, [0] * self._shards, []
        for slot in slots:
            shard = self._shard(slot)
            if used[shard] < width:
                pairs.append((shard * width + used[shard], slot))
                used[shard] += 1
        return pairs

    # --- Decoding. ---

    def _decode(self, block: int) -> dict[int, Reply]:
        """Runs a block over the lanes and stores its tokens."""
        chosen = self._assign(self._active, self.lanes)
        if not chosen:
            return {}
        if self.lanes == self.resident:
            chosen = [(int(self._place[slot]), slot) for _, slot in chosen]
        self._fit(max(len(self._rows[slot]) + min(block, self._active[slot].left) for _, slot in chosen))
        inputs = self._lane_inputs(chosen, self._cache[0].length, block)
        self._cache, *sampled = self._programs.generate(self._params, self._cache, *inputs)
        for array in sampled:
            array.copy_to_host_async()
        ids, logprobs, counts, steps, *others = map(np.asarray, sampled)
        self.counts.sampled += int(counts.sum())
        self.counts.steps += int(steps)
        replies = {}
        for lane, slot in chosen:
            active, count = self._active[slot], int(counts[lane])
            new = ids[lane, :count].tolist()
            active.ids += new
            active.logprobs += logprobs[lane, :count].tolist()
            if active.request.alternatives:
                own, top, top_logprobs = (array[lane, :count].tolist() for array in others)
                active.alternatives += map(Alternatives, own, map(tuple, top), map(tuple, top_logprobs))
            active.left -= count
            self._rows[slot] += new
            self._cached[slot] += count  # without the last sampled token, with the one before the first
            stopped = active.ids[-1] in self.stop_ids
            if stopped or active.left == 0:
                replies[slot] = active.reply(truncated=not stopped)
                del self._active[slot]
                self._idle[slot] = None
                self._unfinished.remove(slot)
        return replies

    def _lane_inputs(self, chosen: Sequence[tuple[int, int]], length: int, block: int = 0) -> list[Any]:
        """Arguments of `generate` after a cache of `length`, for (lane, slot) pairs; the other lanes idle."""
        places = np.full(self.lanes, self.resident, np.int32)
        words = np.zeros((self.lanes, KEY_WORDS), np.uint32)
        tokens, positions, limits = np.zeros((3, self.lanes), np.int32)
        for lane, slot in chosen:
            row, active = self._rows[slot], self._active[slot]
            places[lane] = self._place[slot]
            words[lane] = (*active.request.key, active.request.turn)
            tokens[lane], positions[lane] = row[-1], len(row) - 1
            limits[lane] = min(active.left, block)
        inputs = [places, words, tokens, positions, limits]
        if self.per_request:
            lanes = [RequestSampling()] * self.lanes
            rows = np.full((self.lanes, length), self.config.vocab_size, np.int32)
            replies = np.zeros(self.lanes, np.int32)
            for lane, slot in chosen:
                row, active = self._rows[slot], self._active[slot]
                lanes[lane] = active.request.sampling or lanes[lane]
                if lanes[lane].penalises:  # nothing else reads the rows, and filling them takes time
                    rows[lane, : len(row)] = row
                replies[lane] = len(row) - len(active.ids)
            wanted = np.array(any(self._active[slot].request.alternatives for _, slot in chosen))
            return [*inputs, None, PerRequest(LaneSampling.of(lanes), rows, replies, wanted)]
        if self.sampling.repetition_penalty != 1:
            seen = np.zeros((self.lanes, self.config.vocab_size), bool)
            for lane, slot in chosen:
                seen[lane, self._rows[slot]] = True
            inputs.append(seen)
        return inputs

    def _need_weights(self) -> None:
        if self._params is None:
            raise RuntimeError("the engine has no weights yet; call load first")

    def _shard(self, slot: int) -> int:
        return slot // self._slots_per_shard

    def _fit(self, tokens: int) -> None:
        """Grows the cache to a length that holds `tokens`."""
        length = next(size for size in self.lengths if size >= tokens)
        if self._cache is None:
            self._cache = self._programs.create(self.lengths[0])
        while self._cache[0].length < length:
            longer = self.lengths[self.lengths.index(self._cache[0].length) + 1]
            for index, entry in enumerate(
                self._cache
            ):  # layer by layer, so that no second whole cache exists
                self._cache[index] = self._programs.grow(entry, longer)
