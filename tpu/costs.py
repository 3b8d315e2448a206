"""What a step of a recipe takes and costs on a slice: an estimate from the lower bounds of its programs.

Every dialogue is as long as it may be. Update and prefill are assumed to reach UPDATE of their bound by
operations, decoding DECODE of its bound by bytes; nobody has measured that yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tpu.slices import chip

if TYPE_CHECKING:
    from tpu.programs import Job

UPDATE, DECODE = 0.45, 0.6  # the targets of benchmarks/update.py and benchmarks/decode.py
TURN_SECONDS = 10.0  # of a turn's calls to user, director and judge, where the recipe expects nothing
# Dollars for an hour of a chip on demand, US regions; https://cloud.google.com/tpu/pricing has today's.
PRICES = {"v5e": 1.20, "v5p": 4.20, "v6e": 2.70}

PARTS = ("update", "decode", "prefill", "exchange", "waiting")


def step_seconds(job: Job, bounds: Mapping[str, Mapping[str, float]], copy: int) -> dict[str, float]:
    """Seconds of a step by PARTS. They add up: a lane is idle while its user answers.

    Args:
      bounds: of each program, as of `bounds.bounds`.
      copy: bytes of a chip's share of the sampling weights, which it receives once a step ("exchange").
    """
    config, engine = job.config, job.engine
    rollout, training = config.rollout, config.training
    dialogues = rollout.scenarios * rollout.rollouts // job.processes.count
    sampled = min(rollout.max_turns * rollout.max_reply_tokens, rollout.max_tokens // 2)
    chunks = dialogues * (rollout.max_tokens - sampled) / (engine.prefill_rows * engine.chunk)
    blocks = math.ceil(dialogues / engine.lanes) * sampled / engine.block
    updates = training.epochs * rollout.scenarios / training.minibatch_scenarios
    world = config.environment
    turn = sum(role.seconds for role in (world.user, world.director, world.judge)) or TURN_SECONDS
    return {
        "update": updates * max(bounds["train"].values()) / UPDATE,
        "decode": blocks * max(bounds["generate"].values()) / DECODE,
        "prefill": chunks * max(bounds["prefill"].values()) / UPDATE,
        "exchange": copy / chip(job.slice).interconnect,
        "waiting": rollout.max_turns * turn,
    }


def dollars(slice_name: str, chip_hours: float) -> float:
    """At PRICES."""
    return chip_hours * PRICES[slice_name.split("-")[0]]
