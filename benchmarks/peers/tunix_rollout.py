"""The reference work of benchmarks/rollout.py with Tunix's sampler, run in a separate environment.

Reads the work as JSON from the first line of standard input and prints "ready". For each further line it runs
the work once and prints the number of sampled tokens.

Tunix's sampler takes strings and keeps no cache between calls, so every turn starts from the beginning. It
samples at temperature 1 without filters and without a stop id, so that every reply has its full length.
"""

import json
import sys

import numpy as np
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3


class Numbers:
    """A tokenizer whose texts are ids in decimal."""

    def __init__(self, end: int):
        self._end = end

    def encode(self, text, **options):
        return [int(word) for word in text.split()]

    def decode(self, ids, **options):
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        return 0

    def eos_id(self):
        return self._end

    def pad_id(self):
        return 1


def main() -> None:
    work = json.loads(sys.stdin.readline())
    shape = work["shape"]
    config = ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    dialogues, turns, reply, length = (work[name] for name in ("dialogues", "turns", "reply", "length"))
    sampler = Sampler(
        Qwen3(config, rngs=nnx.Rngs(0)),
        Numbers(shape["vocab_size"]),
        CacheConfig(length + 8, config.num_layers, config.num_kv_heads, config.head_dim),
    )

    def run() -> int:
        rows = [[] for _ in range(dialogues)]
        for turn in range(turns):
            for row, new in zip(rows, work["users"][turn], strict=True):
                row += new
            # One prompt length per turn; the sampler compiles each once, in the first round.
            output = sampler(
                [" ".join(map(str, row)) for row in rows],
                max_generation_steps=reply,
                max_prompt_length=len(rows[0]),
                eos_tokens=[shape["vocab_size"]],
                temperature=1.0,
                top_p=1.0,
                seed=turn,
            )
            for row, tokens in zip(rows, output.tokens, strict=True):
                assert len(tokens) == reply
                row += np.asarray(tokens).tolist()
        assert all(len(row) == length for row in rows)
        return dialogues * turns * reply

    print("ready", flush=True)
    for _ in sys.stdin:
        print(run(), flush=True)


if __name__ == "__main__":
    main()
