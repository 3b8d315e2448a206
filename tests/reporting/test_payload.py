import base64
import gzip
import json

import pytest

from mapo_jax.reporting.credit import credit_batch
from mapo_jax.reporting.folder import read_run
from mapo_jax.reporting.payload import Group, TokenWriter, by_importance, pack


def opened(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def run(run_folder):
    return read_run(run_folder, dialogues=1000)


@pytest.fixture(scope="module")
def groups(run):
    return [Group(0, batch, credit_batch(batch, run.algorithm)) for batch in (*run.training, *run.validation)]


def test_every_dialogue_comes_out_as_it_went_in(run, groups):
    packed = pack([run], groups)
    rows = opened(packed.index)["rows"]
    assert len(rows) == packed.dialogues == 6 * 9 + 3 * 8
    assert (packed.without_text, packed.without_tokens) == (0, 0)
    for group in groups:
        for dialogue, credit, found in zip(
            group.batch.dialogues, group.credits, opened(packed.pieces[group.key]), strict=True
        ):
            assert [(t["u"], t["r"]) for t in found["turns"]] == [(t.user, t.reply) for t in dialogue.turns]
            assert [t["c"][0] for t in found["turns"]] == [
                None if reward is None else round(reward, 3) for reward in credit.rewards
            ]


def test_the_tokens_spell_the_row(run, groups):
    packed = pack([run], groups)
    group = groups[0]
    found = opened(packed.pieces[f"{group.key}.tokens"])
    for dialogue, rows in zip(group.batch.dialogues, found["rows"], strict=True):
        text = "".join(found["words"][i] for i in rows[0]["i"])
        for turn in dialogue.turns:
            assert f"<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n{turn.reply}" in text
        mask = [bool(v) for v, n in zip(rows[0]["s"][::2], rows[0]["s"][1::2], strict=True) for _ in range(n)]
        assert mask == dialogue.rows[0].sampled.tolist()
        assert len(rows[0]["l"]) == sum(mask)
        first = dialogue.rows[0].logprob[dialogue.rows[0].sampled][0]
        assert rows[0]["l"][0] == pytest.approx(-100 * first, abs=0.51)


def test_what_does_not_fit_is_left_out_and_counted(run, groups):
    whole = pack([run], groups)
    texts = sum(len(piece) for key, piece in whole.pieces.items() if not key.endswith(".tokens"))
    half = pack([run], groups, limit=texts // 2 + 200 * 78)
    assert half.size <= texts // 2 + 200 * 78
    assert half.without_text > 0
    assert half.dialogues + half.without_text == 78
    assert {"0.v6", "0.v0"} <= set(half.pieces)  # before and after come first
    assert len(opened(half.index)["rows"]) == half.dialogues
    without_tokens = pack([run], groups, limit=texts + 200 * 78 + 1000)
    assert without_tokens.without_text == 0 and without_tokens.without_tokens == 78


def test_the_order_of_importance(groups):
    assert [group.key for group in by_importance(groups)] == [
        *("0.v6", "0.v0", "0.t6", "0.t1", "0.v3"),
        *("0.t4", "0.t2", "0.t3", "0.t5"),
    ]


def test_the_same_run_gives_the_same_bytes(run, groups):
    assert pack([run], groups) == pack([run], groups)


def test_without_a_tokenizer_the_ids_are_shown(tmp_path):
    assert TokenWriter(tmp_path).text(17) == "[17]"
