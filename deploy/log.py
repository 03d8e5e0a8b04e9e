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
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unshot.errors import InputError

FEEDBACK = "feedback.jsonl"
Arm = Literal["baseline", "candidate"]


class Entry(BaseModel):
    """A line of the log."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="the request's id; feedback names it")
    time: float = Field(description="seconds since 1970, UTC; of a request its arrival")


class Request(Entry):
    """One answered (or failed) request of one arm. A shadowed request has two lines with one id."""

    arm: Arm = Field(description="the arm that made this answer")
    version: str = Field(description="the registry's version behind that arm, or the back end's name")
    unit: str = Field(description="hash of the sticky key that drew the arm: the unit of an A/B test")
    assigned: Arm = Field(description="the arm the unit was drawn into; differs from `arm` after a fallback")
    shadow: bool = Field(False, description="answered beside the real answer, never shown to the user")
    fallback: bool = Field(False, description="shown in place of the assigned arm's answer, which failed")
    error: str | None = Field(
        None, description="kind of failure (timeout, http 500, schema, ...); None: answered"
    )
    schema_ok: bool | None = Field(None, description="whether the answer kept the task's labels or schema")
    label: str | None = Field(None, description="the label that the answer states, where the task has labels")
    input: str | None = Field(None, description="the user's last message, redacted; only where logged")
    answer: str | None = Field(None, description="the answer, redacted; only where logged")
    input_words: int | None = Field(None, description="words of the user's last message")
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue_s: float | None = Field(None, description="seconds in the gateway before the back end was asked")
    ttft_s: float | None = Field(None, description="seconds from arrival to the first token")
    e2e_s: float | None = Field(None, description="seconds from arrival to the last token")
    cost_usd: float | None = Field(None, description="US dollars of this answer")
    logprob: float | None = Field(
        None, description="mean log-probability of the answer's tokens: uncertainty"
    )
    slice: str | None = Field(None, description="a tag that the caller gave (`x-unshot-slice`), for slices")


class Feedback(Entry):
    """What a user or a reviewer said of an answer."""

    correct: bool | None = Field(None, description="a label, a thumb, or a judge's word")
    correction: str | None = Field(None, description="the right answer, where one was given")
    by: str = Field("user", description="user, reviewer or judge")


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
        line = entry.model_dump_json(exclude_defaults=True) + "\n"
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
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first: Any = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise InputError(f"{path}, line {number}: {where}: {first['msg']}") from None
