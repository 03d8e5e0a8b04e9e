"""Data files as the ecosystem has them: JSONL with `messages` or `prompt` + `completion`, CSV/TSV with columns.

Every row becomes an `Example`; errors name the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unshot.errors import InputError, nearest

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool", "developer")
INPUT_COLUMNS = ("prompt", "input", "text", "question", "clause")
OUTPUT_COLUMNS = ("completion", "output", "label", "answer", "category")


@dataclass(frozen=True)
class Example:
    """One row: what goes in (`messages`, without the final answer), the answer, and where it stood.

    `answer` is None for rows that have only an input. `extra` holds the row's other columns.
    """

    messages: tuple[Message, ...]
    answer: str | None
    line: int
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        """The user's text: the content of the last user message."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message["content"]
        return self.messages[-1]["content"] if self.messages else ""

    def row(self) -> dict[str, Any]:
        """The row as unshot writes it: `{"messages": [...]}`, plus the other columns."""
        messages = list(self.messages)
        if self.answer is not None:
            messages.append({"role": "assistant", "content": self.answer})
        return {"messages": messages, **self.extra}


def read_examples(
    path: Path,
    *,
    answers: bool = True,
    input_column: str | None = None,
    output_column: str | None = None,
) -> list[Example]:
    """Read a JSONL, JSON or CSV/TSV file; at least one row.

    `answers` demands an answer in every row. The columns default to `prompt`/`completion` and their usual
    other names. Raises `InputError` naming file and line.
    """
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: empty; it needs at least one row")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, text)
    elif suffix == ".json":
        rows = _json_rows(path, text)
    else:
        rows = _jsonl_rows(path, text)
    examples = [
        parse_row(path, line, row, input_column=input_column, output_column=output_column)
        for line, row in rows
    ]
    if not examples:
        raise InputError(f"{path}: no rows; it needs at least one")
    if answers:
        for example in examples:
            if example.answer is None or not example.answer.strip():
                raise InputError(
                    f"{path}, line {example.line}: no answer; the row needs a non-empty `completion` or a last "
                    "message of role `assistant`"
                )
    return examples


def read_text(path: Path) -> str:
    """A UTF-8 text file's content; `InputError` where it is missing, a directory, or not UTF-8."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give a file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(f"{path}: not readable (permission denied)") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.start}); convert it, e.g. `iconv -f latin1 -t utf-8`"
        ) from None


def text_or_file(value: str | None) -> str | None:
    """A flag that is a text, or the path of a text file that exists."""
    if value is None or "\n" in value or len(value) > 255 or not Path(value).is_file():
        return value
    return read_text(Path(value)).strip()


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSONL (UTF-8, one object a line)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error}); each line is one object"
            ) from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if isinstance(loaded, dict):
        loaded = next((v for v in loaded.values() if isinstance(v, list)), None)
    if not isinstance(loaded, list):
        raise InputError(f"{path}: expected a JSON list of rows")
    yield from enumerate(loaded, start=1)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path}, line {reader.line_num}: more fields than the header has; quote the commas"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None


def parse_row(
    path: Path, line: int, row: Any, *, input_column: str | None = None, output_column: str | None = None
) -> Example:
    """One parsed row as an `Example`; `InputError` naming file and line where it is not one."""
    where = f"{path}, line {line}"
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    if "messages" in row and input_column is None:
        messages = _messages(where, row["messages"])
        extra = {k: v for k, v in row.items() if k != "messages"}
        if messages[-1]["role"] == "assistant":
            return Example(tuple(messages[:-1]), messages[-1]["content"], line, extra)
        return Example(tuple(messages), None, line, extra)
    source = _column(where, row, input_column, INPUT_COLUMNS, required=True)
    target = _column(where, row, output_column, OUTPUT_COLUMNS, required=output_column is not None)
    assert source is not None
    prompt, answer = row[source], row.get(target) if target else None
    extra = {k: v for k, v in row.items() if k not in (source, target)}
    if isinstance(prompt, list):  # TRL's conversational prompt/completion form
        messages = _messages(where, prompt)
    elif isinstance(prompt, str) and prompt.strip():
        messages = [{"role": "user", "content": prompt}]
    else:
        raise InputError(f"{where}: `{source}` is empty or not text")
    if isinstance(answer, list):
        answer = _messages(where, answer)[-1]["content"]
    elif isinstance(answer, dict):
        answer = json.dumps(answer, ensure_ascii=False)
    elif answer is not None and not isinstance(answer, str):
        answer = str(answer)
    return Example(tuple(messages), answer, line, extra)


def _column(
    where: str, row: dict[str, Any], name: str | None, usual: Sequence[str], *, required: bool
) -> str | None:
    if name is not None:
        if name not in row:
            raise InputError(f"{where}: no column `{name}`; {nearest(name, row)}")
        return name
    for candidate in usual:
        if candidate in row:
            return candidate
    if required:
        raise InputError(
            f"{where}: found {', '.join(f'`{k}`' for k in row) or 'no fields'}; a row needs `messages`, or `prompt` "
            "and `completion` (name other columns with --input-column / --output-column)"
        )
    return None


def _messages(where: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `messages` must be a non-empty list of {{role, content}}")
    messages = []
    for position, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: message {position} needs a text `content`")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"{where}: message {position} has role {role!r}; accepted: {', '.join(ROLES)}")
        messages.append({"role": role, "content": message["content"]})
    if len(messages) > 1 and messages[-1]["role"] not in ("assistant", "user", "tool"):
        raise InputError(
            f"{where}: the last message has role {messages[-1]['role']!r}; it must be user or assistant"
        )
    if all(m["role"] in ("system", "developer") for m in messages) or messages[0]["role"] == "assistant":
        raise InputError(
            f"{where}: the messages hold no question; a user message must come before the answer"
        )
    return messages
