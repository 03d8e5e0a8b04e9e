"""When requests are sent: closed loop, or open loop at constant, Poisson or gamma intervals, or by a trace."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unshot.data.rows import read_text
from unshot.errors import InputError, nearest

FORMS = {
    "closed": "closed:CONCURRENCY",
    "constant": "constant:RATE",
    "poisson": "poisson:RATE",
    "gamma": "gamma:RATE:CV",
    "trace": "trace:FILE",
}


@dataclass(frozen=True)
class Load:
    """A parsed load. `rate` is requests a second, `cv` the coefficient of variation of the intervals."""

    kind: str
    concurrency: int = 0
    rate: float = 0.0
    cv: float = 1.0
    times: tuple[float, ...] = ()
    text: str = ""

    @property
    def open(self) -> bool:
        """Whether requests are sent by the clock, whatever the server does."""
        return self.kind != "closed"

    def most(self, seconds: float) -> int:
        """As many requests as an open loop may send within `seconds`, and some more."""
        if self.kind == "trace":
            return len(self.times)
        return int(self.rate * seconds * 1.5 + 10 * math.sqrt(self.rate * seconds) + 100)

    def arrivals(self, count: int, *, seed: int = 0) -> np.ndarray:
        """Scheduled times in seconds from the start, ascending, shape `(count,)` (a trace may hold fewer).

        The mean rate is `rate`; gamma intervals have shape 1/cv^2, so that cv above 1 makes bursts.
        """
        if self.kind == "trace":
            return np.asarray(self.times[:count])
        if self.kind == "constant":
            return np.arange(count) / self.rate
        generator = np.random.default_rng(seed)
        shape = 1.0 if self.kind == "poisson" else 1 / self.cv**2
        intervals = generator.gamma(shape, 1 / (self.rate * shape), size=count)
        times: np.ndarray = np.concatenate([[0.0], np.cumsum(intervals)[:-1]])
        return times


def parse_load(text: str) -> Load:
    """`closed:4`, `constant:10`, `poisson:10`, `gamma:10:2`, `trace:FILE`. Raises `InputError`."""
    kind, _, rest = text.partition(":")
    if kind not in FORMS:
        raise InputError(
            f"unknown load `{text}`; {nearest(kind, FORMS)} (forms: {', '.join(FORMS.values())})"
        )
    if kind == "trace":
        return Load(kind, times=_read_trace(Path(rest)), text=text)
    try:
        numbers = [float(part) for part in rest.split(":")]
        if len(numbers) != (2 if kind == "gamma" else 1) or not all(0 < n < float("inf") for n in numbers):
            raise ValueError
    except ValueError:
        raise InputError(f"load `{text}`: give {FORMS[kind]} with numbers above 0") from None
    if kind == "closed":
        if numbers[0] != int(numbers[0]):
            raise InputError(f"load `{text}`: the concurrency must be a whole number")
        return Load(kind, concurrency=int(numbers[0]), text=text)
    return Load(kind, rate=numbers[0], cv=numbers[1] if kind == "gamma" else 1.0, text=text)


def _read_trace(path: Path) -> tuple[float, ...]:
    """Send times in seconds: one number a line, or JSONL with `timestamp` (Mooncake's, in ms) or `time` (s)."""
    times = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                value = value["time"] if "time" in value else value["timestamp"] / 1000
            times.append(float(value))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}, line {number}: no send time; give a number of seconds, or JSON with `time` (seconds) or "
                "`timestamp` (milliseconds)"
            ) from None
    if not times:
        raise InputError(f"{path}: empty; it needs one send time a line")
    ordered = np.sort(np.asarray(times))
    if not np.isfinite(ordered).all():
        raise InputError(f"{path}: a send time is not a finite number")
    return tuple((ordered - ordered[0]).tolist())
