"""Forecast published measurements and report the errors, with devices, models or whole sources left out of the fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, to_builtins

from planner.latency.fit import fit_rows
from planner.latency.measured import UNITS, Observation, Skipped, predict, read_measured
from planner.latency.step import Efficiency, Overhead, efficiency, overheads, spread_of
from unshot.errors import InputError

HOLD_OUTS = ("none", "gpu", "model")
Z90 = 1.645


class NothingToLeaveOut(InputError):
    """All rows are of one GPU or one model."""


class Judged(Struct, frozen=True):
    """One row and its forecast; 0 if the model does not fit the device. `spread`: the log error it states."""

    row: Observation
    forecast: float
    spread: float

    @property
    def fits(self) -> bool:
        """Whether the model fits the device at all."""
        return self.forecast > 0

    @property
    def error(self) -> float:
        """Forecast / measured - 1."""
        return self.forecast / self.row.measured - 1.0

    @property
    def inside(self) -> bool:
        """Whether the measurement lies in the 90% band of the forecast."""
        return self.fits and abs(float(np.log(self.forecast / self.row.measured))) <= Z90 * self.spread


class JudgedRow(Struct):
    """One row of the report."""

    line: int
    model: str
    gpu: str
    engine: str
    precision: str
    tensor_parallel: int
    input_tokens: int
    output_tokens: int
    concurrency: int | None
    quantity: str
    unit: str
    measured: float
    forecast: float | None
    error: float | None
    inside: bool


class Summary(Struct):
    """Errors of one quantity with one engine; `inside` is the share of rows in the forecast's 90% band."""

    rows: int
    median_abs_error: float
    p90_abs_error: float
    mean_error: float
    inside: float


class Report(Struct):
    """Errors of one file; `does_not_fit` and `skipped` rows are in no summary."""

    file: str
    hold_out: str
    summary: dict[str, Summary]
    worst: list[JudgedRow]
    does_not_fit: list[JudgedRow]
    skipped: list[Skipped]
    rows: list[JudgedRow]

    def plain(self) -> Any:
        """JSON types only."""
        return to_builtins(self)


def judge(rows: Sequence[Observation], hold_out: str = "none") -> list[Judged]:
    """Forecast every row, in the order given. Raises `InputError` if there is nothing to leave out."""
    if hold_out not in HOLD_OUTS:
        raise InputError(f"unknown hold-out '{hold_out}'; accepted: {', '.join(HOLD_OUTS)}")
    if hold_out == "none":
        known = overheads()
        return [_judged(r, efficiency(r.gpu, r.engine), known.get(r.engine.name, Overhead())) for r in rows]
    key = _KEYS[hold_out]
    names = {key(r) for r in rows}
    if len(names) < 2:
        raise NothingToLeaveOut(
            f"all rows are of {hold_out} {names.pop()}; leaving one {hold_out} out needs two or more"
        )
    fits = {name: fit_rows([r for r in rows if key(r) != name]) for name in names}
    found = []
    for row in rows:
        found.append(_judged(row, *fits[key(row)].of(row)))
    return found


def _judged(row: Observation, eff: Efficiency, overhead: Overhead) -> Judged:
    spread = spread_of(eff, row.arch, row.tensor_parallel)
    if row.quantity == "ttft":
        spread = max(spread, overhead.spread_first)
    return Judged(row, predict(row, eff, overhead), spread)


_KEYS: dict[str, Callable[[Observation], str]] = {
    "gpu": lambda row: row.gpu.name,
    "model": lambda row: row.arch.name,
}


def validate(path: Path, hold_out: str = "none") -> Report:
    """The whole report: rows in file order, errors by quantity and engine, the five rows furthest off."""
    skipped: list[Skipped] = []
    judged = judge(read_measured(path, skipped=skipped), hold_out)
    table = [_row(j) for j in judged]
    fitting = [j for j in judged if j.fits]
    return Report(
        file=str(path),
        hold_out=hold_out,
        summary=summarise(fitting),
        worst=sorted((r for r in table if r.error is not None), key=lambda r: -abs(r.error or 0.0))[:5],
        does_not_fit=[r for r in table if r.error is None],
        skipped=skipped,
        rows=table,
    )


def summarise(judged: Sequence[Judged]) -> dict[str, Summary]:
    """Errors by `quantity`, or `engine quantity` if several engines were measured."""
    several = len({j.row.engine.name for j in judged}) > 1

    def label(j: Judged) -> str:
        return f"{j.row.engine.name} {j.row.quantity}" if several else j.row.quantity

    found = {}
    for name in dict.fromkeys(map(label, judged)):
        members = [j for j in judged if label(j) == name]
        errors = np.array([j.error for j in members])
        found[name] = Summary(
            rows=len(errors),
            median_abs_error=float(np.median(np.abs(errors))),
            p90_abs_error=float(np.quantile(np.abs(errors), 0.9)),
            mean_error=float(errors.mean()),
            inside=float(np.mean([j.inside for j in members])),
        )
    return found


def _row(j: Judged) -> JudgedRow:
    row = j.row
    return JudgedRow(
        line=row.line,
        model=row.arch.name,
        gpu=row.gpu.name,
        engine=row.engine.name,
        precision=row.precision.name,
        tensor_parallel=row.tensor_parallel,
        input_tokens=int(row.input_tokens),
        output_tokens=int(row.output_tokens),
        concurrency=row.concurrency,
        quantity=row.quantity,
        unit=UNITS.get(row.quantity, "tokens/s"),
        measured=row.measured,
        forecast=j.forecast if j.fits else None,
        error=j.error if j.fits else None,
        inside=j.inside,
    )
