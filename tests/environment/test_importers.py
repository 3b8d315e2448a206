"""Importing cards: labels, stages, start states, and the real SAGE profiles if they are there."""

import json

import pytest

from mapo_jax.environment.importers import UNTOLD, four, main, sections, split_of
from mapo_jax.environment.scenario import read_cards

PROFILE = {
    "id": "0A1B2C3D-0000-0000-0000-000000000000",
    "player": "* 姓名：陈一\n* 年龄：27岁\n* 职业：教师\n\n* 个人爱好：\n1. 爬山。\n\n* 说话风格：\n很慢。",
    "scene": "**背景故事：**\n\n**事件起因：**\n\n学校换了校长。\n\n**事件经过：**\n\n"
    "* **一周前：** 新校长取消了她带了三年的合唱团，没有提前说。\n"
    "* **三天前：** 学生来问她什么时候排练，她不知道怎么回答。\n\n"
    "**事件主要冲突：**\n\n* **冲突事件：** 家长会上没有人替她说一句话。\n"
    "* **冲突内在原因：** 她觉得努力不算数。\n\n**事件当前状态：**\n\n她每天照常上课。\n",
    "task": "你希望有人听你说完",
    "first_talk": "今天又没排练。",
    "main_cha": "内向",
    "cha_group": ["谨慎"],
}
CHARACTER = """## 角色信息
姓名：李二
年龄：31
- 社交性格：爽快
- 内核性格：多疑
## 角色基础共情阈值
共情阈值【低】，说明文字
## 聊天话题
搬家之后没有人联系他。
## 共情需求
倾诉中想要获得的共情点：有人记得他。
人物共情阈值：讨厌敷衍。
童年经历：住在海边。
少年经历：转过三次学。
青年经历：开过一家小店。
隐形成长主线脉络：总在告别。
现在的情况：一个人住。
现在的人生主线目标：再开一家店。
现在的人生愿景与动力：让人愿意回来。
## 角色故事
故事的起因：新家的门铃一次也没响过。
"""


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_sage_profile_becomes_a_card(tmp_path):
    source, output = tmp_path / "p.jsonl", tmp_path / "cards.jsonl"
    source.write_text(json.dumps(PROFILE) + "\n")
    assert run("sage", source, "--output", output, "--domain", "career") == 0
    (card,), problems = read_cards(output)
    assert not problems and card.id == "sage-0a1b2c3d" and card.language == "zh" and card.domain == "career"
    assert (card.person.name, card.person.age, card.person.speech) == ("陈一", 27, "很慢。")
    assert card.hope == "你希望有人听你说完" and card.motive == "她觉得努力不算数。"
    assert card.story.trigger == "学校换了校长。"
    tellings = [stage.telling for stage in card.story.stages]
    assert "取消了她带了三年的合唱团" in tellings[0] and "什么时候排练" in tellings[1]
    assert tellings[2] == "家长会上没有人替她说一句话。"
    assert not card.start and not card.scripted and card.history[0] == UNTOLD


def test_an_empa_folder_becomes_cards_with_their_start(tmp_path):
    (tmp_path / "character_setting").mkdir()
    (tmp_path / "character_setting" / "script_007.md").write_text(CHARACTER)
    (tmp_path / "scenarios").mkdir()
    course = {f"阶段{i}": {"标题": f"第{i}", "内容": f"内容{i}"} for i in (2, 1, 4, 3)}
    stories = [{"剧本编号": "script_007", "故事的经过": course, "故事的结果": "门铃响了。"}]
    (tmp_path / "scenarios" / "character_stories.json").write_text(json.dumps(stories))
    levels = {f"{axis}.{i}": i % 4 for axis in "CAP" for i in (1, 2, 3)}
    (tmp_path / "iedr_batch_results.json").write_text(
        json.dumps([{"script_id": "script_007", "status": "success", "iedr": levels}])
    )
    output = tmp_path / "cards.jsonl"
    assert run("empa", tmp_path, "--output", output) == 0
    (card,), problems = read_cards(output)
    assert not problems and card.id == "empa-007" and card.empathy_threshold == "low"
    assert card.start == (1, 2, 3) * 3 and card.history == (
        "住在海边。",
        "转过三次学。",
        "开过一家小店。",
        "总在告别。",
    )
    assert [stage.telling for stage in card.story.stages] == [f"第{i} 内容{i}" for i in (1, 2, 3, 4)]
    assert card.story.trigger == "新家的门铃一次也没响过。" and card.story.outcome == "门铃响了。"


def test_what_is_missing_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"id": "x"}\n')
    for arguments, words in (
        (("sage", tmp_path / "none.jsonl"), "cannot read"),
        (("sage", tmp_path / "p.jsonl"), "line 1 is no SAGE profile"),
        (("empa", tmp_path), "character_stories.json"),
    ):
        assert run(*arguments, "--output", tmp_path / "o.jsonl") == 2
        assert words in capsys.readouterr().err
    assert run("sage", tmp_path / "p.jsonl", "--output", tmp_path / "o.yaml") == 2


def test_sections_and_stages():
    assert sections("# 甲：a\nb\n**乙** c\n1. 丙：\n", ("甲", "乙", "丙")) == {"甲": "a b", "乙": "c"}
    assert four(["a", "b", "c", "d", "e"], []) == ["a", "b", "c", "d e"]
    assert four(["a"], ["", "a", "x"]) == ["a", "x", UNTOLD, UNTOLD]
    shares = [split_of(f"card-{i}") for i in range(2000)]
    assert 0.05 < shares.count("validation") / 2000 < 0.15 and 0.7 < shares.count("train") / 2000 < 0.9


def test_the_real_profiles(shared_data, tmp_path):
    output = tmp_path / "cards.jsonl"
    assert run("sage", shared_data / "sage" / "profiles.jsonl", "--output", output) == 0
    cards, problems = read_cards(output)
    assert len(cards) == 100 and not problems
    assert sum(card.story.stages[3].telling != UNTOLD for card in cards) >= 90
    assert sum(card.story.stages[1].telling != UNTOLD for card in cards) >= 98
    assert sum(card.situation != UNTOLD for card in cards) >= 95
    assert all(card.person.name != UNTOLD for card in cards)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_line_is_named(tmp_path, capsys, text):
    (tmp_path / "p.jsonl").write_text(text + "\n")
    assert run("sage", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl") == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "[]",
        "[" * 100_000,
        "9" * 5000,
        json.dumps(PROFILE | {"player": 7}),
        json.dumps(PROFILE | {"player": "Prose without a label."}),
        json.dumps(PROFILE | {"id": 7}),
    ],
)
def test_a_line_that_is_no_profile_is_one_sentence(tmp_path, capsys, line):
    source = tmp_path / "p.jsonl"
    source.write_text(json.dumps(PROFILE) + "\n" + line + "\n")
    assert run("sage", source, "--output", tmp_path / "cards.jsonl") == 2
    error = capsys.readouterr().err
    assert "line 2 is no SAGE profile" in error and "Traceback" not in error


def test_half_a_character_of_a_profile_is_replaced(tmp_path):
    source, output = tmp_path / "p.jsonl", tmp_path / "cards.jsonl"
    source.write_text(json.dumps(PROFILE | {"task": "half \ud83d"}) + "\n")
    assert run("sage", source, "--output", output) == 0
    assert read_cards(output)[0][0].hope == "half \ufffd"


@pytest.mark.parametrize(
    ("story", "start"), [({"故事的经过": [1]}, []), ({}, []), ({}, [7]), ({}, [{"iedr": dict.fromkeys(
        (f"{axis}.{n}" for axis in "CAP" for n in (1, 2, 3)), 1)}])]
)  # fmt: skip
def test_a_folder_that_is_not_as_empa_has_it_is_one_sentence(tmp_path, capsys, story, start):
    (tmp_path / "character_setting").mkdir()
    (tmp_path / "character_setting" / "script_001.md").write_text(CHARACTER if story or start else "Prose.")
    (tmp_path / "scenarios").mkdir()
    stories = [{"剧本编号": "script_001"} | story]
    (tmp_path / "scenarios" / "character_stories.json").write_text(json.dumps(stories))
    (tmp_path / "iedr_batch_results.json").write_text(json.dumps(start))
    assert run("empa", tmp_path, "--output", tmp_path / "cards.jsonl") == 2
    assert "as EMPA has" in capsys.readouterr().err
