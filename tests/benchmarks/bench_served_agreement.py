"""The same two files measured in this process and by a local server: do the ratios and the verdict agree?

Run: python -m tests.benchmarks.bench_served_agreement DEMO [--cold-requests 6] [--rows N] [--threads N]
DEMO is the directory of `unshot demo`. Both runs ask the same rows; the server is `serve:gguf:`'s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.records import SIDES
from bench.summary import ratio
from unshot.contracts.report import BenchReport


def measure(demo: Path, folder: Path, prefix: str, options: argparse.Namespace) -> BenchReport:
    """The report of one run."""
    command = [
        sys.executable, "-m", "unshot", "bench", "--case", str(demo / "case" / "unshot.toml"),
        "--baseline", f"{prefix}gguf:{demo / 'baseline' / 'model-q8_0.gguf'}",
        "--candidate", f"{prefix}gguf:{demo / 'artifacts' / 'model-q8_0.gguf'}",
        "--data", str(demo / "run" / "splits" / "test.jsonl"), "--task", str(demo / "run" / "task.json"),
        "--cold-requests", str(options.cold_requests), "--out", str(folder / "report"), "-q", "--json",
        *(["--threads", str(options.threads)] if options.threads else []),
        *(["--rows", str(options.rows), "--requests", str(options.rows)] if options.rows else []),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    return BenchReport.read(folder / "report")


def main() -> None:
    """Print both ratios a mode, whether their intervals overlap, and what a request costs more over the server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("demo", type=Path)
    parser.add_argument("--cold-requests", type=int, default=6)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    reports = {}
    for name, prefix in (("in process", ""), ("served", "serve:")):
        with tempfile.TemporaryDirectory() as folder:
            reports[name] = measure(options.demo, Path(folder), prefix, options)
        speeds = {mode: ratio(facts.claim.speed) for mode, facts in reports[name].modes.items()}
        print(f"{name}: {speeds}", flush=True)
    for mode in reports["in process"].modes:
        facts = {name: r.modes[mode] for name, r in reports.items()}
        a, b = (facts[name].claim.speed for name in facts)
        overlap = a.low <= (b.high or float("inf")) and b.low <= (a.high or float("inf"))
        print(
            f"{mode}: in process {ratio(a)}, served {ratio(b)}, intervals {'overlap' if overlap else 'DIFFER'}"
        )
        for side in SIDES:
            for figure in ("ttft_ms", "tpot_ms", "e2e_ms"):
                x, y = (getattr(facts[name].side(side), figure).p50.value for name in facts)
                print(f"  {side} {figure} p50: {x:.1f} in process, {y:.1f} served ({y - x:+.1f})")
    for name, report in reports.items():
        scores = ", ".join(f"{s} {report.quality.side(s).score:.3f}" for s in SIDES)
        print(f"{name}: {report.verdict} ({report.reason}); {report.quality.metric} {scores}")


if __name__ == "__main__":
    main()
