"""`unshot deploy drift` from log directory to alarm."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploy.drift.looks import Record, Schedule, ends, take
from deploy.drift.sample import Inputs, from_requests, from_texts, training_texts
from deploy.drift.slices import find, verdicts
from unshot.console import Output
from unshot.contracts.manifest import sha256
from unshot.contracts.request_log import Request, read_feedback, read_requests
from unshot.contracts.task import Task
from unshot.engines.embedder import embedder_name, open_embedder
from unshot.errors import InputError

STATE = "drift.json"
# Training rows that the live window is compared with.
MOST = 1000
# Requests that are looked through for worse slices.
SLICED = 5000
DRIFT, NONE, EARLY = "drift", "no drift", "too early"


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
) -> dict[str, Any]:
    """Take the looks that are due and name the worse slices. Raises `InputError`.

    `arm` None: the candidate where it has answered, else the baseline. `reference` None: the log's first requests.
    """
    lines, arm = arm_lines(folder, arm, since=since, until=until)
    embedder = embedder_name(embedder)
    embed = open_embedder(embedder)
    base = None
    source = f"the first {schedule.settle} requests of the log"
    if reference is not None:
        base = from_texts(training_texts(reference, most=MOST), embed)
        source = str(reference)
    settings = {
        "arm": arm,
        "embedder": embedder,
        "reference": _digest(reference),
        "since": since,
        **asdict(schedule),
    }
    record = Record(state or folder / STATE, settings)
    if not restart:
        record.load()
    due = ends(len(lines), schedule, record.done(lines), own_reference=base is None)
    sliced = sliced_rows(len(lines), schedule, own_reference=base is None)
    inputs = from_requests(lines, embed, needed(due, sliced, schedule, own_reference=base is None))
    if base is not None and inputs.texts is None:
        out.warn(
            "the log holds no texts of the inputs (or not of all); only their length is compared, see `unshot deploy "
            "serve --help` on logging texts"
        )
    with out.progress() as progress:
        bar = progress.add_task("looking", total=len(due), note="")
        for end in due:
            number = len(record.looks)
            record.looks.append(take(lines, inputs, base, end, schedule, embed, number=number))
            progress.update(bar, advance=1, note=f"{sum(x.alarm for x in record.looks)} alarms")
    if due:
        record.save()
    return {
        "log": str(folder),
        "arm": arm,
        "version": lines[-1].version,
        "requests": len(lines),
        "reference": source,
        "reference_rows": schedule.settle if base is None else len(base),
        "schedule": asdict(schedule),
        **conclude(record, len(due)),
        **worse(folder, [lines[i] for i in sliced], inputs.take(sliced), task),
        "looks": [asdict(x) for x in record.looks],
    }


def sliced_rows(total: int, schedule: Schedule, *, own_reference: bool) -> np.ndarray:
    """The rows that slices are made of: the last ones, none of the reference's."""
    return np.arange(max(min(schedule.settle, total) if own_reference else 0, total - SLICED), total)


def needed(due: list[int], sliced: np.ndarray, schedule: Schedule, *, own_reference: bool) -> np.ndarray:
    """The rows whose vectors are asked for; the others of a long log are not embedded."""
    windows = [np.arange(end - schedule.window, end) for end in due]
    first = [np.arange(schedule.settle)] if own_reference and due else []
    return np.unique(np.concatenate([sliced, *first, *windows]))


def arm_lines(
    folder: Path, arm: str | None, *, since: float | None, until: float | None
) -> tuple[list[Request], str]:
    """One arm's lines by time, shadowed ones included: they answered live inputs too."""
    everything = list(read_requests(folder, since=since, until=until))
    count = Counter(line.arm for line in everything)
    arm = arm or ("candidate" if count["candidate"] else "baseline")
    lines = sorted((line for line in everything if line.arm == arm), key=lambda line: (line.time, line.id))
    if not lines:
        raise InputError(f"{folder}: no requests of the arm `{arm}`; the log has {dict(count) or 'none'}")
    return lines, arm


def conclude(record: Record, new: int) -> dict[str, Any]:
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


def _when(look: Any) -> dict[str, Any]:
    return {
        "requests": look.end,
        "time": datetime.fromtimestamp(look.time, UTC).isoformat(timespec="seconds"),
        "features": [s["feature"] for s in look.shifts if s["drift"]],
    }


def worse(folder: Path, live: list[Request], inputs: Inputs, task: Task | None) -> dict[str, Any]:
    """The slices of what came in, and by what they are judged."""
    what, bad = verdicts(live, read_feedback(folder), task)
    found = find(live, inputs, bad, task) if live else []
    return {
        "judged_by": what,
        "judged": int(np.isfinite(bad).sum()) if len(bad) else 0,
        "slices": [{**asdict(s), "worse": s.worse} for s in found],
    }


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    file = path / "splits" / "train.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path}: no training rows there; give a run of `unshot tune`, or a data file")
    return sha256(file)
