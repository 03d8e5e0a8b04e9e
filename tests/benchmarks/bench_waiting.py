"""p95 time to first token, closed form against simulation, on loads drawn at random by seed.

    python -m tests.benchmarks.bench_waiting [--loads 30] [--seed 7] [--bursty] [--workers 2]

The seed is not among those that the correction was fitted on (`planner.waiting_fit`). `noise` is the standard error of
the simulated p95 over its seeds.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

import numpy as np

from planner import queueing
from planner.capacity import forecast
from planner.simulate import simulate
from planner.waiting_fit import Drawn, draw

# Utilisation: requests of one simulation, and how many seeds.
RUNS = {0.3: (30_000, 2), 0.6: (40_000, 2), 0.85: (100_000, 3)}


def judge(drawn: Drawn) -> list[dict[str, object]]:
    """One load at each utilisation."""
    rows: list[dict[str, object]] = []
    for share, (requests, seeds) in RUNS.items():
        load = drawn.at(share)
        one = drawn.setup()
        seen = [simulate(one, load, requests=requests, seed=s).quantiles("ttft").p95 for s in range(seeds)]
        mean = float(np.mean(seen))
        plain = queueing.respond(one.cost, one.shape(load), load.rate, (95.0,), correct=False)
        rows.append(
            {
                "load": f"{drawn.model} {drawn.precision} {drawn.gpu} {load.prompt_tokens:g}/{load.output_tokens:g} "
                f"cv {load.prompt_cv:g}/{load.output_cv:g}/{load.arrival_cv:g} slots {one.max_batch}",
                "utilisation": share,
                "simulated_s": mean,
                "noise": float(np.std(seen, ddof=1) / mean / seeds**0.5),
                "error": forecast(one, load).ttft.p95 / mean - 1.0,
                "uncorrected": float(plain.ttft[95.0]) / mean - 1.0,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=30)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--bursty", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    loads = list(islice(draw(given.seed, bursty=given.bursty), given.loads))
    with ProcessPoolExecutor(given.workers) as pool:
        rows = [row for found in pool.map(judge, loads) for row in found]
    for row in sorted(rows, key=lambda r: -abs(r["error"]))[:10]:  # type: ignore[arg-type]
        print(json.dumps(row))
    for share in RUNS:
        at = [row for row in rows if row["utilisation"] == share]
        for name in ("uncorrected", "error"):
            error = np.abs([row[name] for row in at])
            print(
                f"{share:.0%} {name:12s} median {np.median(error):.1%}  within 10% {np.mean(error <= 0.1):.0%}  "
                f"p90 {np.quantile(error, 0.9):.0%}  noise median {np.median([r['noise'] for r in at]):.1%}"  # type: ignore[misc]
            )


if __name__ == "__main__":
    main()
