"""The correction of the waiting formulas: a factor by percentile, from weights fitted to the simulation.

`planner.waiting_fit` draws loads, simulates them and writes the weights (`unshot/catalog/waiting.json`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

Number = Any
LARGEST = 1.0  # of the logarithm of a factor: further off the formula is not corrected but wrong
_Z = (0.0, 1.6448536, 2.3263479)


def products(signs: Number) -> Number:
    """One, the signs (k, ...) and their pairwise products: shape (1 + k + k (k + 1) / 2, ...)."""
    first, second = np.triu_indices(len(signs))
    return np.concatenate([np.ones_like(signs[:1]), signs, signs[first] * signs[second]])


@functools.cache
def weights() -> dict[str, np.ndarray] | None:
    """Centre and width of the signs and the weights by figure; None where they were never fitted."""
    from unshot import catalog

    path = Path(catalog.__file__).parent / "waiting.json"
    if not path.is_file():
        return None
    raw = json.loads(path.read_bytes())
    found = {name: np.array(values) for name, values in raw["weights"].items()}
    return {"centre": np.array(raw["centre"]), "width": np.array(raw["width"]), **found}


class Correction:
    """Factors on a closed-form latency. `signs` has shape (k, ...); nothing is changed without weights."""

    def __init__(self, signs: Number) -> None:
        self.weights = weights()
        if self.weights is None:
            return
        tail = (1,) * (signs.ndim - 1)
        unit = (signs - self.weights["centre"].reshape(-1, *tail)) / self.weights["width"].reshape(-1, *tail)
        # Outside of what was simulated the nearest simulated load answers.
        self.table = products(np.clip(unit, -3.0, 3.0))

    def _log(self, name: str) -> Number:
        assert self.weights is not None
        return np.clip(np.tensordot(self.weights[name], self.table, axes=1), -LARGEST, LARGEST)

    def mean(self, measure: str) -> Number:
        """Factor on the mean of `ttft` or `e2e`."""
        return 1.0 if self.weights is None else np.exp(self._log(f"{measure}_mean"))

    def at(self, measure: str, z: float) -> Number:
        """Factor on the percentile at `z` standard normal deviations (between the fitted ones a straight line)."""
        if self.weights is None:
            return 1.0
        names = [f"{measure}_{p}" for p in ("p50", "p95", "p99")]
        if z <= _Z[0] or z >= _Z[2]:
            return np.exp(self._log(names[0] if z <= _Z[0] else names[2]))
        i = 0 if z <= _Z[1] else 1
        share = (z - _Z[i]) / (_Z[i + 1] - _Z[i])
        below = self._log(names[i]) if share < 1.0 else 0.0
        above = self._log(names[i + 1]) if share > 0.0 else 0.0
        return np.exp((1.0 - share) * below + share * above)
