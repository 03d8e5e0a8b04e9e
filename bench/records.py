"""What is kept of one request, and the figures over many. docs/bench.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.stats import percentile_interval

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
        return self.token_times[0] if self.token_times else math.nan

    @property
    def tpot(self) -> float:
        """Time per output token after the first: (last - first) / (tokens - 1); NaN below two tokens."""
        if len(self.token_times) < 2 or self.output_tokens < 2:
            return math.nan
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

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


def summarise(records: Sequence[Record], seconds: float | None = None) -> dict[str, Any]:
    """Figures of one side in one mode; `seconds` is the time the load took (default: the sum of service times).

    Latencies are milliseconds, throughputs per second.
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

    def rate(total: float) -> float | None:
        return float(total / busy) if busy > 0 else None

    return {
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
        "requests_per_second": rate(len(good)),
        "input_tokens_per_second": rate(float(prompt.sum()) if good else 0.0),
        "output_tokens_per_second": rate(float(output.sum()) if good else 0.0),
        "stopped_at_limit": sum(r.finish == "length" for r in good),
    }
