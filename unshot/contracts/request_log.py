"""The request log: what the gateway writes and what `ab`, `drift` and `retrain` read.

A log directory holds `requests-YYYYMMDD.jsonl` (one `Request` a line, by the UTC day of its arrival) and
`feedback.jsonl` (one `Feedback` a line, in the order in which it came). Texts are there only if the user asked for
them; personal data is redacted before anything is written. A line is written whole or not at all; what a power cut or a
kill tore is cut off when the next writer starts, and readers skip, count and report what they cannot read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from msgspec import Meta

from unshot.contracts.record import Record, RecordError
from unshot.data.files import append_line, mend, plain_file
from unshot.errors import InputError

FEEDBACK = "feedback.jsonl"
# The source of feedback whose giver is not known as a reviewer.
USER = "user"
FORMAT = 2
Arm = Literal["baseline", "candidate"]
# Up to the end of the year 9999: what a calendar can show.
Time = Annotated[float, Meta(ge=0, lt=253402300800)]


class Entry(Record, omit_defaults=True):
    """A line of the log. `id` is the request's, `time` seconds since 1970, UTC (of a request its arrival)."""

    FILE: ClassVar[str]

    id: str
    time: Time


class LoggedMessage(Record):
    """One message of a request, redacted."""

    role: str
    content: str


class Request(Entry):
    """One answered (or failed) request of one arm. A shadowed request has two lines with one id.

    Times are seconds, `queue_s` in the gateway before the back end was asked, `ttft_s` and `e2e_s` from arrival;
    `cost_usd` is US dollars; `logprob` the mean log-probability of the answer's tokens.
    """

    FILE: ClassVar[str] = "requests.jsonl"

    # The arm that made this answer, and the registry's version behind it (or the back end's name).
    arm: Arm
    version: str
    # Salted hash of the sticky key that drew the arm (the unit of an A/B test), and the arm it was drawn into.
    unit: str
    assigned: Arm
    # The candidate's share when the arm was drawn, 0 to 1; None in logs of format 1, which did not keep it.
    share: Annotated[float, Meta(ge=0, le=1)] | None = None
    # Answered beside the real answer and never shown; shown in place of the assigned arm's answer, which failed.
    shadow: bool = False
    fallback: bool = False
    # Kind of failure (timeout, http 500, schema, ...); None: answered.
    error: str | None = None
    # The failure is the request's own (refused as invalid, cut by its own limit): it says nothing of the arm.
    request_fault: bool = False
    # Whether the answer kept the task's labels or schema, and the label it states.
    schema_ok: bool | None = None
    label: str | None = None
    # The user's last message and the answer, redacted; only if texts are logged. `cut`: longer than the log keeps.
    input: str | None = None
    answer: str | None = None
    cut: bool = False
    # The whole request as the client sent it, its prompt included; only in record mode, and only if texts are logged.
    messages: list[LoggedMessage] | None = None
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
    format: int = 1


class Feedback(Entry):
    """What a user or a reviewer said of an answer: a label, a thumb, or the right answer; `by` says who."""

    FILE: ClassVar[str] = FEEDBACK

    correct: bool | None = None
    correction: str | None = None
    by: str = USER
    format: int = 1


E = TypeVar("E", Request, Feedback)


class Writer:
    """Appends entries, whole lines a write, among other writers of the same directory.

    Raises `OSError` where the directory cannot be made. `cut` counts the torn last lines that were removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.cut = sum(mend(path) for path in files(folder))

    def write(self, entry: Request | Feedback) -> None:
        """Append one entry, whole or not at all: raises `OSError`, and nothing of the line stays.

        Not flushed to the disk: a power cut may lose the last seconds, a crash does not.
        """
        for error in self.append([self.placed(entry)]):
            raise error

    def placed(self, entry: Request | Feedback) -> tuple[Path, bytes]:
        """The file that an entry belongs to, and its line."""
        if isinstance(entry, Feedback):
            path = self.folder / FEEDBACK
        else:
            path = self.folder / f"requests-{datetime.fromtimestamp(entry.time, UTC):%Y%m%d}.jsonl"
        return path, (entry.changed(format=FORMAT).to_json() + "\n").encode("utf-8", "replace")

    def append(self, placed: Iterable[tuple[Path, bytes]]) -> list[OSError]:
        """Append lines, those of a file in one piece; why those failed that did, each whole or not at all."""
        files: dict[Path, list[bytes]] = {}
        for path, line in placed:
            files.setdefault(path, []).append(line)
        failed = []
        for path, lines in files.items():
            try:
                append_line(path, b"".join(lines))
            except OSError as error:
                if len(lines) == 1:
                    failed.append(error)
                else:  # a full disk may still hold some of them
                    failed += [e for line in lines for e in self.append([(path, line)])]
        return failed


def files(folder: Path) -> list[Path]:
    """The files of a log directory that are there, requests by day, then feedback."""
    feedback = folder / FEEDBACK
    return [*sorted(folder.glob("requests-*.jsonl")), *([feedback] if feedback.is_file() else [])]


@dataclass
class Unreadable:
    """Lines of a log that were skipped, and the first reason by file."""

    lines: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path, number: int, reason: str) -> None:
        self.lines += 1
        self.reasons.setdefault(path.name, f"line {number}: {reason}")

    def sentence(self) -> str | None:
        """What was skipped, in one line; None where nothing was."""
        if not self.lines:
            return None
        first = "; ".join(f"{name}, {reason}" for name, reason in list(self.reasons.items())[:3])
        return f"{self.lines} lines of the log cannot be read and are left out ({first[:400]})"


def read_requests(
    folder: Path,
    unreadable: Unreadable | None = None,
    *,
    since: float | None = None,
    until: float | None = None,
) -> Iterator[Request]:
    """Requests of a log directory that arrived in [since, until), by day, in file order.

    What cannot be read is counted in `unreadable`, for the caller to report. Raises `InputError` where there is no log.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such directory, so no requests-*.jsonl; give the --log directory of `unshot deploy serve`"
        )
    skipped = Unreadable() if unreadable is None else unreadable
    found = sorted(folder.glob("requests-*.jsonl"))
    if not found:
        raise InputError(
            f"{folder}: no requests-*.jsonl there; give the --log directory of `unshot deploy serve`"
        )
    for path in found:
        for request in _read(path, Request, skipped):
            if (since is None or request.time >= since) and (until is None or request.time < until):
                yield request


def read_feedback(folder: Path, unreadable: Unreadable | None = None) -> dict[str, Feedback]:
    """The last feedback on each request, by the request's id; empty where there is none.

    What a reviewer or a judge said stands above what a user said, whichever came last.
    """
    path = folder / FEEDBACK
    if not path.is_file():
        return {}
    found: dict[str, Feedback] = {}
    for entry in _read(path, Feedback, Unreadable() if unreadable is None else unreadable):
        before = found.get(entry.id)
        if before is None or before.by == USER or entry.by != USER:
            found[entry.id] = entry
    return found


def _read(path: Path, kind: type[E], unreadable: Unreadable) -> Iterator[E]:
    try:
        with plain_file(path).open("rb") as handle:
            yield from _entries(path, handle, kind, unreadable)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _entries(path: Path, lines: Iterable[bytes], kind: type[E], unreadable: Unreadable) -> Iterator[E]:
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            unreadable.add(path, number, "torn: its writer is at it, or was killed at it")
            return
        try:
            entry = kind.from_json(line)
        except (RecordError, RecursionError) as error:
            unreadable.add(path, number, str(error)[:120])
            continue
        if entry.format > FORMAT:
            raise InputError(
                f"{path}, line {number}: format {entry.format} is newer than this unshot reads ({FORMAT}); "
                "upgrade unshot"
            )
        yield entry
