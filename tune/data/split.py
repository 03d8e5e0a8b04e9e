"""`unshot data split`: by class, by group or by time, and without near-duplicates across the parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tune.contamination import ASIDE, Cleaned, separate
from tune.data.balance import Labels
from tune.data.variety import SAMPLE, template_share
from tune.meaning import by_meaning
from tune.split import NAMES, Split, order, split
from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, describe_file, staged, write_text
from unshot.data.load import load_rows
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


def split_file(
    data: Path,
    final: Path,
    *,
    group_by: str | None = None,
    time: str | None = None,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    field: str | None = None,
    overwrite: bool = False,
    rows_as: RowOptions | None = None,
    prompt: Prompt | None = None,
    embedder: str | None = None,
    out: Output | None = None,
) -> dict[str, Any]:
    """Write train, validation and test rows, and what was moved between them, to the directory `final`.

    By default each class apart. `group_by` keeps the rows of a column's value on one side; `time` makes the
    oldest rows train and the newest test. Raises `InputError`.
    """
    rows = load_rows(data, rows_as, out or Output(verbosity=-1), prompt=prompt, used=(group_by, time))
    for column in (group_by, time):
        if column is not None:
            _need(data, rows, column)
    labels = Labels(field)
    for row in rows:
        labels.add(row.answer or "")
    counts = labels.counts()

    def stratum(row: Example) -> str:
        return labels.label(row.answer or "") if counts else ""

    def unit(row: Example) -> Hashable:
        return None if group_by is None else str(row.extra[group_by])

    if len(rows) < 10:
        raise InputError(f"{data}: {len(rows)} rows; a split needs at least 10")
    try:
        if time is not None:
            parts = by_time(
                rows, key=_clock(data, rows, time), unit=unit if group_by else None, shares=shares
            )
        elif group_by is not None:
            parts = by_group(rows, unit=unit, stratum=stratum, shares=shares, seed=seed)
        else:
            parts = split(rows, stratum=stratum, shares=shares, seed=seed)
        cleaned = separate(
            parts,
            stratum=stratum,
            seed=seed,
            unit=unit if group_by else None,
            refill=group_by is None and time is None,
            set_aside=time is not None,
            meaning=lambda texts: by_meaning(texts, embedder, out=out),
        )
    except InputError as error:
        raise InputError(f"{data}: {error}") from None
    manifest = Manifest("data-split", seeds={"seed": seed}, inputs=[describe_file(data)])
    manifest.config = {"group_by": group_by, "time": time, "shares": list(shares)}
    result = _result(cleaned, parts) | {"template_share": template_share([row.text for row in rows[:SAMPLE]])}
    with staged(final, overwrite=overwrite) as work:
        for name in NAMES:
            write_jsonl(work / f"{name}.jsonl", [row.row() for row in getattr(cleaned.parts, name)])
        if cleaned.aside:
            write_jsonl(work / f"{ASIDE}.jsonl", [row.row() for row in cleaned.aside])
        write_text(work / "contamination.json", dumps(cleaned.report()) + "\n")
        manifest.result = {k: v for k, v in result.items() if k != "contamination"}
        manifest.finish(work)
    return {"data": str(data), "out": str(final), **result}


def _result(cleaned: Cleaned, before: Split) -> dict[str, Any]:
    return {
        "rows": {name: len(getattr(cleaned.parts, name)) for name in NAMES},
        "before": {name: len(getattr(before, name)) for name in NAMES},
        "aside": len(cleaned.aside),
        "moved": len(cleaned.moved),
        "refilled": len(cleaned.refilled),
        "contamination": cleaned.report(),
    }


def by_group(
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
    if len(groups) < 3:
        raise InputError(f"{len(groups)} groups; three parts need at least 3")
    totals: dict[Hashable, int] = defaultdict(int)
    for row in rows:
        totals[stratum(row)] += 1
    lacks = [{key: share * n for key, n in totals.items()} for share in shares]
    parts: tuple[list[Example], ...] = ([], [], [])
    ranked = sorted(groups, key=lambda g: (-len(groups[g]), order(seed, str(g))))
    for number, name in enumerate(ranked):
        members = groups[name]
        # The last groups go to parts that are still empty.
        empty = [p for p in range(3) if not parts[p]]
        open_parts = empty if len(ranked) - number <= len(empty) else range(3)
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
    if not (parts.train and parts.validation and parts.test):
        raise InputError("too few different times for three parts")
    return parts


def _need(data: Path, rows: Sequence[Example], column: str) -> None:
    for row in rows:
        if row.extra.get(column) in (None, ""):
            hint = nearest(column, row.extra) if row.extra else "the row has no other columns"
            raise InputError(f"{data}, line {row.line}: no `{column}`; {hint}")


def _clock(data: Path, rows: Sequence[Example], column: str) -> Callable[[Example], float]:
    """Seconds of each row's time: a number, or ISO 8601."""
    seconds: dict[int, float] = {}
    for row in rows:
        value = row.extra[column]
        try:
            seconds[id(row)] = float(value)
        except (TypeError, ValueError):
            try:
                seconds[id(row)] = datetime.fromisoformat(str(value)).timestamp()
            except ValueError:
                raise InputError(
                    f"{data}, line {row.line}: `{column}` is {str(value)[:40]!r}; give a number or ISO 8601 "
                    "(2026-01-31T12:00:00)"
                ) from None
    return lambda row: seconds[id(row)]
