"""Timings of the planner: `python -m tests.benchmarks.bench_planner [--plan]`.

100,000 simulated requests, and the sizing of ten options with an SLO; with `--plan` a new process of `unshot plan`,
first (empty cache) and repeated, nine runs each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from planner.latency.replica import Load, Slo, replica
from planner.latency.simulate import simulate
from planner.latency.sizing import rate_within, simulated
from tests.planner_files import few_shot, inputs, model_folder

GPUS = ("l4", "a10g", "l40s", "a100-sxm-80", "h100-sxm")


def timed(call: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ten_options() -> None:
    """Size and simulate ten options: five GPUs, the long prompt and the short one."""
    os.environ["UNSHOT_NO_CACHE"] = "1"
    for gpu in GPUS:
        for prompt in (2000.0, 150.0):
            load = Load(5.0, prompt, 60.0)
            one = replica("llama-3.1-8b", gpu, "fp16", load)
            rate = rate_within(one, load, Slo(ttft=1.0, e2e=6.0)).rate
            if rate > 0:
                simulated(one, replace(load, rate=0.8 * rate))


def plan_seconds() -> tuple[list[float], list[float]]:
    """Seconds of `unshot plan` in a new process, with an empty cache and again."""
    first, again = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = few_shot(folder / "f.jsonl", 40), inputs(folder / "i.jsonl"), model_folder(folder / "model")
        command = [
            sys.executable, "-m", "unshot", "plan", "--prompt", str(files[0]), "--inputs", str(files[1]),
            "--rate", "20", "--baseline", "gpt-4.1", "--approximate", "--tokenizer", f"llama-3.1-8b={files[2]}",
            "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--gpu", "l4", "--slo-ttft", "500",
        ]  # fmt: skip
        for run in range(9):
            environment = {**os.environ, "UNSHOT_CACHE": str(folder / f"cache{run}"), "UNSHOT_OFFLINE": "1"}
            environment.pop("UNSHOT_NO_CACHE", None)
            for seconds in (first, again):
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                seconds.append(time.perf_counter() - start)
    return first, again


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", action="store_true")
    load = Load(3.0, 2000.0, 200.0)
    one = replica("llama-3.1-8b", "h100-sxm", "fp16", load)
    print(f"100,000 simulated requests: {timed(lambda: simulate(one, load, requests=100_000)):.2f} s")
    print(f"ten options sized and simulated: {timed(ten_options):.2f} s")
    if parser.parse_args().plan:
        for name, seconds in zip(("first", "repeated"), plan_seconds(), strict=True):
            print(
                f"unshot plan, {name}: median {statistics.median(seconds):.2f} s, {min(seconds):.2f} at best"
            )


if __name__ == "__main__":
    main()
