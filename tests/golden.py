"""A golden server in a process of its own, as a fixture for tests and benchmarks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def golden_server(**script: object) -> Iterator[str]:
    """Start `unshot bench golden` with options from `script`; yields the base URL."""
    options = [part for k, v in script.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    process = subprocess.Popen(
        [sys.executable, "-m", "unshot", "bench", "golden", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "the golden server did not start"
        yield url
    finally:
        process.terminate()
        process.wait(timeout=10)
        if process.stdout:
            process.stdout.close()
