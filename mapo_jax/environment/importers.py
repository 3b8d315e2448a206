"""Imports cards from other collections: SAGE profiles, and EMPA's folders of cards. Both are Chinese.

    python -m mapo_jax.environment.importers sage profiles.jsonl --output cards.jsonl
    python -m mapo_jax.environment.importers empa FOLDER --output cards.jsonl

Texts that a source lacks become UNTOLD. A judge estimates missing start states (`python -m mapo_jax.rate`).
The texts keep their licence.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_jax.commands import run_command
from mapo_jax.environment.card_schema import DOMAINS, INDICATORS
from mapo_jax.environment.scenario import print_problems, read_cards
from mapo_jax.errors import UserError
from mapo_jax.files import encodable, write_whole
from mapo_jax.json_files import read_json

UNTOLD = "没有提到。"
_LONGEST = 1500  # characters of one field


def split_of(name: str) -> str:
    """A tenth of the cards each for validation and test, by name, so that new cards do not move others."""
    tenth = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(tenth, "train")


def sections(text: str, labels: Sequence[str]) -> dict[str, str]:
    """The text after each label, up to the next label.

    A label is at the start of a line, perhaps as a heading, bold, numbered or in a list, with or without a
    colon. Of repeated labels the first counts.

    Raises:
      ValueError: the text has none of the labels.
    """
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    pattern = re.compile(rf"^[ \t]*[#*\-•\d.、\s]*\**({names})[ \t]*\**[：:]?\**[ \t]*", re.MULTILINE)
    _, *parts = pattern.split(text)  # before the first label; then labels and bodies by turns
    if not parts:
        raise ValueError(f"no line begins with a label such as {labels[0]}")
    bodies: dict[str, str] = {}
    for label, body in zip(parts[::2], parts[1::2], strict=True):
        bodies.setdefault(label, plain(body))
    return {label: body for label, body in bodies.items() if body}


def plain(text: str) -> str:
    """One paragraph without markup."""
    text = re.sub(r"</?[a-z_]+>|[*#`>]+|-{2,}", " ", text)
    return " ".join(text.split())[:_LONGEST].strip(" -•")


def four(parts: Sequence[str], spare: Sequence[str]) -> list[str]:
    """Exactly four stages: surplus ones are joined to the last, missing ones come from `spare`."""
    stages = [part for part in parts if part]
    if len(stages) > 4:
        stages = [*stages[:3], " ".join(stages[3:])[:_LONGEST]]
    stages += [text for text in spare if text and text not in stages][: 4 - len(stages)]
    return [*stages, *[UNTOLD] * (4 - len(stages))]


_SAGE_PERSON = ("姓名", "年龄", "性别", "职业", "个人爱好", "习惯和行为特点", "说话风格", "说话方式")
_SAGE_SCENE = (
    "倾诉背景事件", "背景故事", "事件起因", "事件经过", "事件主要冲突", "冲突事件",
    "冲突角色", "冲突内在原因", "玩家遇到的困难", "尝试未成功的解决方案", "当前问题",
    "事件当前状态", "玩家不同emotion下的反应", "根据隐藏主题的反应", "贴合隐藏主题的NPC回复",
    "偏离隐藏主题的NPC回复", "隐藏主题",
)  # fmt: skip


def _card(
    name: str, texts: Mapping[str, str | None], age: str | None, stages: list[str], threshold: str = "medium"
) -> dict[str, Any]:
    """A card with these texts, by field; a text that is missing or empty becomes UNTOLD."""

    def section(*fields: str) -> dict[str, str]:
        return {field: texts.get(field) or UNTOLD for field in fields}

    number = re.search(r"\d+", age or "")
    years = int(number.group()) if number else 0
    person = section("name", "social", "inner", "speech")
    return {
        "id": name,
        "language": "zh",
        "domain": "life",
        "split": split_of(name),
        "person": {"name": person.pop("name"), "age": years if 0 < years < 120 else 30, **person},
        "empathy_threshold": threshold,
        **section("topic", "hope"),
        "dislike": list(section("dislike").values()),
        "history": section("childhood", "youth", "adulthood", "recent"),
        "present": section("situation", "goal", "motive"),
        "story": {
            **section("trigger"),
            "stages": [{"telling": telling} for telling in stages],
            **section("outcome", "epilogue"),
        },
    }


def sage_card(profile: dict[str, Any]) -> dict[str, Any]:
    """A card from one SAGE profile (`player`, `scene`, `task`, `first_talk`, ...). Age 30 if it has none."""
    person = sections(profile["player"], _SAGE_PERSON)
    # Profiles name the same sections with and without a particle.
    text = re.sub(r"事件中?的(?=起因|经过|主要冲突|当前状态)", "事件", profile["scene"])
    text = re.sub(r"尝试过?[，但]*未成功", "尝试未成功", text)
    text = re.sub(r"(?<=\n)([#*\d.\s]*)玩家在?不同[^\n：:]{0,20}反应", r"\1玩家不同emotion下的反应", text)
    text = re.sub(r"(?<=\n)([#*\d.\s]*)根据[^\n：:]{0,10}隐藏主题[^\n：:]*", r"\1根据隐藏主题的反应", text)
    text = re.sub(r"(?:NPC)?(贴合|偏离)[^\n：:]{0,6}隐藏主题的?(?:NPC)?的?回复", r"\1隐藏主题的NPC回复", text)
    scene = sections(text, _SAGE_SCENE)
    course = re.search(
        r"事件经过[^\n]*\n(.*?)(?=\n[^\n]*(?:事件主要冲突|主要冲突|玩家遇到的困难|事件当前状态))", text, re.S
    )
    bullets = re.split(r"\n\s*(?:[-*•]+\s|\d+[.、]\s*|\*\*)", "\n" + course.group(1)) if course else []
    stages = [plain(bullet) for bullet in bullets if len(plain(bullet)) > 12]
    spare = [scene.get(name, "") for name in ("冲突事件", "尝试未成功的解决方案", "当前问题", "事件主要冲突")]
    trigger = scene.get("事件起因") or (stages[0] if stages else plain(text)[:300])
    traits = "、".join([profile.get("main_cha", ""), *profile.get("cha_group", ())])

    def joined(*texts: str | None) -> str:
        return "；".join(text for text in texts if text)

    texts = {
        "name": person["姓名"].split()[0] if person.get("姓名") else None,
        "social": joined(person.get("职业"), person.get("个人爱好")),
        "inner": joined(traits, person.get("习惯和行为特点")),
        "speech": joined(person.get("说话风格"), person.get("说话方式")),
        "topic": plain(profile["first_talk"]),
        "hope": plain(profile["task"]),
        "dislike": scene.get("偏离隐藏主题的NPC回复"),
        "recent": trigger,
        "situation": scene.get("事件当前状态") or scene.get("当前问题"),
        "goal": plain(profile["task"]),
        "motive": scene.get("冲突内在原因"),
        "trigger": trigger,
        "outcome": scene.get("事件当前状态"),
    }
    name = f"sage-{profile['id'].lower().split('-')[0]}"
    return _card(name, texts, person.get("年龄"), four(stages, spare))


_EMPA_LABELS = (
    "姓名", "性别", "年龄", "社交性格", "内核性格", "角色输出格式", "角色当前行为",
    "角色聊天原则", "角色聊天策略", "角色基础共情阈值", "聊天话题", "共情需求",
    "想要找人倾诉的想法与内容", "倾诉中想要获得的共情点", "人物共情阈值", "当下共情需求优先级",
    "角色过往经历", "童年经历", "少年经历", "青年经历", "隐形成长主线脉络", "角色现状",
    "现在的情况", "现在的人生主线目标", "现在的人生愿景与动力", "角色故事", "故事的起因",
    "角色信息", "角色特征",
)  # fmt: skip
_EMPA_FIELDS = {
    "name": "姓名",
    "social": "社交性格",
    "inner": "内核性格",
    "topic": "聊天话题",
    "hope": "倾诉中想要获得的共情点",
    "dislike": "人物共情阈值",
    "childhood": "童年经历",
    "youth": "少年经历",
    "adulthood": "青年经历",
    "recent": "隐形成长主线脉络",
    "situation": "现在的情况",
    "goal": "现在的人生主线目标",
    "motive": "现在的人生愿景与动力",
    "trigger": "故事的起因",
}


def empa_card(name: str, text: str, story: dict[str, Any], start: dict[str, int] | None) -> dict[str, Any]:
    """A card from a character file (`script_NNN.md`), its entry in `character_stories.json`, its start."""
    texts_by_label = sections(text, _EMPA_LABELS)
    threshold = re.search(r"共情阈值【(.)", text)
    numbered = sorted(
        story.get("故事的经过", {}).items(), key=lambda item: int(re.sub(r"\D", "", item[0]) or 0)
    )
    stages = [plain(f"{part.get('标题', '')} {part.get('内容', '')}") for _, part in numbered]
    epilogues = [v for k, v in story.items() if k in ("故事的尾声", "故事的插曲", "尾声")]
    texts = {field: texts_by_label.get(label) for field, label in _EMPA_FIELDS.items()}
    texts["outcome"] = plain(str(story.get("故事的结果", "")))
    texts["epilogue"] = plain(str(epilogues[0])) if epilogues else None
    levels = {"低": "low", "中": "medium", "高": "high"}
    level = levels.get(threshold.group(1) if threshold else "", "medium")
    card = _card(name, texts, texts_by_label.get("年龄"), four(stages, []), level)
    return card if start is None else card | {"start": start}


def import_sage(path: Path) -> list[dict[str, Any]]:
    """Cards of a SAGE profile file, one JSON object on each line.

    Raises:
      UserError: an unreadable file, or a profile that lacks a field; names its line.
    """
    cards = []
    for number, line in enumerate(_read(path).rstrip("\n").split("\n"), start=1):
        try:
            cards.append(sage_card(encodable(json.loads(line))))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path}, line {number} is no SAGE profile: {error!r}") from error
    return cards


def import_empa(folder: Path) -> list[dict[str, Any]]:
    """Cards of a folder with `character_setting/script_NNN.md` and `scenarios/character_stories.json`.

    The nine start levels come from any `iedr_batch_results.json` at or below the folder, if there is one.

    Raises:
      UserError: a missing or unreadable file.
    """
    entries = read_json(folder / "scenarios" / "character_stories.json", "stories")
    stories = {str(entry.get("剧本编号")): entry for entry in entries if isinstance(entry, dict)}
    starts: dict[str, dict[str, int]] = {}
    for file in sorted(folder.rglob("iedr_batch_results.json")):
        try:
            for entry in read_json(file, "start states"):
                levels = entry.get("iedr") or {}
                if all(f"{name[0]}.{name[1]}" in levels for name in INDICATORS):
                    starts[entry["script_id"]] = {name: levels[f"{name[0]}.{name[1]}"] for name in INDICATORS}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} holds no start states as EMPA has them: {error!r}") from error
    files = sorted((folder / "character_setting").glob("script_*.md"))
    if not files:
        raise UserError(f"{folder} has no character_setting/script_*.md; give the folder with both parts")
    cards = []
    for file in files:
        if file.stem not in stories:
            raise UserError(f"scenarios/character_stories.json has no story for {file.name}")
        name = f"empa-{file.stem.removeprefix('script_').lower()}"
        try:
            cards.append(empa_card(name, _read(file), stories[file.stem], starts.get(file.stem)))
        except (TypeError, AttributeError, ValueError) as error:
            raise UserError(f"the story or text of {file.name} is not as EMPA has it: {error!r}") from error
    return cards


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Imports, writes, and checks what was written; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.environment.importers", description="Turns others' cards into ours."
    )
    parser.add_argument("source", choices=("sage", "empa"))
    parser.add_argument("path", type=Path, help="sage: a JSONL file; empa: the folder of both parts")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--domain", choices=DOMAINS, default="life", help="of all cards (default: life)")
    options = parser.parse_args(arguments)

    def command() -> None:
        if options.output.suffix != ".jsonl":
            raise UserError(f"--output is {options.output}; its name must end with .jsonl")
        cards = import_sage(options.path) if options.source == "sage" else import_empa(options.path)
        lines = [json.dumps(card | {"domain": options.domain}, ensure_ascii=False) for card in cards]
        write_whole(options.output, "\n".join(lines) + "\n")
        sound, problems = read_cards(options.output)
        print_problems(problems)
        print(f"{len(sound)} cards in {options.output}, {len(problems)} problems")
        missing = sum(not card.start for card in sound)
        if missing:
            print(f"{missing} have no start: python -m mapo_jax.rate {options.output} --output FILE.jsonl")

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
