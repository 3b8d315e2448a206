"""Host work of a step with 1, 2 and 4 processes and a constant number of dialogues per process.

    python benchmarks/hosts.py [--steps 5] [--dialogues 64] [--json FILE]

Runs the host's part of a step with the training run's functions: dialogues with the scripted world (an
engine that returns random tokens replaces the device), cells and advantages, token rows, gathering them,
metrics, and writing the dialogues. There are no weights, forward or backward passes. Measures the CPU time
of all threads of a process, because wall time means nothing with fewer cores than processes; waiting uses no
CPU time. Reports the busiest process and the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROLLOUTS = 8


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main() -> None:
    """Starts the processes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one that is not")
    parser.add_argument("--dialogues", type=int, default=64, help="dialogues per process, a multiple of 8")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options, Path(options.worker))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in options.counts:
            results[count] = measure(options, count, folder)
    first = results[options.counts[0]]
    phases = list(first[0])
    print(f"CPU milliseconds a step of the busiest process (mean); {options.dialogues} dialogues in each")
    print(f"{'processes':<10}" + "".join(f"{phase:>18}" for phase in phases) + f"{'growth':>9}")
    for count, processes in results.items():
        cells = []
        for phase in phases:
            values = [process[phase] for process in processes]
            cells.append(f"{max(values):9.1f} ({sum(values) / count:6.1f})")
        growth = max(process["all"] for process in processes) / first[0]["all"] - 1
        print(f"{count:<10}" + "".join(f"{cell:>18}" for cell in cells) + f"{growth:>9.0%}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measure(options: argparse.Namespace, count: int, folder: str) -> list[dict[str, float]]:
    """CPU milliseconds per phase, for each process."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, __file__, "--worker", folder, "--steps", str(options.steps)]
    workers = [
        subprocess.Popen(
            [*command, "--dialogues", str(options.dialogues)],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [worker.communicate(timeout=1800)[0] for worker in workers]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


class RandomEngine:
    """An engine for `rollout.collect` that answers every request at once with random ids."""

    def __init__(self, slots: int, length: int, vocabulary: int, stop: int):
        import numpy as np

        self.slots, self.length, self.max_reply_tokens, self.version = slots, length, 32, 0
        self._vocabulary, self._stop = vocabulary, stop
        self._random, self._waiting = np.random.default_rng(0), []

    def reset(self) -> None:
        self._waiting = []

    def release(self, slot: int) -> None:
        pass

    def submit(self, request) -> None:
        self._waiting.append(request.slot)

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def advance(self) -> dict:
        from mapo_jax.rollout.requests import Reply

        waiting, self._waiting = self._waiting, []
        replies = {}
        for slot in waiting:
            ids = self._random.integers(8, self._vocabulary, self._random.integers(8, 31)).tolist()
            replies[slot] = Reply((*ids, self._stop), (-1.0,) * (len(ids) + 1), False)
        return replies


def work(options: argparse.Namespace, folder: Path) -> None:
    """One process: runs the host's part of the steps and prints its CPU time by phase."""
    count = int(os.environ["JAX_NUM_PROCESSES"])
    from mapo_jax.config import load_config

    scenarios = options.dialogues * count // ROLLOUTS
    config = load_config(None, [f"rollout.scenarios={scenarios}", f"rollout.rollouts={ROLLOUTS}"])
    from mapo_jax.running.processes import join

    with join(config) as processes:
        figures = steps(config, processes, folder, options.steps)
        processes.finish()
    print(json.dumps(figures), flush=True)


def steps(config, processes, folder: Path, counted: int) -> dict[str, float]:
    """CPU milliseconds a step."""
    import numpy as np

    from mapo_jax.environment.dialogue import from_stripped, strip_texts
    from mapo_jax.environment.scenario import load_scenarios
    from mapo_jax.environment.scripted import scripted_roles
    from mapo_jax.environment.scripted.readings import reading_metrics
    from mapo_jax.environment.state import Limits
    from mapo_jax.files import part_name, part_of, write_whole
    from mapo_jax.learning import batch as rows
    from mapo_jax.learning.credit import turn_advantages, turn_returns, turn_rewards
    from mapo_jax.rollout.collect import collect
    from mapo_jax.rollout.rows import ChatFormat
    from mapo_jax.scores.figures import summarize
    from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer

    cards = load_scenarios(None, "train")
    model = folder / f"tokenizer{processes.index}"
    tokenizer = train_tokenizer([c.story.stages[0].line[0] for c in cards], 2000, max_tokens=512)
    write_tokenizer(model, tokenizer)
    chat = ChatFormat(load_tokenizer(model))
    share = processes.share(config.rollout.scenarios)
    engine = RandomEngine(
        (share.stop - share.start) * ROLLOUTS,
        config.rollout.max_tokens,
        chat.vocabulary_size,
        chat.end_of_turn[0],
    )
    roles, algorithm = scripted_roles(config.environment), config.algorithm
    limits = Limits(config.rollout.min_turns, config.rollout.max_turns, 0.05)
    spent: dict[str, float] = {}
    clock = time.process_time()

    def lap(phase: str, step: int) -> None:
        nonlocal clock
        now = time.process_time()
        if step:  # the first step compiles
            spent[phase] = spent.get(phase, 0.0) + 1000 * (now - clock) / counted
        clock = now

    for step in range(counted + 1):
        scenarios = [cards[(step + s) % len(cards)] for s in range(config.rollout.scenarios)]
        processes.exchange("step", step)
        lap("waiting", step)
        dialogues = asyncio.run(
            collect(
                scenarios,
                ROLLOUTS,
                engine,
                chat,
                roles,
                limits,
                seed=1,
                step=step,
                concurrency=64,
                share=share,
            )
        )
        lap("dialogues", step)
        processes.exchange("held", None)
        cells = rows.make_cells(dialogues, config.rollout.max_turns)
        cells = rows.Cells(*processes.gather((cells.positions, cells.valid, cells.scored)))
        rewards = turn_rewards(cells.positions, cells.scored, algorithm=algorithm)
        returns = turn_returns(rewards, cells.valid, cells.scored, algorithm=algorithm)
        advantages = turn_advantages(rewards, returns, cells.valid, cells.scored, algorithm=algorithm)
        batch = rows.make_batch(
            dialogues, np.asarray(advantages)[share], cells.scored[share], config.rollout.max_tokens
        )
        lap("rows", step)
        batch = processes.gather(batch)
        for chosen in rows.scenario_order(0, step, 0, config.rollout.scenarios, 2):
            rows.take_scenarios(batch, chosen, ROLLOUTS)
        lap("gathering", step)
        held = [(dialogue.scenario, strip_texts(dialogue.state)) for group in dialogues for dialogue in group]
        if (parts := processes.report("figures", held)) is not None:
            states = [from_stripped(scenarios[s], what) for part in parts for s, what in part]
            summarize(states, 0.85), reading_metrics(states)
        lap("metrics", step)
        lines = [json.dumps(dialogue.to_json()) for group in dialogues for dialogue in group]
        file = part_of(folder / f"step_{step:06d}.jsonl", part_name(processes.index, processes.count))
        write_whole(file, "\n".join(lines))
        lap("files", step)
    return spent | {"all": sum(spent.values())}


if __name__ == "__main__":
    main()
