"""Error bars: Monte Carlo over the assumptions, and the tornado that says which of them matters most.

Each assumption is a log-normal factor given by its 5th and 95th percentile (an interval that is not symmetric keeps
both ends: the two halves have their own spread). Draws are shared between options, so that what they have in common
cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from planner.breakeven import break_even
from planner.options import Option, World

DRAWS = 1000
Z95 = 1.6448536269514722


class Assumption(Struct, frozen=True):
    """One thing that may be off. `low` and `high` are factors (5th and 95th percentile) round the forecast.

    `field` is the `World` field it scales, or `rate`. `chosen` ones are decisions: they are in the tornado, not drawn.
    """

    field: str
    label: str
    low: float
    high: float
    why: str
    chosen: bool = False


class Band(Struct, frozen=True):
    """A forecast with its 90% interval; None where a quantile is not finite (never breaks even, never pays back)."""

    p5: float | None
    p50: float | None
    p95: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> Band:
        """Quantiles of draws; NaN counts as infinite (it never happens)."""
        filled = np.where(np.isnan(values), np.inf, values)
        found = np.quantile(filled, [0.05, 0.5, 0.95], method="nearest")
        return cls(*(float(v) if np.isfinite(v) else None for v in found))


class Swing(Struct, frozen=True):
    """What one assumption does alone: the result at its low and at its high end."""

    label: str
    why: str
    low_factor: float
    high_factor: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """How far the result moves."""
        return abs(self.high - self.low) if np.isfinite(self.high) and np.isfinite(self.low) else np.inf


class Uncertainty(Struct, frozen=True):
    """Bands per option (`monthly`), for the pair compared (`break_even`, `payback`, `saving`), and the tornado.

    `never` is the share of draws in which the option does not break even at any rate; `cheaper` the share in which it
    is cheaper at the case's rate.
    """

    monthly: dict[str, Band]
    saving: Band | None
    break_even: Band | None
    payback: Band | None
    never: float | None
    cheaper: float | None
    tornado: tuple[Swing, ...]
    break_even_draws: tuple[float, ...]


def draw(assumptions: Sequence[Assumption], draws: int, seed: int) -> tuple[World, np.ndarray]:
    """A world of arrays, shape `(draws, 1)`, and the factors on the rate, same shape."""
    generator = np.random.default_rng(seed)
    factors = {}
    for one in assumptions:
        if one.chosen:
            continue
        normal = generator.standard_normal((draws, 1))
        below, above = np.log(one.low) / -Z95, np.log(one.high) / Z95
        factors[one.field] = np.exp(np.where(normal < 0, normal * below, normal * above))
    rate = factors.pop("rate", np.ones((draws, 1)))
    return World(**factors), rate


def analyse(
    options: Sequence[Option],
    assumptions: Sequence[Assumption],
    rate: float,
    *,
    tuned: Option | None,
    keep: Option | None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Uncertainty:
    """Run the analysis at a mean `rate` for every option, and for `tuned` against `keep` where both are given."""
    world, rates = draw(assumptions, draws, seed)
    monthly = {
        o.key: Band.of(np.ravel(o.monthly(rate * rates, world) + np.zeros((draws, 1)))) for o in options
    }
    if tuned is None or keep is None:
        return Uncertainty(monthly, None, None, None, None, None, (), ())
    crossing = np.asarray(break_even(tuned, keep, world))
    months = payback_draws(tuned, keep, rate * rates, world)
    saving = np.ravel(keep.monthly(rate * rates, world) - tuned.monthly(rate * rates, world))
    return Uncertainty(
        monthly=monthly,
        saving=Band.of(saving),
        break_even=Band.of(crossing),
        payback=Band.of(months),
        never=float(np.mean(np.isnan(crossing))),
        cheaper=float(np.mean(saving > 0)),
        tornado=tuple(tornado(tuned, keep, assumptions, rate)),
        break_even_draws=tuple(float(v) for v in crossing if np.isfinite(v)),
    )


def payback_draws(tuned: Option, keep: Option, rates: np.ndarray, world: World) -> np.ndarray:
    """`payback` for draws with their own rates."""
    saving = np.ravel(keep.monthly(rates, world) - tuned.monthly(rates, world))
    extra = np.ravel(tuned.once(world) - keep.once(world) + np.zeros_like(rates))
    return np.where(saving > 0, np.maximum(extra, 0) / np.where(saving > 0, saving, 1.0), np.inf)


def tornado(tuned: Option, keep: Option, assumptions: Sequence[Assumption], rate: float) -> list[Swing]:
    """Swings of the monthly saving at `rate`, largest first, one assumption at a time."""
    swings = []
    for one in assumptions:
        ends = []
        for factor in (one.low, one.high):
            world = World() if one.field == "rate" else replace(World(), **{one.field: factor})
            at = rate * factor if one.field == "rate" else rate
            ends.append(float(keep.monthly(at, world) - tuned.monthly(at, world)))
        swings.append(Swing(one.label, one.why, one.low, one.high, ends[0], ends[1]))
    # What changes nothing (a fleet kept at its minimum does not feel its throughput) is left out.
    return sorted((s for s in swings if s.width > 1e-9), key=lambda s: -s.width)
