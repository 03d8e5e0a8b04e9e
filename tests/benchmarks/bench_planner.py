"""Timings of the planner's performance half: `python -m tests.benchmarks.bench_planner [--json]`.

Targets: a sweep of 100,000 points under 2 s, a simulation of 100,000 requests under 5 s, one forecast far below a
second.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from msgspec.structs import replace

from planner.capacity import forecast
from planner.replica import Load, setup
from planner.simulate import simulate
from planner.sweep import sweep


def timed(call) -> tuple[float, object]:  # type: ignore[no-untyped-def]
    """Seconds of the fastest of three calls, and the result."""
    best, result = float("inf"), None
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    models = [
        "llama-2-7b", "llama-2-13b", "llama-3.1-8b", "mistral-7b", "mistral-nemo-12b", "qwen2.5-7b", "qwen2.5-14b",
        "qwen3-8b", "gemma-2-9b", "phi-4",
    ]  # fmt: skip
    gpus = ["t4", "l4", "a10g", "l40s", "rtx-3090", "rtx-4090", "a40", "a100-sxm-80", "h100-sxm", "h200"]
    prompts, rates = list(np.linspace(200, 4000, 10)), list(np.geomspace(0.05, 200, 25))
    seconds, result = timed(
        lambda: sweep(models, gpus, ["fp16", "fp8", "int8", "int4"], prompts, rates, output_tokens=128)
    )
    rows = [("sweep, points", int(result.ttft.size), seconds, 2.0)]  # type: ignore[attr-defined]
    load = Load(1.0, 2000, 200)
    one = setup("llama-3.1-8b", "h100-sxm", "fp16", load)
    for rate in (3.0, 10.0):
        busy = replace(load, rate=rate)
        seconds, _ = timed(lambda busy=busy: simulate(one, busy, requests=100_000))
        rows.append((f"simulation at {rate:g}/s, requests", 100_000, seconds, 5.0))
    seconds, _ = timed(lambda: forecast(setup("llama-3.1-8b", "h100-sxm", "fp16", load), load))
    rows.append(("one forecast", 1, seconds, 0.05))
    if arguments.json:
        print(
            json.dumps(
                [{"what": w, "count": n, "seconds": s, "target_s": t} for w, n, s, t in rows], indent=2
            )
        )
        return
    for what, count, seconds, target in rows:
        print(
            f"{what:32s} {count:9,d}  {seconds:8.3f} s  (target {target:g} s) {'ok' if seconds < target else 'SLOW'}"
        )


if __name__ == "__main__":
    main()
