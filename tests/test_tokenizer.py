import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapo_jax.errors import UserError
from mapo_jax.tokenizer import (
    CHAT_TEMPLATE,
    END,
    SPECIAL_TOKENS,
    START,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer,
)

TEXTS = [
    f"{start} about the {adjective} {noun}. I feel tired."
    for start in ("I keep thinking", "Tell me more", "We argued")
    for adjective in ("old", "new", "quiet")
    for noun in ("kettle", "garden", "night shifts", "piano")
] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer(TEXTS, 320, max_tokens=512))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_the_vocabulary_has_no_holes_and_the_asked_size(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(320))
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


def test_special_tokens_play_qwens_parts(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END, "<|endoftext|>", None)
    assert tokenizer.model_max_length == 512
    assert tokenizer.encode(START + "user") == [1, *tokenizer.encode("user")]


def test_frequent_words_are_one_token(tokenizer):
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(" feel")) == 1


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_every_text_comes_back(tokenizer, text):
    import unicodedata

    plain = unicodedata.normalize("NFC", text)  # the only change that Qwen's format makes
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == plain


def test_the_chat_template_is_chatml(tokenizer):
    messages = [{"role": "user", "content": "I feel tired."}, {"role": "assistant", "content": "Tell me."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nI feel tired.<|im_end|>\n<|im_start|>assistant\nTell me.<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nI feel tired.<|im_end|>\n<|im_start|>assistant\n"


def test_the_same_texts_give_the_same_files(folder, tmp_path):
    write_tokenizer(tmp_path, train_tokenizer(TEXTS, 320, max_tokens=512))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_merges_and_vocabulary_alone_give_the_same_tokens(folder, tokenizer):
    """Tools may take vocabulary and merges and build the tokenizer themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    plain = Tokenizer(models.BPE(content["vocab"], [tuple(merge) for merge in content["merges"]]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = TEXTS[0]
    assert plain.encode(text).ids == tokenizer.encode(text)
    assert len(content["vocab"]) == 320


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocabulary.*258.*at least 259"):
        train_tokenizer(TEXTS, 258, max_tokens=512)


def same_as_transformers_finds(folder):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert type(ours) is type(theirs) and ours.chat_template == theirs.chat_template
    assert ours._tokenizer.to_str() == theirs._tokenizer.to_str()
    return type(ours).__name__


def test_it_is_the_tokenizer_that_transformers_finds(folder, tmp_path):
    assert same_as_transformers_finds(folder) == "Qwen2Tokenizer"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert same_as_transformers_finds(tmp_path) == "TokenizersBackend"


def test_qwens_own_tokenizer_is_read_as_transformers_reads_it(shared_data):
    assert same_as_transformers_finds(shared_data / "qwen3_tokenizer") == "Qwen2Tokenizer"


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_written_tokenizer_has_no_spelling_that_only_version_5_reads(folder, tmp_path, kind):
    """tests/test_export_transformers4.py lets transformers 4 read it."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    named = {"extra_special_tokens": {"image_token": START}} if kind != "Qwen2Tokenizer" else {}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": kind} | named))
    loaded = load_tokenizer(source)
    write_tokenizer(tmp_path / "written", loaded, "{{ messages }}")
    written = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == kind
    assert written["additional_special_tokens"] == [START, END]
    assert written.get("extra_special_tokens") == named.get("extra_special_tokens")
    assert not {"backend", "is_local", "local_files_only", "model_specific_special_tokens"} & set(written)

    again = load_tokenizer(tmp_path / "written")
    assert (again.chat_template, loaded.chat_template) == ("{{ messages }}", CHAT_TEMPLATE)
    assert again._tokenizer.to_str() == loaded._tokenizer.to_str()
    assert again.extra_special_tokens == loaded.extra_special_tokens
    assert again.special_tokens_map == loaded.special_tokens_map


def test_a_missing_or_foreign_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
