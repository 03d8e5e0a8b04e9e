"""What tells where the waiting formulas fall short: dimensionless, bounded signs of a load on a device.

Times are taken as shares of one decode iteration, counts as logarithms or as shares of the slots. No sign names a
model, a device or a load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from planner.roofline import StepCost

if TYPE_CHECKING:
    from planner.queueing import Shape

Number = Any


def cost_signs(cost: StepCost, shape: Shape, one: Number, most: Number) -> list[Number]:
    """What an iteration is made of. `one` and `most` are seconds of an iteration with one and with all sequences."""

    def log(value: Number, unit: Number, width: float = 3.0) -> Number:
        return np.log(np.maximum(value / unit, 1e-4)) / width

    arithmetic = shape.new * cost.token
    return [
        log(most, one),
        log(arithmetic, one),
        log(shape.chunk * cost.token, one),
        log(shape.pairs * cost.pair, one),
        log(shape.new * cost.move, one),
        log(cost.chunk + 0.0 * one, one),
        log(cost.sampled, one),
        cost.fixed / one,
        cost.weights / one,
        cost.experts / one,
        cost.head / one,
        log(shape.context * cost.context, one),
    ]


def load_signs(shape: Shape, limit: Number, steps: Number, room: Number) -> list[Number]:
    """What the load alone says. `room` is how many mean requests the memory holds, `limit` whole ones at most."""
    wide = shape.chunk / shape.new
    chunks = 1.0 / wide
    rest = np.where(chunks > 1.0, np.ceil(chunks - 1e-9) / chunks - 1.0, 0.0)
    return [
        np.tanh(np.log(wide) / 2.0),
        np.tanh(2.0 * np.log(wide / 1.5)),
        np.log(wide) / 3.0,
        rest,
        np.log(limit) / 4.0,
        1.0 / np.sqrt(limit),
        np.minimum(room / limit, 3.0) - 1.0,
        np.log(limit / shape.chunk) / 4.0,
        np.log1p(steps) / 3.0,
        np.log(shape.context / shape.new) / 3.0,
        np.sqrt(shape.work_cv2),
        np.sqrt(shape.output_cv2),
        np.log(shape.arrival_cv2),
        np.sqrt(shape.size_cv2),
        np.sqrt(shape.size_cv2 / limit) * 3.0,
    ]


def share_signs(
    fit: Number, unfilled: list[Number], work_cv2: Number, waits: list[Number], behind: Number
) -> list[Number]:
    """How prompts share iterations.

    `fit` prompts fit an iteration beside the sequences that decode; `unfilled` is the share of an iteration left where
    one, two, three of a queue end; `waits` are percentiles of the wait for one server and prompts of one size, in
    prefills; `behind` is how many prefills an arrival finds.
    """
    alike = np.exp(-20.0 * work_cv2)  # prompts of one length: what fits jumps
    return [
        alike,
        alike * (unfilled[0] - 0.5),
        np.log(fit) / 3.0,
        np.tanh(4.0 * np.log(fit)),
        *unfilled,
        *(np.log1p(wait) for wait in waits),
        np.log(np.maximum(behind, 1e-4)) / 3.0,
        np.tanh(np.log(np.maximum(behind, 1e-4) / 0.05)),
    ]


def state_signs(
    *, rho: Number, busy: Number, tight: Number, full: Number, spin: Number, idle: Number, batch: Number,
    limit: Number, extra: Number, hidden: Number, now: Number, alone: Number, one: Number, slot: Number,
    clump: Number, spread_n: Number, size_cv2: Number, mean: Number, variance: Number, third: Number,
) -> list[Number]:  # fmt: skip
    """Where the formulas see the server: load, queue and the moments of the wait they found."""
    return [
        rho,
        -np.log(1.0 - np.minimum(rho, 0.97)) / 2.0,
        busy,
        np.minimum(tight, 1.2),
        -np.log(1.0 - np.minimum(tight, 0.97)) / 2.0,
        np.sqrt(full),
        spin,
        idle,
        np.log1p(batch) / 4.0,
        batch / limit,
        np.tanh(np.log(extra / one) / 2.0),
        hidden / one,
        np.log(now / one),
        np.log(alone / one) / 3.0,
        np.log1p(full * slot / mean),
        np.log(clump),
        np.tanh((limit - batch) / np.sqrt(spread_n + batch * size_cv2 + 1.0) / 3.0),
        np.log(mean / alone),
        np.sqrt(variance) / mean,
        np.minimum(third / np.maximum(variance, 1e-100) ** 1.5, 4.0) / 2.0,
    ]


def stack(parts: list[Number]) -> Number:
    """The signs as one array, shape (signs, ...), each between -4 and 4."""
    return np.stack([np.clip(p, -4.0, 4.0) for p in np.broadcast_arrays(*parts)])
