"""Initial weights that can copy: an induction circuit in the first two layers of a fresh model.

To name what a user has said, a model must find the last occurrence of the current token and copy the token
that followed it: an induction head (Olsson et al. 2022, "In-context learning and induction heads",
arXiv:2209.11895). Training finds this circuit only after far more tokens than a warm start on a laptop sees.
So a fresh model starts with it. Training may change it freely.

- Layer 0, *previous token*: queries and keys read one constant coordinate of the embedding, so that scores
  depend on distance alone; the query is rotated back by one position in the fast rotary pairs, so the score
  peaks one token back. The value is the token's embedding in one subspace ("what"); the output writes it into
  another ("what came before").
- Layer 1, *induction*: the query reads "what" of the current token, the key "what came before" of an earlier
  one, in the slow rotary pairs, which distance hardly rotates. The value is the embedding at that position;
  the output adds it to the residual, and the tied head reads it as the next token.

Only Qwen3 (with its query and key norms) is supported. Every group of key/value heads gets the circuit, in
the first of its query heads.
"""

import jax
import numpy as np

from mapo_jax.model.qwen import Params, QwenConfig

# Tuned on loss and naming after a minute of training, and on copying of random rows before training.
EMBEDDING_SCALE = 0.1  # standard deviation of the embedding; with a tied head it also scales the first logits
CONSTANT = 4.0  # the constant coordinate, in standard deviations
OTHERS = 0.2  # factor on the output of all heads, so that the untrained ones do not mask the circuit
WRITE_BEFORE = 2.0  # gain with which "what came before" is written, in standard deviations
WRITE_NEXT = 12.0  # gain with which the copied embedding is written
SHARPNESS = 2.0  # scale of query and key norms in both layers
# Radians per token: rotary pairs above FAST distinguish neighbours, those below SLOW carry content.
FAST, SLOW = 0.15, 0.02


def with_induction_heads(params: Params, config: QwenConfig, seed: int) -> Params:
    """Fresh weights with the circuit written into them; unchanged if the architecture has no room for it.

    It needs Qwen3 norms, a tied embedding, two layers, rotary pairs of both kinds, and a model width of at
    least twice the slow pairs' coordinates for every group of heads.

    Args:
      params: from `init_params`; not modified.
      seed: of the subspaces.
    """
    width, size, groups = config.hidden_size, config.head_dim, config.num_kv_heads
    frequencies = config.rope_theta ** (-np.arange(0, size, 2) / size)
    fast, slow = (frequencies > FAST).astype(float), np.tile(frequencies < SLOW, 2)
    content = int(slow.sum())  # coordinates that carry content, in each of two subspaces per group
    room = 2 * groups * content <= width - 1 and content > 0 and size <= width - 1
    if not (config.qk_norm and config.tie_word_embeddings and config.num_layers >= 2 and room):
        return params

    params = jax.tree.map(np.array, params)
    attention, embedding = params["layers"]["attention"], params["embed"]["embedding"]
    query, key, value, output = (attention[name]["kernel"] for name in ("q", "k", "v", "o"))
    rng = np.random.default_rng(seed)
    embedding *= EMBEDDING_SCALE / embedding.std()
    embedding[:, 0] = CONSTANT * EMBEDDING_SCALE
    output *= OTHERS
    for name in ("q_norm", "k_norm"):
        attention[name]["scale"][:2] = SHARPNESS

    def orthonormal(columns: int) -> np.ndarray:
        """Orthonormal columns [D, columns] that do not read the constant coordinate."""
        basis, _ = np.linalg.qr(rng.standard_normal((width - 1, columns)))
        return np.concatenate([np.zeros((1, columns)), basis])

    subspaces = orthonormal(2 * groups * content)
    turned_back = np.concatenate([fast * np.cos(frequencies), -fast * np.sin(frequencies)])
    in_place = np.concatenate([fast, np.zeros_like(fast)])
    for group in range(groups):
        head = group * (config.num_heads // groups)
        what, before = np.zeros((2, width, size))
        what[:, slow] = subspaces[:, 2 * group * content : (2 * group + 1) * content]
        before[:, slow] = subspaces[:, (2 * group + 1) * content : (2 * group + 2) * content]
        query[0, :, head], query[0, 0, head] = 0.0, turned_back
        key[0, :, group], key[0, 0, group] = 0.0, in_place
        value[0, :, group] = what
        output[0, head] = before.T * EMBEDDING_SCALE * WRITE_BEFORE
        query[1, :, head], key[1, :, group] = what, before
        copied = orthonormal(size)
        value[1, :, group] = copied
        output[1, head] = copied.T * EMBEDDING_SCALE * WRITE_NEXT
    return params
