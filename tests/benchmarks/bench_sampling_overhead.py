"""What watching memory and power costs a run: the same request with and without the watching thread, in turn.

Run: python -m tests.benchmarks.bench_sampling_overhead [PAIRS]
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext

import numpy as np

from bench.resources import Monitor
from unshot import embedded
from unshot.engines.llama_cpp import GgufEngine
from unshot.metrics.ratios import ratio_of_means


def main() -> None:
    """Print the ratio of the times with and without, and the CPU time of one look."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    engine = GgufEngine(str(embedded.gguf_path()), threads=1)
    ids = np.random.default_rng(0).integers(100, engine.vocabulary - 100, size=64).tolist()
    times: dict[bool, list[float]] = {True: [], False: []}
    looks = cpu = 0.0
    for i in range(pairs + 2):
        for watched in (True, False) if i % 2 else (False, True):
            monitor = Monitor({"this": os.getpid()}) if watched else None
            with monitor or nullcontext():
                began = time.perf_counter()
                engine.generate(ids, max_tokens=48, stop_ids=(), prefix_cache=False)
                took = time.perf_counter() - began
            if i > 1:
                times[watched].append(took)
                if monitor:
                    facts = monitor.facts()
                    looks, cpu = looks + facts.samples, cpu + facts.sampling_cpu_seconds
    ratio = ratio_of_means(times[True], times[False])
    print(
        f"with / without watching: {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] over {pairs} pairs of "
        f"{np.median(times[False]) * 1000:.0f} ms; {cpu / looks * 1e6:.0f} us of CPU a look, {looks:.0f} looks"
    )
    engine.close()


if __name__ == "__main__":
    main()
