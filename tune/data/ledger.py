"""What a teacher was asked and what it said: append-only, so that a killed run goes on without paying twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from unshot.console import Output
from unshot.contracts.record import Record, RecordError
from unshot.data.files import append_line, mend
from unshot.errors import OutsideError

FILE = "ledger.jsonl"
Status = Literal["ok", "truncated", "refused", "malformed", "failed"]
# What was answered is paid for and never asked again; a request that got no answer is.
PAID: tuple[Status, ...] = ("ok", "truncated", "refused", "malformed")


class Entry(Record):
    """One request that came to an end. Tokens and dollars are None if the server did not report them."""

    key: str
    status: Status
    text: str = ""
    # Why there is no answer: `http 400`, `timeout`, what the server said.
    detail: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    dollars: float | None = None
    # Smallest difference of log-probability between the first and the second token of the answer.
    margin: float | None = None
    # Tries that were sent and got no answer at all, which a server may have charged for all the same.
    lost: int = 0


class Ledger:
    """The entries of a labelling run by request key. Safe to write from several threads."""

    def __init__(self, folder: Path, out: Output) -> None:
        self.path = folder / FILE
        self.entries: dict[str, Entry] = {}
        # Dollars by the usage that servers reported, over so many requests, and the most that one of them took.
        self.spent, self.priced, self.dearest = 0.0, 0, 0.0
        # Requests whose dollars nobody knows: answers without usage, and malformed or lost ones.
        self.unpriced, self.unsure = 0, 0
        self._lock = threading.Lock()
        bad = self._read()
        if bad:
            out.warn(
                f"{self.path}: {bad} lines cannot be read and are left out; their requests are asked again"
            )

    def _read(self) -> int:
        """Take in what an earlier run left; a torn last line is cut off. The number of other unreadable lines."""
        if not self.path.is_file():
            return 0
        mend(self.path)
        bad = 0
        for line in self.path.read_bytes().splitlines():
            try:
                entry = Entry.from_json(line)
            except RecordError:
                bad += 1
                continue
            self._count(entry)
        return bad

    def _count(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        self.unsure += entry.lost
        if entry.dollars is not None:
            self.spent, self.priced = self.spent + entry.dollars, self.priced + 1
            self.dearest = max(self.dearest, entry.dollars)
        elif entry.status == "malformed":
            self.unsure += 1
        elif entry.status in PAID:
            self.unpriced += 1

    def add(self, entry: Entry) -> None:
        """Write an entry, whole or not at all. Raises `OutsideError` if the disk is full."""
        with self._lock:
            try:
                append_line(self.path, entry.to_json().encode("utf-8", "replace") + b"\n", flush=True)
            except OSError as error:
                raise OutsideError(
                    f"{self.path}: {error.strerror}; free some space, the same command goes on"
                ) from None
            self._count(entry)

    def why(self) -> str:
        """What was wrong with the last answer that cannot be used."""
        return next((e.detail for e in reversed(self.entries.values()) if e.detail), "")

    def paid(self, key: str) -> Entry | None:
        """The entry of a request that was answered; None if it must be asked."""
        entry = self.entries.get(key)
        return entry if entry is not None and entry.status in PAID else None


def write_batch(path: Path, bodies: Iterator[tuple[str, dict[str, object]]]) -> int:
    """Requests as an OpenAI batch input file; their number."""
    count = 0
    with path.open("w", encoding="utf-8", errors="backslashreplace") as handle:
        for key, body in bodies:
            line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count
