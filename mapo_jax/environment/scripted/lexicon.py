"""The sentences of the scripted world, read from `sentences.yaml`, which also describes their slots."""

from pathlib import Path

import yaml

_FILE = yaml.safe_load(Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8"))

# Pools of sentences: the policy's by act; the user's by purpose, by unstated feeling, by the act they
# have had enough of, and by reaction to the last reply, in order of precedence; those of imagined cards.
CONSTRUCTIONS, MESSAGES, HINTS, WEARY, REACTIONS, IMAGINED = (
    {name: tuple(sentences) for name, sentences in _FILE[section].items()}
    for section in ("replies", "messages", "hints", "weary", "reactions", "imagined")
)
