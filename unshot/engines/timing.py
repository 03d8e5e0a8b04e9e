"""TTFT, TPOT and ITL: the one definition that engines, bench, export and gateway share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def ttft(times: Sequence[float], start: float) -> float:
    """Time to first token: the first arrival minus `start`, on one clock; NaN where nothing arrived."""
    return times[0] - start if times else math.nan


def tpot(times: Sequence[float], tokens: int | None) -> float:
    """Time per output token after the first: (last arrival - first arrival) / (tokens - 1).

    `tokens` are those that the arrivals brought. A token without an arrival of its own is not among them: a server's
    stop token stands in its `usage` and takes no time on the wire. NaN below two arrivals or two tokens, and where
    the number of tokens is not known.
    """
    if len(times) < 2 or tokens is None or tokens < 2:
        return math.nan
    return (times[-1] - times[0]) / (tokens - 1)


def itl(times: Sequence[float]) -> list[float]:
    """Inter-token latencies: the time between arrivals that follow each other; what came at once is one arrival."""
    return [after - before for before, after in itertools.pairwise(times) if after > before]
