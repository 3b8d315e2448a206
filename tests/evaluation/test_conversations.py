"""Remote dialogues against the scripted loop, local ones against `collect` through the command."""

import asyncio
import json

import pytest

from mapo_jax.config import EnvironmentConfig
from mapo_jax.environment.dialogue import DialogueState
from mapo_jax.environment.roles import Roles, open_dialogue, take_turn
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.environment.scripted import scripted_roles
from mapo_jax.environment.scripted.helper import hold_dialogue
from mapo_jax.environment.state import Limits
from mapo_jax.evaluate import main
from mapo_jax.evaluation.conversations import ReasoningHidden, without_reasoning
from mapo_jax.rollout.collect import derive_seed

CARDS = load_scenarios(split="test")
SHORT = ["rollout.min_turns=2", "rollout.max_turns=3", "rollout.max_reply_tokens=6", "rollout.max_tokens=300"]


def rows(folder):
    return {
        (row["case"], row["rollout"]): row for row in map(json.loads, (folder / "dialogues.jsonl").open())
    }


def say(messages):
    """A policy that needs nothing but the messages, so that server and scripted loop can share it."""
    return "That must be hard." if len(messages) == 1 else "What do you feel?"


def test_a_remote_model_meets_the_same_world_as_a_scripted_policy(server, tmp_path):
    server.reply = lambda request: say(request["messages"])
    command = [
        "empa",
        "--endpoint",
        server.url,
        "--output",
        str(tmp_path / "out"),
        *SHORT,
        "evaluation.rollouts=2",
    ]
    assert main(command) == 0
    found = rows(tmp_path / "out")
    assert len(found) == 2 * len(CARDS) and {row["model"] for row in found.values()} == {"house-model"}
    roles, limits = scripted_roles(EnvironmentConfig()), Limits(2, 3)
    for card in CARDS[:4]:
        for rollout in range(2):
            # The rollouts of a card share the opening, which the scripted loop draws from its own seed.
            opening = found[card.id, rollout]["messages"][0]
            assert opening == found[card.id, 0]["messages"][0]
            seed = derive_seed(0, 0, card.id, rollout)
            state = hold_dialogue(
                card, seed, lambda state: say(state.messages), Opened(roles, opening), limits
            )
            levels = [list(turn.judgement.levels) for turn in state.turns]
            assert found[card.id, rollout]["levels"] == levels
            assert found[card.id, rollout]["messages"] == state.messages
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["house-model"]["cases"] == len(CARDS)
    assert scores["house-model"]["groups"]["domain"].keys() == {card.domain for card in CARDS}


class Opened:
    """Roles whose user opens with a given message."""

    def __init__(self, roles, opening):
        self.judge, self.director, self.user = roles.judge, roles.director, self
        self.reply = roles.user.reply
        self._opening = opening

    async def open(self, scenario, seed):
        return self._opening["content"]


def test_a_server_that_fails_midway_loses_nothing(server, tmp_path, capsys):
    calls = []

    def reply(request):
        calls.append(request)
        return say(request["messages"]) if len(calls) <= 20 else 401

    server.reply = reply
    command = [
        "empa",
        "--endpoint",
        server.url,
        "--output",
        str(tmp_path / "out"),
        *SHORT,
        "evaluation.rollouts=1",
    ]
    assert main([*command, "--concurrency", "2"]) == 2
    assert "failed 1 calls to house-model" in capsys.readouterr().err
    kept = rows(tmp_path / "out").values()
    assert 0 < len(kept) < len(CARDS)
    server.reply = lambda request: say(request["messages"])
    server.requests.clear()
    assert main(command) == 0
    assert len(rows(tmp_path / "out")) == len(CARDS)
    # Nothing that was kept is asked again. (A call of the broken-off run may still reach the server now.)
    asked = {request["messages"][0]["content"] for request in server.requests}
    assert asked and not asked & {row["messages"][0]["content"] for row in kept}


def test_a_remote_models_reasoning_is_neither_judged_nor_kept(server, tmp_path):
    def thinking(request):
        said = say(request["messages"])
        return [f"<think>Hm.</think>{said}", f"Hm.</think>{said}", [{"type": "text", "text": said}]][
            len(server.requests) % 3
        ]

    command = ["empa", "--endpoint", server.url, *SHORT, "evaluation.rollouts=1"]
    for name, reply in (("thinks", thinking), ("speaks", lambda request: say(request["messages"]))):
        server.reply = reply
        assert main([*command, "--output", str(tmp_path / name)]) == 0
    assert rows(tmp_path / "thinks") == rows(tmp_path / "speaks")
    assert not any("think>" in json.dumps(request) for request in server.requests)


@pytest.mark.parametrize("silence", [None, "", " \n", "<think>I wonder", "<think>Hm.</think>"])
def test_a_reply_that_says_nothing_breaks_a_dialogue_off_and_is_not_judged(server, tmp_path, capsys, silence):
    command = break_one_dialogue_off(server, tmp_path, silence)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"1 of {len(CARDS)} dialogues broke off, as in 1 the model gave no answer" in shown
    assert_all_others_are_saved_and_it_is_tried_again(server, command, tmp_path / "out")


def test_a_reply_that_is_no_text_is_a_failed_call(server, tmp_path, capsys):
    command = break_one_dialogue_off(server, tmp_path, [{"type": "image_url"}])
    assert main(command) == 2
    assert "failed 1 calls to house-model (last: malformed" in capsys.readouterr().err
    assert_all_others_are_saved_and_it_is_tried_again(server, command, tmp_path / "out")


def break_one_dialogue_off(server, folder, content):
    """Has the server send `content` as the second reply of one dialogue; returns the command."""
    first = {}

    def reply(request):
        messages = request["messages"]
        opening = first.setdefault("opening", messages[0]["content"])
        return content if messages[0]["content"] == opening and len(messages) > 1 else say(messages)

    server.reply = reply
    return ["empa", "--endpoint", server.url, *SHORT, "evaluation.rollouts=1", "--output", f"{folder}/out"]


def assert_all_others_are_saved_and_it_is_tried_again(server, command, folder):
    assert len(rows(folder)) == len(CARDS) - 1
    server.reply = lambda request: say(request["messages"])
    assert main(command) == 0
    assert len(rows(folder)) == len(CARDS)


class Listening:
    """The scripted roles, with what they were told."""

    def __init__(self):
        self.roles, self.told = scripted_roles(EnvironmentConfig()), []

    async def open(self, scenario, seed):
        return await self.roles.user.open(scenario, seed)

    async def reply(self, state):
        self.told += [turn.reply for turn in state.turns]
        return await self.roles.user.reply(state)

    async def score(self, state, reply):
        self.told += [*(turn.reply for turn in state.turns), reply]
        return await self.roles.judge.score(state, reply)

    async def act(self, state):
        self.told += [turn.reply for turn in state.turns]
        return await self.roles.director.act(state)


def test_a_local_models_reasoning_is_neither_judged_nor_kept():
    limits = Limits(2, 3)

    def held(replies, roles):
        state = DialogueState(CARDS[0], 1, (), asyncio.run(open_dialogue(CARDS[0], 1, roles)))
        for reply in replies:
            if state.outcome is None:
                state = asyncio.run(take_turn(state, reply, roles, limits))
        return state

    thought = ["<think>Hm.</think>That must be hard.", "Hm.</think> What do you feel?", " Oh. "]
    said = ["That must be hard.", "What do you feel?", " Oh. "]
    listening = Listening()
    hearing = ReasoningHidden(Roles(listening, listening, listening)).roles
    assert without_reasoning(held(thought, hearing)) == held(said, scripted_roles(EnvironmentConfig()))
    assert set(listening.told) == set(said)

    for replies in (["<think>Hm."], [said[0], "<think>Hm.</think>"], [said[0], said[1], "<think>"]):
        listening = Listening()
        state = held(replies, ReasoningHidden(Roles(listening, listening, listening)).roles)
        assert without_reasoning(state) is None and state.turns[-1].judgement is None
        assert not any("think" in told for told in listening.told)


@pytest.fixture(scope="module")
def held(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations") / "out"
    assert (
        main(["empa", "--model", str(model_folder), "--output", str(out), *SHORT, "evaluation.rollouts=1"])
        == 0
    )
    return out


def test_a_local_model_holds_a_dialogue_with_every_card(held):
    found = rows(held)
    assert {case for case, _ in found} == {card.id for card in CARDS}
    for row in found.values():
        assert len(row["levels"]) <= 3 and row["outcome"] in ("success", "failure", "timeout", "ended")
        assert len(row["messages"]) in (2 * len(row["levels"]), 2 * len(row["levels"]) + 1)


def test_missing_dialogues_are_held_again_the_same(held, model_folder, tmp_path, capsys):
    before = rows(held)
    lines = (held / "dialogues.jsonl").read_text().splitlines(keepends=True)
    (held / "dialogues.jsonl").write_text("".join(lines[:-5]))
    command = ["empa", "--model", str(model_folder), "--output", str(held), *SHORT, "evaluation.rollouts=1"]
    assert main(command) == 0
    assert "11 of 16 cards are there already" in capsys.readouterr().out
    # What is sampled does not depend on which cards lie beside a card.
    assert rows(held) == before
    assert main([*command, "--seed", "1"]) == 2
    assert "holds an evaluation with seed 0, not 1" in capsys.readouterr().err

    rescored = tmp_path / "scores.json"
    assert main(["empa", "--trajectories", str(held / "dialogues.jsonl"), "--json", str(rescored)]) == 0
    assert json.loads(rescored.read_text()) == json.loads((held / "scores.json").read_text())
