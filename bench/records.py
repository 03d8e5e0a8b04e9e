"""What is kept of one request, and the figures over many. docs/bench.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unshot.case import Slo
from unshot.engines.timing import tpot, ttft
from unshot.metrics.intervals import percentile_interval

PERCENTILES = (50, 90, 95, 99)
SIDES = ("baseline", "candidate")
Side = str


@dataclass
class Record:
    """One request. Times are seconds: `scheduled` and `start` since the run began, the others since `scheduled`.

    `ttft` and `e2e` count from the scheduled time, so that waiting for the client or the system is latency and
    not left out. `token_times` are the arrival of each output token. `error` is the kind of failure, else None.
    """

    side: Side
    mode: str
    row: int
    block: int
    scheduled: float
    start: float
    token_times: list[float]
    e2e: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    text: str = ""
    finish: str | None = None
    error: str | None = None
    detail: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.error is None

    @property
    def ttft(self) -> float:
        """Time to first token; NaN where none came."""
        return ttft(self.token_times, 0.0)

    @property
    def tpot(self) -> float:
        """Time per output token after the first; NaN below two tokens."""
        return tpot(self.token_times, self.output_tokens)

    @property
    def gaps(self) -> np.ndarray:
        """Inter-token latencies: time between arrivals that follow each other."""
        return np.diff(np.asarray(self.token_times, dtype=float))

    @property
    def queue(self) -> float:
        """Time between the scheduled and the actual start."""
        return max(0.0, self.start - self.scheduled)


def distribution(values: Sequence[float] | np.ndarray, *, scale: float = 1000.0) -> dict[str, Any]:
    """Count, mean, standard deviation, extremes and percentiles with 95% intervals; milliseconds by default.

    NaN values are left out. Percentiles are linear between order statistics; their intervals come from the
    binomial distribution of order statistics and are None where the sample is too small to give one.
    """
    array = np.asarray(values, dtype=float)
    array = np.sort(array[np.isfinite(array)]) * scale
    if not len(array):
        return {"count": 0}
    result: dict[str, Any] = {
        "count": len(array),
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "min": float(array[0]),
        "max": float(array[-1]),
    }
    for p in PERCENTILES:
        low, high = percentile_interval(array, p)
        result[f"p{p}"] = {"value": float(np.percentile(array, p)), "low": low, "high": high}
    return result


def summarise(
    records: Sequence[Record], seconds: float | None = None, slo: Slo | None = None
) -> dict[str, Any]:
    """Figures of one side in one mode; `seconds` is the time the load took (default: the sum of service times).

    Latencies are milliseconds, throughputs per second. With an SLO `goodput` is there, with counts of the server
    beside ours `server_minus_our_tokens`.
    """
    good = [r for r in records if r.ok]
    busy = seconds if seconds is not None else sum(r.e2e for r in records if math.isfinite(r.e2e))
    errors: dict[str, int] = {}
    for record in records:
        if record.error:
            errors[record.error] = errors.get(record.error, 0) + 1
    prompt = np.array([r.prompt_tokens for r in good] or [0])
    output = np.array([r.output_tokens for r in good] or [0])
    cached = [r.cached_tokens for r in good if r.cached_tokens is not None]

    facts: dict[str, Any] = {
        "requests": len(records),
        "answered": len(good),
        "errors": errors,
        "seconds": busy,
        "tokens": {
            "prompt": float(prompt.mean()),
            "cached": float(np.mean(cached)) if cached else None,
            "output": float(output.mean()),
        },
        "ttft_ms": distribution([r.ttft for r in good]),
        "tpot_ms": distribution([r.tpot for r in good]),
        "itl_ms": distribution(np.concatenate([r.gaps for r in good]) if good else []),
        "e2e_ms": distribution([r.e2e for r in good]),
        "queue_ms": distribution([r.queue for r in good]),
        **rates(len(good), int(prompt.sum()), int(output.sum()), busy),
        "stopped_at_limit": sum(r.finish == "length" for r in good),
    }
    theirs = [r.extra["server_tokens"] - r.output_tokens for r in records if "server_tokens" in r.extra]
    facts["server_minus_our_tokens"] = token_difference(
        len(theirs), sum(theirs), int(np.count_nonzero(theirs))
    )
    bounds = bounds_of(slo)
    if bounds:
        met = sum(meets(r, bounds) for r in records)
        facts["goodput"] = goodput(met, len(records), busy, bounds)
    return facts


def rates(answered: int, prompt: int, output: int, seconds: float) -> dict[str, float | None]:
    """Throughput: answered requests and their tokens per second; None where no time passed."""
    totals = {"requests": answered, "input_tokens": prompt, "output_tokens": output}
    return {f"{name}_per_second": total / seconds if seconds > 0 else None for name, total in totals.items()}


def token_difference(counted: int, total: int, differ: int) -> dict[str, Any] | None:
    """How the server's counts of output tokens differ from ours; None where no request has both."""
    return {"mean": total / counted, "differ": differ, "requests": counted} if counted else None


def bounds_of(slo: Slo | None) -> dict[str, float]:
    """The SLO's bounds by figure, milliseconds."""
    every = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms, "e2e": slo.e2e_ms} if slo else {}
    return {k: v for k, v in every.items() if v is not None}


def meets(record: Record, bounds: dict[str, float]) -> bool:
    """Whether the request was answered within every bound; a one-token answer has no TPOT and cannot miss it."""
    values = ((getattr(record, name), bound) for name, bound in bounds.items())
    return record.ok and all(math.isnan(v) or v * 1000 <= bound for v, bound in values)


def goodput(met: int, requests: int, seconds: float, bounds: dict[str, float]) -> dict[str, Any]:
    """Requests that met every bound per second, and their share."""
    return {
        "slo_ms": bounds,
        "requests_per_second": met / seconds if seconds > 0 else None,
        "share": met / requests if requests else None,
    }
