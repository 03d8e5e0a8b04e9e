"""Chat messages to token ids, the same way for training, evaluation and engines that use a HF tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.data.rows import Message
from unshot.errors import InputError


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a model directory; `InputError` where it has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises many kinds for a damaged directory
        raise InputError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {error})"
        ) from None
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{path}: the tokenizer has no chat template; use an instruct model, or add one")
    return tokenizer


@dataclass(frozen=True)
class Encoded:
    """One training row: `ids` (prompt then answer) and how many of them are prompt."""

    ids: list[int]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        """Tokens that carry loss, the end-of-turn token included."""
        return len(self.ids) - self.prompt_length


class Chat:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end = self._end_of_turn()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text up to where the assistant starts to answer."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's raise_exception and its own errors
            raise InputError(f"the chat template refuses these messages ({error})") from None
        return text

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `render(messages)`; the template writes its own special tokens."""
        return list(self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"])

    def encode(self, messages: Sequence[Message], answer: str) -> Encoded:
        """Prompt and answer, tokenised apart as at inference, ending with the end-of-turn token."""
        prompt = self.prompt_ids(messages)
        reply = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return Encoded([*prompt, *reply, self.end], len(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _end_of_turn(self) -> int:
        """The special token with which the template ends an assistant turn (else the tokenizer's eos)."""
        marker = "unshot-answer"
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False)
        tail = text.rsplit(marker, 1)[-1].strip()
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
        if ids and ids[0] in self.tokenizer.added_tokens_decoder:
            return int(ids[0])
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has neither an end-of-turn token in its template nor an eos token"
            )
        return int(self.tokenizer.eos_token_id)
