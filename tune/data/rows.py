"""Rows of a data file one at a time, with what is wrong in each: nothing is held, nothing stops at the first fault."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.data.rows import Example, parse_row
from unshot.errors import InputError

# A CSV field may be as long as the longest document, which is more than the csv module's 128 KiB.
FIELD_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class Fault:
    """A malformed row: its line (as an editor counts; the row's number in a JSON list) and what is wrong."""

    line: int
    problem: str


def scan(
    path: Path, *, input_column: str | None = None, output_column: str | None = None
) -> Iterator[Example | Fault]:
    """Every row of a JSONL, CSV/TSV or JSON file as an `Example` with an answer, or as a `Fault`.

    JSONL and CSV are streamed; a JSON list is read whole. Raises `InputError` only where the file itself
    cannot be read.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give a file")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    suffix = path.suffix.lower()
    rows = (
        _csv(path, "\t" if suffix == ".tsv" else ",")
        if suffix in (".csv", ".tsv")
        else _json(path)
        if suffix == ".json"
        else _jsonl(path)
    )
    for line, row in rows:
        if isinstance(row, Fault):
            yield row
            continue
        try:
            example = parse_row(path, line, row, input_column=input_column, output_column=output_column)
        except InputError as error:
            yield Fault(line, str(error).removeprefix(f"{path}, line {line}: "))
            continue
        problem = fault_of(example)
        yield Fault(line, problem) if problem else example


def fault_of(example: Example) -> str | None:
    """What makes a parsed row unfit for training, None where nothing does."""
    if example.answer is None:
        return "no answer: the row needs a `completion`, or a last message of role `assistant`"
    if not example.answer.strip():
        return "the answer is empty"
    if not example.text.strip():
        return "the user message is empty"
    for number, message in enumerate(example.messages, start=1):
        if message["role"] == "system" and number > 1:
            return f"message {number} has role 'system'; only the first may"
        if (
            number > 1
            and message["role"] == example.messages[number - 2]["role"]
            and message["role"] != "tool"
        ):
            return f"messages {number - 1} and {number} both have role {message['role']!r}"
    if example.messages[-1]["role"] == "assistant":
        return "the last two messages both have role 'assistant'"
    texts = [m["content"] for m in example.messages] + [example.answer]
    if any(has_bad_bytes(t) for t in texts):
        return "not UTF-8; convert the file, e.g. `iconv -f latin1 -t utf-8`"
    if any("\ufffd" in t for t in texts):
        return "holds U+FFFD, the mark of a character lost in an earlier conversion"
    if cut_json(example.answer):
        return "the answer starts as JSON and breaks off (truncated?)"
    return None


def cut_json(answer: str) -> bool:
    """Whether an answer opens a JSON object and is none."""
    text = answer.strip()
    if not text.startswith('{"') and text != "{":
        return False
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


def has_bad_bytes(text: str) -> bool:
    """Whether bytes that are no UTF-8 were smuggled through decoding (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield number, json.loads(raw.decode())
            except UnicodeDecodeError as error:
                yield number, Fault(number, f"not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                yield number, Fault(number, f"not valid JSON ({error}); each line is one object")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    from unshot.data.rows import read_text

    try:
        loaded = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if isinstance(loaded, dict):
        loaded = next((v for v in loaded.values() if isinstance(v, list)), None)
    if not isinstance(loaded, list):
        raise InputError(f"{path}: expected a JSON list of rows")
    yield from enumerate(loaded, start=1)


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(FIELD_LIMIT)
    # Bytes that are no UTF-8 pass as surrogates, so that they cost their row and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.reader(handle, delimiter=delimiter)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, Fault(line, f"not valid CSV ({error})")
                continue
            if header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    yield (
                        line,
                        Fault(
                            line,
                            f"{len(fields)} fields, the header has {len(header)}; quote fields that hold "
                            f"{'tabs' if delimiter != ',' else 'commas'}",
                        ),
                    )
                else:
                    yield line, dict(zip(header, fields, strict=True))
