"""The HTTP client's error against a golden server: 1, 50 and 500 streams, and a stall in the tail.

Run: python -m tests.benchmarks.bench_client_accuracy
Truth is what the server noted itself: when a request arrived and when each piece was written.
"""

from __future__ import annotations

import json
import os

import numpy as np

from tests.golden import golden_server
from tests.test_bench_http import errors_against_truth, run


def main() -> None:
    """Print one line a case: errors in milliseconds, median and 99th percentile over the streams."""
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for streams, count, itl in ((1, 30, 5), (50, 300, 20), (500, 1500, 100)):
        with golden_server(ttft_ms=50, itl_ms=itl, tokens=20) as url:
            result, records = run(url, f"closed:{streams}", count, timeout=60)
        found = errors_against_truth(records)
        line = {k: f"p50 {np.median(v):+.3f} p99 {np.percentile(v, 99):+.3f} ms" for k, v in found.items()}
        client = result.client()
        print(f"{streams:4d} streams: {json.dumps(line)} valid={client.valid}")
    with golden_server(ttft_ms=20, itl_ms=2, tokens=20, fault="stall", every=50, stall_ms=2000) as url:
        _, records = run(url, "constant:50", 500, timeout=60)
    e2e = np.array([r.e2e for r in records])
    gaps = np.concatenate([r.gaps for r in records])
    print(
        f"stall of 2 s in 1 of 50 requests: e2e p50 {np.median(e2e) * 1000:.1f} ms, p99 "
        f"{np.percentile(e2e, 99) * 1000:.1f} ms, longest gap {gaps.max() * 1000:.1f} ms"
    )


if __name__ == "__main__":
    main()
