"""`unshot deploy drift` from log directory to alarm."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import numpy as np

from deploy.drift.looks import Look, LookRecord, Schedule, ends, take
from deploy.drift.sample import Inputs, from_requests, from_texts, training_texts
from deploy.drift.season import First, first
from deploy.drift.slices import find, verdicts
from unshot.console import Output
from unshot.contracts.manifest import sha256
from unshot.contracts.request_log import Request, Unreadable, read_feedback, read_requests
from unshot.contracts.task import Task
from unshot.engines.embedder import Vectors, embedder_name, open_embedder
from unshot.errors import InputError

STATE = "drift.json"
# Training rows that the live window is compared with.
MOST = 1000
# Requests that are looked through for worse slices.
SLICED = 5000
DRIFT, NONE, EARLY = "drift", "no drift", "too early"


class Moment(TypedDict):
    """When drift was seen: after how many requests, at what time, in which features."""

    requests: int
    time: str
    features: list[str]


class Answer(TypedDict):
    """Whether there is drift, how many looks are new, when it was found and since when it lasts."""

    verdict: str
    new_looks: int
    found: Moment | None
    since: Moment | None


class SliceFacts(TypedDict):
    """A part of the traffic: how often answers are bad inside and elsewhere, and the corrected p-value."""

    name: str
    rows: int
    bad: int
    share: float
    elsewhere: float
    p: float
    q: float
    worse: bool


class Worse(TypedDict):
    """Slices, worst first, and by what they are judged (`wrong` or `failed`)."""

    judged_by: str
    judged: int
    slices: list[SliceFacts]


class Report(Answer, Worse):
    """`drift.json`."""

    log: str
    arm: str
    version: str
    requests: int
    reference: str
    reference_rows: int
    first_look: int
    schedule: Schedule
    looks: list[Look]


def drift_run(
    folder: Path,
    out: Output,
    *,
    schedule: Schedule,
    reference: Path | None = None,
    arm: str | None = None,
    embedder: str = "hashed",
    state: Path | None = None,
    restart: bool = False,
    since: float | None = None,
    until: float | None = None,
    task: Task | None = None,
) -> Report:
    """Take the looks that are due and name the worse slices. Raises `InputError`.

    `arm` None: the candidate where it has answered, else the baseline. `reference` None: the log's first requests.
    """
    if schedule.season != "none" and reference is not None:
        raise InputError(
            "--season compares the log with itself: the rows of --reference have no hour; leave one out"
        )
    unreadable = Unreadable()
    lines, arm = arm_lines(folder, arm, unreadable, since=since, until=until)
    embedder = embedder_name(embedder)
    embed = open_embedder(embedder)
    base = from_texts(training_texts(reference, most=MOST), embed) if reference is not None else None
    settings = {
        "arm": arm,
        "embedder": embedder,
        "reference": _digest(reference),
        "since": since,
        **schedule.plain(),
    }
    record = LookRecord(state or folder / STATE, settings)
    if not restart:
        record.load()
    begun = (
        first(lines, range(len(lines)), schedule.settle, schedule.season) if base is None else First([], 0)
    )
    due = ends(len(lines), schedule, record.done(lines), own_reference=base is None, span=begun.span)
    sliced = sliced_rows(len(lines), begun)
    inputs = from_requests(lines, embed, needed(due, sliced, schedule, begun))
    if base is not None and inputs.texts is None:
        out.warn(
            "the log holds no texts of the inputs (or not of all); only their length is compared, see `unshot deploy "
            "serve --help` on logging texts"
        )
    take_due(record, due, lines, inputs, base, schedule, embed, out)
    found = worse(folder, [lines[i] for i in sliced], inputs.take(sliced), task, unreadable)
    if skipped := unreadable.sentence():
        out.warn(skipped)
    return {
        "log": str(folder),
        "arm": arm,
        "version": lines[-1].version,
        "requests": len(lines),
        "reference": source(schedule, reference),
        "first_look": first_look(schedule, begun.span),
        "reference_rows": len(begun.rows) if base is None else len(base),
        "schedule": schedule,
        **conclude(record, len(due)),
        **found,
        "looks": record.looks,
    }


def take_due(
    record: LookRecord,
    due: list[int],
    lines: list[Request],
    inputs: Inputs,
    base: Inputs | None,
    schedule: Schedule,
    embed: Vectors,
    out: Output,
) -> None:
    """Take the looks that are due, and keep them."""
    with out.progress() as progress:
        bar = progress.add_task("looking", total=len(due), note="")
        for end in due:
            record.looks.append(take(lines, inputs, base, end, schedule, embed, number=len(record.looks)))
            progress.update(bar, advance=1, note=f"{sum(x.alarm for x in record.looks)} alarms")
    if due:
        record.save()


def source(schedule: Schedule, reference: Path | None) -> str:
    """What the live window is compared with, in words."""
    if reference is not None:
        return str(reference)
    if schedule.season != "none":
        return f"the first whole {schedule.season} of the log, hour by hour"
    return f"the first {schedule.settle} requests of the log"


def first_look(schedule: Schedule, span: int) -> int:
    """Requests after which the first look is due."""
    return -(-(schedule.window + span) // schedule.every) * schedule.every


def sliced_rows(total: int, begun: First) -> np.ndarray:
    """The rows that slices are made of: the last ones, none of the reference's."""
    return np.arange(max(min(begun.span, total), total - SLICED), total)


def needed(due: list[int], sliced: np.ndarray, schedule: Schedule, begun: First) -> np.ndarray:
    """The rows whose vectors are asked for; the others of a long log are not embedded."""
    windows = [np.arange(end - schedule.window, end) for end in due]
    reference = [np.array(begun.rows, dtype=int)] if due else []
    return np.unique(np.concatenate([sliced, *reference, *windows]))


def arm_lines(
    folder: Path, arm: str | None, unreadable: Unreadable, *, since: float | None, until: float | None
) -> tuple[list[Request], str]:
    """One arm's lines by time, shadowed ones included: they answered live inputs too."""
    everything = list(read_requests(folder, unreadable, since=since, until=until))
    count = Counter(line.arm for line in everything)
    arm = arm or ("candidate" if count["candidate"] else "baseline")
    lines = sorted((line for line in everything if line.arm == arm), key=lambda line: (line.time, line.id))
    if not lines:
        raise InputError(f"{folder}: no requests of the arm `{arm}`; the log has {dict(count) or 'none'}")
    return lines, arm


def conclude(record: LookRecord, new: int) -> Answer:
    """The answer: whether one of the new looks (or the last one, where none was due) raised an alarm."""
    if not record.looks:
        return {"verdict": EARLY, "new_looks": 0, "found": None, "since": None}
    fresh = record.looks[-new:] if new else record.looks[-1:]
    alarms = [look for look in fresh if look.alarm]
    since = record.since()
    return {
        "verdict": DRIFT if alarms else NONE,
        "new_looks": new,
        "found": _when(alarms[0]) if alarms else None,
        "since": _when(since) if since else None,
    }


def _when(look: Look) -> Moment:
    return {
        "requests": look.end,
        "time": datetime.fromtimestamp(look.time, UTC).isoformat(timespec="seconds"),
        "features": [s["feature"] for s in look.shifts if s["drift"]],
    }


def worse(
    folder: Path, live: list[Request], inputs: Inputs, task: Task | None, unreadable: Unreadable
) -> Worse:
    """The slices of what came in, and by what they are judged."""
    what, bad = verdicts(live, read_feedback(folder, unreadable), task)
    found = find(live, inputs, bad, task) if live else []
    return {
        "judged_by": what,
        "judged": int(np.isfinite(bad).sum()) if len(bad) else 0,
        "slices": [
            {
                "name": s.name,
                "rows": s.rows,
                "bad": s.bad,
                "share": s.share,
                "elsewhere": s.elsewhere,
                "p": s.p,
                "q": s.q,
                "worse": s.worse,
            }
            for s in found
        ],
    }


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    file = path / "splits" / "train.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: no training rows there; give a run of `unshot tune`, or a data file")
    return sha256(file)
