"""Distributions that can be merged: what client machines send home instead of every request.

DDSketch (Masson, Rim, Lee, VLDB 2019): every order statistic is known within a relative error, whatever is merged in
whatever order. Count, mean, standard deviation and extremes are exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.records import (
    ODD,
    PERCENTILES,
    RequestRecord,
    bounds_of,
    goodput,
    meets,
    odd_counts,
    rate,
    token_difference,
    token_means,
)
from unshot.case import Slo
from unshot.contracts.figures import Distribution, Figures, Percentile
from unshot.errors import OutsideError
from unshot.metrics.ratios import interval_ranks

RELATIVE_ERROR = 0.001


class Sketch:
    """Values of one figure in seconds; NaN and infinite ones are left out."""

    def __init__(self) -> None:
        try:
            from ddsketch import DDSketch
        except ImportError:
            raise OutsideError("merging sketches needs ddsketch; pip install 'unshot[bench]'") from None
        self._sketch = DDSketch(RELATIVE_ERROR)
        self.count = 0
        self._mean = 0.0
        self._squares = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Iterable[float]) -> None:
        """Take values in."""
        array = np.asarray(list(values), dtype=float)
        array = array[np.isfinite(array)]
        if not len(array):
            return
        for value in array.tolist():
            self._sketch.add(value)
        self._take(
            len(array), float(array.mean()), float(((array - array.mean()) ** 2).sum()),
            float(array.min()), float(array.max()),
        )  # fmt: skip

    def merge(self, other: Sketch) -> None:
        """Take in all that `other` holds."""
        self._sketch.merge(other._sketch)
        self._take(other.count, other._mean, other._squares, other.low, other.high)

    def _take(self, count: int, mean: float, squares: float, low: float, high: float) -> None:
        """Moments of two parts put together (Chan, Golub, LeVeque 1979)."""
        total = self.count + count
        if total:
            away = mean - self._mean
            self._squares += squares + away**2 * self.count * count / total
            self._mean += away * count / total
        self.count = total
        self.low, self.high = min(self.low, low), max(self.high, high)

    def order(self, rank: int) -> float:
        """The order statistic of rank 0 to count - 1, within the relative error; the extremes are exact."""
        if rank <= 0:
            return self.low
        if rank >= self.count - 1:
            return self.high
        # Half a rank up, so that no rounding of rank / (count - 1) falls below it.
        found = self._sketch.get_quantile_value((rank + 0.25) / (self.count - 1))
        assert found is not None
        return min(max(float(found), self.low), self.high)

    def percentile(self, p: float) -> float:
        """Linear between order statistics, as for whole samples."""
        place = p / 100 * (self.count - 1)
        below = math.floor(place)
        share = place - below
        return (1 - share) * self.order(below) + (share * self.order(below + 1) if share else 0.0)

    def distribution(self, *, scale: float = 1000.0) -> Distribution:
        """The same facts as `bench.records.distribution`, and the percentiles' relative error."""
        if not self.count:
            return Distribution(count=0)
        found = {}
        for p in PERCENTILES:
            low, high = (None if r is None else self.order(r) * scale for r in interval_ranks(self.count, p))
            found[f"p{p}"] = Percentile(self.percentile(p) * scale, low, high)
        facts = Distribution(
            count=self.count,
            mean=self._mean * scale,
            std=math.sqrt(self._squares / (self.count - 1)) * scale if self.count > 1 else None,
            min=self.low * scale,
            max=self.high * scale,
            relative_error=RELATIVE_ERROR,
        )
        return facts.changed(**found)


FIGURES = ("ttft", "ttft_answer", "tpot", "itl", "e2e", "queue", "connect")
COUNTS = ("prompt", "cached", "output", "reasoning")


@dataclass
class Tally:
    """What one client saw, in a form that adds up: sketches, counts, and when it was under load.

    `tokens` are sums, `known` of how many answers they are: a sum of some answers only is no figure. `began` and
    `ended` are seconds on the clock that all clients share.
    """

    bounds: dict[str, float] = field(default_factory=dict)
    requests: int = 0
    answered: int = 0
    met: int = 0
    limited: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    known: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    compared: int = 0
    compared_total: int = 0
    compared_differ: int = 0
    odd: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ODD, 0))
    models: dict[str, int] = field(default_factory=dict)
    began: float = math.inf
    ended: float = -math.inf
    sketches: dict[str, Sketch] = field(default_factory=lambda: {name: Sketch() for name in FIGURES})

    @classmethod
    def of(cls, records: Sequence[RequestRecord], slo: Slo, began: float, ended: float) -> Tally:
        """The tally of one client's requests."""
        tally = cls(bounds=bounds_of(slo), began=began, ended=ended)
        good = [r for r in records if r.ok]
        tally.requests, tally.answered = len(records), len(good)
        tally.met = sum(meets(r, tally.bounds) for r in records)
        tally.limited = sum(r.finish == "length" for r in good)
        tally.errors = dict(Counter(r.error for r in records if r.error))
        tally.odd, tally.models = odd_counts(good), dict(Counter(r.model for r in good if r.model))
        for name in COUNTS:
            counts = [c for r in good if (c := getattr(r, f"{name}_tokens")) is not None]
            tally.tokens[name], tally.known[name] = sum(counts), len(counts)
        theirs = [
            r.server_tokens - r.output_tokens
            for r in good
            if r.server_tokens is not None and r.output_tokens is not None
        ]
        tally.compared, tally.compared_total = len(theirs), sum(theirs)
        tally.compared_differ = sum(t != 0 for t in theirs)
        for name in ("ttft", "ttft_answer", "tpot", "queue"):
            tally.sketches[name].add(getattr(r, name) for r in good)
        tally.sketches["e2e"].add(r.seconds for r in good)
        tally.sketches["itl"].add(gap for r in good for gap in r.gaps)
        tally.sketches["connect"].add(r.connect for r in records if r.connect is not None)
        return tally

    def merge(self, other: Tally) -> None:
        """Add another client's tally."""
        for name in (
            "requests",
            "answered",
            "met",
            "limited",
            "compared",
            "compared_total",
            "compared_differ",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in (
            (self.errors, other.errors),
            (self.odd, other.odd),
            (self.models, other.models),
        ):
            for kind, count in theirs.items():
                mine[kind] = mine.get(kind, 0) + count
        for name in COUNTS:
            self.tokens[name] += other.tokens[name]
            self.known[name] += other.known[name]
        self.bounds = self.bounds or other.bounds
        self.began, self.ended = min(self.began, other.began), max(self.ended, other.ended)
        for name, sketch in self.sketches.items():
            sketch.merge(other.sketches[name])

    def figures(self) -> Figures:
        """The same facts as `bench.records.summarise`."""
        seconds = max(0.0, self.ended - self.began) if self.requests else 0.0
        counts = {
            name: self.tokens[name] if self.answered and self.known[name] == self.answered else None
            for name in COUNTS
        }
        if self.known["cached"]:
            counts["cached"] = self.tokens["cached"]
        spread = {f"{name}_ms": sketch.distribution() for name, sketch in self.sketches.items()}
        figures = Figures(
            requests=self.requests,
            answered=self.answered,
            errors=dict(self.errors),
            error_rate=1 - self.answered / self.requests if self.requests else 0.0,
            seconds=seconds,
            tokens=token_means(max(1, self.answered), **counts),
            requests_per_second=rate(self.answered, seconds),
            input_tokens_per_second=rate(counts["prompt"], seconds),
            output_tokens_per_second=rate(counts["output"], seconds),
            stopped_at_limit=self.limited,
            **self.odd,  # type: ignore[arg-type]
            models=dict(self.models),
            server_minus_our_tokens=token_difference(
                self.compared, self.compared_total, self.compared_differ
            ),
            goodput=goodput(self.met, self.requests, seconds, self.bounds) if self.bounds else None,
            **dict.fromkeys(spread, Distribution(count=0)),  # type: ignore[arg-type]
        )
        return figures.changed(**spread)
