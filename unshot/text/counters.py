"""Counters: tokens of a text and of a chat request, by the rule of each kind of model.

OpenAI models: tiktoken and OpenAI's own rule for messages. Open models: a `tokenizers.Tokenizer` with the model's chat
template. Anything else: another tokenizer's counts times a measured ratio, with its error. `tokenizers.py` finds
the counter of a model.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from unshot.catalog.tables import table
from unshot.data.rows import Message
from unshot.text.chat import Tokenizer


class Counter(ABC):
    """Counts tokens as one model sees them. `error` is the relative error of a count, 0 where it is exact."""

    name: str
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the counts are the model's own."""
        return self.error == 0.0

    @abstractmethod
    def text(self, text: str) -> int:
        """Tokens of a text by itself."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> int:
        """Tokens of a chat request, its overhead included, up to where the answer starts."""

    def prompts(self, requests: Sequence[Sequence[Message]]) -> list[int]:
        """`prompt` of many requests."""
        return [self.prompt(messages) for messages in requests]

    @abstractmethod
    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        """Tokens at the start of both requests that are the same: what a prefix cache can hold."""

    def answer(self, text: str) -> int:
        """Tokens of an answer, with the token that ends it."""
        return self.text(text) + 1


# Requests from which `prompts` looks for what they share, and the text that stands for the input then.
FEW = 8
MARKER = "unshot9marker"


def _splitter(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that cuts text at its special tokens, where tokens of the pieces add up to tokens of the whole.

    They do for byte-level BPE without a normalizer: special tokens are cut out first and nothing is added at the
    start of a piece. None for anything else (SentencePiece-style prefixes), and then texts are counted whole.
    """
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return None
    state = tokenizer.pre_tokenizer.__getstate__()
    text = state.decode() if isinstance(state, bytes) else str(state)
    if "Metaspace" in text or '"add_prefix_space":true' in text.replace(" ", ""):
        return None
    tokens = tokenizer.get_added_tokens_decoder().values()
    if not tokens or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in tokens):
        return None
    names = sorted((t.content for t in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(re.escape(n) for n in names)})")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


class OpenAICounter(Counter):
    """tiktoken with OpenAI's rule: 3 tokens a message, its role and content, 3 to open the reply.

    Source: OpenAI cookbook, "How to count tokens with tiktoken", `num_tokens_from_messages`.
    """

    def __init__(self, encoding: Any, name: str) -> None:
        self.encoding = encoding
        self.name = f"tiktoken {name}"
        rule = table("tokenizers")["openai_chat"]
        self.per_message, self.reply = int(rule["per_message"]), int(rule["reply"])
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids; text that looks like a special token is plain text, as the API treats it."""
        return list(self.encoding.encode_ordinary(text))

    def text(self, text: str) -> int:
        count = self._counts.get(text)
        if count is None:
            count = self._counts[text] = len(self.encoding.encode_ordinary(text))
        return count

    def answer(self, text: str) -> int:
        # The usage the API reports does not count the end-of-turn token.
        return self.text(text)

    def _message(self, message: Message) -> int:
        calls = message.get("tool_calls")
        parts = [
            message["role"],
            message["content"],
            message.get("name"),
            json.dumps(calls) if calls else None,
        ]
        return self.per_message + sum(self.text(part) for part in parts if part)

    def prompt(self, messages: Sequence[Message]) -> int:
        return sum(self._message(m) for m in messages) + self.reply

    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        count = 0
        for a, b in zip(one, other, strict=False):
            if a == b:
                count += self._message(a)
                continue
            if a["role"] == b["role"]:
                count += self.per_message + self.text(a["role"])
                count += _common(self.ids(a["content"]), self.ids(b["content"]))
            break
        return count


class TemplateCounter(Counter):
    """A tokenizer with a chat template: ids equal to transformers' `apply_chat_template`."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer, self.template, self.name = tokenizer, tokenizer.template, name
        self._splitter = _splitter(tokenizer.backend)
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids, special tokens in the text taken as such (the template writes them)."""
        return self.tokenizer.ids(text)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered request."""
        return self.ids(self.template.render(messages))

    def text(self, text: str) -> int:
        return len(self.ids(text))

    def count(self, rendered: str) -> int:
        """Tokens of a rendered prompt. Pieces between special tokens are counted once and remembered."""
        if self._splitter is None:
            return self.text(rendered)
        total = 0
        for piece in self._splitter.split(rendered):
            count = self._counts.get(piece)
            if count is None:
                count = self._counts[piece] = self.text(piece) if piece else 0
            total += count
        return total

    def prompt(self, messages: Sequence[Message]) -> int:
        return self.count(self.template.render(messages))

    def prompts(self, requests: Sequence[Sequence[Message]]) -> list[int]:
        """`prompt` of many requests; those that differ only in their last message are rendered once."""
        slow = super().prompts
        if self._splitter is None or len(requests) < FEW:
            return slow(requests)
        head = requests[0][:-1]
        role = requests[0][-1]["role"]
        same = [r[:-1] == head and r[-1]["role"] == role and "tools" not in r[-1] for r in requests]
        rendered = self.template.render([*head, {"role": role, "content": MARKER}])
        before, marker, after = rendered.partition(MARKER)
        if not marker or MARKER in after or not all(same):
            return slow(requests)
        for probe in (requests[0], requests[len(requests) // 2], requests[-1]):
            text = probe[-1]["content"]
            if text.strip() == text and self.template.render(probe) != before + text + after:
                return slow(requests)
        # Only the piece round the input is new in each request.
        pieces = self._splitter.split(before)
        fixed, left = sum(self.count(p) for p in pieces[:-1]), pieces[-1]
        right, *rest = self._splitter.split(after)
        fixed += sum(self.count(p) for p in rest)
        counts = []
        for messages in requests:
            text = messages[-1]["content"]
            # Templates may trim, so a text with blanks at its ends is rendered by itself.
            whole = text.strip() == text
            counts.append(fixed + self.count(left + text + right) if whole else self.prompt(messages))
        return counts

    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        return _common(self.prompt_ids(one), self.prompt_ids(other))


class ApproximateCounter(Counter):
    """Another tokenizer's counts times a measured ratio, with the ratio's measured error."""

    def __init__(self, model: str, base: Callable[[str], float], base_name: str, base_error: float) -> None:
        found, facts = family_of(model)
        self.ratio, self.overhead, self.fixed = facts["ratio"], facts["per_message"], facts["fixed"]
        self.end = int(facts.get("answer_end", 1))
        self.base = base
        self.error = facts["error"] + base_error
        self.name = f"approximate ({found} family: {self.ratio:g} x {base_name})"
        self._counts: dict[str, int] = {}

    def text(self, text: str) -> int:
        count = self._counts.get(text)
        if count is None:
            count = self._counts[text] = round(self.ratio * self.base(text))
        return count

    def answer(self, text: str) -> int:
        return self.text(text) + self.end

    def _message(self, message: Message) -> int:
        return self.text(message["content"]) + int(self.overhead)

    def prompt(self, messages: Sequence[Message]) -> int:
        return sum(self._message(m) for m in messages) + int(self.fixed)

    def shared(self, one: Sequence[Message], other: Sequence[Message]) -> int:
        count = 0
        for a, b in zip(one, other, strict=False):
            if a == b:
                count += self._message(a)
                continue
            length = _common(a["content"], b["content"])
            count += int(self.overhead) + self.text(a["content"][:length])
            break
        return count


def family_of(model: str) -> tuple[str, dict[str, Any]]:
    name = model.lower().rsplit("/", 1)[-1]
    families: dict[str, dict[str, Any]] = table("tokenizers")["family"]
    return next((key, f) for key, f in families.items() if any(name.startswith(m) for m in f["match"]))
