"""`unshot data split`: by class, by group or by time, and without near-duplicates across the parts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tune.contamination import ASIDE, Cleaned, separate, with_synthetic
from tune.data.balance import alike_labels, missing_labels
from tune.data.variety import SAMPLE, template_share
from tune.meaning import Meaning, by_meaning
from tune.split import NAMES, SHARES, Split, order, split
from unshot.case import SplitSettings, TaskSettings
from unshot.console import Output, dumps
from unshot.contracts.manifest import NAME, Manifest, describe_data, read_manifest, staged
from unshot.contracts.task import Task, derive_classes
from unshot.data.files import is_split, split_parts, write_text
from unshot.data.load import load_rows
from unshot.data.messages import missing_words, scalar
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, RowOptions, write_jsonl
from unshot.errors import InputError, nearest


def parse_shares(text: str) -> tuple[float, float, float]:
    """`80/10/10` (or `0.8/0.1/0.1`) as three shares that sum to 1; `InputError` for anything else."""
    try:
        values = [float(part) for part in text.replace(",", "/").split("/")]
    except ValueError:
        values = []
    if len(values) != 3 or not all(0 < v < float("inf") for v in values):
        raise InputError(
            f"--shares {text}: give three positive numbers, train/validation/test, e.g. 80/10/10"
        )
    total = sum(values)
    if not (abs(total - 1) < 1e-6 or abs(total - 100) < 1e-4):
        raise InputError(f"--shares {text}: sums to {total:g}; it must be 100 (or 1)")
    return values[0] / total, values[1] / total, values[2] / total


@dataclass(frozen=True)
class Splitting:
    """How rows come apart: by class, by group, by time; or with parts that are files of their own.

    `group_by` keeps the rows of a column's value on one side; `time` makes the oldest rows train and the newest test.
    """

    group_by: str | None = None
    time: str | None = None
    shares: tuple[float, float, float] = SHARES
    validation: Path | None = None
    test: Path | None = None

    @classmethod
    def of(cls, settings: SplitSettings) -> Splitting:
        """From the case's section and the flags over it. Raises `InputError` for bad shares."""
        return cls(
            settings.group_by,
            settings.time,
            parse_shares(settings.shares),
            settings.validation,
            settings.test,
        )

    def resolved(self) -> Splitting:
        """The same with whole paths."""
        validation, test = (path and path.resolve() for path in (self.validation, self.test))
        return replace(self, validation=validation, test=test)

    def check(self) -> None:
        """Raise `InputError` for options that contradict each other."""
        if self.validation and self.test and (self.group_by or self.time):
            raise InputError(
                "--group-by and --time split DATA; with --validation and --test nothing is left to split"
            )

    def record(self) -> dict[str, Any]:
        """What manifests say of it."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Loaded:
    """Rows before the split: those of DATA, and those of the user's own validation and test files."""

    data: Path
    splitting: Splitting
    rows: list[Example]
    own: dict[str, list[Example]]

    @property
    def files(self) -> list[Path]:
        """DATA and the files of its own parts."""
        return [self.data, *(p for p in (self.splitting.validation, self.splitting.test) if p is not None)]

    @property
    def all(self) -> list[Example]:
        """Every row."""
        return [*self.rows, *(row for part in self.own.values() for row in part)]

    def divide(
        self,
        *,
        stratum: Callable[[Example], Hashable],
        seed: int,
        meaning: Callable[[Sequence[str]], Meaning | None] | None = None,
    ) -> tuple[Cleaned, Split]:
        """Train, validation and test without near-duplicates across them, and as they were before these moved.

        Rows of the user's own files stay in their part. Raises `InputError` without the file's name.
        """
        plan, own = self.splitting, self.own
        for name, given in own.items():
            if wrong := next((row for row in given if row.synthetic), None):
                raise InputError(f"{wrong.where}: a synthetic row; none may be in a {name} file")
        made = [row for row in self.rows if row.synthetic]
        real = [row for row in self.rows if not row.synthetic]
        group_by, time = plan.group_by, plan.time

        def unit(row: Example) -> Hashable:
            return None if group_by is None else group_name(row.extra[group_by])

        for column in (group_by, time):
            if column is not None:
                _need(real, column)
        total = sum(s for s, name in zip(plan.shares, NAMES, strict=True) if name not in own)
        shares = [0.0 if name in own else s / total for s, name in zip(plan.shares, NAMES, strict=True)]
        three = (shares[0], shares[1], shares[2])
        if len(own) == 2:
            parts = Split(real, [], [])
        elif time is not None:
            parts = by_time(real, key=_clock(real, time), unit=unit if group_by else None, shares=three)
        elif group_by is not None:
            parts = bygroup_name(real, unit=unit, stratum=stratum, shares=three, seed=seed)
        else:
            parts = split(real, stratum=stratum, shares=three, seed=seed)
        parts = replace(parts, **own)
        cleaned = separate(
            parts,
            stratum=stratum,
            seed=seed,
            unit=unit if group_by else None,
            refill=group_by is None and time is None,
            set_aside=time is not None,
            fixed=own.keys(),
            meaning=meaning,
        )
        return with_synthetic(cleaned, made), parts


def load_parts(data: Path, splitting: Splitting, read: Callable[[Path], list[Example]]) -> Loaded:
    """Read DATA and the files of its own parts. A directory of `unshot data split` brings all three."""
    if is_split(data):
        if splitting.resolved() not in (Splitting(), _split_by(data)):
            raise InputError(
                f"{data}: is split already, by other settings; leave out --group-by, --time, --shares, --validation, "
                "--test, and [split] of the case"
            )
        data, validation, test = split_parts(data)
        splitting = Splitting(validation=validation, test=test)
    splitting.check()
    rows = read(data)
    files = {"validation": splitting.validation, "test": splitting.test}
    return Loaded(
        data, splitting, rows, {name: read(path) for name, path in files.items() if path is not None}
    )


def _split_by(folder: Path) -> Splitting | None:
    """The settings by which `data split` made a directory."""
    settings = read_manifest(folder, verify=False).split if (folder / NAME).is_file() else None
    return Splitting.of(settings) if settings is not None else None


def split_file(
    data: Path,
    final: Path,
    *,
    settings: SplitSettings | None = None,
    task: TaskSettings | None = None,
    seed: int = 0,
    overwrite: bool = False,
    rows_as: RowOptions | None = None,
    prompt: Prompt | None = None,
    embedder: str | None = None,
    out: Output | None = None,
) -> dict[str, Any]:
    """Write train, validation and test rows, and what was moved between them, to the directory `final`.

    The parts are those of `unshot tune` by the same `settings`, `task` and `seed`. Raises `InputError`.
    """
    settings, task, out = settings or SplitSettings(), task or TaskSettings(), out or Output(verbosity=-1)
    splitting = Splitting.of(settings)

    def read(path: Path) -> list[Example]:
        return load_rows(
            path,
            rows_as,
            out,
            prompt=prompt,
            instruction=task.instruction,
            used=(settings.group_by, settings.time),
        )

    loaded = load_parts(data, splitting, read)
    if len(loaded.rows) < 10:
        raise InputError(f"{data}: {len(loaded.rows)} rows; a split needs at least 10")
    try:
        field, labels, _ = derive_classes(task, [row.answer or "" for row in loaded.all], out.log)
        classes = Task(labels=labels, answer_field=field)
        cleaned, parts = loaded.divide(
            stratum=class_of(classes), seed=seed, meaning=lambda texts: by_meaning(texts, embedder, out=out)
        )
    except InputError as error:
        raise InputError(name_file(data, error)) from None
    manifest = Manifest("data-split", seeds={"seed": seed}, inputs=[describe_data(p) for p in loaded.files])
    manifest.config = loaded.splitting.record()
    whole = splitting.resolved()
    manifest.split = settings.changed(validation=whole.validation, test=whole.test)
    result = _result(cleaned, parts) | {
        "template_share": template_share([row.text for row in loaded.all[:SAMPLE]])
    }
    with staged(final, overwrite=overwrite) as work:
        for name in NAMES:
            write_jsonl(work / f"{name}.jsonl", [row.row() for row in getattr(cleaned.parts, name)])
        if cleaned.aside:
            write_jsonl(work / f"{ASIDE}.jsonl", [row.row() for row in cleaned.aside])
        write_text(work / "contamination.json", dumps(cleaned.report()) + "\n")
        manifest.result = {k: v for k, v in result.items() if k != "contamination"}
        manifest.finish(work)
    return {"data": str(data), "out": str(final), **result}


def class_of(task: Task) -> Callable[[Example], str]:
    """What rows are split apart by: their class, where there are classes."""
    return lambda row: task.label(row.answer or "") if task.labels else ""


def name_file(data: Path, error: InputError) -> str:
    """An error's text with the file before it, where it does not name one."""
    text = str(error)
    return text if re.match(r"[^:]*, (line|row) \d+: ", text) else f"{data}: {text}"


def announce_parts(data: Path, cleaned: Cleaned, task: Task, out: Output) -> None:
    """Say what the parts hold, what was moved between them, and labels that may be one."""
    parts = cleaned.parts
    if cleaned.moved:
        out.warn(
            f"{len(cleaned.moved)} validation and test rows were near-duplicates of rows in an earlier part (first: "
            f"line {cleaned.moved[0].line}, like line {cleaned.moved[0].like_line}); "
            + (
                "left out"
                if cleaned.aside
                else f"moved there, {len(cleaned.refilled)} replaced by other rows"
            )
        )
    if cleaned.kept:
        out.warn(
            f"{len(cleaned.kept)} rows of your own validation or test file are near-duplicates of rows in an earlier "
            f"part (first: line {cleaned.kept[0].line}, like line {cleaned.kept[0].like_line}); they stay there, and "
            "scores on them flatter"
        )
    if missing := missing_labels(task.labels or []):
        out.warn(missing)
    if cleaned.synthetic or cleaned.synthetic_left_out:
        out.log(
            f"{cleaned.synthetic} synthetic rows, all in train; {cleaned.synthetic_left_out} left out, being like a "
            "validation or test row"
        )
    alike = alike_labels(task.labels or [])
    if alike:
        named = ", ".join(f"`{a}` and `{b}`" for a, b in alike[:5])
        out.warn(f"{len(alike)} pairs of labels that may be one: {named}")
    out.log(
        f"{data}: {len(parts.train)} train / {len(parts.validation)} validation / {len(parts.test)} test; metric "
        f"{task.metric}" + (f" over {len(task.labels)} labels" if task.labels else "")
    )
    if len(parts.train) < 50:
        out.warn(f"{len(parts.train)} training rows; 50 to 200 good examples are the usual minimum")


def _result(cleaned: Cleaned, before: Split) -> dict[str, Any]:
    return {
        "rows": {name: len(getattr(cleaned.parts, name)) for name in NAMES},
        "before": {name: len(getattr(before, name)) for name in NAMES},
        "aside": len(cleaned.aside),
        "moved": len(cleaned.moved),
        "refilled": len(cleaned.refilled),
        "contamination": cleaned.report(),
    }


def bygroup_name(
    rows: Sequence[Example],
    *,
    unit: Callable[[Example], Hashable],
    stratum: Callable[[Example], Hashable],
    shares: tuple[float, float, float],
    seed: int,
) -> Split:
    """Whole groups, dealt to the part that lacks most of the group's classes (largest groups first)."""
    groups: dict[Hashable, list[Example]] = defaultdict(list)
    for row in rows:
        groups[unit(row)].append(row)
    wanted = [p for p in range(3) if shares[p] > 0]
    if len(groups) < len(wanted):
        raise InputError(f"{len(groups)} groups; {len(wanted)} parts need at least {len(wanted)}")
    totals: dict[Hashable, int] = defaultdict(int)
    for row in rows:
        totals[stratum(row)] += 1
    lacks = [{key: share * n for key, n in totals.items()} for share in shares]
    parts: tuple[list[Example], ...] = ([], [], [])
    ranked = sorted(groups, key=lambda g: (-len(groups[g]), order(seed, str(g))))
    for number, name in enumerate(ranked):
        members = groups[name]
        # The last groups go to parts that are still empty.
        empty = [p for p in wanted if not parts[p]]
        open_parts = empty if len(ranked) - number <= len(empty) else wanted
        chosen = max(
            open_parts,
            key=lambda p: (sum(lacks[p][stratum(r)] for r in members) / shares[p] ** 0.5, -p),
        )
        parts[chosen].extend(members)
        for row in members:
            lacks[chosen][stratum(row)] -= 1
    return Split(*parts)


def by_time(
    rows: Sequence[Example],
    *,
    key: Callable[[Example], float],
    shares: tuple[float, float, float],
    unit: Callable[[Example], Hashable] | None = None,
) -> Split:
    """Oldest to newest; rows of one moment stay together, and a group stands where its newest row does."""
    latest: dict[Hashable, float] = {}
    if unit is not None:
        for row in rows:
            latest[unit(row)] = max(latest.get(unit(row), float("-inf")), key(row))
    when = {id(row): latest[unit(row)] if unit else key(row) for row in rows}
    ranked = sorted(rows, key=lambda row: when[id(row)])
    cuts = [round(shares[0] * len(rows)), round((shares[0] + shares[1]) * len(rows))]
    for n, cut in enumerate(cuts):
        while 0 < cut < len(ranked) and when[id(ranked[cut])] == when[id(ranked[cut - 1])]:
            cut += 1
        cuts[n] = cut
    parts = Split(ranked[: cuts[0]], ranked[cuts[0] : cuts[1]], ranked[cuts[1] :])
    if not all(getattr(parts, name) for name, share in zip(NAMES, shares, strict=True) if share > 0):
        raise InputError(f"too few different times for {sum(share > 0 for share in shares)} parts")
    return parts


def group_name(value: object) -> str:
    """A group's name: 7, 7.0 and "7 " are one."""
    text = scalar(value, "group").strip()
    return text.removesuffix(".0") if isinstance(value, float) else text


def _need(rows: Sequence[Example], column: str) -> None:
    for row in rows:
        if column not in row.extra:
            hint = nearest(column, row.extra) if row.extra else "the row has no other columns"
            raise InputError(f"{row.where}: no `{column}`; {hint}")
        value = row.extra[column]
        if missing_words(value) or (isinstance(value, str) and not value.strip()):
            shown = "null" if value is None else repr(value)
            raise InputError(f"{row.where}: `{column}` is {shown}; fill it in or remove the row")


# Numbers from here on are moments in these units: 1e8 seconds is 1973, 1e11 is the year 5138.
_UNITS = ((1e17, "nanoseconds"), (1e14, "microseconds"), (1e11, "milliseconds"), (1e8, "seconds"))


def _clock(rows: Sequence[Example], column: str) -> Callable[[Example], float]:
    """The moment of each row: numbers of one unit, or ISO 8601 (UTC where no zone is given).

    Raises `InputError` for anything else, NaN, and a mixture of numbers with dates or of units.
    """
    moments: dict[int, float] = {}
    kinds: dict[str, Example] = {}
    for row in rows:
        moments[id(row)], kind = _moment(row, column)
        first = kinds.setdefault(kind, row)
        if len(kinds) > 1 and first is row:
            (known, other), *_ = kinds.items()
            raise InputError(
                f"{row.where}: `{column}` is in {kind}, but {known} in {other.where}; write all rows one way"
            )
    return lambda row: moments[id(row)]


def _moment(row: Example, column: str) -> tuple[float, str]:
    """A row's moment and how it is written."""
    value = row.extra[column]
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        try:
            date = datetime.fromisoformat(str(value))
        except ValueError:
            raise InputError(
                f"{row.where}: `{column}` is {str(value)[:40]!r}; give a number or ISO 8601 (2026-01-31T12:00:00)"
            ) from None
        zone = date.tzinfo is not None
        day = isinstance(value, str) and len(value.strip()) <= len("2026-01-31")
        seconds = (date if zone else date.replace(tzinfo=UTC)).timestamp()
        return seconds, "dates with a time zone" if zone else "days" if day else "dates without a time zone"
    if not math.isfinite(number):
        raise InputError(
            f"{row.where}: `{column}` is {number:g}, which is no moment; fill it in or remove the row"
        )
    return number, next((unit for least, unit in _UNITS if abs(number) >= least), "numbers")
