"""`unshot data import` of 100,000 requests with a prompt of some 1,200 tokens: seconds, and peak memory.

python -m tests.benchmarks.bench_data_import [REQUESTS]
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from tune.data.collect import import_logs
from unshot.console import Output


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    system = "Sort the message of a customer. " + " ".join(chance.choices(words, k=600))
    with tempfile.TemporaryDirectory() as folder:
        for form in ("system prompt", "text with a slot"):
            path = Path(folder) / "log.jsonl"
            with path.open("w", encoding="utf-8") as handle:
                for n in range(count):
                    text = " ".join(chance.choices(words, k=40))
                    if form == "system prompt":
                        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
                    else:
                        whole = f"{system}\n\nMessage: {text}\n\nAnswer with the class."
                        messages = [{"role": "user", "content": whole}]
                    response = {"created": 1_767_225_600 + n, "choices": [{"message": {"content": "card"}}]}
                    row = {"request": {"model": "gpt-4o", "messages": messages}, "response": response}
                    handle.write(json.dumps(row) + "\n")
            size = path.stat().st_size / 1e6
            started, worked = time.perf_counter(), time.process_time()
            result = import_logs([path], Path(folder) / f"out-{form[:4]}", Output(verbosity=-1), mapping={})
            seconds, cpu = time.perf_counter() - started, time.process_time() - worked
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            versions = [(v["requests"], v["static_tokens"]) for v in result["versions"]]
            print(
                f"{form}: {count:,} requests, {size:,.0f} MB, {seconds:.1f} s ({cpu:.1f} s of one core)",
                end=", ",
            )
            print(f"peak {memory:,.0f} MB; {versions}")


if __name__ == "__main__":
    main()
