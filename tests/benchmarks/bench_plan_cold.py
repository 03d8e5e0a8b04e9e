"""Cold start of `unshot plan`: wall time of a fresh process, what it imports, against `python -c pass`.

    python tests/benchmarks/bench_plan_cold.py [--runs 15]

Target: under 0.6 s, torch never imported. `first` counts tokens and reads prices anew (UNSHOT_NO_CACHE=1), `again`
takes them over from an earlier run of the same case. Other load on the machine shows in the median; the smallest is
the machine's own figure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TARGET_S = 0.6


def timed(command: list[str], runs: int, **extra: str) -> dict[str, float]:
    """Wall seconds (smallest and median) and CPU seconds (median) of a command."""
    wall, cpu = [], []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "UNSHOT_OFFLINE": "1", **extra}
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            sys.exit(done.stderr)
    return {"min_s": min(wall), "median_s": statistics.median(wall), "cpu_median_s": statistics.median(cpu)}


def files(folder: Path) -> dict[str, list[str]]:
    """Two cases: the embedded model on a CPU, and an API baseline against an 8B model on a GPU."""
    shots = [
        {
            "prompt": f"Clause {i}: either party may end this agreement on {i} days' notice.",
            "completion": "termination",
        }
        for i in range(24)
    ]
    (folder / "shots.jsonl").write_text("".join(json.dumps(s) + "\n" for s in shots), encoding="utf-8")
    common = ["--prompt", str(folder / "shots.jsonl"), "--rate", "5", "--json", "-q"]
    plan = [sys.executable, "-m", "unshot", "plan"]
    small = ["--model", "smollm2-135m"]
    return {
        "embedded model on cpu": [*plan, *common, *small, "--baseline-model", "smollm2-135m", "--gpu", "cpu"],
        "gpt-4 against smollm2-135m on l4": [*plan, *common, *small, "--baseline", "gpt-4", "--gpu", "l4"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    result: dict[str, object] = {"python -c pass": timed([sys.executable, "-c", "pass"], runs)}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in files(Path(folder)).items():
            first = timed(command, runs, UNSHOT_NO_CACHE="1")
            again = timed(command, runs)
            result[name] = {"first": first, "again": again}
            probe = [sys.executable, "-X", "importtime", *command[1:]]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "UNSHOT_OFFLINE": "1"}
            text = subprocess.run(probe, cwd=ROOT, env=environment, capture_output=True, text=True).stderr
            modules = {line.rsplit("|", 1)[-1].strip() for line in text.splitlines() if "|" in line}
            result[f"{name}: modules"] = len(modules)
            heavy = sorted({"torch", "transformers", "onnxruntime", "scipy", "huggingface_hub"} & modules)
            result[f"{name}: heavy imports"] = heavy
            result[f"{name}: under {TARGET_S} s"] = {
                "first": first["min_s"] < TARGET_S,
                "again": again["min_s"] < TARGET_S,
            }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
