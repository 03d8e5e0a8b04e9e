"""Efficiencies of the machine that a bench report was taken on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.latency.least_squares import least_squares
from planner.latency.replica import all_pairs
from planner.latency.step import Efficiency, Overhead, cost_of, efficiency, overheads
from unshot import catalog
from unshot.catalog import Architecture, Engine, Gpu, Precision
from unshot.contracts.report import BenchReport
from unshot.errors import InputError

NOISE = 0.05  # of a median, in logarithms


class Side(Struct, frozen=True):
    """One side of a report: medians of a single stream, seconds; `tpot` 0 if none was measured."""

    arch: Architecture
    precision: Precision
    new: float
    cached: float
    output: float
    ttft: float
    tpot: float


class Calibration(Struct, frozen=True):
    """What a report says of its machine: the device, the engine, and its efficiencies with error bars."""

    gpu: Gpu
    engine: Engine
    efficiency: Efficiency

    def holds_for(self, gpu: Gpu) -> bool:
        """Whether the report is about this device: the same one, or a CPU for a CPU."""
        return gpu.name == self.gpu.name or gpu.family == self.gpu.family == "cpu"


def calibrate(report: Path | Mapping[str, object], *, gpu: str | None = None) -> Calibration:
    """Fit the efficiencies of the machine a bench report was taken on.

    `report` is a `report.json` (path or its content). Read are `sides`: a list of objects with `model` (catalog name
    or an object in `config.json` form), `precision`, `prompt_tokens` (one number, or one per request), optionally
    `cached_tokens`, `ttft_s` and `tpot_s` (lists, seconds; one stream); `gpu` (a catalog or NVML name, which the
    argument overrides) and `engine` (default: llama.cpp). Prefill and decode times of each side are fitted together,
    leaning on the catalog's numbers for that family: what the report does not determine stays near them with their
    error bars. Raises `InputError`.
    """
    where = str(report) if isinstance(report, Path) else "report"
    raw = _read(report) if isinstance(report, Path) else report
    rows = raw.get("sides") if isinstance(raw, Mapping) else None
    rows = list(rows.values()) if isinstance(rows, Mapping) else rows
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where}: no `sides`; give the report.json of `unshot bench`")
    name = gpu or raw.get("gpu", "cpu")
    if name is None:
        raise InputError(f"{where}: it does not say which GPU or CPU it was taken on, so it calibrates none")
    device = catalog.gpu(str(name))
    engine = catalog.engine(str(raw.get("engine") or "llamacpp"))
    prior = efficiency(device, engine)
    overhead = overheads().get(engine.name, Overhead())
    sides = [_side(row, f"{where}: sides[{i}]") for i, row in enumerate(rows)]
    # The catalog's numbers are as sure as their own error bars and the engine's error allow.
    wide = NOISE / np.maximum(np.hypot(prior.errors, prior.spread), NOISE)

    def residual(x: np.ndarray) -> np.ndarray:
        eff = prior.with_vector(np.clip(x, -16.0, 8.0))
        return np.asarray([e for side in sides for e in _errors(side, device, engine, eff, overhead)])

    logs, covariance = least_squares(residual, prior.vector(), weight=wide, toward=prior.vector())
    scatter = math.sqrt(float(np.mean(residual(logs) ** 2)))
    # Not surer than the scatter allows, and no surer than 2% of a machine's day-to-day noise.
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.02**2))
    # What the report says nothing about is as sure as it was before, however wide its times scatter.
    c, b, t, s = (float(e) for e in np.minimum(errors, np.maximum(np.asarray(prior.errors), scatter)))
    fitted = replace(
        prior.with_vector(logs),
        errors=(c, b, t, s),
        spread=max(0.05, scatter),
        rows=len(residual(logs)),
        how=f"calibrated on {device.name} from {where}",
    )
    return Calibration(device, engine, fitted)


def _errors(side: Side, device: Gpu, engine: Engine, eff: Efficiency, overhead: Overhead) -> list[float]:
    """Log errors of a side's times to first token and per output token."""
    cost = cost_of(side.arch, device, side.precision, engine=engine, eff=eff)
    pairs = all_pairs(side.new + side.cached) - all_pairs(side.cached)
    chunks = max(1, math.ceil(side.new / engine.chunk))
    each = cost.step(
        side.new / chunks,
        pairs / chunks,
        0.0,
        0.0,
        prompts=1 / chunks,
        chunks=1.0,
    )
    found = [math.log((chunks * float(each) + overhead.request + overhead.accept) / side.ttft)]
    if side.tpot:
        context = side.arch.cached_tokens(side.new + side.cached + side.output / 2)
        found.append(math.log(float(cost.step(0.0, 0.0, 1.0, context)) / side.tpot))
    return found


def _read(path: Path) -> Mapping[str, object]:
    try:
        loaded: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot read it ({error}); give the report.json of `unshot bench`"
        ) from None
    # A file without a version is one of the parts that are read here, written by hand.
    typed = isinstance(loaded, dict) and "version" in loaded
    return BenchReport.parse(loaded, str(path)).plain() if typed else loaded


def _side(side: object, where: str) -> Side:
    if not isinstance(side, Mapping):
        raise InputError(f"{where}: not an object; see `calibrate` for what is read")
    for key in ("model", "precision", "prompt_tokens", "ttft_s"):
        if key not in side:
            raise InputError(f"{where}: no `{key}`; give the report.json of `unshot bench`")
    model = side["model"]
    named = isinstance(model, Mapping)
    arch = catalog.architecture_from_config(model, name=where) if named else catalog.model(model)

    def median(key: str, default: float | None = None) -> float:
        try:
            array = np.atleast_1d(np.asarray(side.get(key, default), dtype=float))
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
    form = catalog.precision(str(side["precision"]))
    return Side(arch, form, prompt - cached, cached, output, ttft, max(tpot, 0.0))
