"""Cards from conversations: checked as all cards are, without traces of a person; data for the warm start."""

import json

import pytest
import yaml

from mapo_jax import chat_log, draft
from mapo_jax.environment.dialogue import RoleFailure
from mapo_jax.environment.live.draft import to_card
from mapo_jax.environment.live.traces import doubtful, trace
from mapo_jax.environment.scenario import load_scenarios, read_cards, to_mapping
from mapo_jax.warmstarting.chats import read_chats as read_warmstart


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_log(folder, chats, ratings=None):
    """`chats`: (scenario, messages of one line); `ratings`: by the number of the chat."""
    folder.mkdir()
    with (folder / "2026-01-31.jsonl").open("w") as file:
        for index, (scenario, messages) in enumerate(chats):
            line = {
                "kind": "turn",
                "conversation": f"c{index}",
                "reply": f"r{index}",
                "time": 1,
                "model": "m",
            }
            file.write(json.dumps(line | {"scenario": scenario, "messages": messages}) + "\n")
        for index, rating in (ratings or {}).items():
            line = {"kind": "feedback", "reply": f"r{index}", "rating": rating, "comment": "", "time": 2}
            file.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture
def drafted():
    """What a model would say that drafts well."""
    card = to_mapping(load_scenarios()[0])
    for key in ("id", "split", "start", "language", "value"):
        card.pop(key, None)
    story = card["story"]
    card["story"] = {key: story[key] for key in ("trigger", "outcome", "epilogue")}
    card["story"]["stages"] = [{"telling": stage["telling"]} for stage in story["stages"]]
    return card


def test_cards_are_drafted_from_free_talks(serve, drafted, tmp_path, capsys):
    server = serve(lambda request, number: json.dumps(drafted))
    talk = [user("My sister Anna in Leeds does not call."), assistant("That hurts.")]
    folder = write_log(tmp_path / "kept", [(None, talk), ("life-1", [user("x"), assistant("y")])])
    output = tmp_path / "drafts.yaml"
    judge = [f"environment.judge.url={server.url}", "environment.judge.model=m"]
    assert draft.main([str(folder), "--output", str(output), *judge]) == 0
    (card,), problems = read_cards(output)
    assert not problems and not card.start and card.person.name == drafted["person"]["name"]
    assert output.read_text().startswith("# Drafts")
    asked = server.requests[-1]["messages"]
    assert "Anna in Leeds" in asked[1]["content"] and "Replace every name" in asked[0]["content"]
    assert "1 drafts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "trace", ["write to a.b@example.org", "see https://x.example", "call +44 20 7946 0958"]
)
def test_traces_of_a_person_are_refused(drafted, trace):
    to_card(json.dumps(drafted), "draft-1")
    with pytest.raises(RoleFailure, match="lead back"):
        to_card(json.dumps(drafted | {"hope": f"That they {trace}."}), "draft-1")


SAID = [
    "My sister Anna doesn't call since we moved to Leeds. Hector left. I HATE THE physio",
    "On Monday Dr. Okafor said: Will it be Rose\u2019s farm in saltburn? Zo\u0065\u0308 knows.",
    "\u201cBranwen\u201d is here, and Branwen\u2019s friend.",
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("That ANNA calls.", "ANNA"),
        ("Near Leeds' station.", "Leeds"),
        ("Ask okafor about it.", "okafor"),  # after an abbreviation's full stop, and of another spelling
        ("With Branwen's friend.", "Branwen's"),
        ("On Monday the sister will call.", None),
        ("Hector was here, and Will, with a physio from Saltburn.", None),  # listed, see below
        ("A rose.", None),
    ],
)
def test_names_of_a_conversation_are_refused(drafted, text, found):
    assert trace([text, {"a": 1}], SAID) == found
    if found is not None:
        with pytest.raises(RoleFailure, match=f"holds .{found}"):
            to_card(json.dumps(drafted | {"hope": text}), "draft-1", SAID)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The physio in Saltburn knows Zo\u00eb and Hector.", ["physio", "Saltburn", "Zo\u00eb", "Hector"]),
        ("Rose will call on Monday.", ["Rose"]),
        ("A rose, and I will call the farm in Riga.", []),
    ],
)
def test_what_may_be_a_name_is_listed(text, words):
    assert doubtful({"hope": text}, SAID) == words


def test_a_name_is_asked_for_again_and_what_may_be_one_is_marked(serve, drafted, tmp_path, capsys):
    named = drafted | {"hope": "That Anna calls."}
    better = drafted | {"hope": "That the physio calls."}
    server = serve(lambda request, number: json.dumps(better if "Anna'" in str(request) else named))
    talk = [user("It is my sister Anna, not the physio. \u4f60\u597d"), assistant("That hurts.")]
    output = tmp_path / "drafts.yaml"
    judge = [f"environment.judge.url={server.url}", "environment.judge.model=m"]
    folder = write_log(tmp_path / "kept", [(None, talk)])
    assert draft.main([str(folder), "--output", str(output), *judge]) == 0
    (card,), problems = read_cards(output)
    assert not problems and card.hope == better["hope"]
    text = output.read_text()
    assert "perhaps a name: physio\n" in text and "without capitals" in text
    assert "1 of them may hold names" in capsys.readouterr().out


def test_what_is_no_card_is_refused(drafted):
    drafted["story"]["stages"].pop()
    with pytest.raises(RoleFailure, match="stages"):
        to_card(json.dumps(drafted), "draft-1")


def test_only_talks_with_a_scenario(tmp_path, capsys):
    folder = write_log(tmp_path / "kept", [("life-1", [user("x"), assistant("y")])])
    assert draft.main([str(folder), "--output", str(tmp_path / "drafts.yaml")]) == 2
    assert "held with a scenario" in capsys.readouterr().err


def test_the_warm_start_takes_what_was_rated_well(tmp_path, capsys):
    """A line may begin with replies of before the conversation was kept; a bad reply is not learnt."""
    chats = [
        (None, [user("a"), assistant("Early."), user("b"), assistant("Good.")]),
        (None, [user("c"), assistant("Bad.")]),
        (None, [user("d"), assistant("Unrated.")]),
    ]
    folder, output = write_log(tmp_path / "kept", chats, {0: 1, 1: -1}), tmp_path / "good.jsonl"
    assert chat_log.main([str(folder), "--output", str(output)]) == 0
    assert "1 of 3" in capsys.readouterr().out
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["messages"] == chats[0][1]
    assert len(read_warmstart(output)) == 1
    mixed = {"id": "c", "messages": chats[0][1] + chats[1][1], "replies": ["x", "y"]}
    mixed["feedback"] = {"x": {"rating": 1}, "y": {"rating": -1}, "z": {"rating": 1}}
    (row,) = chat_log.well_rated([mixed])
    assert [message.get("weight") for message in row["messages"]] == [None] * 5 + [0]
    assert chat_log.main([str(write_log(tmp_path / "b", chats)), "--output", str(output)]) == 2


def test_drafts_are_yaml_that_people_can_read(drafted):
    assert yaml.safe_load(yaml.safe_dump([to_card(json.dumps(drafted), "draft-1")], sort_keys=False))
