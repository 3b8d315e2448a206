"""The live world: pauses, journal, keys, custom classes, and many dialogues at once."""

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest

from mapo_jax import validation
from mapo_jax.config import ROLES, load_config, to_yaml
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.live.calls import call_figures
from mapo_jax.environment.live.guard import WorldFailing
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.state import Limits
from mapo_jax.errors import UserError
from mapo_jax.files import part_name
from mapo_jax.role_models import _server, open_models
from mapo_jax.rollout.collect import collect, derive_seed
from mapo_jax.rollout.device import Device
from mapo_jax.rollout.requests import Reply
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.run import Position
from mapo_jax.running.phases import Phases
from mapo_jax.running.processes import SINGLE, Processes
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from mapo_jax.world import open_world

KEY = "sk-live-0123456789abcdef"
CARDS = load_scenarios(split="train")[:2]
LIMITS = Limits(min_turns=3, max_turns=3)
ROLLOUTS = 3


@dataclass
class TalkingEngine:
    """Stands for the policy's engine; its replies depend on the request's key only."""

    slots: int = 64
    length: int = 4096
    max_reply_tokens: int = 6
    version: int = 0
    said: list = field(default_factory=list)
    end: int = 0

    def reset(self):
        self.rows, self.submitted = {}, []

    @property
    def busy(self):
        return bool(self.submitted)

    def release(self, slot):
        pass

    def submit(self, request):
        row = [] if request.start else self.rows[request.slot]
        self.rows[request.slot] = [*row, *request.ids]
        self.submitted.append(request)

    def advance(self):
        replies = {}
        for request in [self.submitted.pop() for _ in range(len(self.submitted))]:
            number = derive_seed(*request.key, request.turn)
            ids = [10 + (number >> shift) % 90 for shift in (0, 7, 14)] + [self.end]
            self.said.append((request.key, request.turn))
            self.rows[request.slot] += ids
            replies[request.slot] = Reply(tuple(ids), (-0.5,) * 4, False)
        return replies


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [line for card in CARDS for stage in card.story.stages for line in stage.line]
    write_tokenizer(folder, train_tokenizer(texts, 320, max_tokens=4096))
    return ChatFormat(load_tokenizer(folder))


def configure(url, **changes):
    settings = {"environment.family": "live", "environment.call_seconds": 3.0, "environment.concurrency": 8}
    for role in ("user", "judge", "director"):
        settings |= {f"environment.{role}.url": url, f"environment.{role}.model": "m"}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def hold(
    world, chat, config, *, step=0, engine=None, cards=CARDS, rollouts=ROLLOUTS, notes=None,
    processes=SINGLE, **options,
):  # fmt: skip
    engine, world.processes = engine or TalkingEngine(), processes
    engine.end = chat.end_of_turn[0]
    return world.hold(
        lambda journal: collect(
            cards,
            rollouts,
            engine,
            chat,
            world.roles,
            LIMITS,
            seed=1,
            step=step,
            concurrency=config.environment.concurrency,
            journal=journal,
        ),
        stream="train",
        step=step,
        check=lambda: None,
        note=(notes if notes is not None else []).append,
        **options,
    )


def asked(requests):
    """Identifies each call."""
    return [json.dumps([request["messages"], request["seed"]]) for request in requests]


def flat(dialogues):
    return [dialogue for group in dialogues for dialogue in group]


def test_dialogues_with_well_formed_roles(serve, well_formed, chat, tmp_path):
    server = serve(well_formed)
    config = configure(server.url)
    with open_world(config, tmp_path, None) as world:
        before = server.count
        assert before == 3  # each server was asked whether it is there
        dialogues = flat(hold(world, chat, config))
        metrics = world.metrics()
    assert len(dialogues) == 6 and all(d.state.outcome == "timeout" for d in dialogues)
    turns = [turn for d in dialogues for turn in d.state.turns]
    assert len(turns) == 18 and all(turn.judgement.levels == (1, 0, 1, 0, 0, 0) for turn in turns)
    # Two openings; per dialogue three judgements, two directions, two replies.
    assert server.count - before == 2 + 6 * (3 + 2 + 2)
    assert metrics["judge/calls"] == 18 and metrics["user/calls"] == 2 + 12
    assert metrics["judge/call_failure_rate"] == 0 and 0 < metrics["judge/latency_p50"] < 3
    assert not (tmp_path / "failures.jsonl").exists()


def test_a_second_process_repeats_no_call_and_no_turn(serve, well_formed, chat, tmp_path):
    """A kill leaves the journal and the cache; here the first world is dropped in the middle of a step."""
    server = serve(well_formed)
    config = configure(server.url)

    class Killed(Exception):
        pass

    def killing(request, number):
        if number == 3 + 2 + 20:
            raise_in_main.append(True)
        return well_formed(request, number)

    raise_in_main = []
    server.answer = killing
    engine = TalkingEngine()
    engine.end = chat.end_of_turn[0]

    def check():
        if raise_in_main:
            raise Killed

    with open_world(config, tmp_path, None) as world, pytest.raises(Killed):
        world.hold(
            lambda journal: collect(
                CARDS, ROLLOUTS, engine, chat, world.roles, LIMITS, seed=1, step=0, concurrency=1,
                on_turn=lambda *_: check(), journal=journal,
            ),
            stream="train", step=0, check=check, note=print,
        )  # fmt: skip
    lines = [
        json.loads(line) for line in (tmp_path / "journal" / "train_000000.jsonl").read_text().splitlines()
    ]
    finished = [line for line in lines if "index" in line]
    assert 4 <= len(finished) < 18
    earlier = asked(server.requests)
    server.requests.clear()
    server.answer = well_formed
    second = TalkingEngine()
    with open_world(config, tmp_path, None) as world:
        server.requests.clear()
        dialogues = flat(hold(world, chat, config, engine=second))
    # Only the one call that was under way when the first was dropped may be asked again: it had no answer.
    assert len(set(asked(server.requests)) & set(earlier)) <= 1
    assert len(second.said) == 18 - len(finished)
    for line in finished:
        (dialogue,) = [d for d in dialogues if d.state.seed == line["seed"]]
        turn = dialogue.state.turns[line["index"]]
        assert list(turn.position) == line["turn"]["position"] and turn.user == line["turn"]["user"]
        spans = [i for i, t in enumerate(dialogue.row.turn) if t == line["index"]]
        assert [dialogue.row.ids[i] for i in spans] == line["ids"]
        assert [dialogue.row.logprob[i] for i in spans] == line["logprobs"]
    # The rows are what the engine has seen, position for position, those that were taken up too.
    seen = {tuple(row) for row in second.rows.values()}
    talked = {key for key, _ in second.said}
    for dialogue in dialogues:
        assert dialogue.state.turn_count == 3
        if (1, 0, dialogue.state.seed) in talked:
            assert dialogue.row.ids in seen


def test_an_outage_pauses_the_run_which_then_goes_on(serve, well_formed, chat, tmp_path):
    server = serve(well_formed)
    config = configure(
        server.url, environment__call_seconds=0.6, environment__failure_share=0.05,
        environment__pause_minutes=0.02,
    )  # fmt: skip
    notes, saved = [], []
    with open_world(config, tmp_path, None) as world:
        world.on_pause = lambda: saved.append(True)
        server.answer = lambda request, number: (
            ("status", 500, {}) if not notes and number > 20 else well_formed(request, number)
        )
        dialogues = flat(hold(world, chat, config, notes=notes))
    assert len(saved) == len(notes) == 1
    assert "6 of the last" in notes[0] and "HTTP 500" in notes[0] and "pause 1 of 5" in notes[0]
    turns = [turn for d in dialogues for turn in d.state.turns]
    assert len(turns) == 18 and all(turn.scored for turn in turns)  # the outage left no hole


def test_an_outage_that_does_not_clear_stops_the_run_and_loses_nothing(serve, well_formed, chat, tmp_path):
    server = serve(well_formed)
    config = configure(
        server.url, environment__call_seconds=0.6, environment__failure_share=0.05,
        environment__pause_minutes=0.002,
    )  # fmt: skip
    saved, notes = [], []
    with open_world(config, tmp_path, None) as world:
        world.on_pause = lambda: saved.append(True)
        server.answer = lambda request, number: (
            ("status", 503, {}) if number > 20 else well_formed(request, number)
        )
        with pytest.raises(UserError) as caught:
            hold(world, chat, config, notes=notes)
    message = str(caught.value)
    assert "503" in message and "same command goes on" in message and "\n" not in message
    assert len(saved) == 6 and len(notes) == 5
    waits = [float(note.split(": ")[-1].split(" s")[0]) for note in notes]
    assert waits == sorted(waits)
    answered = [r for r, n in zip(asked(server.requests), range(1, 10**6), strict=False) if n <= 20][3:]
    server.answer = well_formed
    with open_world(config, tmp_path, None) as world:
        server.requests.clear()
        dialogues = flat(hold(world, chat, config))
    assert all(turn.scored for d in dialogues for turn in d.state.turns)
    assert not set(asked(server.requests)) & set(answered)


def test_a_step_without_a_usable_dialogue_is_no_step(serve, well_formed, chat, tmp_path):
    server = serve(well_formed)
    config = configure(server.url, environment__failure_share=1.0, environment__pause_minutes=0)
    with open_world(config, tmp_path, None) as world:
        server.answer = lambda request, number: "no judgement"
        with pytest.raises(UserError, match="none of the 6 dialogues"):
            hold(world, chat, config)


@dataclass(frozen=True)
class Two(Processes):
    """This process, and the values of another: its failure, whether a dialogue is usable, how many it has."""

    count: int = 2
    other: tuple = (None, True, 6)
    places: list = field(default_factory=list)

    def exchange(self, what, value):
        self.places.append(what)
        return [value, list(self.other)]

    def together(self, what, work):
        self.places.append(what)
        return work()


@pytest.mark.parametrize("cards", [CARDS, ()], ids=["all lost", "no share"])
def test_a_step_is_judged_on_the_dialogues_of_all_processes(serve, well_formed, chat, tmp_path, cards):
    server = serve(well_formed)
    config = configure(server.url, environment__failure_share=1.0, environment__pause_minutes=0)
    with open_world(config, tmp_path, None) as world:
        server.answer = lambda request, number: "no judgement"
        processes = Two()
        dialogues = flat(hold(world, chat, config, cards=cards, processes=processes))
        assert len(dialogues) == 3 * len(cards) and not any(d.usable(0.5) for d in dialogues)
        assert processes.places == ["dialogues", "the world"]
        with pytest.raises(UserError, match=f"none of the {3 * len(cards) + 4} dialogues"):
            hold(world, chat, config, cards=cards, processes=Two(other=(None, False, 4)))


def test_processes_pause_together_where_none_has_a_usable_dialogue(serve, well_formed, chat, tmp_path):
    server, notes, said = serve(well_formed), [], iter([(None, False, 4), (None, False, 4), (None, True, 4)])
    config = configure(server.url, environment__failure_share=1.0, environment__pause_minutes=0.02)

    class Recovering(Two):
        def exchange(self, what, value):
            super().exchange(what, value)
            return [value, list(next(said))]

    processes = Recovering()
    with open_world(config, tmp_path, None) as world:
        server.answer = lambda request, number: "no judgement"
        hold(world, chat, config, processes=processes, notes=notes)
    assert ["pause 1 of 5" in notes[0], "pause 2 of 5" in notes[1], len(notes)] == [True, True, 2]
    assert processes.places == ["dialogues", "the world", "a pause"] * 2 + ["dialogues", "the world"]


def test_an_evaluation_that_fails_in_another_process_fails_here(serve, well_formed, chat, tmp_path):
    config = configure(serve(well_formed).url)
    processes = Two(other=("HTTP 500", False, 0))
    with open_world(config, tmp_path, None) as world, pytest.raises(WorldFailing, match=r"^HTTP 500$"):
        hold(world, chat, config, processes=processes, patient=False)


@pytest.mark.parametrize(("count", "share"), [(1, (9, 100, 0)), (2, (4, 50, 0)), (64, (1, 1, 0))])
def test_processes_share_what_is_limited(serve, well_formed, tmp_path, count, share):
    """The shares sum to at most the limit, but each is at least one; no limit stays no limit."""
    limits = {f"environment__{role}__requests_per_minute": 100 for role in ROLES}
    config = configure(serve(well_formed).url, environment__concurrency=9, **limits)
    made = []

    def server(name, role, environment, connections, log):
        made.append((environment.concurrency, role.requests_per_minute, role.tokens_per_minute))
        return _server(name, role, environment, connections, log)

    with (
        mock.patch("mapo_jax.role_models._server", server),
        open_world(config, tmp_path, None, processes=Processes(0, count)) as world,
    ):
        assert world.concurrency == share[0]
    assert made == [share] * 3


@pytest.mark.parametrize(
    ("limits", "which"),
    [
        ({"environment__call_seconds": 60.0, "environment__step_seconds": 5.0}, "step"),
        # Twice the time of one attempt: less than the four that the call itself would take.
        ({"environment__call_seconds": 1.5, "rollout__max_turns": 1, "rollout__min_turns": 1}, "dialogue"),
    ],
    ids=["step", "dialogue"],
)
def test_a_hanging_judge_costs_its_dialogues_and_no_more_time(
    serve, well_formed, chat, tmp_path, limits, which
):
    """The judge hangs for one of two persons; no failure is allowed, and still nothing pauses."""
    hanging = CARDS[0].person.name

    def answer(request, number):
        judging = "response_format" in request and "last reply" in request["messages"][1]["content"]
        hangs = judging and hanging in str(request["messages"])
        return ("silence",) if hangs else well_formed(request, number)

    server = serve(answer)
    config = configure(server.url, environment__failure_share=0.0, environment__pause_minutes=0, **limits)
    with open_world(config, tmp_path, None) as world:
        started = time.monotonic()
        hung, others = hold(world, chat, config)
        assert time.monotonic() - started < 20  # the server would have taken a minute for each call
        metrics = world.metrics()
    assert [(d.state.outcome, d.state.failure) for d in hung] == [("error", "timeout")] * ROLLOUTS
    assert not any(turn.scored for d in hung for turn in d.state.turns)
    assert all(d.state.outcome == "timeout" and all(t.scored for t in d.state.turns) for d in others)
    rows = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert {row["detail"] for row in rows} == {f"the time of the {which} is used up"}
    # In each of the three the judge, and then the director too.
    assert metrics["failures/timeout"] == len(rows) == 2 * ROLLOUTS


def test_several_samples_of_the_judge_are_one_judgement_with_a_spread(serve, judged, tmp_path):
    levels = {}

    def answer(request, number):
        if "response_format" not in request:
            return "ready"
        seen = levels.setdefault(str(request["messages"]), [])
        seen.append(request["seed"])
        return judged(min(len(seen), 3) - 1, 0, 0, 0, 0, 0)  # 0, then 1, then 2: points 0, 1 and 3

    config = configure(serve(answer).url, environment__judge__samples=3)
    with open_world(config, tmp_path, None) as world:
        found = world.score_calibration(5, lambda: None)
        metrics = world.metrics()
    assert set(found.values()) == {(1, 0, 0, 0, 0, 0)}
    assert metrics["judge/calls"] == 32 * 3 and metrics["judge/spread"] == 3
    assert all(len(set(seeds)) == 3 for seeds in levels.values())


def test_roles_of_one_model_share_an_engine_with_room_for_the_longest_answer(monkeypatch, chat):
    """Each role keeps its max_tokens; no answer is cut at another role's."""
    made = []

    class Engine(TalkingEngine):
        def __init__(self, config, **options):
            super().__init__(slots=options["slots"], max_reply_tokens=options["max_reply_tokens"])
            made.append(self)
            self.end, self.limits = chat.end_of_turn[0], []
            self.reset()

        def load(self, params, version):
            pass

        def submit(self, request):
            self.limits.append(request.limit)
            super().submit(request)

    policy = SimpleNamespace(config=None, chat=chat)
    monkeypatch.setattr("mapo_jax.role_models.Engine", Engine)
    loaded = []
    load = lambda *args, **options: loaded.append(options["dtype"]) or (policy, None)  # noqa: E731
    monkeypatch.setattr("mapo_jax.role_models.load_policy", load)
    changes = {f"environment__{role}__model": "engine:x" for role in ROLES} | {"model__dtype": "bfloat16"}
    changes |= {f"environment__{role}__url": None for role in ROLES}
    lengths = {"user": 50, "judge": 700, "director": 90}
    changes |= {f"environment__{role}__max_tokens": length for role, length in lengths.items()}

    async def ask(callers):
        for role in ROLES:
            await callers[role]([{"role": "user", "content": "Hm."}])

    with (
        asyncio.Runner() as runner,
        open_models(configure(None, **changes), None, None, runner, ROLES) as (callers, log),
    ):
        runner.run(ask(callers))
        metrics = call_figures([log.drain()], {})
    (engine,) = made
    assert loaded == ["bfloat16"]
    assert engine.max_reply_tokens == 700 and engine.limits == [lengths[role] for role in ROLES]
    assert all(metrics[f"{role}/latency_p50"] > 0 for role in ROLES)


def test_what_is_wrong_with_a_roles_engine_is_said_in_the_roles_own_keys(monkeypatch):
    def load(*args, **options):
        raise UserError("`rollout.max_tokens` is 4096; it must be at most the 512 positions of the model x")

    monkeypatch.setattr("mapo_jax.role_models.load_policy", load)
    config = configure("http://127.0.0.1:9/v1", environment__judge__model="engine:x")
    with (
        asyncio.Runner() as runner,
        pytest.raises(UserError, match=r"`environment\.judge\.extra_body\.tokens` is 4096"),
        open_models(config, None, None, runner, ("judge",)),
    ):
        pass


def test_a_server_that_is_not_there_is_one_clear_error(serve, well_formed, tmp_path):
    server = serve(lambda request, number: ("status", 401, {}, "no such key"))
    config = configure(server.url)
    with (
        pytest.raises(UserError, match=r"the user's server .* 401.*environment\.user\.url"),
        open_world(config, tmp_path, None),
    ):
        pass
    config = configure("http://127.0.0.1:9/v1", environment__call_seconds=0.5)
    with pytest.raises(UserError, match="does not serve 'm'"), open_world(config, tmp_path, None):
        pass
    assert list(tmp_path.iterdir()) == []  # the folder is free for the mended configuration


def test_the_key_is_found_nowhere(serve, well_formed, chat, tmp_path, monkeypatch, capfd):
    """A hostile server: it echoes the key in errors, in answers and in place of headers."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def answer(request, number):
        if number % 5 == 0:
            return ("status", 500, {}, f"key {KEY} failed")
        if number % 7 == 0:
            return f"Your key is {KEY}."
        return well_formed(request, number)

    server = serve(answer)
    keys = {f"environment__{role}__key_variable": "JUDGE_KEY" for role in ("user", "judge", "director")}
    config = configure(server.url, environment__failure_share=0.0, environment__pause_minutes=0.001, **keys)
    notes = []
    with open_world(config, tmp_path, None) as world:
        server.answer = lambda request, number: (
            ("status", 400, {}, f"bad {KEY}") if number > 30 else answer(request, number)
        )
        try:
            hold(world, chat, config, notes=notes)
        except UserError as error:
            notes.append(str(error))
    assert any(f"bearer {KEY}" in headers.lower() for headers in server.headers)
    out, err = capfd.readouterr()
    texts = {"yaml": to_yaml(config), "notes": "\n".join(notes), "out": out, "err": err}
    assert notes and any("[key]" in note for note in notes)
    for name, text in texts.items():
        assert KEY not in text, name
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"calls.sqlite", "failures.jsonl"} <= {file.name for file in files}
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("key", [None, "", "sk-a b", "sk-ab\r", "sk-a\u2019b"])
def test_a_key_that_is_none_is_named_by_its_variable(key, tmp_path, monkeypatch):
    if key is not None:
        monkeypatch.setenv("SOME_KEY", key)
    config = configure("http://127.0.0.1:9/v1", environment__user__key_variable="SOME_KEY")
    with pytest.raises(UserError, match="SOME_KEY") as caught, open_world(config, tmp_path, None):
        pass
    assert "sk-a" not in str(caught.value) and not list(tmp_path.iterdir())


def test_no_server_is_asked_before_every_key_was_looked_at(serve, well_formed, tmp_path, monkeypatch):
    server = serve(well_formed)
    monkeypatch.setenv("SOME_KEY", "sk-a\n")
    config = configure(server.url, environment__director__key_variable="SOME_KEY")
    with pytest.raises(UserError, match=r"environment\.director\.key_variable.*SOME_KEY"):
        open_world(config, tmp_path, None).__enter__()
    assert server.count == 0


@pytest.mark.parametrize(
    "body",
    [[], {}, "ready", {"choices": []}, {"choices": [{"message": {"role": "assistant", "content": 5}}]}],
)
def test_a_server_that_sends_no_completion_is_not_ready(serve, tmp_path, body):
    server = serve(lambda request, number: ("body", json.dumps(body).encode(), {}))
    config = configure(server.url, environment__call_seconds=0.6)
    with pytest.raises(UserError, match=r"the user's server .* does not serve 'm' \(malformed"):
        open_world(config, tmp_path, None).__enter__()


def test_a_model_that_only_reasons_about_it_is_ready(serve, tmp_path):
    message = {"role": "assistant", "content": None, "reasoning_content": "Which word?"}
    server = serve(lambda request, number: {"choices": [{"message": message, "finish_reason": "length"}]})
    with open_world(configure(server.url), tmp_path, None):
        assert server.count == 3


def test_a_key_spelled_in_escapes_is_not_brought_back_by_parsing(serve, judged, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)
    judgement = judged(1, 0, 0, 0, 0, 0).replace("words of the reply", f"It is {escaped}.")
    server = serve(lambda request, number: judgement)
    with open_world(configure(server.url, environment__judge__key_variable="JUDGE_KEY"), tmp_path, None) as w:
        found = w.run(w.roles.judge.score(DialogueState(CARDS[0], 1, (), "Hm."), "Yes."))
    assert found.levels == (1, 0, 0, 0, 0, 0) and set(found.evidence) == {"It is [key]."}


def test_processes_that_share_a_folder_have_caches_of_their_own(serve, well_formed, tmp_path):
    """SQLite's write-ahead log must not be opened from two machines."""
    config = configure(serve(well_formed).url)
    parts = [part_name(index, 2) for index in range(2)]
    with open_world(config, tmp_path, None, processes=Processes(0, 2)):  # noqa: SIM117
        with open_world(config, tmp_path, None, processes=Processes(1, 2)) as world:
            world.run(world.roles.user.open(CARDS[0], 1))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"calls{part}.sqlite" for part in parts]


def test_more_connections_than_may_be_open_are_one_sentence(serve, well_formed, tmp_path, monkeypatch):
    server = serve(well_formed)
    limit = len(os.listdir("/dev/fd")) + 200  # whatever earlier tests have open
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    config = configure(server.url, environment__concurrency=256)
    with pytest.raises(
        UserError, match=rf"`environment.concurrency` allows for 256 connections.* open {limit};"
    ):
        open_world(config, tmp_path, None).__enter__()
    assert server.count == 0 and not list(tmp_path.iterdir())
    with open_world(configure(server.url, environment__concurrency=32), tmp_path, None):
        pass


OWN_JUDGE = """
from mapo_jax.environment.dialogue import Judgement

class LengthJudge:
    def __init__(self, complete):
        self.complete = complete

    async def score(self, state, reply):
        level = 1 if len(reply) < 200 else 0
        return Judgement((0, 0, level, 0, 0, 0), (reply,) * 6, ("its length",) * 6)
"""


def test_a_class_of_ones_own(serve, well_formed, chat, tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(OWN_JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    server = serve(well_formed)
    own = {"environment__judge__implementation": "own_judge:LengthJudge"}
    config = configure(server.url, **own, environment__judge__model=None, environment__judge__url=None)
    with open_world(config, tmp_path / "run", None) as world:
        dialogues = flat(hold(world, chat, config))
    turns = [turn for d in dialogues for turn in d.state.turns]
    assert all(turn.judgement.levels == (0, 0, 1, 0, 0, 0) for turn in turns)
    assert not any("C_progress" in json.dumps(r["messages"]) for r in server.requests)
    sys.modules.pop("own_judge", None)


def test_a_judge_of_ones_own_beside_the_scripted_user_and_director(chat, tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(OWN_JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(None, ["environment.judge.implementation=own_judge:LengthJudge"])
    with open_world(config, tmp_path / "run", None) as world:
        assert world.live
        dialogues = flat(hold(world, chat, config))
    turns = [turn for d in dialogues for turn in d.state.turns]
    assert all(turn.judgement.levels == (0, 0, 1, 0, 0, 0) for turn in turns)
    with open_world(load_config(), tmp_path / "scripted", None) as world:
        scripted = flat(hold(world, chat, config))
    first = [[d.state.turns[0].user for d in side] for side in (dialogues, scripted)]
    assert first[0] == first[1]
    sys.modules.pop("own_judge", None)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module:X", "cannot be imported"),
        ("json:X", "cannot be imported"),
        ("json:JSONDecoder", "no `async def score`; see mapo_jax/environment/roles.py"),
        ("broken_judge:Judge", "cannot be imported: ZeroDivisionError"),
        ("odd_judges:NeedsMore", "cannot be made: TypeError"),
        ("odd_judges:Breaks", "cannot be made: KeyError: 'no setting'"),
    ],
)
def test_a_class_that_is_no_judge_is_one_clear_error(path, words, tmp_path, serve, well_formed, monkeypatch):
    """And leaves no file, so that the corrected command can use the folder."""
    (tmp_path / "broken_judge.py").write_text("1 / 0")
    (tmp_path / "odd_judges.py").write_text(ODD_JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    config = configure(serve(well_formed).url, environment__judge__implementation=path)
    with pytest.raises(UserError, match=words) as caught, open_world(config, tmp_path / "run", None):
        pass
    assert "environment.judge.implementation" in str(caught.value) and not (tmp_path / "run").exists()
    sys.modules.pop("odd_judges", None)


ODD_JUDGES = """
class NeedsMore:
    def __init__(self, complete, more):
        pass
    async def score(self, state, reply):
        pass

class Breaks:
    def __init__(self, complete):
        raise KeyError("no setting")
    async def score(self, state, reply):
        pass
"""


def test_the_scripted_world_is_untouched(chat, tmp_path):
    config = load_config()
    with open_world(config, tmp_path, None) as world:
        assert not world.live and world.metrics() == {} and world.status() == ""
        assert len(flat(hold(world, chat, config))) == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [32, 64])
def test_many_dialogues_are_bound_by_latency_alone(serve, well_formed, chat, tmp_path, concurrency):
    """256 dialogues, 300 ms a call: within 1.25 x (calls x latency / concurrency). Memory stays flat.

    Wants an idle machine. Calls under way are bounded by `environment.concurrency`; with 64 that is 213 calls
    a second, near what one Python process can make, and here it is the server as well.
    """
    import tracemalloc

    latency = 0.3
    server = serve(well_formed, latency=latency)
    server.keep_requests = False
    config = configure(server.url, environment__call_seconds=30.0, environment__concurrency=concurrency)
    cards = load_scenarios(split="train")[:32]
    sizes, seconds = [], []
    with open_world(config, tmp_path, None) as world:
        for step in range(3):
            engine = TalkingEngine(slots=256)
            before, started, used = server.count, time.monotonic(), time.process_time()
            hold(world, chat, config, step=step, engine=engine, cards=cards, rollouts=8)
            seconds.append(time.monotonic() - started)
            calls = server.count - before
            spent = 1000 * (time.process_time() - used) / calls
            world.metrics()
            if step == 0:
                tracemalloc.start()
            sizes.append(tracemalloc.get_traced_memory()[0])
    bound = calls * latency / concurrency
    print(f"concurrency {concurrency}: {calls} calls, bound {bound:.1f} s, took {seconds}")
    print(f"{spent:.1f} ms of CPU a call, the server's included; traced memory after each step: {sizes}")
    assert server.most <= 3 * concurrency
    assert min(seconds) <= 1.25 * bound
    assert sizes[2] - sizes[1] < 2**20


def test_metrics_stay_apart_from_the_check(serve, well_formed, tmp_path):
    with open_world(configure(serve(well_formed).url), tmp_path, None) as world:
        assert not any(world.metrics().values())
        levels = world.score_calibration(5, lambda: None)
        assert len(levels) == 32 and set(levels.values()) == {(1, 0, 1, 0, 0, 0)}
        assert world.metrics()["judge/calls"] == 32


def test_a_stop_request_is_heard_while_the_world_is_awaited(serve, well_formed, chat, tmp_path):
    server = serve(well_formed)
    config = configure(server.url, environment__call_seconds=60.0)
    asking = SimpleNamespace(since=None)

    class Stop(Exception):
        pass

    def check():
        if asking.since and time.monotonic() > asking.since + 0.3:
            raise Stop

    async def forever(_):
        asking.since = time.monotonic()
        await asyncio.sleep(60)

    with open_world(config, tmp_path, None) as world:
        started = time.monotonic()
        with pytest.raises(Stop):
            world.run(forever(None), check)
        assert time.monotonic() - started < 10


def test_steps_under_way_have_journals_of_their_own_and_one_bound_for_their_calls(
    serve, well_formed, chat, tmp_path
):
    server = serve(well_formed, latency=0.01)
    config = configure(server.url, rollout__ahead=1, environment__concurrency=3)

    def collection(step):
        engine = TalkingEngine(end=chat.end_of_turn[0])
        return lambda journal: collect(
            CARDS, ROLLOUTS, engine, chat, world.roles, LIMITS, seed=1, step=step, concurrency=world.calls,
            journal=journal,
        )  # fmt: skip

    with open_world(config, tmp_path, None) as world:
        collections = [collection(step) for step in range(2)]
        begun = [world.begin(each, stream="train", step=step) for step, each in enumerate(collections)]
        for step, (each, task) in enumerate(zip(collections, begun, strict=True)):
            options = dict(stream="train", step=step, check=lambda: None, note=print, begun=task)
            dialogues = flat(world.hold(each, **options))
            assert [d.state.turn_count for d in dialogues] == [3] * 6 and dialogues[0].step == step
            journal = (tmp_path / "journal" / f"train_{step:06d}.jsonl").read_text().splitlines()
            assert {d.state.seed for d in dialogues} == {
                line["seed"] for line in map(json.loads, journal) if "index" in line
            }
    assert 1 < server.most <= 3


def test_a_step_that_failed_while_nobody_waited_begins_again_without_a_pause(serve, well_formed, tmp_path):
    attempts, notes = [], []

    async def collection(journal):
        attempts.append(journal)
        if len(attempts) == 1:
            raise WorldFailing("down")
        return [[SimpleNamespace(usable=lambda share: True)]]

    config = configure(serve(well_formed).url, rollout__ahead=1)
    with open_world(config, tmp_path, None) as world:
        begun = world.begin(collection, stream="train", step=3)
        while not begun.done():
            time.sleep(0.01)
        options = dict(stream="train", step=3, check=lambda: None, note=notes.append)
        assert len(world.hold(collection, **options, begun=begun)) == 1
    assert len(attempts) == 2 and notes == []


def test_an_evaluation_that_is_left_out_keeps_its_calls_from_the_next_step(
    serve, well_formed, tmp_path, monkeypatch
):
    config = configure(serve(well_formed).url)
    written = []
    with open_world(config, tmp_path, None) as world:

        def converse(run, at, scenarios, **_):
            world.run(world.evaluation_roles.user.open(scenarios[0], 1))
            raise WorldFailing("no luck")

        monkeypatch.setattr(validation, "converse", converse)
        run = SimpleNamespace(
            processes=Processes(),
            folder=tmp_path,
            config=config,
            phases=Phases(),
            validation=[CARDS[0]],
            evaluator=SimpleNamespace(load=lambda *_: None),
            engine=SimpleNamespace(device=Device()),
            sampling_weights=lambda weights: weights,
            world=world,
            writer=SimpleNamespace(write=lambda step, metrics: written.append((step, metrics))),
            display=SimpleNamespace(note=lambda text: None),
        )
        validation.evaluate(run, Position(4, SimpleNamespace(weights=None), {}))
        assert not world.metrics().get("user/calls")
    ((step, metrics),) = written
    assert step == 4 and metrics["evaluation/user/calls"] == 1
    assert all(name.startswith("evaluation/") for name in metrics)
