"""How often the interval of a ratio of means holds the truth under shared noise, and how often `met` is said wrongly.

Run: python -m tests.benchmarks.bench_ratio_coverage [TRIALS]
"""

from __future__ import annotations

import sys

import numpy as np

from tests.test_bench_stats import shared_noise
from unshot.metrics.intervals import MET
from unshot.metrics.ratios import ratio_of_means

SPREADS = {"rows and blocks": (0.3, 0.2, 0.1), "blocks": (0.0, 0.3, 0.1), "rows": (0.3, 0.0, 0.2)}


def main() -> None:
    """Print coverage and false `met` by rows x repeats, block size and what is shared, as a Markdown table."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print("| rows x repeats | block | " + " | ".join(f"noise of {name}" for name in SPREADS) + " |")
    print("|---|---|" + "---|" * len(SPREADS))
    for rows, repeats in ((64, 1), (256, 1), (8, 8), (8, 32), (35, 10)):
        for block in (1, 4, 16):
            cells = []
            for spread in SPREADS.values():
                generator = np.random.default_rng([rows, repeats, block])
                covered = wrong = 0
                for _ in range(trials):
                    ratio = ratio_of_means(
                        *shared_noise(generator, rows, repeats, block, ratio=5.0, spread=spread)
                    )
                    covered += ratio.low <= 5.0 <= ratio.high
                    wrong += ratio.verdict(5.0 * (1 + 1e-9)) == MET
                cells.append(f"{covered / trials:.1%}, {wrong / trials:.1%}")
            print(f"| {rows} x {repeats} | {block} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
