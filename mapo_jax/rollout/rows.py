"""Token rows: how a dialogue becomes one growing row of ids, and the template that renders the same row.

Every sampled id enters the row as it was sampled; only a new user message is rendered and tokenised; nothing
is decoded and encoded again. So the row that is trained on is the row that the sampler saw. A row of a
thinking family (Qwen3 with thinking off) and two turns, sampled tokens in brackets:

    <|im_start|>user⏎ text <|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎[reply <|im_end|>]
    ⏎<|im_start|>user⏎ text <|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎[reply <|im_end|>]

Qwen3's own template drops the think blocks of earlier turns, so that its renderings of a dialogue do not
extend each other. Two policies (`rollout.history`):

- `append`: the empty think block of every turn stays in the row, outside the loss. One row per dialogue;
  `ChatFormat.template` is a chat template that renders a dialogue to exactly this row, for export.
- `per_turn`: every turn is rendered anew by the family's own template. One row per turn; nothing is reused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from mapo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
ZERO_WIDTH_SPACE = "\u200b"
_PROBE = "PROBE"

# Both templates begin with `prepare.jinja`. It gives every message a text: null or missing content is empty,
# a list of text parts is joined, as servers and their clients send them. It keeps other roles' texts from
# spelling a control token, and adds the system message where one belongs. Upper-case names stand for
# literals, which ChatFormat puts in.
#
# With history=append, `append.jinja` follows. Unlike Qwen's own it writes the line break before each message
# but the first, not after each, so that a finished dialogue ends with <|im_end|> as its row does. Tool calls
# and their results are written as the family writes them; reasoning is left out, since the policy was trained
# with an empty think block. With history=per_turn the family's own template follows instead.
_TEMPLATES = resources.files("mapo_jax.rollout") / "templates"


@dataclass(frozen=True)
class Row:
    """Tokens of a dialogue, with the training data of each; all four have the same length."""

    ids: tuple[int, ...] = ()
    sampled: tuple[bool, ...] = ()  # this policy sampled it in this dialogue: the loss mask
    turn: tuple[int, ...] = ()  # turn of the reply it belongs to (an unsampled end of turn too); -1: none
    logprob: tuple[float, ...] = ()  # of the distribution it was sampled from (float32 values); else 0

    def __len__(self) -> int:
        return len(self.ids)

    def with_prompt(self, ids: Sequence[int]) -> Row:
        """The row with rendered tokens appended: prompts, user messages."""
        return self._with(ids, sampled=False, turn=-1, logprobs=(0.0,) * len(ids))

    def with_reply(
        self, ids: Sequence[int], logprobs: Sequence[float], turn: int, end_of_turn: Sequence[int] = ()
    ) -> Row:
        """The row with a sampled reply appended, and behind it `end_of_turn`, unsampled, if it was cut."""
        row = self._with(ids, sampled=True, turn=turn, logprobs=logprobs)
        return row._with(end_of_turn, sampled=False, turn=turn, logprobs=(0.0,) * len(end_of_turn))

    def _with(self, ids: Sequence[int], *, sampled: bool, turn: int, logprobs: Sequence[float]) -> Row:
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} ids, but {len(logprobs)} log-probabilities")
        return Row(
            self.ids + tuple(int(i) for i in ids),
            self.sampled + (sampled,) * len(ids),
            self.turn + (turn,) * len(ids),
            self.logprob + tuple(float(p) for p in logprobs),
        )


class ChatFormat:
    """Renders dialogues for one tokenizer of the Qwen family (ChatML).

    The differences within the family are read from the tokenizer's own chat template by rendering a probe
    with thinking switched off: the system message that it adds by itself (Qwen2.5's), and what it writes
    after `<|im_start|>assistant`: an empty think block if the family thinks (Qwen3), else nothing. A
    tokenizer without a template gets plain ChatML.

    User text cannot spell a control token: a zero-width space is inserted after the first character of each
    one. The template does the same, so the saved, unaltered text renders to the row.

    Attributes:
      opening: text between `<|im_start|>assistant` + line break and a reply.
      end_of_turn: ids that close a reply; appended unsampled when it was cut by its token limit.
      stop_ids: ids that end a reply when sampled.
      vocabulary_size: ids from here on have no text and must never be sampled.
      template: jinja source of the chat template that renders a dialogue as it was trained on. With
        `history=append` that is the row, id for id, provided that the tokenizer would spell the replies with
        the ids that were sampled (a policy may sample another spelling of the same text). With
        `history=per_turn`, the row of the last turn and what the family's template writes after it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, history: str = "append", system_prompt: str | None = None
    ):
        """Reads the format from `tokenizer`.

        Args:
          tokenizer: a Qwen-format tokenizer, with or without a chat template.
          history: `append` or `per_turn` (see the module).
          system_prompt: first message of every dialogue; None or empty for the family's own, if it has one.

        Raises:
          UserError: the tokenizer is not of the family, or its template cannot be followed.
        """
        if history not in ("append", "per_turn"):
            raise UserError(f"`rollout.history` is {history!r}; it must be append or per_turn")
        vocabulary = tokenizer.get_vocab()
        for token in (START, END):
            if token not in vocabulary:
                raise UserError(
                    f"the tokenizer has no token {token}; a tokenizer of the Qwen family is needed"
                )
        self.vocabulary_size = max(vocabulary.values()) + 1
        if len(set(vocabulary.values())) != self.vocabulary_size:
            raise UserError(
                f"the tokenizer's {len(vocabulary)} tokens leave holes among {self.vocabulary_size} ids; ids "
                "without text could be sampled: renumber its tokens without holes"
            )
        self.tokenizer = tokenizer
        self.history = history
        self.end_of_turn = (vocabulary[END],)
        # A Qwen base model ends a text with <|endoftext|>; it ends a reply too, but does not close its turn.
        end_of_text = vocabulary.get("<|endoftext|>")
        self.stop_ids = self.end_of_turn + (() if end_of_text is None else (end_of_text,))
        self._markers = tuple(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if len(token.content) > 1
            and (token.special or (token.content.startswith("<") and token.content.endswith(">")))
        )
        family_system, self.opening = self._probe()
        self.system = self.plain(system_prompt or family_system)
        self.template = self._make_template()

    def start(self, first: str) -> tuple[int, ...]:
        """Ids up to the start of the first reply, for the user's first message."""
        if self.history == "per_turn":
            return self.prompt([{"role": "user", "content": first}])
        system = f"{START}system\n{self.system}{END}\n" if self.system else ""
        return self._encode(system + self._user_text(first))

    def next_user(self, text: str) -> tuple[int, ...]:
        """Ids from after a reply's closing `<|im_end|>` to the start of the next reply.

        Raises:
          ValueError: with `history=per_turn`, where no row is continued (see `prompt`).
        """
        if self.history != "append":
            raise ValueError("history=per_turn renders every turn anew: use prompt(messages)")
        # Tokenised after the token it will follow, since a tokenizer may treat the start of a text specially.
        ids = self._encode(END + "\n" + self._user_text(text))
        assert ids[0] == self.end_of_turn[0], "the tokenizer does not keep <|im_end|> whole"
        return ids[1:]

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Ids of a whole dialogue, up to the start of the next reply."""
        return self._encode(self._render(messages, self.template, add_generation_prompt=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a reply's ids, without its closing `<|im_end|>`; other control tokens stay visible."""
        if len(ids) and ids[-1] == self.end_of_turn[0]:
            ids = ids[:-1]
        return self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)

    def plain(self, text: str) -> str:
        """`text` with a zero-width space inside every control token."""
        for marker in self._markers:
            text = text.replace(marker, marker[0] + ZERO_WIDTH_SPACE + marker[1:])
        return text

    def _user_text(self, text: str) -> str:
        return f"{START}user\n{self.plain(text)}{END}\n{START}assistant\n{self.opening}"

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _render(self, messages: Sequence[Mapping[str, str]], template: str | None, **options: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, **options
        )

    def _probe(self) -> tuple[str, str]:
        """(system message that the family adds, what it writes before a reply)."""
        if self.tokenizer.chat_template is None:
            return "", ""
        try:
            text = self._render(
                [{"role": "user", "content": _PROBE}], None, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:
            raise UserError(f"the tokenizer's chat template cannot be rendered: {error}") from error
        system, user, opening = text.partition(f"{START}user\n{_PROBE}{END}\n{START}assistant\n")
        if system:
            known = system.startswith(f"{START}system\n") and system.endswith(f"{END}\n")
            system = system.removeprefix(f"{START}system\n").removesuffix(f"{END}\n") if known else START
        if not user or START in system or END in system or START in opening or END in opening:
            raise UserError(
                "the tokenizer's chat template is not that of the Qwen family (ChatML); "
                f"it renders a user's first message as {text!r}"
            )
        if "<think>" in opening and "</think>" not in opening:
            raise UserError(
                "this model's template cannot switch thinking off; use an instruct model or one that can"
            )
        return system, opening

    def _make_template(self) -> str:
        values = {"MARKERS": list(self._markers), "SYSTEM": self.system, "OPENING": self.opening}

        def read(name: str) -> str:  # a Python literal in ASCII is a jinja literal too
            source = (_TEMPLATES / name).read_text("utf-8")
            return re.sub(r"\b(MARKERS|SYSTEM|OPENING)\b", lambda match: ascii(values[match[1]]), source)

        prepare = read("prepare.jinja")
        if self.history == "append":
            return prepare + read("append.jinja")
        family = self.tokenizer.chat_template
        if family is None:
            raise UserError("`rollout.history=per_turn` needs a tokenizer with a chat template of its own")
        return family if family.startswith(prepare) else prepare + family
