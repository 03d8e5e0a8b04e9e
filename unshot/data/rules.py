"""What makes a row unfit, the same for every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence

from unshot.data.example import Example, Message


def check_example(example: Example, *, answers: bool = True, missing: str | None = None) -> str | None:
    """What makes a row unfit for every stage alike, None where nothing does; `missing`: why it has no answer.

    Turns must alternate: the chat templates of Llama 2, Mistral and Gemma raise an error where two user turns follow
    each other, so that a model tuned on such rows could not be asked the same way elsewhere.
    """
    answer = example.answer
    if answers and (answer is None or not answer.strip()):
        if missing:
            return f"no answer: {missing}"
        return "no answer: the row needs a non-empty `completion`, or a last message of role `assistant`"
    if not example.messages:
        return "the messages hold no question; a user message must come before the answer"
    if not example.text.strip():
        return "the user message is empty"
    if problem := _check_order(example.messages, answer is not None):
        return problem
    for text in (*(m["content"] for m in example.messages), answer or ""):
        if problem := _check_text(text):
            return problem
    if answer is not None and _cut_json(answer):
        return "the answer starts as JSON and breaks off (truncated?)"
    return None


def _check_order(messages: Sequence[Message], answered: bool) -> str | None:
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            return f"message {number} has role 'system'; only the first may"
        if number > 1 and role == messages[number - 2]["role"] and role != "tool":
            return (
                f"messages {number - 1} and {number} both have role {role!r}; chat templates want turns to alternate: "
                "join them into one"
            )
    if messages[-1]["role"] == "assistant" and answered:
        return "the last two messages both have role 'assistant'; join them into one"
    if messages[-1]["role"] == "system" or messages[bool(messages[0]["role"] == "system")]["role"] != "user":
        return "the messages hold no question; a user message must come before the answer"
    return None


def _check_text(text: str) -> str | None:
    """Characters that no file can hold, or that say that others were lost."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # how the CSV reader marks a byte that is no UTF-8
            return "not UTF-8; convert the file, e.g. `iconv -f latin1 -t utf-8`"
        return "holds half a character (a lone surrogate, `\\ud800` to `\\udfff`); write the whole one"
    if "\ufffd" in text:
        return "holds U+FFFD, the mark of a character lost in an earlier conversion"
    return None


def _cut_json(answer: str) -> bool:
    """Whether an answer opens a JSON object and is none."""
    text = answer.strip()
    if not text.startswith('{"') and text != "{":
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return False
