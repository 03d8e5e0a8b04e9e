"""Fit the efficiencies of device families and the overheads of engines from measured rows.

Each family's four numbers are fitted in logarithms by damped least squares (Levenberg 1944, Marquardt 1963) on log
errors with a pseudo-Huber loss, held near the fit of all families together: a family with few rows leans on the
others. A family with no rows takes the mean of those that have some. What an engine adds (`Overhead`) is fitted on its
own rows over these, held near a common start. No number belongs to a row, a model or a single device.

`python -m planner.latency.fit MEASURED.csv ... --out efficiency.toml` rewrites the catalog's table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.latency.least_squares import least_squares, loss
from planner.latency.measured import Observation, Runs, predict
from planner.latency.step import (
    UNKNOWN_FAMILY,
    Efficiency,
    Overhead,
    efficiency,
    pool,
)
from unshot import catalog
from unshot.errors import InputError

# Where a fit starts and what it leans on, with wide tolerance but for the share of the bandwidth: reading weights is
# streaming, at nine tenths of the data sheet whatever the engine, and saturated batches hardly tell it. llama.cpp's
# share of the peak starts where TensorRT-LLM's families lie (0.51 to 0.76): both multiply with cuBLAS-like kernels.
START = {
    "batched": (np.log([0.55, 0.90, 0.70, 6e-5]), np.array([0.2, 3.0, 0.3, 0.3])),
    "llamacpp": (np.log([0.62, 0.90, 8.0, 1e-4]), np.array([0.1, 3.0, 0.1, 0.5])),
}
# How strongly a family is held to the common fit (1 = one row of one natural log unit).
HOLD = {
    "batched": np.array([0.3, 0.5, 0.5, 0.5]),
    "llamacpp": np.array([0.3, 1.0, 0.3, 1.0]),
}
PREFILL_WEIGHT = 0.7  # prefill rows of the single-stream kind scatter more: MMQ against cuBLAS paths
TTFT_WEIGHT = 0.4  # one engine's TTFTs at one setting lie up to a factor of ten apart (28 to 269 ms)
# The overhead's six numbers in logarithms: factors on the kernels, 20 us per sequence, 4 and 10 ms per request.
ADDED = ("compute", "bandwidth", "step", "sequence", "request", "accept")
ADDED_START = np.log([0.85, 1.0, 1.0, 2e-5, 4e-3, 1e-2])
ADDED_HOLD = np.array([0.5, 1.0, 1.0, 0.1, 0.1, 0.1])
# Host times per request that are tried: below the GPU's own they change no throughput, so no slope leads to them.
REQUESTS = (2e-3, 8e-3, 12e-3, 16e-3, 20e-3, 24e-3, 32e-3)
# TensorRT-LLM's kernels are what the families are fitted on: only its server adds something.
ONLY_SERVER = np.array([1e3, 1e3, 1e3, 1e3, 0.1, 0.1])
ROBUST_ENGINE = 0.3  # log error beyond which a row of an engine pulls no harder
# The source's README: the H100 of these rows may have been throttled.
WEIGHTS = {("gpustack", "h100-sxm"): 0.5}


class Fit(Struct, frozen=True):
    """The result: efficiencies by kernels and family, pooled ones for families without rows, overheads by engine."""

    families: Mapping[tuple[str, str], Efficiency]
    pooled: Mapping[tuple[str, str], Efficiency]
    engines: Mapping[str, Overhead]
    other: Overhead

    def of(self, row: Observation) -> tuple[Efficiency, Overhead]:
        """The numbers that apply to a row; `spread` of the first is the forecast's."""
        kernels = row.engine.kernels
        base = self.families.get((kernels, row.gpu.family))
        if base is None:
            base = self.pooled.get((kernels, pool(row.gpu, kernels))) or efficiency(row.gpu, row.engine)
        if kernels == "llamacpp":
            return base, Overhead()
        return with_overhead(base, row, self.engines.get(row.engine.name, self.other))


def with_overhead(base: Efficiency, row: Observation, added: Overhead) -> tuple[Efficiency, Overhead]:
    """A family's efficiency with what an engine adds, as `planner.latency.step.efficiency` puts them together."""
    known = row.gpu.family in added.families
    return replace(
        base,
        compute=base.compute * added.compute,
        bandwidth=base.bandwidth * added.bandwidth,
        third=base.third * added.bandwidth,
        step=base.step * added.step,
        spread=added.spread if known else math.hypot(added.spread, UNKNOWN_FAMILY),
    ), added


def is_base(row: Observation) -> bool:
    """Whether a row is one the kernels' efficiencies are fitted on: saturated TensorRT-LLM, or llama.cpp."""
    if row.engine.kernels == "llamacpp":
        return row.quantity in ("prefill", "decode")
    return (
        row.engine.name == "trtllm" and row.quantity == "throughput" and not (row.prompts or row.concurrency)
    )


def fit_rows(
    rows: Sequence[Observation], *, how: str = "", known: dict[object, Overhead] | None = None
) -> Fit:
    """Fit every family and engine that has rows. Raises `InputError` for none.

    `known` keeps engines' fits by their rows and the families' numbers, for fits that leave other rows out.
    """
    if not rows:
        raise InputError("no rows to fit; give a CSV of measured figures")
    families: dict[tuple[str, str], Efficiency] = {}
    pooled: dict[tuple[str, str], Efficiency] = {}
    base = [r for r in rows if is_base(r)]
    for kernels, group in sorted({(r.engine.kernels, pool(r.gpu, r.engine.kernels)) for r in base}):
        members = [r for r in base if (r.engine.kernels, pool(r.gpu, r.engine.kernels)) == (kernels, group)]
        start, loose = START[kernels]
        common, covariance = _solve(members, start, loose, start)
        fitted = []
        for family in sorted({r.gpu.family for r in members}):
            own = [r for r in members if r.gpu.family == family]
            watts = _watts(own) if kernels == "batched" else 0.0
            logs, spread = _solve(own, common, HOLD[kernels], common, watts)
            fitted.append(logs)
            families[kernels, family] = _record(own, logs, spread, how, watts)
        middle = np.mean(fitted, axis=0)
        # A family of its own differs from the mean as the known ones do.
        between = np.var(fitted, axis=0) if len(fitted) > 1 else np.full(4, 0.15**2)
        pooled[kernels, group] = replace(_record(members, middle, covariance + np.diag(between), how), rows=0)
    partial = Fit(families, pooled, {}, Overhead())
    engines = {}
    for name in sorted({r.engine.name for r in rows if not is_base(r) and r.engine.kernels == "batched"}):
        own = [r for r in rows if r.engine.name == name and not is_base(r)]
        key = (tuple(map(id, own)), *sorted((str(k), e) for k, e in families.items() if k[0] == "batched"))
        known = {} if known is None else known
        engines[name] = known[key] if key in known else _fit_engine(own, partial, how)
        known[key] = engines[name]
    if any(r.engine.name == "trtllm" for r in base):
        found = sorted({r.gpu.family for r in base if r.engine.name == "trtllm"})
        served = engines.get("trtllm", Overhead(spread=0.1))
        engines["trtllm"] = replace(served, rows=served.rows + len(base), families=tuple(found), how=how)
    return Fit(families, pooled, engines, _other(list(engines.values())))


def _fit_engine(rows: Sequence[Observation], base: Fit, how: str) -> Overhead:
    """What an engine adds, on its own rows."""
    hold = ONLY_SERVER if rows[0].engine.name == "trtllm" else ADDED_HOLD
    start = np.where(hold > 1e2, np.log([1.0, 1.0, 1.0, 1e-9, 4e-3, 1e-2]), ADDED_START)
    scale = np.array([_weight(r) for r in rows])
    measured = np.log([r.measured for r in rows])

    def added(x: np.ndarray) -> Overhead:
        values = np.exp(np.clip(x, -25.0, 3.0))
        return added_of(values)

    def residual(x: np.ndarray) -> np.ndarray:
        runs: Runs = {}
        guess = [predict(r, *_plain(base, r, added(x)), runs) for r in rows]
        return scale * (np.log(np.maximum(guess, 1e-9)) - measured)

    def fitted(begin: np.ndarray) -> np.ndarray:
        return least_squares(residual, begin, weight=hold, toward=start, rounds=9, robust=ROBUST_ENGINE)[0]

    def lost(x: np.ndarray) -> float:
        return loss(residual(x), x, weight=hold, toward=start, robust=ROBUST_ENGINE)

    logs = fitted(start)
    request = ADDED.index("request")
    tried = [np.where(np.arange(len(logs)) == request, math.log(r), logs) for r in REQUESTS]
    moved = min(tried, key=lost)
    if lost(moved) < lost(logs):
        logs = fitted(moved)
    left = residual(logs)
    return replace(
        added(logs),
        spread=float(np.sqrt(np.mean(left**2))),
        rows=len(rows),
        families=tuple(sorted({r.gpu.family for r in rows})),
        how=how,
    )


def added_of(values: Sequence[float]) -> Overhead:
    """An overhead of these six numbers, in the order of `ADDED`."""
    compute, bandwidth, step, sequence, request, accept = (float(v) for v in values)
    return Overhead(compute, bandwidth, step, sequence, request, accept)


def _plain(base: Fit, row: Observation, added: Overhead) -> tuple[Efficiency, Overhead]:
    kernels = row.engine.kernels
    found = base.families.get((kernels, row.gpu.family)) or base.pooled.get((kernels, pool(row.gpu, kernels)))
    if found is None:
        found = _catalog_base(row)
    return with_overhead(found, row, added)


def _catalog_base(row: Observation) -> Efficiency:
    """The catalog's own numbers of the family, without any engine's factors."""
    from planner.latency.step import family_efficiency

    return family_efficiency(row.gpu, row.engine.kernels)


def _other(engines: Sequence[Overhead]) -> Overhead:
    """An engine without rows: the mean of those that have some, with a wide band."""
    known = [e for e in engines if e.sequence > 1e-8]
    if not known:
        return Overhead()
    means = [float(np.exp(np.mean([np.log(getattr(e, name)) for e in known]))) for name in ADDED]
    return replace(added_of(means), spread=0.35, how="mean of the engines with rows")


def _weight(row: Observation) -> float:
    found = (
        v for (source, gpu), v in WEIGHTS.items() if row.source.startswith(source) and row.gpu.name == gpu
    )
    return next(found, 1.0) * (TTFT_WEIGHT if row.quantity == "ttft" else 1.0)


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
        guess = np.array([predict(r, eff, Overhead()) for r in rows])
        return scale * (np.log(np.maximum(guess, 1e-9)) - measured)

    return least_squares(residual, start, weight=weight, toward=toward)


def _record(
    rows: Sequence[Observation], logs: np.ndarray, covariance: np.ndarray, how: str, watts: float = 0.0
) -> Efficiency:
    eff = Efficiency(1.0, 1.0, 1.0, 1.0, watts=watts).with_vector(logs)
    c, b, t, s = (float(e) for e in np.sqrt(np.maximum(np.diag(covariance), 0.0)))
    left = np.log([max(predict(r, eff, Overhead()), 1e-9) / r.measured for r in rows])
    spread = float(np.sqrt(np.mean(left**2)))
    return replace(eff, errors=(c, b, t, s), spread=spread, rows=len(rows), how=how)


def write_catalog(paths: Sequence[Path], out: Path) -> list[str]:
    """Fit every family and engine from the CSV files and write the catalog's `efficiency.toml`.

    Returns the table of errors with one source left out at a time, as Markdown lines.

    `spread` of a family is the root mean square log error of its rows when their device is left out; of an engine, that
    of its rows when their file is left out of the fit (the whole engine, if that is its only one).
    """
    from planner.latency.measured import read_measured

    rows = [row for path in paths for row in read_measured(path, skipped=[])]
    names = ", ".join(p.name for p in paths)
    lines = [
        "# Efficiencies by kernels and device family, and what each engine adds; written by `python -m",
        "# planner.latency.fit`; no number belongs to a row.",
        "# compute: share of dense peak; bandwidth: share of memory bandwidth when weights are read;",
        "# third: batched, share of bandwidth when decode attention reads the cache; llamacpp, bytes (CUDA) or",
        "# quantised weights (Metal, CPU) per core and clock; step: seconds of overhead per layer and iteration.",
        "# errors: relative standard errors of the four; spread: relative standard deviation of one forecast;",
        "# watts: board power over fp16 peak of the fitted device (data sheet), W per 1e12 operations/s.",
        "# engine: factors on compute, bandwidth and step; host seconds per sequence and iteration (sequence), per",
        "# request and not overlapped (request), per request and overlapped (accept).",
        f"# Fitted on: {names}.",
    ]
    fit = fit_rows(rows, how="least squares")
    base = [r for r in rows if is_base(r)]
    left_out = leave_out(base, lambda r: r.gpu.name)
    # llama.cpp's rows span years of builds: a forecast is as unsure as one source is about another.
    builds = leave_out([r for r in base if r.engine.kernels == "llamacpp"], lambda r: r.source)
    least = {"llamacpp": _band([error for _, error in builds])}
    for (kernels, name), eff in fit.families.items():
        spread = _rms([e for r, e in left_out if (r.engine.kernels, r.gpu.family) == (kernels, name)])
        lines += _family(
            kernels, name, replace(eff, spread=max(spread or eff.spread, least.get(kernels, 0.0)))
        )
    for (kernels, name), eff in fit.pooled.items():
        if (kernels, name) in fit.families:
            continue
        spread = _rms([e for r, e in left_out if (r.engine.kernels, pool(r.gpu, kernels)) == (kernels, name)])
        lines += _family(
            kernels, name, replace(eff, spread=max(spread or eff.spread, least.get(kernels, 0.0)))
        )
    for kernels, name in (("batched", "pooled"), ("llamacpp", "pooled"), ("llamacpp", "apple")):
        if (kernels, name) not in fit.families and (kernels, name) not in fit.pooled:
            lines += _family(kernels, name, efficiency(catalog.gpu("m1" if name == "apple" else "h100-sxm"), catalog.engine("trtllm" if kernels == "batched" else "llamacpp")))  # fmt: skip  # noqa: E501
    lines += _family("llamacpp", "cpu", efficiency(catalog.gpu("cpu"), catalog.engine("llamacpp")))
    # The only file of saturated batches cannot go: nothing would be left to fit. Its models go in turn.
    alone = leave_out([r for r in base if r.engine.kernels == "batched"], lambda r: r.arch.name)
    files = {r.source for r in rows} - {r.source for r, _ in alone}
    by_source = leave_out(rows, lambda r: r.source, names=files) + alone
    spreads: dict[str, Overhead] = {"llamacpp": Overhead(spread=least["llamacpp"])}
    for name, added in sorted(fit.engines.items()):
        own = [(r, e) for r, e in by_source if r.engine.name == name]
        first = [e for r, e in own if r.quantity == "ttft"]
        others = [(r, e) for r, e in own if r.quantity != "ttft"]
        # Users meet an engine at its server: its band is no narrower than that of the rows taken at one.
        served = _band([e for r, e in others if r.http])
        errors = {"spread": max(_band([e for _, e in others]), served) or added.spread}
        errors |= {"spread_first": _band(first)} if first else {}
        spreads[name] = replace(added, **errors)
        lines += _engine(name, spreads[name])
    for name in sorted(set(catalog.engines()) - set(fit.engines) - {"llamacpp"}):
        lines += _engine(name, fit.other)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return left_out_table(by_source, {name: spreads[name] for name in spreads})


def leave_out(
    rows: Sequence[Observation], key: Callable[[Observation], str], names: Collection[str] | None = None
) -> list[tuple[Observation, float]]:
    """Each row with the log error of its forecast when all rows that share its key are left out of the fit.

    `names`: only these keys are left out in turn (None: all).
    """
    found = []
    known: dict[object, Overhead] = {}
    for name in sorted({key(r) for r in rows} if names is None else names):
        kept = [r for r in rows if key(r) != name]
        if not kept:
            continue
        fit, runs = fit_rows(kept, known=known), Runs()
        for row in (r for r in rows if key(r) == name):
            guess = predict(row, *fit.of(row), runs)
            if guess > 0:
                found.append((row, math.log(guess / row.measured)))
    return found


def left_out_table(errors: Sequence[tuple[Observation, float]], engines: Mapping[str, Overhead]) -> list[str]:
    """Markdown lines: errors by engine and figure when their file is left out, and the share inside the stated band."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row, error in errors:
        served = ""
        if row.engine.name == "trtllm":
            served = " at a server" if row.http else ", saturated, one model left out"
        groups.setdefault((row.engine.title + served, row.quantity), []).append(error)
        engine = engines[row.engine.name]
        width = max(engine.spread, engine.spread_first) if row.quantity == "ttft" else engine.spread
        # The furthest row of a handful lies on the band's edge.
        inside = float(abs(error) <= 1.645 * width * (1 + 1e-9))
        groups.setdefault((row.engine.title + served, f"{row.quantity} inside"), []).append(inside)
    lines = ["| engine | figure | rows | median abs. error | in the band |", "|---|---|---:|---:|---:|"]
    for (title, quantity), found in sorted(groups.items()):
        if not quantity.endswith("inside"):
            middle = float(np.median(np.abs(np.expm1(found))))
            share = float(np.mean(groups[title, f"{quantity} inside"]))
            lines.append(f"| {title} | {quantity} | {len(found)} | {middle:.1%} | {share:.0%} |")
    return lines


def _band(errors: Sequence[float]) -> float:
    """The standard deviation whose 90% band holds 90% of the log errors; 0 for none."""
    if not errors:
        return 0.0
    # Of a handful of rows the furthest counts: between two of them lies less than 90%.
    method: Literal["higher", "linear"] = "higher" if len(errors) < 10 else "linear"
    return max(float(np.quantile(np.abs(errors), 0.9, method=method)) / 1.645, 0.05)


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0


def _family(kernels: str, name: str, eff: Efficiency) -> list[str]:
    errors = ", ".join(f"{e:.3f}" for e in eff.errors)
    return [
        "",
        f"[family.{kernels}.{name}]",
        f"compute = {eff.compute:.4g}",
        f"bandwidth = {eff.bandwidth:.4g}",
        f"third = {eff.third:.4g}",
        f"step = {eff.step:.4g}",
        f"errors = [{errors}]",
        f"spread = {eff.spread:.3f}",
        f"rows = {eff.rows}",
        *([f"watts = {eff.watts:.4g}"] if eff.watts and kernels == "batched" else []),
        f'how = "{eff.how}"',
    ]


def _engine(name: str, added: Overhead) -> list[str]:
    families = ", ".join(f'"{f}"' for f in added.families)
    return [
        "",
        f"[engine.{name}]",
        *(f"{field} = {getattr(added, field):.4g}" for field in ADDED),
        f"spread = {added.spread:.3f}",
        f"spread_first = {added.spread_first:.3f}",
        f"rows = {added.rows}",
        f"families = [{families}]",
        f'how = "{added.how}"',
    ]


def main() -> None:
    """Command line of the refit."""
    import click

    from unshot.errors import UnshotError

    @click.command()
    @click.argument("measured", nargs=-1, required=True, type=click.Path(path_type=Path))
    @click.option("--out", required=True, type=click.Path(path_type=Path), help="efficiency.toml to write.")
    def run(measured: tuple[Path, ...], out: Path) -> None:
        """Fit the efficiencies of every device family and engine from MEASURED files."""
        try:
            click.echo("\n".join(write_catalog(measured, out)))
        except UnshotError as error:
            raise click.ClickException(str(error)) from None

    run()


if __name__ == "__main__":
    main()
