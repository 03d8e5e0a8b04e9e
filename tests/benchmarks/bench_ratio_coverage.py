"""How often the ratio's interval holds the truth, and how often `met` is said wrongly.

Run: python -m tests.benchmarks.bench_ratio_coverage [TRIALS]
"""

from __future__ import annotations

import sys

import numpy as np

from bench import claim as claims
from tests.test_bench_stats import service_times
from unshot.metrics.intervals import MET, bootstrap_ratio, fieller


def main() -> None:
    """Print coverage and false `met` by true ratio and number of pairs."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    real = bootstrap_ratio
    claims.bootstrap_ratio = lambda a, b, seed=0: real(a, b, draws=1000, seed=seed)  # type: ignore[assignment,misc]
    print("pairs ratio  fieller  bootstrap  used   met wrongly")
    for pairs in (8, 24, 70):
        for truth in (1.0, 3.0, 5.0, 10.0):
            a, b = service_times(np.random.default_rng(int(truth * 100 + pairs)), pairs, truth, trials=trials)
            hits = np.zeros(4)
            for i in range(trials):
                used = claims.widest(a[i], b[i], seed=i)
                plain, boot = fieller(a[i], b[i]), real(a[i], b[i], draws=1000, seed=i)
                hits += [
                    plain.low <= truth <= plain.high,
                    boot.low <= truth <= boot.high,
                    used.low <= truth <= used.high,
                    used.verdict(truth * 1.0001) == MET,
                ]
            share = hits / trials
            print(f"{pairs:5d} {truth:5g}  {share[0]:7.3f}  {share[1]:9.3f}  {share[2]:.3f}  {share[3]:.3f}")


if __name__ == "__main__":
    main()
