"""kill -9 at random moments of an export: never a wrong file under the final name, and the rerun finishes.

Run: python tests/benchmarks/kill_export.py FOLDER [--times 50] [--to gguf:q8_0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--to", action="append")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.export_cases import make_run
    from tests.tiny_models import make
    from unshot.contracts.manifest import read_manifest

    work = options.folder.resolve()
    run = make_run(make("llama", work / "base"), work / "run")
    out = work / "art"
    targets = [x for t in options.to or ["gguf:q8_0", "gguf:f32"] for x in ("--to", t)]
    command = [sys.executable, "-m", "unshot", "export", str(run), *targets, "--out", str(out), "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = time.monotonic()
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    whole = time.monotonic() - begun
    expected = {k: v["sha256"] for k, v in read_manifest(out).outputs.items() if k.endswith(".gguf")}
    shutil.rmtree(out)
    generator = random.Random(0)
    counts = {"nothing": 0, "partial kept aside": 0, "complete": 0, "wrong": 0}
    for _ in range(options.times):
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(generator.uniform(0.0, 1.05) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            found = {k: v["sha256"] for k, v in read_manifest(out).outputs.items() if k.endswith(".gguf")}
            counts["complete" if found == expected else "wrong"] += 1
            shutil.rmtree(out)
        elif (work / ".art.partial").exists():
            counts["partial kept aside"] += 1
        else:
            counts["nothing"] += 1
    last = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
    found = {k: v["sha256"] for k, v in read_manifest(out).outputs.items() if k.endswith(".gguf")}
    left = [p.name for p in work.glob(".art*") if p.name.endswith(".partial")]
    result = {
        "times": options.times,
        **counts,
        "rerun_exit": last,
        "rerun_equal": found == expected,
        "left": left,
    }
    print(json.dumps({**result, "seconds_of_one": round(whole, 1)}))


if __name__ == "__main__":
    main()
