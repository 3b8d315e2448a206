"""The cache, the check with its one repair, and the log of failures."""

import asyncio
import json
import sqlite3

import pytest

from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.call_cache import CallCache
from mapo_jax.environment.live.calls import Caller, CallLog, call_figures
from mapo_jax.environment.roles import Completion
from mapo_jax.errors import UserError

CHAT = [{"role": "user", "content": "Hello."}]


class Model:
    """Answers with its lines in turn; raises a line that is an exception."""

    def __init__(self, *lines):
        self.lines, self.heard = list(lines), []

    async def __call__(self, messages, *, seed, schema):
        self.heard.append((messages, seed, schema))
        line = self.lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return Completion(line, 10, 5)


def check(text):
    if text != "good":
        raise RoleFailure("out_of_range" if text == "far" else "malformed", f"{text} is not good")


def repair(problem):
    return f"Mend: {problem}"


def make(tmp_path, model, **settings):
    log = CallLog(tmp_path / "failures.jsonl")
    return Caller("judge", model, {"model": "m", **settings}, log, CallCache(tmp_path / "calls.sqlite")), log


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]


def test_the_same_call_is_made_once_and_any_difference_is_another_call(tmp_path):
    model = Model(*"abcdef")
    caller, log = make(tmp_path, model)
    ask = lambda caller, *args, **kw: asyncio.run(caller(*args, **kw))  # noqa: E731
    assert ask(caller, CHAT, seed=1) == ask(caller, CHAT, seed=1) == "a"
    assert ask(caller, CHAT, seed=2) == "b"
    assert ask(caller, [{"role": "user", "content": "Hello!"}], seed=1) == "c"
    assert ask(caller, CHAT, seed=1, schema={"type": "object"}) == "d"
    other, _ = make(tmp_path, model, temperature=0.5)
    assert ask(other, CHAT, seed=1) == "e"
    user = Caller("user", model, {"model": "m"}, log, caller.cache)
    assert ask(user, CHAT, seed=1) == "f"
    again, _ = make(tmp_path, Model())
    assert ask(again, CHAT, seed=1) == "a"  # from the file
    metrics = call_figures([log.drain()], {"judge": (1e6, 2e6)})
    assert metrics["judge/calls"] == 5 and metrics["judge/cached"] == 1
    assert metrics["judge/cost"] == 4 * (10 + 2 * 5)  # four paid calls: a, b, c, d
    assert call_figures([log.drain()], {}) == {"environment/cost": 0.0}


def test_one_repair_with_the_reason_and_the_answer_before_it(tmp_path):
    model = Model("bad", "good")
    caller, log = make(tmp_path, model)
    assert asyncio.run(caller(CHAT, seed=1, check=check, repair=repair)) == "good"
    assert model.heard[1][0] == [
        *CHAT,
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "Mend: bad is not good"},
    ]
    metrics = call_figures([log.drain()], {})
    assert metrics["judge/repair_rate"] == 1 and metrics["judge/call_failure_rate"] == 0
    (row,) = rows(tmp_path)
    assert (row["kind"], row["raw"], row["final"], row["seed"]) == ("malformed", "bad", False, 1)


def test_a_second_bad_answer_fails_for_good_and_is_kept_but_not_cached(tmp_path):
    caller, log = make(tmp_path, Model("bad", "far", "good"))
    with pytest.raises(RoleFailure) as caught:
        asyncio.run(caller(CHAT, check=check, repair=repair))
    assert (caught.value.kind, caught.value.raw) == ("out_of_range", "far")
    assert [(r["raw"], r["final"]) for r in rows(tmp_path)] == [("bad", False), ("far", True)]
    assert log["judge"].failures == {"out_of_range": 1}
    # The next call reaches the model, not the cache.
    assert asyncio.run(caller(CHAT, check=check, repair=repair)) == "good"


def test_a_transport_failure_is_not_repaired(tmp_path):
    caller, log = make(tmp_path, Model(RoleFailure("timeout", "slow")))
    with pytest.raises(RoleFailure, match="slow"):
        asyncio.run(caller(CHAT, check=check, repair=repair))
    metrics = call_figures([log.drain()], {})
    assert metrics["judge/call_failure_rate"] == 1 and "failures/timeout" not in metrics
    assert metrics["judge/repair_rate"] == 0


def test_latencies_and_spread(tmp_path):
    log = CallLog()
    tally = log["judge"]
    tally.calls, tally.seconds, tally.spreads = 1, [float(i) for i in range(1, 101)], [0.0, 3.0]
    metrics = call_figures([log.drain()], {})
    # numpy's linear rule by hand: 1 + 0.5 * 99 and 1 + 0.95 * 99.
    assert metrics["judge/latency_p50"] == 50.5 and metrics["judge/latency_p95"] == pytest.approx(95.05)
    assert metrics["judge/spread"] == 1.5


def test_a_file_that_is_no_cache_is_one_clear_error(tmp_path):
    (tmp_path / "calls.sqlite").write_text("not a database, but long enough to be looked at as one" * 20)
    with pytest.raises(UserError, match="remove the file"):
        CallCache(tmp_path / "calls.sqlite")


def test_the_cache_holds_answers_only(tmp_path):
    caller, _ = make(tmp_path, Model("good"))
    asyncio.run(caller([{"role": "user", "content": "a secret prompt"}]))
    table = sqlite3.connect(tmp_path / "calls.sqlite").execute("SELECT * FROM calls").fetchall()
    assert len(table) == 1 and table[0][1:] == ("judge", "good", 10, 5) and len(table[0][0]) == 64


def test_figures_of_several_processes_are_those_of_all_calls(tmp_path):
    """Each process drains its own log; together they give the metrics of a common log."""
    together, logs = CallLog(), [CallLog(), CallLog()]
    for number, log in enumerate([logs[0], logs[1], logs[1]]):
        for one in (log, together):
            tally = one["judge"]
            tally.calls += 2
            tally.repairs += number
            tally.seconds += [float(number), 3.0 * number]
            tally.failures["timeout"] += 1
            tally.input_tokens += 10 * number
            one.lost["timeout"] += number
    logs[1]["user"].calls += 1
    together["user"].calls += 1
    prices = {"judge": [1.0, 2.0]}
    drained = [json.loads(json.dumps(log.drain())) for log in logs]
    assert call_figures(drained, prices) == call_figures([together.drain()], prices)
    assert call_figures([log.drain() for log in logs], prices) == {"environment/cost": 0.0}


def test_a_long_answer_is_kept_and_shown_to_the_model_as_an_excerpt(tmp_path):
    model = Model("x" * 10**6, "good")
    caller, _ = make(tmp_path, model)
    assert asyncio.run(caller(CHAT, check=check, repair=repair)) == "good"
    assert all(len(message["content"]) < 5000 for message in model.heard[1][0])
    (row,) = rows(tmp_path)
    assert row["raw"].startswith("xxx") and "characters left out" in row["raw"]
    assert len(json.dumps(row)) < 10_000


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_fails_and_is_not_cached(tmp_path, empty):
    caller, _ = make(tmp_path, Model(empty, "good"))
    with pytest.raises(RoleFailure, match="malformed: it is empty"):
        asyncio.run(caller(CHAT))
    assert asyncio.run(caller(CHAT)) == "good"


def test_a_kept_answer_that_is_refused_now_is_asked_for_again(tmp_path):
    caller, log = make(tmp_path, Model("bad", "good"))
    assert asyncio.run(caller(CHAT)) == "bad"  # without a check
    assert asyncio.run(caller(CHAT, check=check)) == "good"
    assert asyncio.run(caller(CHAT, check=check)) == "good"
    assert (log["judge"].calls, log["judge"].cached) == (3, 1)


def test_half_a_character_goes_nowhere(tmp_path):
    model = Model("so \ud83d", "so \ud83d\ude00")
    caller, _ = make(tmp_path, model)
    messages = [{"role": "user", "content": "so \ude00"}]
    for said in ("so \ufffd", "so \ufffd"):  # the second one is from the file
        assert asyncio.run(caller(messages)) == said
    assert model.heard[0][0] == [{"role": "user", "content": "so \ufffd"}]
    assert asyncio.run(caller(messages, seed=1)) == "so \U0001f600"
