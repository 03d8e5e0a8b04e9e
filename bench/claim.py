"""The claim check: faster and cheaper by the claimed factor, with prefix caching and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.quality import FAILED, PASSED
from bench.records import Record
from unshot.case import Claim
from unshot.metrics.intervals import (
    INCONCLUSIVE,
    MET,
    NOT_MET,
    Clustered,
    Interval,
    ratio_of_means,
    t_quantile,
    units_to_settle,
)


def service_ratio(baseline: Sequence[Record], candidate: Sequence[Record]) -> Interval:
    """Mean end-to-end time of the baseline over the candidate's, on pairs of the same request."""
    return ratio_of_means([r.e2e for r in baseline], [r.e2e for r in candidate])


def side_ratio(baseline: Sequence[Record], candidate: Sequence[Record], figure: str) -> dict[str, Any] | None:
    """Ratio of the means of another figure (`ttft`, `tpot`, `prompt_tokens`, ...) for information."""
    rows = [
        (float(getattr(a, figure)), float(getattr(b, figure)))
        for a, b in zip(baseline, candidate, strict=True)
    ]
    rows = [(a, b) for a, b in rows if math.isfinite(a) and math.isfinite(b) and a > 0 and b > 0]
    if len(rows) < 2:
        return None
    return shown(ratio_of_means([a for a, _ in rows], [b for _, b in rows]))


def shown(ratio: Interval) -> dict[str, Any]:
    """A ratio as the report keeps it."""
    return {
        "value": ratio.value,
        "low": ratio.low,
        "high": ratio.high if math.isfinite(ratio.high) else None,
        "pairs": ratio.n,
        "method": ratio.method,
        "level": ratio.level,
    }


def per_correct_ratio(
    costs: tuple[Sequence[float], Sequence[float]],
    correct: tuple[Sequence[float], Sequence[float]],
    *,
    draws: int = 4000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Ratio of cost per correct answer, percentile bootstrap over cost pairs and over scored rows apart.

    None where a side has no correct answer at all: its cost per correct answer has no value.
    """
    right = [np.asarray(c, dtype=float) for c in correct]
    if not right[0].sum() or not right[1].sum():
        return None
    generator = np.random.default_rng(seed)
    money = [np.asarray(c, dtype=float) for c in costs]
    picks = generator.integers(0, len(money[0]), size=(draws, len(money[0])))
    rows = generator.integers(0, len(right[0]), size=(draws, len(right[0])))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (money[0][picks].mean(axis=1) / right[0][rows].mean(axis=1)) / (
            money[1][picks].mean(axis=1) / right[1][rows].mean(axis=1)
        )
    point = (money[0].mean() / right[0].mean()) / (money[1].mean() / right[1].mean())
    # A draw without any right answer on both sides has no ratio; on one side it is 0 or infinite.
    low, high = np.quantile(values[~np.isnan(values)], [0.025, 0.975], method="nearest")
    return {
        "value": float(point),
        "low": float(low),
        "high": float(high) if np.isfinite(high) else None,
        "pairs": len(money[0]),
        "method": "bootstrap of requests and rows",
        "level": 0.95,
    }


def check(speed: Interval, cost: Interval, claim: Claim) -> dict[str, Any]:
    """Verdict of one mode: both ratios at least `claim.low`."""
    verdicts = (speed.verdict(claim.low), cost.verdict(claim.low))
    if all(v == MET for v in verdicts):
        verdict = MET
    elif NOT_MET in verdicts:
        verdict = NOT_MET
    else:
        verdict = INCONCLUSIVE
    result: dict[str, Any] = {
        "verdict": verdict,
        "speed": {**shown(speed), "verdict": verdicts[0]},
        "cost": {**shown(cost), "verdict": verdicts[1]},
    }
    if verdict == INCONCLUSIVE:
        needed = [
            _pairs_needed(r, claim.low)
            for r, v in zip((speed, cost), verdicts, strict=True)
            if v == INCONCLUSIVE
        ]
        result["pairs_to_settle"] = None if None in needed else max(n for n in needed if n is not None)
    if speed.value > claim.high and cost.value > claim.high:
        result["above_range"] = True
    return result


def _pairs_needed(ratio: Interval, claim: float) -> int | None:
    """How many pairs would settle the verdict with probability 0.8, if mean and spread stay as measured."""
    half = math.log(ratio.high / ratio.low) / 2 if ratio.low > 0 and math.isfinite(ratio.high) else math.inf
    if not math.isfinite(half):
        return None
    error = half / t_quantile(0.5 + ratio.level / 2, ratio.n - 1)
    log = Clustered(math.log(ratio.value), error**2, ratio.n - 1, ratio.n, ratio.n, "pairs")
    needed = units_to_settle(log, math.log(claim))
    return None if needed is None else max(needed, ratio.n + 1)


def overall(modes: dict[str, dict[str, Any]], gate: str | None, why: str = "") -> tuple[str, str]:
    """`(verdict, reason)` over the modes and the quality gate: every mode must be met and the gate passed."""
    by_verdict: dict[str, list[str]] = {MET: [], NOT_MET: [], INCONCLUSIVE: []}
    for mode, facts in modes.items():
        by_verdict[facts["verdict"]].append(mode)
    met, bad, unclear = (" and ".join(by_verdict[v]) for v in (MET, NOT_MET, INCONCLUSIVE))
    parts = []
    if bad:
        parts.append(f"not faster and cheaper enough with the prefix {bad}")
    if unclear:
        parts.append(
            f"cannot tell with the prefix {unclear}, the interval holds values on both sides of the claim"
        )
    if gate == FAILED:
        parts.append("the candidate's quality is worse than the baseline's beyond the margin")
    elif gate is not None and gate != PASSED:
        parts.append(f"it is not shown that the candidate's quality is not worse ({why or 'too few rows'})")
    if not parts:
        return MET, f"speed and cost hold with the prefix {met}"
    verdict = NOT_MET if bad or gate == FAILED else INCONCLUSIVE
    return verdict, "; ".join(parts) + (f" (speed and cost hold with the prefix {met})" if met else "")
