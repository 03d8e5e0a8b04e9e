"""Seconds and peak memory of `unshot data check` on many rows: `python -m tests.benchmarks.bench_data_check [ROWS]`.

The rows are made up: 6 to 24 words from a vocabulary of 5,000 with natural (Zipf) frequencies, 20 classes, 1% exact
and 1% near duplicates, some e-mail addresses and malformed rows. The check runs in a process of its own.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT, command


def write_rows(path: Path, rows: int) -> None:
    """A JSONL file of `rows` made-up rows."""
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(5000)]
    weights = [1 / (rank + 1) ** 0.7 for rank in range(5000)]
    earlier: list[str] = []
    with path.open("w", encoding="utf-8") as handle:
        for number in range(rows):
            words = chance.choices(vocabulary, weights, k=chance.randint(6, 24))
            if earlier and number % 100 == 50:
                text = chance.choice(earlier)
            elif earlier and number % 100 == 51:
                text = chance.choice(earlier) + " please"
            else:
                text = " ".join(words)
            if number % 1000 == 7:
                text += " mail me at jo.doe@example.org"
            if number % 97 == 0 and len(earlier) < 5000:
                earlier.append(text)
            row = '{"prompt": ' if number % 10_000 == 9 else json.dumps(
                {"prompt": text, "completion": f"class {number % 20}"}
            )  # fmt: skip
            handle.write(row + "\n")


def main() -> None:
    """Print one JSON object with the figures."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        start = time.perf_counter()
        done = subprocess.run(
            command(["data", "check", path, "--json", "-q"]), cwd=ROOT, capture_output=True, check=False
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        if done.returncode not in (0, 1):
            sys.exit(done.stderr.decode())
        result = json.loads(done.stdout)
        figures = {
            "rows": rows,
            "file_mb": round(path.stat().st_size / 1e6, 1),
            "seconds": round(seconds, 1),
            "peak_rss_mb": round(peak * 1024 / 1e6),
            "malformed": len(result["malformed"]),
            "exact_rows": result["duplicates"]["exact_rows"],
            "near_rows": result["duplicates"]["near_rows"],
            "personal_rows": result["personal_data"]["total"],
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
