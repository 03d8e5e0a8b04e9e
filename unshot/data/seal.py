"""Readings of held-out rows, beside their hash and not in a run: runs that share a test set share its seal.

Whoever picks the best of twenty runs by one test set has fitted to it; a record in each run would not show it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from unshot.data.example import Example
from unshot.data.files import append_after
from unshot.errors import OutsideError


@dataclass(frozen=True)
class Seal:
    """A test set's readings: its hash, those before this one, how many runs made them, how many of these are others."""

    sha256: str
    before: int
    runs: int
    others: int = 0

    def warning(self) -> str | None:
        """What a score on these rows is worth after other runs were scored on them; None on the first reading."""
        if not self.before:
            return None
        times = (
            "once before"
            if self.before == 1
            else f"{self.before} times before, by {self.runs} run{'s' * (self.runs > 1)}"
        )
        return (
            f"these test rows were read {times}: where the best of them is "
            "chosen by this score, it is no longer a test; choose on validation, or test the chosen run on other rows"
        )


def folder() -> Path:
    """`$UNSHOT_DATA`, else `unshot` under the platform's user data directory."""
    if os.environ.get("UNSHOT_DATA"):
        return Path(os.environ["UNSHOT_DATA"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "unshot"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "unshot"


def rows_digest(rows: Sequence[Example]) -> str:
    """Hex SHA-256 of the rows' inputs and answers, whatever their order and file format."""
    each = sorted(json.dumps([row.messages, row.answer], sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def record_reading(rows: Sequence[Example], by: str, run: Path) -> Seal:
    """Append a reading of `rows` by a stage for a run; what was read before.

    Raises `OutsideError` where it cannot be recorded.
    """
    digest = rows_digest(rows)
    path = folder() / "readings" / f"{digest}.jsonl"
    entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": by, "run": str(run.resolve())}
    before: list[dict[str, str]] = []

    def add(lines: list[str]) -> str:
        before.extend(json.loads(line) for line in lines)
        return json.dumps(entry)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_after(path, add)
    except (OSError, ValueError) as error:
        raise OutsideError(
            f"{path}: the reading of the test rows cannot be recorded ({error}); set UNSHOT_DATA to a directory that "
            "can be written"
        ) from None
    runs = {r.get("run") for r in before}
    return Seal(digest, len(before), len(runs), len(runs - {entry["run"]}))
