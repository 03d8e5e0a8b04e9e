"""The forms a row can have in the ecosystem, each with how it becomes messages and an answer.

A form is one entry of `FORMATS`: the first whose test a row passes reads it. What a form does not use of a row is
left in `extra` (columns) or named in `ignored` (keys inside messages), so that nothing is dropped in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from unshot.data.example import Example, Message
from unshot.data.files import Place, Problem, is_missing
from unshot.data.messages import (
    MEDIA,
    Parsed,
    Row,
    decoded,
    is_zero,
    media_name,
    message_of,
    missing_words,
    read_messages,
    scalar,
    split_answer,
)
from unshot.data.rules import check_example
from unshot.errors import nearest

SLOT = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
INPUT_COLUMNS = ("prompt", "input", "text", "question", "query", "instruction", "clause")
OUTPUT_COLUMNS = ("completion", "output", "response", "answer", "label", "category")
SYSTEM_COLUMNS = ("system", "system_prompt")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "function_response": "tool", "observation": "tool", "function_call": "function_call",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Where in a row the input and the answer stand, where the usual names do not say it.

    Several input columns are put one below the other, or into `template` (a text with `{{column}}` slots). `system`
    names the column of the row's system prompt.
    """

    input: tuple[str, ...] = ()
    output: str | None = None
    template: str | None = None
    system: str | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns of the input: those of the template's slots, where there is a template."""
        return tuple(dict.fromkeys(SLOT.findall(self.template))) if self.template is not None else self.input

    def fitting(self, names: Collection[str]) -> Columns:
        """What of this holds for a file with columns of these names: the input's columns all together or not at all."""
        has = all(name in names for name in self.asked)
        return Columns(
            self.input if has else (),
            self.output if self.output in names else None,
            self.template if has else None,
            self.system if self.system in names else None,
        )


@dataclass(frozen=True)
class Format:
    """One form of rows: its name for people, how a row of it is known, and how it is read."""

    name: str
    matches: Callable[[Row, Columns], bool]
    parse: Callable[[Row, Columns], Parsed]


@dataclass(frozen=True)
class Read:
    """A row that was read: the example, the name of its form, fields it does not use, and what was changed in it."""

    example: Example
    format: str
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def read_row(place: Place, row: object, columns: Columns, *, answers: bool = True) -> Read:
    """One loaded row as an `Example`. Raises `Problem` for a row that no stage can use.

    `answers` demands an answer. The rules are the same for every caller: see `check_example`.
    """
    if not isinstance(row, dict):
        raise Problem(f"expected an object, found {type(row).__name__}")
    for name in sorted(MEDIA & row.keys()):
        if not (
            is_missing(row[name]) or row[name] in ("", [], {}) or isinstance(row[name], int) or name == "file"
        ):
            raise Problem(f"holds {media_name(name)} (`{name}`); unshot reads text only")
    named = {*columns.asked, columns.output, columns.system} - {None}
    whole = "messages" in row and named and not named & row.keys()
    if whole:  # as unshot writes rows: what the columns were is in the messages
        columns = Columns()
    form = next((f for f in FORMATS if f.matches(row, columns)), None)
    if form is None:
        raise Problem(
            f"found {', '.join(f'`{k}`' for k in row) or 'no fields'}; a row needs `messages`, or `prompt` and "
            "`completion` (name other columns with --input-column / --output-column)"
        )
    parsed = form.parse(row, columns)
    if whole:
        parsed.notes.add("holds `messages` and none of the named columns: the messages are read as they are")
    _add_system(parsed, row, columns)
    _take_tools(parsed, row)
    first = parsed.messages[0] if parsed.messages else None
    if first and first["role"] == "system" and not first["content"].strip():
        del parsed.messages[0]  # says nothing, and stands where the instruction goes
    if is_zero(row.get("weight")):
        raise Problem("has weight 0, which means not to train on it; remove the row")
    if parsed.answer is not None and missing_words(parsed.answer):
        parsed.missing = f"it is {parsed.answer.strip()}, a missing value; write the answer or remove the row"
        parsed.answer = None
    extra = {k: v for k, v in row.items() if k not in parsed.used}
    example = Example(
        tuple(parsed.messages), parsed.answer, place.line, extra, tools=parsed.tools, where=str(place)
    )
    problem = check_example(example, answers=answers, missing=parsed.missing)
    if problem:
        raise Problem(problem)
    unused = [k for k, v in extra.items() if not (is_missing(v) or v in ("", [], {}))]
    name = form.name if not parsed.columns else f"columns {_and(parsed.columns)}"
    return Read(example, name, (*unused, *sorted(parsed.ignored)), tuple(sorted(parsed.notes)))


def _set_answer(parsed: Parsed, row: Row, name: str | None) -> None:
    """Take the answer from a column: text, JSON of an object, or the last turn of a list of messages."""
    if name is None:
        return
    value = row[name]
    parsed.used.add(name)
    if shown := missing_words(value):
        parsed.missing = f"`{name}` is {shown}, a missing value; write the answer or remove the row"
    elif isinstance(value, list) and value and all(isinstance(v, dict) and "content" in v for v in value):
        before, parsed.answer = split_answer(parsed, read_messages(parsed, value, name))
        if parsed.answer is None:
            raise Problem(
                f"`{name}` ends with role {before[-1]['role']!r}; it must end with the assistant's answer"
            )
        parsed.messages += before
    else:
        parsed.answer = scalar(value, name)


def _first(row: Row, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _named(row: Row, name: str) -> str:
    if name not in row:
        raise Problem(f"no column `{name}`; {nearest(name, row)}")
    return name


def _output(
    row: Row, columns: Columns, taken: Iterable[str] = (), usual: Sequence[str] = OUTPUT_COLUMNS
) -> str | None:
    if columns.output is not None:
        return _named(row, columns.output)
    return _first(row, (name for name in usual if name not in taken))


def _text(row: Row, name: str) -> str:
    """A column that must hold a text or a number."""
    value = row[name]
    if missing_words(value) or not (isinstance(value, str) or type(value) in (int, float)):
        raise Problem(f"`{name}` is empty or not text")
    text = scalar(value, name)
    if not text.strip():
        raise Problem(f"`{name}` is empty or not text")
    return text


def _add_system(parsed: Parsed, row: Row, columns: Columns) -> None:
    """The row's `system` column as its system message."""
    if columns.system is not None:
        name = _named(row, columns.system)
    else:
        name = next((n for n in SYSTEM_COLUMNS if row.get(n)), SYSTEM_COLUMNS[0])
    value = row.get(name)
    parts = isinstance(value, list) and name in SYSTEM_COLUMNS
    usual = isinstance(value, str) or parts
    if name in parsed.used or is_missing(value) or (columns.system is None and not usual):
        return
    parsed.used.add(name)
    if parts:
        text = message_of(parsed, {"role": "system", "content": value}, 0)["content"]
    else:
        text = scalar(value, name)
    if not text.strip():
        return
    if parsed.messages and parsed.messages[0]["role"] == "system":
        raise Problem(f"has both a column `{name}` and a system message; keep one of them")
    parsed.messages.insert(0, {"role": "system", "content": text})


def _take_tools(parsed: Parsed, row: Row) -> None:
    """Function definitions beside the conversation: `tools`, or OpenAI's older `functions`."""
    for name in ("tools", "functions"):
        value = decoded(row.get(name))
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            parsed.used.add(name)
            wrapped = (v if "function" in v else {"type": "function", "function": v} for v in value)
            parsed.tools = tuple(wrapped)
            parsed.notes.add(f"`{name}` are handed to the chat template; not every template writes them")


def _refuse_preference(row: Row, columns: Columns) -> Parsed:
    if mark := _first(row, (n for n in ("kto_tag", "label") if isinstance(row.get(n), bool))):
        raise Problem(
            f"a preference row (an answer with a true or false `{mark}`, as for KTO); tuning needs the right answer "
            "alone"
        )
    names = [n for n in ("preferred_output", "non_preferred_output", "chosen", "rejected") if n in row]
    raise Problem(
        f"a preference row ({', '.join(f'`{n}`' for n in names)}); tuning needs the right answer alone: keep the "
        "preferred one as `completion` (--output-column chosen reads TRL's; --method dpo and kto learn from `rejected`)"
    )


def _is_preference(row: Row, columns: Columns) -> bool:
    if columns.output == "chosen":  # asked for by name: the right answer, beside a column `rejected`
        return False
    if {"preferred_output", "non_preferred_output"} & row.keys() or {"chosen", "rejected"} <= row.keys():
        return True
    conversation = {"completion", "messages", "conversations"} & row.keys()
    return isinstance(row.get("kto_tag"), bool) or bool(conversation and isinstance(row.get("label"), bool))


def _chat(row: Row, columns: Columns) -> Parsed:
    parsed = Parsed([], used={"messages"})
    messages = read_messages(parsed, row["messages"], "messages")
    parsed.messages, parsed.answer = split_answer(parsed, messages)
    if parsed.answer is None and columns.output is not None:
        _set_answer(parsed, row, _output(row, columns))
    return parsed


def _sharegpt(row: Row, columns: Columns) -> Parsed:
    name = _first(row, ("conversations", "conversation")) or ""
    parsed = Parsed([], used={name})
    turns = decoded(row[name])
    if not isinstance(turns, list) or not turns:
        raise Problem(f"`{name}` must be a non-empty list of {{from, value}}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(message_of(parsed, turn, number))
            continue
        role = SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise Problem(f"turn {number} is from {turn['from']!r}; accepted: {', '.join(SHAREGPT_ROLES)}")
        parsed.ignored |= {
            f"{name}.{k}" for k, v in turn.items() if k not in ("from", "value", "weight", "train") and v
        }
        if role == "function_call":
            try:
                call = json.loads(turn.get("value") or "")
            except (ValueError, TypeError, RecursionError):
                raise Problem(f"turn {number} is a function call that is no JSON") from None
            calls = call if isinstance(call, list) else [call]
            plain: dict[str, object] = {"role": "assistant", "content": None, "tool_calls": calls}
        else:
            plain = {"role": role, "content": turn.get("value")}
        if role == "assistant":
            plain |= {k: turn[k] for k in ("weight", "train") if k in turn}
        messages.append(message_of(parsed, plain, number))
    parsed.messages, parsed.answer = split_answer(parsed, messages)
    return parsed


def _squad(row: Row, columns: Columns) -> Parsed:
    question = _first(row, ("question", "query")) or ""
    parsed = Parsed([_user([_text(row, "context"), _text(row, question)])], used={"context", question})
    if columns.output is None and "answers" in row:
        parsed.used.add("answers")
        texts = _answer_texts(row["answers"])
        if not texts:
            parsed.missing = "`answers` is empty (a question without an answer)"
            return parsed
        if len(set(texts)) > 1:
            parsed.notes.add("of several `answers` the first is used")
        parsed.answer = texts[0]
        return parsed
    _set_answer(parsed, row, _output(row, columns, parsed.used, ("answer", *OUTPUT_COLUMNS)))
    return parsed


def _answer_texts(value: object) -> list[str]:
    """SQuAD's answers: `{"text": [...]}`, a list of `{"text": ...}` or of texts, or one text."""
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, str):
        return [value]
    items = value if isinstance(value, list) else []
    found = [item.get("text") if isinstance(item, dict) else item for item in items]
    return [text for text in found if isinstance(text, str) and text.strip()]


def _alpaca(row: Row, columns: Columns) -> Parsed:
    parts, used = [_text(row, "instruction")], {"instruction"}
    # Alpaca's own `text` is the row rendered; without `output` it is a column like any other.
    whole = {"output", "response"} & row.keys()
    for name in ("input", "context", "question", "query", *(() if whole else ("text",))):
        if name in row:
            used.add(name)
            text = "" if is_missing(row[name]) else scalar(row[name], name)
            parts += [text] if text.strip() else []
    messages: list[Message] = []
    history = row.get("history")
    if isinstance(history, list):
        used.add("history")
        for pair in history:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
                raise Problem("`history` must be a list of [question, answer]")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    parsed = Parsed([*messages, _user(parts)], used=used)
    _set_answer(parsed, row, _output(row, columns, used, ("output", *OUTPUT_COLUMNS)))
    return parsed


def _usual_columns(row: Row, columns: Columns) -> Parsed:
    name = _first(row, INPUT_COLUMNS) or ""
    parsed = Parsed([], used={name})
    if isinstance(row[name], list):
        parsed.messages = read_messages(parsed, row[name], name)
    else:
        parsed.messages = [{"role": "user", "content": _text(row, name)}]
    usual = [c for c in OUTPUT_COLUMNS if c != name]
    output = _output(row, columns, {name}, usual)
    if output is None and parsed.messages[-1]["role"] == "assistant":
        parsed.messages, parsed.answer = split_answer(parsed, parsed.messages)
    _set_answer(parsed, row, output)
    if name != "prompt" or output != "completion":
        parsed.columns = (name, *([output] if output else []))
    return parsed


def _named_columns(row: Row, columns: Columns) -> Parsed:
    """Input columns by name, one below the other or in the slots of a template."""
    names = columns.asked
    parsed = Parsed([], used=set(names))
    for name in names:
        _named(row, name)
    if columns.template is None and len(names) == 1:
        if isinstance(row[names[0]], list):
            parsed.messages = read_messages(parsed, row[names[0]], names[0])
        else:
            parsed.messages = [{"role": "user", "content": _text(row, names[0])}]
    else:
        values = {}
        for name in names:
            if is_missing(row[name]):
                parsed.notes.add(f"`{name}` is missing in some rows; its place is left empty")
            values[name] = "" if is_missing(row[name]) else scalar(row[name], name)
        if not any(v.strip() for v in values.values()):
            raise Problem(f"{', '.join(f'`{n}`' for n in names)}: all empty")
        if columns.template is None:
            parsed.messages = [_user([v for v in values.values() if v.strip()])]
        else:
            text = SLOT.sub(lambda slot: values[slot[1]], columns.template)
            parsed.messages = [{"role": "user", "content": text}]
    output = _output(row, columns, parsed.used)
    _set_answer(parsed, row, output)
    parsed.columns = (*names, *([output] if output else []))
    return parsed


def _and(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


def _user(parts: Sequence[str]) -> Message:
    return {"role": "user", "content": "\n\n".join(parts)}


def _conversational(row: Row, columns: Columns) -> bool:
    return isinstance(row.get("prompt"), list)


FORMATS: tuple[Format, ...] = (
    Format("named columns", lambda row, columns: bool(columns.input or columns.template), _named_columns),
    Format("preference", _is_preference, _refuse_preference),
    Format("messages", lambda row, columns: "messages" in row, _chat),
    Format("ShareGPT", lambda row, columns: bool({"conversations", "conversation"} & row.keys()), _sharegpt),
    Format(
        "Alpaca (instruction, input, output)",
        lambda row, columns: (
            "instruction" in row and (bool({"output", "response"} & row.keys()) or "prompt" not in row)
        ),
        _alpaca,
    ),
    Format(
        "context and question",
        lambda row, columns: "context" in row and bool({"question", "query"} & row.keys()),
        _squad,
    ),
    Format("conversational prompt and completion", _conversational, _usual_columns),
    Format(
        "prompt and completion", lambda row, columns: {"prompt", "completion"} <= row.keys(), _usual_columns
    ),
    Format("columns", lambda row, columns: _first(row, INPUT_COLUMNS) is not None, _usual_columns),
)
