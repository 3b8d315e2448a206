"""Cards: strict validation, points of the start state, and the embedded set as a whole."""

import copy
import json
from collections import Counter

import pytest
import yaml

from mapo_jax.environment.card_schema import DOMAINS, INDICATORS
from mapo_jax.environment.scenario import load_scenarios, main, read_cards, start_position, to_mapping
from mapo_jax.errors import UserError

CARD = {
    "id": "night-rota",
    "domain": "career",
    "split": "train",
    "person": {"name": "Ines", "age": 34, "social": "A nurse.", "inner": "Doubts.", "speech": "Dry."},
    "empathy_threshold": "medium",
    "topic": "The ward.",
    "hope": "To be heard.",
    "dislike": ["pep talks"],
    "start": dict(zip(INDICATORS, (2, 2, 3, 3, 2, 3, 2, 1, 2), strict=True)),
    "history": {"childhood": "a", "youth": "b", "adulthood": "c", "recent": "d"},
    "present": {"situation": "s", "goal": "g", "motive": "m"},
    "value": "being fair",
    "story": {
        "trigger": "t",
        "stages": [
            {
                "telling": "t",
                "particulars": [f"the {name} shifts", f"the {name} rota"],
                "line": [f"I count the {name} shifts.", f"Nobody asked about the {name} rota."],
                "feeling": "tired",
                "unstated": "unseen",
            }
            for name in ("night", "summer", "winter", "new")
        ],
        "strengths": ["turning up every morning", "keeping the charts in order"],
        "steps": ["a short talk with Mara", "one evening without the phone"],
        "outcome": "o",
        "epilogue": "e",
    },
}


def write(folder, *cards):
    (folder / "cards.yaml").write_text(yaml.safe_dump(list(cards)))
    return folder


def edited(path, value):
    card = copy.deepcopy(CARD)
    holder = card
    for key in path[:-1]:
        holder = holder[key]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return card


def test_card_is_read_whole(tmp_path):
    (scenario,) = load_scenarios(write(tmp_path, CARD))
    assert scenario.person.name == "Ines"
    assert scenario.story.stages[1].particulars == ("the summer shifts", "the summer rota")
    # C: -2*2 - 2*2 - 3*3; A: -2*3 - 4*2 - 3*3; P: -2*2 - 4*1 - 3*2.
    assert scenario.start_position == (-17, -23, -14)
    assert scenario.strongest_axis == "A"


def test_extreme_start_states():
    assert start_position([3] * 9) == (-21, -27, -27)
    assert start_position(dict.fromkeys(INDICATORS, 0)) == (0, 0, 0)
    with pytest.raises(UserError, match="A2"):
        start_position({**dict.fromkeys(INDICATORS, 1), "A2": 4})
    with pytest.raises(UserError, match="9 levels"):
        start_position([1, 2])


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        (("domain",), "cooking", "domain"),
        (("person", "age"), "old", "person.age"),
        (("person", "age"), None, "person.age"),
        (("start", "A1"), 7, "start.A1"),
        (("start",), dict.fromkeys(INDICATORS, 0), "start"),
        (("mood",), "grey", "mood"),
        (("story", "stages"), CARD["story"]["stages"][:3], "story.stages"),
        (("story", "stages", 0, "feeling"), "glad", "feeling"),
        (("story", "stages", 0, "unstated"), "tired", "unstated"),
        (("story", "stages", 0, "particulars"), ["my shifts", "the night rota"], "particulars"),
        (("story", "stages", 1), CARD["story"]["stages"][0], "overlaps"),
        (("story", "stages", 0, "line"), ["I count shifts.", "Nobody asked about the night rota."], "line"),
        (("story", "stages", 0, "line", 0), "I am tired of the night shifts.", "line"),
        (("story", "stages", 0, "line", 0), "I count the night shifts and then I count them again.", "line"),
        (("story", "strengths"), ["she turns up", "keeping the charts in order"], "strengths"),
        (("story", "steps"), ["talk with Mara", "one evening without the phone"], "steps"),
        (("value",), "", "value"),
        (("topic",), None, "topic"),
    ],
)
def test_broken_card_names_file_card_and_field(tmp_path, path, value, names):
    with pytest.raises(UserError) as problem:
        load_scenarios(write(tmp_path, edited(path, value)))
    for part in ("cards.yaml", "night-rota", names):
        assert part in str(problem.value)


def test_files_that_are_no_cards(tmp_path):
    with pytest.raises(UserError, match="no scenario cards"):
        load_scenarios(tmp_path)
    (tmp_path / "cards.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_scenarios(tmp_path)
    (tmp_path / "cards.yaml").write_text("person: Ines")
    with pytest.raises(UserError, match="list of cards"):
        load_scenarios(tmp_path)
    with pytest.raises(UserError, match="already used"):
        load_scenarios(write(tmp_path, CARD, CARD))
    with pytest.raises(UserError, match="choose one of"):
        load_scenarios(tmp_path, split="dev")
    with pytest.raises(UserError, match="no scenario cards of split"):
        load_scenarios(write(tmp_path, CARD), split="test")


def test_check_command(tmp_path, capsys):
    assert main(["check", str(write(tmp_path, CARD))]) == 0
    assert "1 sound cards, 0 problems" in capsys.readouterr().out
    assert main(["check", str(write(tmp_path, edited(("value",), None)))]) == 2
    assert "value: is missing" in capsys.readouterr().err
    assert main([]) == 2


def test_embedded_cards_are_balanced():
    cards = load_scenarios()
    assert len(cards) == 96 and len({card.id for card in cards}) == 96
    assert Counter(card.domain for card in cards) == dict.fromkeys(DOMAINS, 16)
    assert Counter(card.split for card in cards) == {"train": 64, "validation": 16, "test": 16}
    for split, count in (("train", 64), ("validation", 16), ("test", 16)):
        axes = Counter(card.strongest_axis for card in load_scenarios(split=split))
        assert all(count * 0.25 <= axes[axis] <= count * 0.42 for axis in "CAP"), (split, axes)
    norms = [sum(x * x for x in card.start_position) ** 0.5 for card in cards]
    # Published cases: mean 32.3, sd 4.5.
    assert 29 < sum(norms) / 96 < 35 and min(norms) < 27 and max(norms) > 36
    assert {card.empathy_threshold for card in cards} == {"low", "medium", "high"}


def prose_only(card):
    """The card without phrases, for the live world only."""
    plain = to_mapping(card)
    del plain["value"], plain["story"]["strengths"], plain["story"]["steps"]
    for stage in plain["story"]["stages"]:
        for key in ("particulars", "line", "feeling", "unstated"):
            del stage[key]
    return plain


def test_cards_survive_as_plain_data_in_both_formats(tmp_path):
    cards = load_scenarios()[:5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(to_mapping(card)) + "\n" for card in cards[:3]))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump([to_mapping(card) for card in cards[3:]]))
    assert load_scenarios(tmp_path) == cards


def test_a_card_without_phrases_is_for_the_live_world(tmp_path):
    plain = prose_only(load_scenarios()[0]) | {"language": "zh"}
    (tmp_path / "a.jsonl").write_text(json.dumps(plain))
    (card,) = load_scenarios(tmp_path, scripted=False)
    assert card.language == "zh" and not card.scripted and card.story.stages[0].line == ()
    with pytest.raises(UserError, match=r"no phrases.*environment\.family=live"):
        load_scenarios(tmp_path)


def test_a_card_without_a_start_waits_for_a_judge(tmp_path, capsys):
    plain = prose_only(load_scenarios()[0])
    del plain["start"]
    (tmp_path / "a.jsonl").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"no start.*mapo_jax\.rate"):
        load_scenarios(tmp_path, scripted=False)
    assert main(["check", str(tmp_path)]) == 0
    assert "1 with no start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"language": "fr"}, ["language", "en, zh"]),
        ({"value": "craft"}, ["story.strengths", "is missing"]),
        ({"topic": 3}, ["topic", "must be text"]),
        ({"colour": "red"}, ["colour", "unknown"]),
        ({"start": {"C1": 5}}, ["start.C1", "0, 1, 2 or 3"]),
    ],
)
def test_problems_name_file_card_and_field(tmp_path, capsys, change, words):
    plain = prose_only(load_scenarios()[0])
    plain |= change
    (tmp_path / "mine.jsonl").write_text(json.dumps(plain))
    assert main(["check", str(tmp_path)]) == 2
    report = capsys.readouterr().err
    assert "mine.jsonl, card career-white-hat" in report
    assert all(word in report for word in words)


def test_a_broken_line_of_jsonl_is_named(tmp_path, capsys):
    good = json.dumps(to_mapping(load_scenarios()[0]))
    (tmp_path / "mine.jsonl").write_text(good + '\n{"id": 1\n{"id": "two"}\n')
    assert main(["check", str(tmp_path)]) == 2
    report = capsys.readouterr()
    assert "mine.jsonl, line 2 is not valid JSON" in report.err and "1 sound cards" in report.out
    assert "mine.jsonl, card two, story: is missing" in report.err  # later lines are read as well


def test_half_a_character_is_a_problem_of_its_card(tmp_path):
    for number, path in enumerate((("topic",), ("person", "name"), ("dislike", 0), ("history", "youth"))):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(edited(path, "half \ud83d")))
        with pytest.raises(UserError, match="holds half of a surrogate pair"):
            load_scenarios(file)
    file.write_text(json.dumps(edited(("topic",), "whole \U0001f600")))
    assert load_scenarios(file)[0].topic == "whole \U0001f600"


@pytest.mark.parametrize(
    "card",
    [
        edited(("id",), "\x1b]0;owned\x07\u202e\n0 problems"),
        edited(("domain",), "\x1b[2J\ud83d"),
        CARD | {"\x1b[31m": 1},
        {"id": ["\x1b[2J"]},
        "\x1b[2J",
    ],
)
def test_a_check_prints_nothing_that_steers_a_terminal(tmp_path, capsys, card):
    (tmp_path / "cards.jsonl").write_text(json.dumps(card))
    assert main(["check", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e", "\ud83d"} & set(shown.out + shown.err)
    assert "\n0 problems" not in shown.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cards.jsonl", "[" * 100_000),
        ("cards.jsonl", "9" * 5000),
        ("cards.yaml", "[" * 5000),
        ("cards.yaml", "- {id: 2001-99-99}"),
        ("cards.yaml", "- " + "9" * 5000),
    ],
)
def test_what_a_parser_gives_up_on_is_a_problem(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    scenarios, problems = read_cards(tmp_path)
    assert not scenarios and "is not valid" in problems[0]
