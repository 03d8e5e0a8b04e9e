"""The correction of the waiting formulas: a factor by figure, from a few small networks fitted to the simulation.

`planner.waiting_fit` draws loads, simulates them and writes the weights (`unshot/catalog/waiting.json`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

Number = Any
MEASURES = ("ttft", "e2e", "tpot")
FIGURES = tuple(f"{measure}_{name}" for measure in MEASURES for name in ("mean", "p50", "p95", "p99"))
LARGEST = 1.5  # of the logarithm of a factor: further off the formula is not corrected but wrong
_Z = (0.0, 1.6448536, 2.3263479)


@functools.cache
def weights() -> dict[str, np.ndarray] | None:
    """Centre and width of the signs, and the layers; None where they were never fitted.

    `w1` (members, hidden, signs), `b1` (members, hidden), `w2`, `b2`, and `w3`, `b3` to one logarithm for each of
    `FIGURES`; the members' mean is the answer.
    """
    from unshot import catalog

    path = Path(catalog.__file__).parent / "waiting.json"
    if not path.is_file():
        return None
    raw = json.loads(path.read_bytes())
    names = ("centre", "width", "w1", "b1", "w2", "b2", "w3", "b3")
    return {name: np.array(raw[name], dtype=np.float32) for name in names}


def unit(signs: Number, centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Signs (k, points) brought to a common scale; outside of what was simulated the nearest simulated load answers."""
    scaled: np.ndarray = np.clip((signs - centre[:, None]) / width[:, None], -3.0, 3.0)
    return scaled


def run(net: dict[str, np.ndarray], scaled: np.ndarray) -> np.ndarray:
    """The networks' mean, shape (figures, points), on scaled signs (k, points)."""
    total = np.zeros((len(FIGURES), scaled.shape[1]), dtype=np.float32)
    for i in range(len(net["w1"])):
        hidden = np.tanh(net["w1"][i] @ scaled + net["b1"][i][:, None])
        hidden = np.tanh(net["w2"][i] @ hidden + net["b2"][i][:, None])
        total += net["w3"][i] @ hidden + net["b3"][i][:, None]
    return total / len(net["w1"])


class Correction:
    """Factors on closed-form latencies. `signs` has shape (k, ...); nothing is changed without weights."""

    def __init__(self, signs: Number) -> None:
        net = weights()
        self.logs: dict[str, np.ndarray] | None = None
        if net is None:
            return
        shape = signs.shape[1:]
        flat = unit(signs.reshape(len(signs), -1).astype(np.float32), net["centre"], net["width"])
        found = np.clip(run(net, flat), -LARGEST, LARGEST)
        self.logs = {name: row.astype(float).reshape(shape) for name, row in zip(FIGURES, found, strict=True)}

    def mean(self, measure: str) -> Number:
        """Factor on the mean of one of `MEASURES`."""
        return 1.0 if self.logs is None else np.exp(self.logs[f"{measure}_mean"])

    def at(self, measure: str, z: float) -> Number:
        """Factor on the percentile at `z` standard normal deviations (between the fitted ones a straight line)."""
        if self.logs is None:
            return 1.0
        rows = [self.logs[f"{measure}_{p}"] for p in ("p50", "p95", "p99")]
        if z <= _Z[0] or z >= _Z[2]:
            return np.exp(rows[0] if z <= _Z[0] else rows[2])
        i = 0 if z <= _Z[1] else 1
        share = (z - _Z[i]) / (_Z[i + 1] - _Z[i])
        return np.exp((1.0 - share) * rows[i] + share * rows[i + 1])
