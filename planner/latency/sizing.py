"""How many requests per second one replica takes within an SLO, and what its clients then see.

The closed form gives the first guess; the simulation has the last word on every figure that is shown.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.latency.closed_form import Response, capacity, respond
from planner.latency.replica import Load, Replica, Slo
from planner.latency.simulate import Run, simulate
from unshot.cache import cached
from unshot.report.formats import milliseconds

# Requests of the simulations that search the rate, and of the one whose percentiles are shown.
SEARCHED, SHOWN = 3_000, 10_000
# Without a target a replica is loaded to this share of its capacity, and never above it.
MAX_UTILISATION = 0.9
IDLE = 1e-3  # share of the capacity at which a server counts as idle
TOLERANCE = 0.05  # relative width at which the search of the rate ends
MEASURES = ("ttft", "tpot", "e2e")
PERCENTILES = (50.0, 95.0, 99.0)


class Sizing(Struct, frozen=True):
    """The highest requests/s of one replica within an SLO; 0 where none is, `reason` then says which target fails."""

    rate: float
    reason: str = ""


def saturated(one: Replica, load: Load) -> float:
    """Requests/s of one replica whose queue never empties."""
    return float(capacity(one.cost, one.shape(load), one.overhead.request))


def rate_within(one: Replica, load: Load, slo: Slo, *, searched: int = SEARCHED) -> Sizing:
    """The highest rate at which every target of `slo` holds, at most `MAX_UTILISATION` of the capacity.

    The closed form's rate is simulated; the closed form, scaled to what the simulation gave, proposes the next one
    until two rates, one that holds and one that does not, lie within `TOLERANCE`. Kept in the cache between runs.
    """
    if one.limit < 1:
        return Sizing(0.0, one.why_not)
    if not slo.targets:
        return Sizing(saturated(one, load) * MAX_UTILISATION)
    rate, reason = cached("sizing", (one, load, slo, searched), lambda: _search(one, load, slo, searched))
    return Sizing(rate, reason)


def _search(one: Replica, load: Load, slo: Slo, searched: int) -> tuple[float, str]:
    """The highest rate within the SLO, and why it is 0 if it is."""
    top = saturated(one, load) * MAX_UTILISATION
    idle = _ratios(one, replace(load, rate=IDLE * top), slo, 400)
    worst = max(idle, key=lambda name: idle[name])
    if idle[worst] > 1.0:
        return 0.0, _missed(worst, slo, idle[worst])
    grid = np.geomspace(IDLE, 1.0, 120) * top
    curve = _curve(one, load, grid, slo)
    scale = dict.fromkeys(slo.targets, 1.0)
    low, high = IDLE * top, top * (1.0 + TOLERANCE)
    rate = min(_highest(grid, curve, scale), top)
    for _ in range(5):
        found = _ratios(one, replace(load, rate=rate), slo, searched)
        if max(found.values()) <= 1.0:
            low = rate
        else:
            high = rate
        if high / low < 1.0 + TOLERANCE or low >= top:
            break
        scale = {name: found[name] / float(np.interp(rate, grid, curve[name])) for name in found}
        proposed = _highest(grid, curve, scale)
        # A step past what is known to be on the other side, so that the bracket closes.
        step = TOLERANCE / 2.0
        proposed = proposed * (1.0 + step) if rate == low else proposed * (1.0 - step)
        inside = low * 1.005 < proposed < high * 0.995
        rate = min(proposed if inside else math.sqrt(low * min(high, top)), top)
    return low, ""


def _ratios(one: Replica, load: Load, slo: Slo, requests: int) -> dict[str, float]:
    """Simulated latency over its target, by measure."""
    run = simulate(one, load, requests=requests)
    return {name: run.at(name, slo.percentile) / target for name, target in slo.targets.items()}


def _curve(one: Replica, load: Load, rates: np.ndarray, slo: Slo) -> dict[str, np.ndarray]:
    """The closed form's latency over its target at each rate, by measure; shape (rates,)."""
    answer = closed_form(one, load, rates, (slo.percentile,))
    return {
        name: np.asarray(getattr(answer, name)[slo.percentile] + 0.0 * rates) / target
        for name, target in slo.targets.items()
    }


def closed_form(
    one: Replica, load: Load, rates: np.ndarray | float, percentiles: tuple[float, ...]
) -> Response:
    """`planner.latency.closed_form.respond` of a replica."""
    shape = one.shape(load)
    return respond(
        one.cost, shape, rates, percentiles, request=one.overhead.request, accept=one.overhead.accept
    )


def _highest(grid: np.ndarray, curve: dict[str, np.ndarray], scale: dict[str, float]) -> float:
    """The highest rate of the grid up to which every scaled latency stays within its target."""
    good = np.ones(len(grid), dtype=bool)
    for name, values in curve.items():
        good &= values * scale[name] <= 1.0
    if good.all():
        return float(grid[-1])
    first = int(np.argmin(good))
    if first == 0:
        return float(grid[0])
    # Between two points of the grid the worst latency is a straight line.
    before, after = (max(curve[n][i] * scale[n] for n in curve) for i in (first - 1, first))
    share = (1.0 - before) / (after - before) if np.isfinite(after) and after > before else 0.5
    return float(grid[first - 1] + share * (grid[first] - grid[first - 1]))


def _missed(name: str, slo: Slo, ratio: float) -> str:
    title = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end-to-end time"}[name]
    target = slo.targets[name]
    seen, wanted = milliseconds(ratio * target * 1e3), milliseconds(target * 1e3)
    return f"{title} is {seen} on an idle server; the target is {wanted}"


class Latency(NamedTuple):
    """Percentiles of one measure in seconds, by 50, 95 and 99, and the p95's 90% interval (None: no finite end)."""

    at: dict[float, float]
    p95_interval: tuple[float, float | None]


def simulated(
    one: Replica, load: Load, *, deviations: float = 1.645, requests: int = SHOWN
) -> dict[str, Latency]:
    """TTFT, TPOT and end-to-end time of `load` from a simulation, kept in the cache between runs.

    The interval of the p95 is that of the closed form with the device as much slower or faster as `deviations` of the
    engine's error say, moved by the factor by which its middle is; a time to first token's is no narrower than the
    engine's error on those.
    """

    def run() -> dict[str, list[float]]:
        found: Run = simulate(one, load, requests=requests)
        return {name: [found.at(name, p) for p in PERCENTILES] for name in MEASURES}

    seen: dict[str, list[float]] = cached("latency", (one, load, requests), run)
    spread = deviations * one.eff.spread
    first = math.exp(deviations * one.overhead.spread_first) if one.engine.kernels == "batched" else 1.0
    middle, slow, fast = (
        closed_form(replace(one, cost=one.cost.scaled(speed)), load, load.rate, (95.0,))
        for speed in (1.0, math.exp(-spread), math.exp(spread))
    )
    found = {}
    for name in MEASURES:
        at = dict(zip(PERCENTILES, seen[name], strict=True))
        ends = [float(getattr(answer, name)[95.0]) for answer in (fast, slow)]
        factor = at[95.0] / float(getattr(middle, name)[95.0])
        low, high = (end * factor for end in ends)
        if name == "ttft":
            low, high = min(low, at[95.0] / first), max(high, at[95.0] * first)
        found[name] = Latency(at, (low, high if math.isfinite(high) else None))
    return found
