"""Fit the four efficiencies of each device family, from published rows or from one bench report.

Each family's four numbers are fitted in logarithms by damped least squares (Levenberg 1944, Marquardt 1963) on log
errors with a pseudo-Huber loss, held near the fit of all families together: a family with few rows leans on the
others. A family with no rows takes the mean of those that have some. No number belongs to a row, a model or a single
device.

`python -m planner.fit PUBLISHED.csv ... --out efficiency.toml` rewrites the catalog's table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.published import Observation, predict
from planner.replica import CHUNK
from planner.roofline import Efficiency, cost_of, efficiency, pool
from unshot import catalog
from unshot.errors import InputError

ROBUST = 0.1  # log error beyond which a row's pull grows only linearly
# Where a fit starts and what it leans on: middle of the ranges seen in the literature, with wide tolerance.
START = {
    "batched": (np.log([0.55, 0.80, 0.70, 6e-5]), np.array([0.2, 1.0, 0.3, 0.3])),
    "llamacpp": (np.log([0.45, 0.85, 8.0, 1e-4]), np.array([0.1, 0.5, 0.1, 0.5])),
}
# How strongly a family is held to the common fit (1 = one row of one natural log unit).
HOLD = {
    "batched": np.array([0.3, 0.5, 0.5, 0.5]),
    "llamacpp": np.array([0.3, 1.0, 0.3, 1.0]),
}
PREFILL_WEIGHT = 0.7  # prefill rows of the single-stream kind scatter more: MMQ against cuBLAS paths


class Fit(Struct, frozen=True):
    """The result: efficiencies by family, and by pooled class for families without rows."""

    families: Mapping[str, Efficiency]
    pooled: Mapping[str, Efficiency]

    def of(self, row: Observation) -> Efficiency:
        """The numbers that apply to a row."""
        family = self.families.get(row.gpu.family)
        return family or self.pooled[pool(row.gpu, row.engine)]


def least_squares(
    residual: Callable[[np.ndarray], np.ndarray], start: np.ndarray, *, weight: np.ndarray, toward: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise pseudo-Huber(residual(x)) + |weight (x - toward)|^2; return x and its covariance.

    `residual` maps (k,) to (n,); `weight`, `toward` are (k,). The covariance, (k, k), is the inverse curvature
    scaled by the residual variance.
    """

    def loss(r: np.ndarray, x: np.ndarray) -> float:
        data = ROBUST**2 * np.sum(np.sqrt(1 + (r / ROBUST) ** 2) - 1)
        return float(data + 0.5 * np.sum((weight * (x - toward)) ** 2))

    x = np.array(start, dtype=float)
    r = residual(x)
    now, damping = loss(r, x), 1e-2
    curvature = np.eye(len(x))
    for _ in range(60):
        jacobian = np.empty((len(r), len(x)))
        for j in range(len(x)):
            moved = x.copy()
            moved[j] += 1e-4
            jacobian[:, j] = (residual(moved) - r) / 1e-4
        pull = 1.0 / np.sqrt(1 + (r / ROBUST) ** 2)
        curvature = jacobian.T @ (jacobian * pull[:, None]) + np.diag(weight**2)
        slope = jacobian.T @ (pull * r) + weight**2 * (x - toward)
        for _ in range(8):
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -slope)
            tried = residual(x + step)
            new = loss(tried, x + step)
            if new < now:
                break
            damping *= 4.0
        else:
            break
        gained = now - new
        x, r, now, damping = x + step, tried, new, max(damping / 5.0, 1e-9)
        if gained < 1e-9:
            break
    variance = float(np.sum(r**2)) / max(1, len(r) - len(x))
    return x, np.linalg.inv(curvature) * max(variance, 1e-4)


def fit_rows(rows: Sequence[Observation], *, how: str = "") -> Fit:
    """Fit every family that has rows. All rows must be of one engine. Raises `InputError` for none."""
    if not rows:
        raise InputError("no rows to fit; give a CSV of published measurements")
    engine = rows[0].engine
    start, loose = START[engine]
    families: dict[str, Efficiency] = {}
    pooled: dict[str, Efficiency] = {}
    for group in sorted({pool(r.gpu, engine) for r in rows}):
        members = [r for r in rows if pool(r.gpu, engine) == group]
        common, covariance = _solve(members, start, loose, start)
        fitted = []
        for family in sorted({r.gpu.family for r in members}):
            own = [r for r in members if r.gpu.family == family]
            watts = _watts(own)
            logs, spread = _solve(own, common, HOLD[engine], common, watts)
            fitted.append(logs)
            families[family] = _record(own, logs, spread, how, watts)
        middle = np.mean(fitted, axis=0)
        # A family of its own differs from the mean as the known ones do.
        between = np.var(fitted, axis=0) if len(fitted) > 1 else np.full(4, 0.15**2)
        pooled[group] = replace(_record(members, middle, covariance + np.diag(between), how), rows=0)
    pooled.setdefault("pooled", efficiency(catalog.gpu("h100-sxm"), engine))
    for name in ("apple", "cpu"):
        pooled.setdefault(name, efficiency(catalog.gpu("m1" if name == "apple" else "cpu"), "llamacpp"))
    return Fit(families, pooled)


def _watts(rows: Sequence[Observation]) -> float:
    """Board power over fp16 peak of the best-fed device among the rows, W per 1e12 operations/s."""
    return max((r.gpu.tdp or 0.0) / r.gpu.peak("fp16") * 1e12 for r in rows)


def _solve(
    rows: Sequence[Observation], start: np.ndarray, weight: np.ndarray, toward: np.ndarray, watts: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    blank = Efficiency(1.0, 1.0, 1.0, 1.0, watts=watts)
    scale = np.array([PREFILL_WEIGHT if r.quantity == "prefill" else 1.0 for r in rows])
    measured = np.log([r.measured for r in rows])

    def residual(x: np.ndarray) -> np.ndarray:
        eff = blank.with_vector(np.clip(x, -14.0, 6.0))
        guess = np.array([predict(r, eff) for r in rows])
        return scale * (np.log(np.maximum(guess, 1e-9)) - measured)

    # A row whose model does not fit the device says nothing about speed.
    return least_squares(residual, start, weight=weight, toward=toward)


def _record(
    rows: Sequence[Observation], logs: np.ndarray, covariance: np.ndarray, how: str, watts: float = 0.0
) -> Efficiency:
    eff = Efficiency(1.0, 1.0, 1.0, 1.0, watts=watts).with_vector(logs)
    errors = tuple(float(e) for e in np.sqrt(np.maximum(np.diag(covariance), 0.0)))
    left = np.log([max(predict(r, eff), 1e-9) / r.measured for r in rows])
    spread = float(np.sqrt(np.mean(left**2)))
    return replace(eff, errors=errors, spread=spread, rows=len(rows), how=how)  # type: ignore[arg-type]


def calibrate(report: Path | Mapping[str, Any], *, gpu: str | None = None) -> Efficiency:
    """Efficiencies of the machine a bench report was taken on, with error bars.

    `report` is a `report.json` (path or its content). Read are `sides`: a list of objects with `model` (catalog name
    or an object in `config.json` form), `precision`, `prompt_tokens` (one number, or one per request), optionally
    `cached_tokens`, `ttft_s` and `tpot_s` (lists, seconds; one stream); and `gpu` (catalog name), which the argument
    overrides. Prefill and decode times of each side are fitted together, leaning on the catalog's numbers for that
    family: what the report does not determine stays near them with their error bars. Raises `InputError`.
    """
    where = str(report) if isinstance(report, Path) else "report"
    if isinstance(report, Path):
        try:
            raw = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{report}: cannot read it ({error}); give the report.json of `unshot bench`"
            ) from None
    else:
        raw = report
    sides = raw.get("sides") if isinstance(raw, Mapping) else None
    if isinstance(sides, Mapping):
        sides = list(sides.values())
    if not isinstance(sides, list) or not sides:
        raise InputError(f"{where}: no `sides`; give the report.json of `unshot bench`")
    name = gpu or raw.get("gpu") or "cpu"
    device = catalog.gpu(str(name))
    prior = efficiency(device, "llamacpp")
    points = [point for i, side in enumerate(sides) for point in _side(side, f"{where}: sides[{i}]")]
    # A medians' noise of about 5% against the prior's own error bars.
    wide = 0.05 / np.maximum(np.asarray(prior.errors), 0.05)

    def residual(x: np.ndarray) -> np.ndarray:
        eff = prior.with_vector(np.clip(x, -16.0, 8.0))
        errors = []
        for arch, form, new, cached, output, ttft, tpot in points:
            cost = cost_of(arch, device, form, engine="llamacpp", eff=eff)
            pairs = (new + cached) * (new + cached + 1) / 2 - cached * (cached + 1) / 2
            chunks = max(1, math.ceil(new / CHUNK["llamacpp"]))
            guess = chunks * float(
                cost.step(
                    new / chunks, pairs / chunks, 0.0, 0.0, prompts=1 / chunks, chunks=new / 512 / chunks
                )
            )
            errors.append(math.log(guess / ttft))
            if tpot:
                step = float(cost.step(0.0, 0.0, 1.0, arch.cached_tokens(new + cached + output / 2)))
                errors.append(math.log(step / tpot))
        return np.asarray(errors)

    logs, covariance = least_squares(residual, prior.vector(), weight=wide, toward=prior.vector())
    left = residual(logs)
    # Not surer than the scatter allows, and no surer than 2% of a machine's day-to-day noise.
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.02**2))
    # What the report says nothing about is as sure as it was before, however wide its times scatter.
    errors = np.minimum(errors, np.maximum(np.asarray(prior.errors), math.sqrt(float(np.mean(left**2)))))
    return replace(
        prior.with_vector(logs),
        errors=tuple(float(e) for e in errors),  # type: ignore[arg-type]
        spread=float(max(0.05, math.sqrt(float(np.mean(left**2))))),
        rows=len(left),
        how=f"calibrated on {device.name} from {where}",
    )


def _side(side: Any, where: str) -> list[tuple[Any, ...]]:
    if not isinstance(side, Mapping):
        raise InputError(f"{where}: not an object; see `calibrate` for what is read")
    for key in ("model", "precision", "prompt_tokens", "ttft_s"):
        if key not in side:
            raise InputError(f"{where}: no `{key}`; give the report.json of `unshot bench`")
    model = side["model"]
    arch = (
        catalog.architecture_from_config(model, name=where)
        if isinstance(model, Mapping)
        else catalog.model(model)
    )
    form = catalog.precision(str(side["precision"]))

    def median(key: str, default: float | None = None) -> float:
        value = side.get(key, default)
        try:
            array = np.atleast_1d(np.asarray(value, dtype=float))
        except (TypeError, ValueError):
            array = np.array([])
        array = array[np.isfinite(array)]
        if not len(array):
            if default is not None:
                return default
            raise InputError(f"{where}: `{key}` holds no numbers")
        return float(np.median(array))

    prompt, ttft = median("prompt_tokens"), median("ttft_s")
    cached, output, tpot = median("cached_tokens", 0.0), median("output_tokens", 0.0), median("tpot_s", 0.0)
    if prompt <= cached or ttft <= 0:
        raise InputError(
            f"{where}: prompt tokens must exceed the cached ones and `ttft_s` must be above zero"
        )
    return [(arch, form, prompt - cached, cached, output, ttft, tpot if tpot > 0 else 0.0)]


def write_catalog(paths: Sequence[Path], out: Path) -> None:
    """Fit every family from the CSV files and write the catalog's `efficiency.toml`.

    `spread` of a family is the root mean square log error of its rows when their model is left out (throughput) or
    their device is (single stream); of a pooled class, that of all rows when their device is left out.
    """
    from planner.published import read_published

    lines = [
        "# Efficiencies by engine and device family, written by `python -m planner.fit`; no number belongs to a row.",
        "# compute: share of dense peak; bandwidth: share of memory bandwidth when weights are read;",
        "# third: batched, share of bandwidth when decode attention reads the cache; llamacpp, bytes (CUDA) or",
        "# quantised weights (Metal, CPU) per core and clock; step: seconds of overhead per layer and iteration.",
        "# errors: relative standard errors of the four; spread: relative standard deviation of one forecast;",
        "# watts: board power over fp16 peak of the fitted device (data sheet), W per 1e12 operations/s.",
        f"# Fitted on: {', '.join(p.name for p in paths)}.",
    ]
    for path in paths:
        rows = read_published(path)
        engine = rows[0].engine
        how = f"least squares on {path.name}"
        fit = fit_rows(rows, how=how)
        by_gpu = _left_out(rows, "gpu")
        try:
            by_model = _left_out(rows, "model")
        except InputError:
            by_model = by_gpu
        for name, eff in fit.families.items():
            if name in {"apple", "cpu"}:
                continue
            spread = _rms(
                [e for r, e in (by_model if engine == "batched" else by_gpu) if r.gpu.family == name]
            )
            lines += _table(engine, name, replace(eff, spread=spread))
        for name in sorted({pool(r.gpu, engine) for r in rows}):
            spread = _rms([e for r, e in by_gpu if pool(r.gpu, engine) == name])
            used = sum(pool(r.gpu, engine) == name for r in rows)
            # Apple is one family: what stands for unknown devices there is the family's own fit.
            eff = fit.families[name] if name in fit.families else fit.pooled[name]
            lines += _table(engine, name, replace(eff, spread=spread, rows=used))
    lines += _table("llamacpp", "cpu", efficiency(catalog.gpu("cpu"), "llamacpp"))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _left_out(rows: Sequence[Observation], what: str) -> list[tuple[Observation, float]]:
    from planner.validate import judge

    return [(j.row, math.log(max(j.forecast, 1e-9) / j.row.measured)) for j in judge(rows, what)]


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _table(engine: str, name: str, eff: Efficiency) -> list[str]:
    errors = ", ".join(f"{e:.3f}" for e in eff.errors)
    return [
        "",
        f"[{engine}.{name}]",
        f"compute = {eff.compute:.4g}",
        f"bandwidth = {eff.bandwidth:.4g}",
        f"third = {eff.third:.4g}",
        f"step = {eff.step:.4g}",
        f"errors = [{errors}]",
        f"spread = {eff.spread:.3f}",
        f"rows = {eff.rows}",
        *([f"watts = {eff.watts:.4g}"] if eff.watts and engine == "batched" else []),
        f'how = "{eff.how}"',
    ]


def main() -> None:
    """Command line of the refit."""
    import click

    from unshot.errors import UnshotError

    @click.command()
    @click.argument("published", nargs=-1, required=True, type=click.Path(path_type=Path))
    @click.option("--out", required=True, type=click.Path(path_type=Path), help="efficiency.toml to write.")
    def run(published: tuple[Path, ...], out: Path) -> None:
        """Fit the efficiencies of every device family from PUBLISHED files."""
        try:
            write_catalog(published, out)
        except UnshotError as error:
            raise click.ClickException(str(error)) from None

    run()


if __name__ == "__main__":
    main()
