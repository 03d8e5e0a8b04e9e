"""Open loop at 1,000 requests a second on loopback: ours, and guidellm and aiperf where they are installed.

Run: python -m tests.benchmarks.bench_open_loop [--rate 1000] [--seconds 5] [--guidellm DIR] [--aiperf DIR]
DIR is where `pip install --target DIR guidellm` put it, so that its versions do not touch this environment.

Seen from the server, the same for every tool: achieved rate; how irregular the requests arrive (arrival minus its
place in a perfect schedule that starts with the earliest); CPU seconds of the whole process tree per 1,000 requests,
without start-up (the difference between a short and a long run).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from tests.golden import golden_server
from unshot import embedded


def command(tool: str, url: str, rate: int, count: int, folder: Path) -> list[str]:
    """The tool's command line for one open-loop run at a constant rate."""
    if tool.startswith("unshot"):
        processes = tool.partition(" x")[2] or "1"
        return [
            sys.executable, "-m", "unshot", "bench", "load", url, "--load", f"constant:{rate}",
            "--requests", str(count), "--processes", processes, "--warm-up", "0",
            "--out", str(folder / "unshot"), "-q", "--prompt-words", "32",
        ]  # fmt: skip
    tokenizer = str(embedded.ensure())
    if tool == "guidellm":
        return [
            sys.executable, "-m", "guidellm", "run",
            "--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model=golden",
            "--profile", f"kind=constant,rate={rate}", "--constraint", f"kind=max_requests,count={count}",
            "--tokenizer", f"kind=hf_auto,model={tokenizer}",
            "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=5",
            "--output", f"kind=json,path={folder / 'guidellm.json'}", "--disable-console",
        ]  # fmt: skip
    return [
        sys.executable, "-m", "aiperf", "profile", "-m", "golden", "-u", url.removesuffix("/v1"), "--streaming",
        "--endpoint-type", "chat", "--request-rate", str(rate), "--arrival-pattern", "constant",
        "--request-count", str(count), "--tokenizer", os.environ.get("BENCH_TOKENIZER", "builtin"),
        "--isl", "40", "--osl", "5",
        "--artifact-dir", str(folder / "aiperf"), "--ui", "none",
    ]  # fmt: skip


def measure(tool: str, url: str, rate: int, count: int, path: Path | None) -> tuple[np.ndarray, float]:
    """Arrival times at the server, and CPU seconds of the tool's processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command(tool, url, rate, count, Path(folder)),
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with urllib.request.urlopen(f"{url}/log") as response:
        arrivals = np.sort(np.asarray(json.load(response), dtype=float))
    if len(arrivals) < count // 2:
        raise SystemExit(f"{tool}: {len(arrivals)} requests arrived; {(done.stderr or done.stdout)[-600:]}")
    return arrivals, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print one line a tool."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--guidellm", type=Path)
    parser.add_argument("--aiperf", type=Path)
    parser.add_argument("--others-only", action="store_true")
    options = parser.parse_args()
    tools: list[tuple[str, Path | None]] = [("unshot", None), ("unshot x2", None)]
    tools = [] if options.others_only else tools
    tools += [(name, path) for name in ("guidellm", "aiperf") if (path := getattr(options, name))]
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with golden_server(ttft_ms=10, itl_ms=5, tokens=5) as url:
        for tool, path in tools:
            count = options.rate * options.seconds
            _, idle = measure(tool, url, options.rate, options.rate // 2, path)
            arrivals, busy = measure(tool, url, options.rate, count, path)
            arrivals = arrivals[-count:]
            place = arrivals - np.arange(len(arrivals)) / options.rate
            late = (place - place.min()) * 1000
            achieved = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
            cpu = (busy - idle) / (count - options.rate // 2) * 1000
            print(
                f"{tool:10s} achieved {achieved:7.1f}/s of {options.rate}, arrivals late p50 {np.median(late):8.2f} ms "
                f"p99 {np.percentile(late, 99):8.2f} ms, CPU {cpu:.3f} s per 1,000 requests",
                flush=True,
            )


if __name__ == "__main__":
    main()
