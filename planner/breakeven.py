"""Where two cost curves cross, and how long one-off costs take to come back."""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.options import Option, World

# Mean requests per second that are searched: three a day to ten thousand a second.
LOWEST, HIGHEST, POINTS = 10**-4.5, 1e4, 341
GRID = np.geomspace(LOWEST, HIGHEST, POINTS)
REFINEMENTS = 4  # each narrows the bracket 199 times


def break_even(option: Option, rival: Option, world: World | None = None) -> Any:
    """The lowest mean rate above which `option` runs cheaper than `rival` at every rate searched.

    GPUs come in whole numbers, so the curves may cross more than once; the last crossing counts. NaN where `option` is
    dearer at the highest rate, `LOWEST` where it is always cheaper. With an array world the shape is `(draws,)`.
    """
    gap = np.atleast_2d(option.monthly(GRID, world) - rival.monthly(GRID, world))
    dearer = gap >= 0
    last = POINTS - 1 - np.argmax(dearer[:, ::-1], axis=1)
    never_dearer = ~dearer.any(axis=1)
    last = np.where(never_dearer, 0, last)
    inside = np.minimum(last, POINTS - 2)
    rows = np.arange(len(gap))
    a, b = gap[rows, inside], gap[rows, inside + 1]
    # Between two grid points the gap is taken as a straight line; a step (one more GPU) lies within 6% either way.
    share = np.divide(a, a - b, out=np.zeros_like(a), where=a != b)
    rate = GRID[inside] * (GRID[inside + 1] / GRID[inside]) ** np.clip(share, 0, 1)
    rate = np.where(never_dearer, LOWEST, rate)
    rate = np.where(dearer[:, -1], np.nan, rate)
    return float(rate[0]) if world is None or np.ndim(option.monthly(1.0, world)) == 0 else rate


def exact_break_even(option: Option, rival: Option) -> float | None:
    """`break_even` refined to eight digits; None where there is none."""
    rough = break_even(option, rival)
    if np.isnan(rough):
        return None
    if rough <= LOWEST:
        return 0.0
    step = GRID[1] / GRID[0]
    low, high = rough / step, rough * step
    for _ in range(REFINEMENTS):
        fine = np.geomspace(low, high, 200)
        dearer = np.nonzero(option.monthly(fine) - rival.monthly(fine) >= 0)[0]
        # The last crossing counts; where the bracket holds none, the cheaper side begins at its lower end.
        last = min(int(dearer[-1]), len(fine) - 2) if len(dearer) else 0
        low, high = fine[last], fine[last + 1]
    return float(high)


def payback(option: Option, rival: Option, rate: float, world: World | None = None) -> Any:
    """Months until the one-off costs (beyond the rival's) are saved at `rate`; infinity where nothing is saved."""
    saving = np.asarray(rival.monthly(rate, world) - option.monthly(rate, world), dtype=float)
    extra = np.asarray(option.once(world) - rival.once(world), dtype=float)
    months = np.divide(
        extra,
        saving,
        out=np.full(np.broadcast(extra, saving).shape, np.inf),
        where=np.broadcast_to(saving > 0, np.broadcast(extra, saving).shape),
    )
    months = np.maximum(months, 0.0)
    return float(months) if months.ndim == 0 else months.ravel()
