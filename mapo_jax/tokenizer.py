"""A small tokenizer of our own in Qwen's format: byte-level BPE, built from the texts it will read.

The folder that `save_tokenizer` writes is loaded by `transformers.AutoTokenizer` without a network, like any
Qwen2 tokenizer's. As every byte is a token, no text is out of vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mapo_jax.errors import UserError
from mapo_jax.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)  # Qwen's: padding and end of text, and the two of ChatML
BYTES = 256

# Where a token may not cross: contractions; a word with the space before it; single digits; punctuation with
# the space before it and the line breaks after it; white space. In words, Qwen2's own rule.
_SPLIT = "|".join(
    (
        r"(?i:'(?:s|t|re|ve|m|ll|d))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Plain ChatML. What a run trains on may differ (a system prompt, user text that spells a control token):
# the folders that leave a run carry `rollout.chat.ChatFormat.template` instead.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE over `texts`.

    Args:
      texts: what it should write briefly; control tokens are not part of it.
      vocabulary: most tokens, the 256 bytes and the special tokens included. Few texts give fewer.

    Returns:
      The tokenizer; ids: the special tokens, then the bytes, then the merges by frequency. The same texts
      give the same tokenizer.

    Raises:
      UserError: a vocabulary with no room for the bytes.
    """
    fewest = BYTES + len(SPECIAL_TOKENS)
    if vocabulary < fewest:
        raise UserError(f"`model.fresh.vocabulary` is {vocabulary}; it must be at least {fewest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(
    folder: str | Path, tokenizer: Tokenizer, *, max_tokens: int, chat_template: str = CHAT_TEMPLATE
) -> None:
    """Writes the files of a Qwen2 tokenizer: tokenizer.json, vocab.json, merges.txt, tokenizer_config.json.

    Args:
      max_tokens: longest text that the model is made for (`model_max_length`).
      chat_template: jinja source.
    """
    folder = Path(folder)
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    write_whole(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1))
    write_whole(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_whole(folder / "merges.txt", "\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [START, END],
        "added_tokens_decoder": {
            str(number): {
                name: getattr(token, name)
                for name in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            }
            for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": max_tokens,
        "split_special_tokens": False,
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=2) + "\n")


def write_tokenizer(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> None:
    """Writes a loaded tokenizer so that transformers 4 and 5 both read it.

    Args:
      chat_template: jinja source; None for the tokenizer's own.
    """
    own = tokenizer.chat_template
    tokenizer.chat_template = chat_template or own
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # Version 5 writes these for itself alone. Of the names and spellings that both know, it reads 4's.
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("bos_token", "unk_token"):
        settings.setdefault(key, None)  # left out, each version has a default of its own
    named = settings.pop("model_specific_special_tokens", {})
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if named:
        settings["extra_special_tokens"] = named
    write_whole(file, json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; never asks the network.

    Raises:
      UserError: no folder, or no tokenizer in it that transformers can read.
    """
    # Both before the import: no notice that torch is missing, no worker threads inside one that forks.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the model folder {folder} does not exist; give a folder with a tokenizer")
    try:
        # AutoTokenizer gives the same class, but imports torch, two seconds, on its way to it.
        settings = folder / "tokenizer_config.json"
        named = json.loads(settings.read_text()).get("tokenizer_class") if settings.exists() else None
        qwen = named in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
        loader = transformers.Qwen2Tokenizer if qwen else transformers.AutoTokenizer
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error
