"""The process that redacts and writes the request log: `python -m deploy.serve.log_worker DIR REGION`.

Redacting a long text takes time; here it takes none of the gateway's. An entry comes as a line on stdin: `R` or `F` and
its JSON; each is answered by a line on stdout, `written` or `failed WHY`. Lines that came together are written
together. The end of stdin ends it, when everything that was sent is written: a gateway that is killed loses no line
that it had handed over.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

from unshot.contracts.record import RecordError
from unshot.contracts.request_log import USER, Feedback, Request, Writer
from unshot.data.personal import redacted
from unshot.secret import hide

# What a tag of the caller's may hold; it stands in reports and on terminals.
NOT_IN_A_TAG = re.compile(r"[^\w .:/@+\[\]-]+")
LONGEST_TAG = 64
# What a pipe holds.
AT_ONCE = 65_536


def clean(entry: Request | Feedback, region: str) -> Request | Feedback:
    """The entry as it may be written: every text of a client's goes through here."""

    def text(value: str | None) -> str | None:
        return None if value is None else redacted(hide(value), region)

    if isinstance(entry, Feedback):
        return entry.changed(correction=text(entry.correction), by=tag(entry.by, region) or USER)
    return entry.changed(
        input=text(entry.input),
        answer=text(entry.answer),
        label=text(entry.label),
        slice=tag(entry.slice, region),
        messages=None
        if entry.messages is None
        else [
            m.changed(role=tag(m.role, region) or "_", content=text(m.content) or "") for m in entry.messages
        ],
    )


def tag(value: str | None, region: str) -> str | None:
    """A short name that a caller gave, without personal data and what a terminal or a sheet would act on."""
    if value is None:
        return None
    plain = NOT_IN_A_TAG.sub("_", redacted(hide(value), region)).strip()[:LONGEST_TAG]
    return plain.lstrip("=+-@") or None


def write(writer: Writer, region: str, lines: list[bytes]) -> list[str]:
    """Write what came together in one piece a file; an answer for each line, in no order."""
    answers, placed = [], []
    for line in lines:
        kind = Request if line[:1] == b"R" else Feedback
        try:
            placed.append(writer.placed(clean(kind.from_json(line[1:]), region)))
        except (RecordError, ValueError, RecursionError) as error:
            answers.append(f"failed {type(error).__name__}")
    failed = [f"failed {error.strerror or error}".replace("\n", " ") for error in writer.append(placed)]
    return answers + failed + ["written"] * (len(placed) - len(failed))


def main(folder: str, region: str) -> None:
    # Interrupts are the gateway's to handle: it closes stdin when it is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    writer = Writer(Path(folder))
    answers = True
    begun: list[bytes] = []
    # What is there is taken at once; half a line at the end is of a gateway that was killed in the middle of it.
    while data := os.read(0, AT_ONCE):
        whole, end, rest = data.rpartition(b"\n")
        if end:
            lines = b"".join([*begun, whole]).split(b"\n")
            begun = []
            told = write(writer, region, lines)
            if answers:
                try:
                    os.write(1, "".join(f"{one}\n" for one in told).encode(errors="replace"))
                except OSError:
                    answers = False  # nobody is there to count; what was handed over is still written
        begun.append(rest)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1], sys.argv[2])
