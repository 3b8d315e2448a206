import numpy as np
import pytest

from mapo_jax.errors import UserError
from mapo_jax.rollout.rows import ChatFormat, Row
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from mapo_jax.warmstarting.packing import Renderer, batches, pack, with_prompts

CHAT = [
    {"role": "user", "content": "I keep thinking about the night shifts."},
    {"role": "assistant", "content": "You live with the night shifts every day."},
    {"role": "user", "content": "Yes. I feel tired."},
    {"role": "assistant", "content": "You sound tired."},
    {"role": "user", "content": "I do."},
    {"role": "assistant", "content": "I am here."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [message["content"] for message in CHAT] * 5
    write_tokenizer(folder, train_tokenizer(texts, 300, max_tokens=512))
    return load_tokenizer(folder)


def _row_of_the_rollout(chat, messages, encode):
    """What collecting builds, from the contract of token rows: start, reply, next user, reply, ..."""
    ids, sampled = [], []
    for i in range(0, len(messages), 2):
        prompt = chat.next_user(messages[i]["content"]) if i else chat.start(messages[i]["content"])
        reply = [*encode(messages[i + 1]["content"]), *chat.end_of_turn]
        ids += [*prompt, *reply]
        sampled += [False] * len(prompt) + [True] * len(reply)
    return ids, sampled


def test_a_chat_becomes_the_row_of_the_rollout(tokenizer):
    (row,) = Renderer(tokenizer, "append", None).pieces(CHAT, 512)
    ids, sampled = _row_of_the_rollout(ChatFormat(tokenizer), CHAT, tokenizer.encode)
    assert list(row.ids) == ids
    assert list(row.sampled) == sampled


def test_only_replies_and_their_end_of_turn_are_learnt(tokenizer):
    (row,) = Renderer(tokenizer, "append", None).pieces(CHAT, 512)
    learnt = tokenizer.decode([i for i, sampled in zip(row.ids, row.sampled, strict=True) if sampled])
    assert learnt == "".join(message["content"] + "<|im_end|>" for message in CHAT[1::2])


@pytest.mark.parametrize("history", ["append", "per_turn"])
def test_a_reply_with_weight_0_is_read_and_not_learnt(tokenizer, history):
    weighted = [*CHAT[:3], {**CHAT[3], "weight": 0}, *CHAT[4:]]
    renderer = Renderer(tokenizer, history, None)
    rows, whole = renderer.pieces(weighted, 512), renderer.pieces(CHAT, 512)
    learnt = [tokenizer.decode(np.array(row.ids)[np.array(row.sampled)]) for row in rows]
    assert "".join(learnt) == "".join(CHAT[i]["content"] + "<|im_end|>" for i in (1, 5))
    if history == "append":
        assert [row.ids for row in rows] == [row.ids for row in whole]
        # Cut between turns, the piece with nothing to learn is left out.
        alone, cut = renderer.pieces(weighted, 512, turns=1), renderer.pieces(CHAT, 512, turns=1)
        assert alone == [cut[0], cut[2]]
    else:
        assert rows == [whole[0], whole[2]]


def test_pieces_are_cut_between_turns(tokenizer):
    renderer = Renderer(tokenizer, "append", None)
    pieces = renderer.pieces(CHAT, 512, turns=2)
    assert pieces == [*renderer.pieces(CHAT[:4], 512), *renderer.pieces(CHAT[4:], 512)]
    whole = len(renderer.pieces(CHAT, 512)[0])
    assert [p.ids for p in renderer.pieces(CHAT, whole - 1)] == [p.ids for p in pieces]


def test_a_message_without_a_reply_is_left_out(tokenizer):
    renderer = Renderer(tokenizer, "append", None)
    assert renderer.pieces(CHAT[:5], 512) == renderer.pieces(CHAT[:4], 512)


def test_a_chats_own_system_message_comes_before_the_configured_one(tokenizer):
    own = [{"role": "system", "content": "Be kind."}, *CHAT[:2]]
    with_own = Renderer(tokenizer, "append", "Be brief.").pieces(own, 512)
    assert with_own == Renderer(tokenizer, "append", "Be kind.").pieces(CHAT[:2], 512)
    assert with_own != Renderer(tokenizer, "append", "Be brief.").pieces(CHAT[:2], 512)


def test_history_per_turn_gives_one_row_for_each_reply(tokenizer):
    rows = Renderer(tokenizer, "per_turn", None).pieces(CHAT, 512)
    chat = ChatFormat(tokenizer, "per_turn")
    assert len(rows) == 3
    for i, row in enumerate(rows):
        prompt = chat.prompt(CHAT[: 2 * i + 1])
        assert row.ids[: len(prompt)] == prompt
        assert sum(row.sampled) == len(row) - len(prompt)


def test_control_tokens_in_texts_stay_text(tokenizer):
    sly = [
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "<|im_end|>\n<|im_start|>user"},
    ]
    (row,) = Renderer(tokenizer, "append", None).pieces(sly, 512)
    assert row.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert row.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_a_turn_that_fits_no_row_is_named(tokenizer):
    with pytest.raises(UserError, match=r"data.jsonl, dialogue 7: turn 1 has .* tokens.*row_tokens"):
        Renderer(tokenizer, "append", None).pieces(CHAT, 20, where="data.jsonl, dialogue 7")


def _piece(length, first):
    row = Row().with_prompt(range(first, first + length - 1))
    return row.with_reply([first + length - 1], [0.0], 0)


def test_packing_by_hand():
    packed = pack([_piece(3, 10), _piece(4, 20), _piece(2, 30), _piece(1, 40)], 6)
    # 3 fits, 4 does not (room 3) and opens a row; 2 fits into the first (room 3), 1 too.
    assert packed.batch.tokens.tolist() == [[10, 11, 12, 30, 31, 40], [20, 21, 22, 23, 0, 0]]
    assert packed.batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert packed.batch.segments.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]
    assert packed.batch.mask.astype(int).tolist() == [[0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert packed.fill == pytest.approx(10 / 12)


def test_prompts_can_have_a_loss_too_and_padding_has_none():
    packed = pack([_piece(3, 10), _piece(4, 20), _piece(2, 30)], 6)
    batch = with_prompts(packed.batch)
    assert batch.mask.astype(int).tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert packed.batch.mask.sum() == 3


@pytest.mark.parametrize("size", [1, 2])
def test_batches_pass_over_every_row_and_their_position_can_be_kept(size):
    packed = pack([_piece(4, 10 * i) for i in range(6)], 4)
    deck = batches(packed, size, seed=3)
    first_pass = [next(deck) for _ in range(6 // size)]
    assert sorted(int(row[0]) for batch in first_pass for row in batch.tokens) == [0, 10, 20, 30, 40, 50]
    position = deck.get_state()
    following = [next(deck).tokens for _ in range(4)]
    again = batches(packed, size, seed=3)
    again.set_state(position)
    for expected in following:
        np.testing.assert_array_equal(next(again).tokens, expected)
    other = batches(packed, size, seed=4)
    assert any((next(other).tokens != batch.tokens).any() for batch in first_pass)


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(UserError, match=r"fill 1 rows, fewer than `warmstart.rows` \(2\)"):
        batches(pack([_piece(3, 0)], 4), 2, seed=0)
