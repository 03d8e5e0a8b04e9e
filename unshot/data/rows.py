"""The one reader of data rows, for every stage: streamed, in any of the known forms, each fault with its line.

`scan` yields rows and faults one at a time (`data check`); `read_examples` wants all rows and raises at the first
fault. Both see the same rules, so that what one refuses the other refuses with the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unshot.data.example import Example, Fault, Message
from unshot.data.files import Problem, kind_of, raw_rows, read_text, write_jsonl
from unshot.data.formats import Columns, read_row
from unshot.errors import InputError

__all__ = [
    "Columns", "Example", "Fault", "Message", "RowOptions", "Summary", "read_examples", "read_rows", "read_text",
    "scan", "write_jsonl",
]  # fmt: skip


@dataclass(frozen=True)
class RowOptions:
    """What the command line says of reading rows: where things stand, and whether an old prompt stays in them."""

    columns: Columns = field(default_factory=Columns)
    keep_system: bool = False


@dataclass
class Summary:
    """What a reading met: rows by form, fields that nothing uses, and what was changed, each with its rows."""

    path: Path
    rows: int = 0
    faults: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: Example | None = None
    kind: str = ""

    def format(self) -> str:
        """The form of the rows in words, e.g. `JSONL, messages`."""
        name = {"jsonl": "JSONL", "parquet": "Parquet", "arrow": "Arrow"}.get(self.kind, self.kind.upper())
        if not self.formats:
            return f"{name}, no row that can be read"
        if len(self.formats) == 1:
            return f"{name}, {next(iter(self.formats))}"
        parts = (f"{form} ({count} rows)" for form, count in self.formats.most_common())
        return f"{name}, a mixture of forms: {', '.join(parts)}"

    def unused_fields(self, used: Collection[str] = ()) -> dict[str, int]:
        """Fields that nothing uses with the rows that have them, except those that the caller itself uses."""
        return {name: count for name, count in self.unused.items() if name not in used}

    def lines(self, used: Collection[str] = ()) -> list[str]:
        """What a user must know of the reading, one sentence each: fields not used, then changes."""
        unused = self.unused_fields(used)
        named = ", ".join(f"`{name}` ({count} rows)" for name, count in unused.items())
        return [
            *([f"not used: {named}"] if unused else []),
            *(f"{text} ({count} rows)" for text, count in self.notes.items()),
        ]


def scan(
    path: Path, columns: Columns | None = None, *, answers: bool = True, summary: Summary | None = None
) -> Iterator[Example | Fault]:
    """Every row of a file (files, a `datasets` directory) as an `Example` or as a `Fault`; `summary` is filled in.

    `answers` demands an answer in every row. Raises `InputError` only where a file itself cannot be read.
    """
    columns = columns or Columns()
    summary = summary or Summary(path)
    for place, row in raw_rows(path):
        summary.rows += 1
        summary.kind = summary.kind or kind_of(place.file)
        try:
            if isinstance(row, Problem):
                raise row
            found = read_row(place, row, columns, answers=answers)
        except Problem as problem:
            summary.faults += 1
            yield Fault(place.line, str(problem), str(place))
            continue
        summary.formats[found.format] += 1
        summary.unused.update(found.unused)
        summary.notes.update(found.notes)
        summary.first = summary.first or found.example
        yield found.example


def read_rows(
    path: Path, columns: Columns | None = None, *, answers: bool = True
) -> tuple[list[Example], Summary]:
    """All rows and what the reading met; at least one row. Raises `InputError` at the first fault."""
    summary = Summary(path)
    examples = []
    for item in scan(path, columns, answers=answers, summary=summary):
        if isinstance(item, Fault):
            raise InputError(f"{item.where}: {item.problem}")
        examples.append(item)
    if not examples:
        raise InputError(f"{path}: empty; it needs at least one row")
    return examples, summary


def read_examples(path: Path, columns: Columns | None = None, *, answers: bool = True) -> list[Example]:
    """All rows of a file, at least one. Raises `InputError` naming file and line of the first fault."""
    return read_rows(path, columns, answers=answers)[0]
