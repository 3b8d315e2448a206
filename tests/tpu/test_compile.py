"""The programs of every TPU recipe, with two layers of full width, compiled for real chips that are not here."""

import importlib.util
from pathlib import Path

import pytest

from mapo_jax.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path.stem for chip in ("v5p", "v6e") for path in CONFIGS.glob(f"*_{chip}.yaml"))
# Few chips and short rows: the program's text is that of the large slice, with smaller numbers in it.
SMALL = [
    "rollout.scenarios=4", "rollout.rollouts=2", "rollout.max_turns=4", "rollout.max_reply_tokens=64",
    "rollout.min_turns=2", "rollout.max_tokens=1024", "training.minibatch_scenarios=4",
    "training.microbatch_rows=4", "mesh.fsdp=2",
]  # fmt: skip

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (requirements-tpu.txt): nothing here can compile for TPUs",
)


def job_of(recipe, chip, *overrides):
    from tpu.compile import make_job

    config = load_config(CONFIGS / f"{recipe}.yaml", [*SMALL, *overrides])
    chips = 2 * config.mesh.tensor
    return make_job(config, f"{chip}-{2 * chips if chip == 'v5p' else chips}", layers=2)


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_compiles_for_every_chip(recipe, chip):
    from tpu.compile import PROGRAMS, compile_program

    job = job_of(recipe, chip)
    for program in PROGRAMS:
        result = compile_program(job, program)
        assert result.good, (program, result)
