"""The tokenizer of a fresh model: byte-level BPE in Qwen2's format, trained on the texts that it will read.

As every byte is a token, no text is out of vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tokenizers.pre_tokenizers import ByteLevel

from mapo_jax.errors import UserError
from mapo_jax.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)  # Qwen's: padding and end of text, and the two of ChatML
BYTES = 256

# Plain ChatML. What a run trains on may differ (a system prompt, user text that spells a control token):
# the folders that leave a run carry `rollout.rows.ChatFormat.template` instead.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, max_tokens: int) -> PreTrainedTokenizerBase:
    """Trains byte-level BPE with Qwen2's normalisation and its rule for where a token must end.

    Args:
      texts: training texts; control tokens are not part of them.
      vocabulary: maximum number of tokens, including the 256 bytes and the special tokens. Few texts give
        fewer tokens.
      max_tokens: longest text that the model is made for (`model_max_length`).

    Returns:
      The tokenizer, with CHAT_TEMPLATE. Ids: the special tokens, then the bytes, then the merges by
      frequency. The same texts give the same tokenizer.

    Raises:
      UserError: the vocabulary has no room for the bytes.
    """
    fewest = BYTES + len(SPECIAL_TOKENS)
    if vocabulary < fewest:
        raise UserError(f"`model.fresh.vocabulary` is {vocabulary}; it must be at least {fewest}")
    empty = _import_transformers().Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(SPECIAL_TOKENS)},
        merges=[],
        bos_token=None,
        eos_token=END,
        pad_token=END_OF_TEXT,
        unk_token=None,
        add_prefix_space=False,
        additional_special_tokens=[START, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        errors="replace",
        model_max_length=max_tokens,
        split_special_tokens=False,
    )
    alphabet = sorted(ByteLevel.alphabet())
    return empty.train_new_from_iterator(texts, vocabulary, initial_alphabet=alphabet, show_progress=False)


def write_tokenizer(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> None:
    """Writes a tokenizer's files so that transformers 4 and 5 both read them.

    Args:
      chat_template: jinja source; None for the tokenizer's own.
    """
    original = tokenizer.chat_template
    tokenizer.chat_template = chat_template or original
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = original
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # Version 5 writes these for itself alone. Where both versions know a setting, it reads version 4's name.
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("bos_token", "unk_token"):
        settings.setdefault(key, None)  # if it is missing, each version has another default
    named = settings.pop("model_specific_special_tokens", {})
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if named:
        settings["extra_special_tokens"] = named
    write_whole(file, json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; never uses the network.

    Raises:
      UserError: the folder does not exist, or has no tokenizer that transformers can read.
    """
    transformers = _import_transformers()
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the model folder {folder} does not exist; give a folder with a tokenizer")
    try:
        # AutoTokenizer returns the same class, but first imports torch, which takes two seconds.
        settings = folder / "tokenizer_config.json"
        name = json.loads(settings.read_text()).get("tokenizer_class") if settings.exists() else None
        qwen = name in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
        loader = transformers.Qwen2Tokenizer if qwen else transformers.AutoTokenizer
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error


def _import_transformers() -> ModuleType:
    # Both before the import: no notice that torch is missing, no worker threads in a process that forks.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    return transformers
