"""Cold start of `unshot plan`: wall time of a fresh process, what it imports, against `python -c pass`.

    python tests/benchmarks/bench_plan_cold.py [--runs 15]

Target: under 0.6 s, torch never imported. Each case is timed as `--json` and with its tables on the terminal (`again`),
with a prompt that was never counted (`new prompt`), and with an empty cache (`first run`: prices and catalogs are
read anew too; only the embedded model is there, as `unshot demo` leaves it). The runs take turns, so that a slow minute
of the machine meets all of them; other load shows in the median, the smallest is the machine's own figure. Bytecode is
compiled first, as installing a wheel does.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from unshot import embedded

ROOT = Path(__file__).parent.parent.parent
TARGET_S = 0.6
HEAVY = {"torch", "transformers", "onnxruntime", "scipy", "huggingface_hub", "pydantic"}


def once(command: list[str], **extra: str) -> tuple[float, str]:
    """Wall seconds of a command, and its stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "UNSHOT_OFFLINE": "1", **extra}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, done.stderr


def prompt(folder: Path, name: str) -> str:
    """A prompt of 24 short shots in which `name` stands once, so that another name makes a new prompt."""
    shots = [
        {
            "prompt": f"Clause {i} of {name}: either party may end this agreement on {i} days' notice.",
            "completion": "termination",
        }
        for i in range(24)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(s) + "\n" for s in shots), encoding="utf-8")
    return str(path)


CASES = {
    "embedded model on cpu": ["--baseline-model", "smollm2-135m", "--gpu", "cpu"],
    "gpt-4 against smollm2-135m on l4": ["--baseline", "gpt-4", "--gpu", "l4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    compileall.compile_dir(str(ROOT / "unshot"), quiet=1)
    compileall.compile_dir(str(ROOT / "planner"), quiet=1)
    model = embedded.ensure()
    times: dict[str, list[float]] = {}
    loaded: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        same = prompt(folder, "case")
        for number in range(runs + 1):
            turn = {"python -c pass": once([sys.executable, "-c", "pass"])[0]}
            new = prompt(folder, f"prompt{os.getpid()}x{number}")
            for case, flags in CASES.items():
                plan = [
                    sys.executable,
                    "-m",
                    "unshot",
                    "plan",
                    *flags,
                    "--model",
                    "smollm2-135m",
                    "--rate",
                    "5",
                ]
                turn[f"{case}: again"] = once([*plan, "--prompt", same, "--json", "-q"])[0]
                turn[f"{case}: again, tables"] = once([*plan, "--prompt", same])[0]
                turn[f"{case}: new prompt"] = once([*plan, "--prompt", new, "--json", "-q"])[0]
                cache = Path(tempfile.mkdtemp(dir=folder))
                (cache / model.name).symlink_to(model)
                first = once([*plan, "--prompt", same, "--json", "-q"], UNSHOT_CACHE=str(cache))[0]
                turn[f"{case}: first run"] = first
                if not number:
                    probe = [plan[0], "-X", "importtime", *plan[1:], "--prompt", same, "--json", "-q"]
                    lines = once(probe)[1].splitlines()
                    modules = {line.rsplit("|", 1)[-1].strip() for line in lines if "|" in line}
                    loaded[case] = {"modules": len(modules), "heavy": sorted(HEAVY & modules)}
            if number:  # the first turn warms the disk and the caches
                for name, seconds in turn.items():
                    times.setdefault(name, []).append(seconds)
    result = {
        name: {
            "min_s": round(min(seconds), 3),
            "median_s": round(statistics.median(seconds), 3),
            f"under {TARGET_S} s": f"{sum(x < TARGET_S for x in seconds)} of {runs}",
        }
        for name, seconds in times.items()
    }
    print(json.dumps({"seconds": result, "imports": loaded}, indent=2))


if __name__ == "__main__":
    main()
