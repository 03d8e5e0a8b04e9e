"""When to look, how much error rate a look may spend, and the record of looks taken.

Looks fall on fixed request counts, so that calling the command more often spends nothing more. Each of `looks` planned
looks has the share alpha / looks (Bonferroni, whatever the dependence of overlapping windows), and within a look the
features are corrected by Holm. After the planned looks the budget starts again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from deploy.drift.features import Shift, input_shifts, output_shifts
from deploy.drift.sample import Inputs
from deploy.drift.season import Season, alike, first
from unshot.console import dumps
from unshot.contracts.request_log import Request
from unshot.data.files import write_text
from unshot.engines.embedder import Vectors
from unshot.errors import InputError
from unshot.metrics.intervals import holm


@dataclass(frozen=True)
class Schedule:
    """Requests in a live window, requests between looks, and the first ones that the outputs are compared with."""

    window: int
    every: int
    settle: int
    alpha: float
    looks: int
    # Compare like hours with like: the reference is the first whole day or week.
    season: Season = "none"

    def plain(self) -> dict[str, int | float | str]:
        """As it stands in the record of looks; a schedule without a season as it always stood there."""
        return {k: v for k, v in asdict(self).items() if k != "season" or v != "none"}

    @property
    def spent(self) -> float:
        """Error rate of one look."""
        return self.alpha / self.looks


class ShiftFacts(TypedDict):
    """One feature's test at a look; `p_holm` is corrected for the number of features."""

    feature: str
    p: float
    detail: str
    p_holm: float
    drift: bool


@dataclass(frozen=True)
class Look:
    """One look: after how many requests, at whose arrival, its corrected p-values by feature, and the alarm."""

    end: int
    last_id: str
    time: float
    shifts: list[ShiftFacts]
    alarm: bool


def take(
    lines: Sequence[Request],
    inputs: Inputs,
    reference: Inputs | None,
    end: int,
    schedule: Schedule,
    embed: Vectors,
    *,
    number: int = 0,
) -> Look:
    """Look at the window that ends with request `end` (counted from 1) of the log.

    `reference` None: the first requests are the reference of the inputs too. Outputs are compared with the first
    answers of the version that answers now. What the first are says `season.first`.
    """
    start = end - schedule.window
    live = list(range(start, end))
    shifts: list[Shift] = []
    if reference is not None and start >= 0:
        shifts += input_shifts(reference, inputs.take(np.array(live)), embed, seed=number)
    elif reference is None:
        begun = first(lines, range(end), schedule.settle, schedule.season)
        before, after = alike(lines, begun.rows, live, schedule.season) if start >= begun.span else ([], [])
        if before:
            shifts += input_shifts(
                inputs.take(np.array(before)), inputs.take(np.array(after)), embed, seed=number
            )
    version = lines[end - 1].version
    own = [i for i in range(end) if lines[i].version == version]
    begun = first(lines, own, schedule.settle, schedule.season)
    if len(own) >= begun.span + schedule.window:
        before, after = alike(lines, begun.rows, own[-schedule.window :], schedule.season)
        if before:
            shifts += output_shifts([lines[i] for i in before], [lines[i] for i in after])
    corrected = holm([s.p for s in shifts])
    rows: list[ShiftFacts] = [
        {"feature": s.feature, "p": s.p, "detail": s.detail, "p_holm": p, "drift": p <= schedule.spent}
        for s, p in zip(shifts, corrected, strict=True)
    ]
    last_line = lines[end - 1]
    return Look(end, last_line.id, last_line.time, rows, any(r["drift"] for r in rows))


def ends(
    total: int, schedule: Schedule, done: int, *, own_reference: bool, span: int | None = None
) -> list[int]:
    """The looks that are due: request counts after `done`, up to `total`.

    `span` is the number of first requests that are the reference, None: `settle`.
    """
    least = schedule.window + ((schedule.settle if span is None else span) if own_reference else 0)
    points = range(schedule.every, total + 1, schedule.every)
    return [n for n in points if n >= least and n > done]


class LookRecord:
    """The looks taken so far, kept in a file beside the log so that none is taken twice."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path, self.settings = path, settings
        self.looks: list[Look] = []

    def load(self) -> None:
        """Read the file where there is one. Raises `InputError` where it belongs to other settings."""
        if not self.path.is_file():
            return
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            looks = [Look(**look) for look in raw["looks"]]
            settings = raw["settings"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{self.path}: not a record of looks; delete it, or pass --restart") from None
        if settings != self.settings:
            changed = [k for k in self.settings if settings.get(k) != self.settings[k]]
            raise InputError(
                f"{self.path}: those looks were taken with another {', '.join(changed)}; give the same, or --restart "
                "to begin a new error budget"
            )
        self.looks = looks

    def save(self) -> None:
        """Write all looks."""
        write_text(self.path, dumps({"settings": self.settings, "looks": self.looks}) + "\n")

    def done(self, lines: Sequence[Request]) -> int:
        """How many of these requests the last look had seen; older files of the log may be gone by now."""
        if not self.looks:
            return 0
        last = self.looks[-1]
        for index in range(len(lines) - 1, -1, -1):
            if lines[index].id == last.last_id and lines[index].time == last.time:
                return index + 1
        return sum(line.time <= last.time for line in lines)

    def since(self) -> Look | None:
        """The first of the alarms that have not ceased, None where the last look raised none."""
        found = None
        for look in reversed(self.looks):
            if not look.alarm:
                break
            found = look
        return found
