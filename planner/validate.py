"""Forecast against published measurements, row by row: `unshot plan validate PUBLISHED.csv`.

Without a hold-out the catalog's efficiencies answer for every row: that is what a new file is judged with. With
`gpu` or `model` each device or model is left out in turn, the efficiencies are fitted on the file's other rows alone,
and the rows left out are forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from planner.fit import fit_rows
from planner.published import Observation, predict, read_published
from planner.roofline import efficiency
from unshot.errors import InputError

HOLD_OUTS = ("none", "gpu", "model")


class NothingToLeaveOut(InputError):
    """All rows are of one GPU or one model."""


class Judged(Struct, frozen=True):
    """One row and its forecast; `error` is forecast / measured - 1."""

    row: Observation
    forecast: float

    @property
    def error(self) -> float:
        """Relative error, signed."""
        return self.forecast / self.row.measured - 1.0


def judge(rows: Sequence[Observation], hold_out: str = "none") -> list[Judged]:
    """Forecast every row, in the order given. Raises `InputError` where there is nothing to leave out."""
    if hold_out not in HOLD_OUTS:
        raise InputError(f"unknown hold-out '{hold_out}'; accepted: {', '.join(HOLD_OUTS)}")
    if hold_out == "none":
        return [Judged(r, predict(r, efficiency(r.gpu, r.engine))) for r in rows]

    def key(row: Observation) -> str:
        return row.gpu.name if hold_out == "gpu" else row.arch.name

    names = {key(r) for r in rows}
    if len(names) < 2:
        raise NothingToLeaveOut(
            f"all rows are of {hold_out} {names.pop()}; leaving one {hold_out} out needs two or more"
        )
    fits = {name: fit_rows([r for r in rows if key(r) != name]) for name in names}
    return [Judged(r, predict(r, fits[key(r)].of(r))) for r in rows]


def validate(path: Path, hold_out: str = "none") -> dict[str, Any]:
    """The whole report as plain data.

    `rows` (in file order: line, model, gpu, precision, tensor_parallel, input_tokens, output_tokens, quantity,
    measured, forecast, error), `summary` by quantity (rows, median and 90th percentile of |error|, mean error),
    `worst`, the five rows furthest off, and `skipped`, a line for each row whose model, GPU or precision the catalog
    lacks.
    """
    skipped: list[str] = []
    judged = judge(read_published(path, skipped=skipped), hold_out)
    table: list[dict[str, Any]] = [
        {
            "line": j.row.line,
            "model": j.row.arch.name,
            "gpu": j.row.gpu.name,
            "precision": j.row.precision.name,
            "tensor_parallel": j.row.tensor_parallel,
            "input_tokens": int(j.row.input_tokens),
            "output_tokens": int(j.row.output_tokens),
            "quantity": j.row.quantity,
            "measured": j.row.measured,
            "forecast": j.forecast,
            "error": j.error,
        }
        for j in judged
    ]
    summary = {}
    for quantity in dict.fromkeys(j.row.quantity for j in judged):
        errors = np.array([j.error for j in judged if j.row.quantity == quantity])
        summary[quantity] = {
            "rows": len(errors),
            "median_abs_error": float(np.median(np.abs(errors))),
            "p90_abs_error": float(np.quantile(np.abs(errors), 0.9)),
            "mean_error": float(errors.mean()),
        }
    worst = sorted(table, key=lambda row: -abs(row["error"]))[:5]
    return {
        "file": str(path),
        "hold_out": hold_out,
        "unit": "tokens/s",
        "summary": summary,
        "worst": worst,
        "skipped": skipped,
        "rows": table,
    }
