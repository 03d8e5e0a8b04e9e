"""The request log: what the gateway writes and what `ab`, `drift` and `retrain` read.

A log directory holds `requests-YYYYMMDD.jsonl` (one `Request` a line, by the UTC day of its arrival) and
`feedback.jsonl` (one `Feedback` a line, in the order in which it came). Texts are there only where the user asked for
them; personal data is redacted before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from unshot.contracts.record import Record, RecordError
from unshot.errors import InputError

FEEDBACK = "feedback.jsonl"
Arm = Literal["baseline", "candidate"]


class Entry(Record, omit_defaults=True):
    """A line of the log. `id` is the request's, `time` seconds since 1970, UTC (of a request its arrival)."""

    id: str
    time: float


class Request(Entry):
    """One answered (or failed) request of one arm. A shadowed request has two lines with one id.

    Times are seconds, `queue_s` in the gateway before the back end was asked, `ttft_s` and `e2e_s` from arrival;
    `cost_usd` is US dollars; `logprob` the mean log-probability of the answer's tokens.
    """

    # The arm that made this answer, and the registry's version behind it (or the back end's name).
    arm: Arm
    version: str
    # Hash of the sticky key that drew the arm (the unit of an A/B test), and the arm it was drawn into.
    unit: str
    assigned: Arm
    # Answered beside the real answer and never shown; shown in place of the assigned arm's answer, which failed.
    shadow: bool = False
    fallback: bool = False
    # Kind of failure (timeout, http 500, schema, ...); None: answered.
    error: str | None = None
    # Whether the answer kept the task's labels or schema, and the label it states.
    schema_ok: bool | None = None
    label: str | None = None
    # The user's last message and the answer, redacted; only where logged.
    input: str | None = None
    answer: str | None = None
    # Words of the user's last message.
    input_words: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    cost_usd: float | None = None
    logprob: float | None = None
    # A tag that the caller gave (`x-unshot-slice`).
    slice: str | None = None


class Feedback(Entry):
    """What a user or a reviewer said of an answer: a label, a thumb, or the right answer; `by` says who."""

    correct: bool | None = None
    correction: str | None = None
    by: str = "user"


E = TypeVar("E", bound=Entry)


class Writer:
    """Appends entries; one line per write, so that lines of several processes do not mix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, entry: Request | Feedback) -> None:
        """Append one entry. Not flushed to the disk: a power cut may lose the last seconds, a crash does not."""
        if isinstance(entry, Feedback):
            path = self.folder / FEEDBACK
        else:
            path = self.folder / f"requests-{datetime.fromtimestamp(entry.time, UTC):%Y%m%d}.jsonl"
        line = entry.to_json() + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_requests(
    folder: Path, *, since: float | None = None, until: float | None = None
) -> Iterator[Request]:
    """Requests of a log directory that arrived in [since, until), by day, in file order. Raises `InputError`."""
    files = sorted(folder.glob("requests-*.jsonl"))
    if not files:
        raise InputError(
            f"{folder}: no requests-*.jsonl there; give the --log directory of `unshot deploy serve`"
        )
    for path in files:
        for request in _read(path, Request):
            if (since is None or request.time >= since) and (until is None or request.time < until):
                yield request


def read_feedback(folder: Path) -> dict[str, Feedback]:
    """The last feedback on each request, by the request's id; empty where there is none."""
    path = folder / FEEDBACK
    return {entry.id: entry for entry in _read(path, Feedback)} if path.is_file() else {}


def _read(path: Path, kind: type[E]) -> Iterator[E]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith("\n"):
                return  # the writer is at it, or was killed at it
            try:
                yield kind.from_json(line)
            except RecordError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
