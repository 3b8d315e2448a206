"""Logits and log-probabilities of hidden states, in float32 and without an array [B, L, V]."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mapo_jax.model.attention import MASKED
from mapo_jax.model.qwen import Params, QwenConfig
from mapo_jax.model.sharding import RULES


def logits(
    params: Params, config: QwenConfig, hidden: Float[Array, "... D"], *, vocabulary_size: int | None = None
) -> Float[Array, "... V"]:
    """Float32 logits.

    Args:
      vocabulary_size: ids from here on are no tokens (the embedding has more rows than the tokenizer has
        ids); their logits are -1e30, so that they have probability 0 and are never sampled.
    """
    kernel, axis = _kernel(params, config)
    vocabulary = jnp.arange(config.vocab_size)
    return _logits(kernel.astype(hidden.dtype), axis, hidden, vocabulary, vocabulary_size)


def _kernel(params: Params, config: QwenConfig) -> tuple[Array, int]:
    """The head's matrix, and its axis D."""
    if config.tie_word_embeddings:
        return params["embed"]["embedding"], 1
    return params["head"]["kernel"], 0


def _logits(kernel, axis, hidden, vocabulary, vocabulary_size):
    axes = (((hidden.ndim - 1,), (axis,)), ((), ()))
    scores = jax.lax.dot_general(hidden, kernel, axes, preferred_element_type=jnp.float32)
    return scores if vocabulary_size is None else jnp.where(vocabulary < vocabulary_size, scores, MASKED)


def token_logprobs(
    params: Params,
    config: QwenConfig,
    hidden: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    wanted: Bool[Array, "B L"] | None = None,
    *,
    temperature: float = 1.0,
    vocabulary_size: int | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Log-probability of each target, and the entropy of the distribution it comes from.

    The distribution is softmax(logits / temperature). Logits are computed for about `chunk` tokens of each
    device at a time, the same columns of every row, and recomputed in the backward pass: memory is that of a
    few [chunk, V] arrays.

    Args:
      wanted: the tokens whose results are needed. A chunk without any is skipped and its results are 0; so
        put wanted tokens into the first columns.
      chunk: None: `head_chunk`.
      mesh: of weights and rows. The head's matrix is gathered once before the first chunk and its gradient
        reduced once after the last, not with every chunk; the vocabulary stays cut over `tensor`.

    Returns:
      (log-probabilities, entropies), float32, in nats.
    """
    kernel, axis = _kernel(params, config)
    if wanted is None:
        wanted = jnp.ones(targets.shape, bool)
    cut_over = RULES["vocabulary"] if mesh is not None and mesh.shape[RULES["vocabulary"]] > 1 else None
    score = functools.partial(
        _scores, axis=axis, temperature=temperature, vocabulary_size=vocabulary_size, cut_over=cut_over
    )
    chunks = _Chunks(score, chunk or head_chunk(config.vocab_size), axis, hidden.dtype, mesh)
    return _in_chunks(chunks, kernel, hidden, targets, wanted)


def head_chunk(vocabulary: int) -> int:
    """Tokens whose logits are in memory at once.

    The backward pass adds to the matrix's whole gradient with every chunk: on an accelerator smaller chunks
    would be limited by memory bandwidth. A small vocabulary is computed on a CPU, in its cache.
    """
    return 256 if vocabulary <= 2**15 else 512


def _scores(kernel, states, ids, *, axis, temperature, vocabulary_size, cut_over):
    """Log-probabilities and entropies of some tokens, from their logits.

    Args:
      cut_over: the mesh axis that the vocabulary is cut over, inside a `shard_map`: each device has its slice
        of the logits, and only sums and maxima are communicated.
    """
    size = kernel.shape[1 - axis]
    vocabulary = jnp.arange(size) + (0 if cut_over is None else size * jax.lax.axis_index(cut_over))
    scores = _logits(kernel, axis, states, vocabulary, vocabulary_size) / temperature
    here = vocabulary == ids[..., None]
    chosen = jnp.sum(jnp.where(here, scores, 0.0), axis=-1)  # one term and zeros: exact
    if cut_over is None:
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        mean = jnp.sum(jnp.exp(scores - normaliser[..., None]) * scores, axis=-1)
    else:
        top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(scores, axis=-1)), cut_over)
        weights = jnp.exp(scores - top[..., None])
        parts = jnp.stack([chosen, jnp.sum(weights, axis=-1), jnp.sum(weights * scores, axis=-1)])
        chosen, total, weighted = _sum_over(cut_over, parts)
        normaliser, mean = top + jnp.log(total), weighted / total
    return chosen - normaliser, normaliser - mean


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over(axis: str, part: Array) -> Array:
    """The sum over a mesh axis. Every device has its gradient already, which is that of each summand."""
    return jax.lax.psum(part, axis)


_sum_over.defvjp(lambda axis, part: (jax.lax.psum(part, axis), None), lambda axis, _, given: (given,))


@dataclass(frozen=True)
class _Chunks:
    """The arguments of `_in_chunks` without a gradient."""

    score: functools.partial  # (kernel, states [B, W, D], ids [B, W]) -> (log-probabilities, entropies)
    tokens: int  # of each device at a time
    axis: int  # of the kernel: D
    dtype: jnp.dtype
    mesh: Mesh | None

    def cut(self, array: Array) -> Array:
        """[B, L, ...] -> [chunks, B, W, ...], padded with zeros."""
        batch, length = array.shape[:2]
        width = max(1, min(length, self.tokens // batch))
        padded = jnp.pad(array, ((0, 0), (0, -length % width), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, -1, width, *array.shape[2:]), 1, 0)

    def whole(self, array: Array, length: int) -> Array:
        """The inverse of `cut`."""
        array = jnp.moveaxis(array, 0, 1)
        return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]

    def on_mesh(self, function, *, cotangents: int = 0):
        """`function` on every device's rows and slice of the vocabulary.

        Args:
          cotangents: their number in the backward pass; 0: the forward pass.
        """
        if self.mesh is None:
            return function
        rows, width, vocabulary = (PartitionSpec(RULES[axis]) for axis in ("rows", "width", "vocabulary"))
        order = slice(None, None, 1 if self.axis == 0 else -1)
        kernel = PartitionSpec(*(*width, *vocabulary)[order])
        gathered = PartitionSpec(*(None, *vocabulary)[order])
        if cotangents:
            inputs, outputs = (gathered, *(rows,) * (3 + cotangents)), (kernel, rows)
        else:
            inputs, outputs = (kernel, rows, rows, rows), (rows, rows, gathered)
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(chunks: _Chunks, kernel, hidden, targets, wanted):
    return _forward(chunks, kernel, hidden, targets, wanted)[0]


def _forward(chunks, kernel, hidden, targets, wanted):
    def local(kernel, hidden, targets, wanted):
        kernel = kernel.astype(chunks.dtype)
        if chunks.mesh is not None:
            kernel = jax.lax.all_gather(kernel, RULES["width"], axis=chunks.axis, tiled=True)

        def score(chunk):
            states, ids, needed = chunk
            zeros = (jnp.zeros(ids.shape, jnp.float32),) * 2
            return jax.lax.cond(jnp.any(needed), lambda: chunks.score(kernel, states, ids), lambda: zeros)

        scores = jax.lax.map(score, tuple(map(chunks.cut, (hidden, targets, wanted))))
        return *(chunks.whole(array, targets.shape[1]) for array in scores), kernel

    *scores, gathered = chunks.on_mesh(local)(kernel, hidden, targets, wanted)
    # The empty array carries the kernel's dtype.
    return tuple(scores), (gathered, jnp.zeros(0, kernel.dtype), hidden, targets, wanted)


def _forward_rule(chunks, *primals):
    return _forward(chunks, *(primal.value for primal in primals))


def _backward(chunks, residuals, cotangents):
    gathered, like_kernel, hidden, targets, wanted = residuals
    # Outputs that are not in the loss, as an entropy that is only reported, cost nothing.
    used = [i for i, cotangent in enumerate(cotangents) if not isinstance(cotangent, SymbolicZero)]
    if not used:
        return None, None, None, None
    cotangents = [cotangents[index] for index in used]

    def local(kernel, hidden, targets, wanted, *cotangents):
        def one(total, chunk):
            states, ids, needed, *cotangents = chunk

            def score(kernel, states):
                scores = chunks.score(kernel, states, ids)
                return [scores[index] for index in used]

            def add():
                _, pull = jax.vjp(score, kernel, states)
                of_kernel, of_states = pull(cotangents)
                return total + of_kernel.astype(jnp.float32), of_states

            return jax.lax.cond(jnp.any(needed), add, lambda: (total, jnp.zeros_like(states)))

        arrays = tuple(map(chunks.cut, (hidden, targets, wanted, *cotangents)))
        total, states = jax.lax.scan(one, jnp.zeros(kernel.shape, jnp.float32), arrays, reverse=True)
        states = chunks.whole(states, targets.shape[1])
        if chunks.mesh is not None:
            total = jax.lax.psum_scatter(total, RULES["width"], scatter_dimension=chunks.axis, tiled=True)
            total = jax.lax.psum(total, tuple(axis for axis in RULES["rows"] if axis != RULES["width"]))
            # Else the compiler sums whole matrices over the micro-batches, and reduces them once.
            total = jax.lax.optimization_barrier(total)
            states = jax.lax.psum(states, RULES["vocabulary"])
        return total, states

    backward = chunks.on_mesh(local, cotangents=len(used))
    total, states = backward(gathered, hidden, targets, wanted, *cotangents)
    return total.astype(like_kernel.dtype), states, None, None


_in_chunks.defvjp(_forward_rule, _backward, symbolic_zeros=True)
