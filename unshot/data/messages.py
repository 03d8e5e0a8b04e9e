"""Messages of a row: roles, content as text or as parts, tool calls, weights; and values as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unshot.data.example import ROLES, Message
from unshot.data.files import Problem, is_missing

Row = Mapping[str, Any]
# Columns and parts of a message that carry what a text model cannot read.
MEDIA = {
    "image",
    "images",
    "image_url",
    "input_image",
    "audio",
    "audios",
    "input_audio",
    "video",
    "videos",
    "file",
}


@dataclass
class Parsed:
    """A row in the form of a conversation.

    `missing` says why there is no answer where there is none; `columns` name a row's form where no other name does.
    """

    messages: list[Message]
    answer: str | None = None
    used: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    tools: tuple[Mapping[str, object], ...] = ()
    missing: str | None = None
    columns: tuple[str, ...] = ()


# What pandas writes for a value that is not there.
MISSING = {"nan", "NaN", "<NA>", "NaT"}


def missing_words(value: object) -> str | None:
    """How a missing value is written, null or NaN, also as pandas' text for it; None for a value."""
    if value is None:
        return "null"
    return "NaN" if is_missing(value) or (isinstance(value, str) and value.strip() in MISSING) else None


def decoded(value: object) -> object:
    """A list or object that a CSV or Parquet column holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def scalar(value: object, name: str) -> str:
    """A column's value as text. Raises `Problem` for one that has no text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        raise Problem(f"`{name}` holds bytes, not text")
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
        raise Problem(f"`{name}` holds an image or audio; unshot reads text only")
    if isinstance(value, float) and not math.isfinite(value):
        raise Problem(f"`{name}` is {value}, which is not a value")
    if isinstance(value, dict | list | float):
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise Problem(f"`{name}` cannot be written as JSON ({error})") from None
    return str(value)  # dates and decimals of Parquet


def read_messages(parsed: Parsed, value: object, name: str) -> list[Message]:
    """A list of `{role, content}` as messages, also as JSON text. Raises `Problem` for anything else."""
    value = decoded(value)
    if not isinstance(value, list) or not value:
        raise Problem(f"`{name}` must be a non-empty list of {{role, content}}")
    return [message_of(parsed, message, number) for number, message in enumerate(value, start=1)]


def message_of(parsed: Parsed, message: object, number: int) -> Message:
    if not isinstance(message, dict):
        raise Problem(f"message {number} is no object with `role` and `content`")
    role = message.get("role")
    if role == "function":
        role = "tool"
    if role not in ROLES:
        raise Problem(f"message {number} has role {role!r}; accepted: {', '.join(ROLES)}")
    if role == "developer":
        parsed.notes.add("role `developer` is read as `system`, the name chat templates know")
        role = "system"
    calls = message.get("tool_calls") or (
        [{"type": "function", "function": message["function_call"]}] if message.get("function_call") else None
    )
    content = _content(message.get("content"), number, optional=bool(calls))
    result: Message = {"role": role, "content": content}
    if calls:
        result["tool_calls"] = _calls(calls, number)
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            result[key] = message[key]  # type: ignore[literal-required]
    if "name" in result:
        parsed.notes.add("`name` is handed to the chat template; most templates leave it out")
    weight = message.get("weight")
    if weight is not None and (weight not in (0, 1) or role != "assistant"):
        raise Problem(f"message {number} has weight {weight!r}; an assistant message may have 0 or 1")
    # axolotl's name for the same.
    if role == "assistant" and (is_zero(weight) or message.get("train") is False):
        result["weight"] = 0
    known = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "weight", "train"}
    parsed.ignored |= {
        f"messages.{k}" for k, v in message.items() if k not in known and v not in (None, "", [], {})
    }
    return result


def _content(value: object, number: int, *, optional: bool) -> str:
    """A message's text: a string, or its text parts, one a line."""
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        raise Problem(f"message {number} needs a text `content`")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and kind not in MEDIA:
            texts.append(part["text"])
        elif kind in MEDIA or (isinstance(part, dict) and MEDIA & part.keys()):
            name = str(kind) if kind in MEDIA else sorted(MEDIA & part.keys())[0]  # type: ignore[union-attr]
            raise Problem(f"message {number} holds {media_name(name)} (`{name}`); unshot reads text only")
        else:
            raise Problem(f"message {number} has a part of type {kind!r}; only text parts can be read")
    return "\n".join(texts)


def _calls(calls: object, number: int) -> list[Mapping[str, object]]:
    """Tool calls with their arguments as an object, which is what chat templates write as JSON."""
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise Problem(f"message {number} needs a list of objects in `tool_calls`")
    result: list[Mapping[str, object]] = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Problem(f"message {number} has a tool call without a function's name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise Problem(f"message {number} has a tool call whose arguments are no JSON") from None
        own = {"name": function["name"], "arguments": arguments if arguments is not None else {}}
        result.append({**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": own})
    return result


def _trim(messages: list[Message]) -> list[Message]:
    """The messages up to the last that is to be learnt: what follows a turn has no part in its loss."""
    if messages[-1]["role"] != "assistant" or messages[-1].get("weight") != 0:
        return messages
    for number in range(len(messages), 0, -1):
        if messages[number - 1]["role"] == "assistant" and messages[number - 1].get("weight") != 0:
            return messages[:number]
    raise Problem("every assistant message has weight 0, which means not to train on it; remove the row")


def split_answer(parsed: Parsed, messages: list[Message]) -> tuple[list[Message], str | None]:
    """What comes before the last assistant turn, and that turn's text: the answer. None where the last is another's."""
    trimmed = _trim(messages)
    if len(trimmed) < len(messages):
        parsed.notes.add("turns after the last one to learn (`weight: 0`) are left out")
    last = trimmed[-1]
    if last["role"] != "assistant":
        return trimmed, None
    if last.get("tool_calls"):
        called = [c["function"]["name"] for c in last["tool_calls"] if isinstance(c["function"], dict)]
        raise Problem(
            f"the answer is a tool call ({', '.join(f'`{n}`' for n in called)}); unshot trains on text answers: write "
            "the call as text, or end the row with a text answer"
        )
    return trimmed[:-1], last["content"]


def is_zero(value: object) -> bool:
    """Whether a weight is 0, also as a CSV column's text."""
    if isinstance(value, str):
        try:
            return float(value) == 0
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def media_name(name: str) -> str:
    kind = next((k for k in ("image", "audio", "video") if k in name), "a file")
    return kind if kind in ("audio", "a file") else f"{'an' if kind == 'image' else 'a'} {kind}"
