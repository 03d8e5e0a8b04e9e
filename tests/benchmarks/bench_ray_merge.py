"""Several clients on Ray against one golden server: merged percentiles against those of every single request.

Run: python -m tests.benchmarks.bench_ray_merge [--workers 2] [--rate 200] [--requests 2000]
Needs `pip install 'unshot[ray]'`. Workers keep every request for once, so that the exact percentiles are known.
"""

from __future__ import annotations

import argparse

from bench.cluster import deal, run_ray
from bench.records import distribution
from bench.schedule import parse_load
from bench.sketch import RELATIVE_ERROR
from tests.golden import golden_server
from unshot.case import Slo
from unshot.console import Output
from unshot.engines.address import parse_url
from unshot.engines.openai import Api


def main() -> None:
    """Print the largest relative error by figure, and what the clients did."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    with golden_server(ttft_ms=20, itl_ms=3, tokens=20, fault="stall", every=50, stall_ms=300) as url:
        api = Api(parse_url(url), "golden")
        body = api.body([{"role": "user", "content": "hello"}], 64)
        shares = deal(
            api, None, [body] * options.requests, parse_load(f"poisson:{options.rate}"), options.workers,
            timeout=30, seed=1, tokenizer=None, slo=Slo(e2e_ms=200),
        )  # fmt: skip
        for share in shares:
            share.sample = options.requests
        tally, client, records, _ = run_ray(shares, None, Output())
    print(client)
    merged = tally.figures()
    if not merged.answered:
        raise SystemExit(f"no request was answered: {merged.errors}, {records[0].detail}")
    print(f"{merged.answered} answered of {merged.requests}, {merged.requests_per_second:.1f}/s")
    exact = {name: distribution(getattr(r, name) for r in records) for name in ("ttft", "tpot", "queue")}
    exact["e2e"] = distribution(r.seconds for r in records)
    exact["itl"] = distribution(gap for r in records for gap in r.gaps)
    for name, whole in exact.items():
        found = getattr(merged, f"{name}_ms")
        errors = [getattr(found, p).value / getattr(whole, p).value - 1 for p in ("p50", "p90", "p95", "p99")]
        assert found.count == whole.count
        worst = max(abs(e) for e in errors)
        p50, p99 = (getattr(whole, p).value for p in ("p50", "p99"))
        print(
            f"{name:6s} p50 {p50:8.3f} ms, p99 {p99:8.3f} ms; merged off by {worst:.3%} at most "
            f"(stated {RELATIVE_ERROR:.1%})"
        )


if __name__ == "__main__":
    main()
