"""Results of several clients add up: sketches against whole samples, and clients on Ray where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.cluster import LoadClient, Part, clock_offset, deal, merge
from bench.records import distribution, summarise
from bench.schedule import parse_load
from bench.sketch import RELATIVE_ERROR, Sketch
from tests.golden import golden_server, golden_thread
from unshot.case import Slo
from unshot.engines.address import parse_url
from unshot.engines.openai import Api
from unshot.errors import InputError

BODY = Api(parse_url("http://127.0.0.1:1/v1"), "golden").body([{"role": "user", "content": "hello"}], 64)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 30_000])
def test_a_merged_sketch_is_within_its_error_of_the_whole_sample(count: int) -> None:
    values = np.random.default_rng(count).lognormal(-3, 1.5, count)
    merged = Sketch()
    for part in np.array_split(values, 3):
        sketch = Sketch()
        sketch.add(part)
        merged.merge(sketch)
    got, exact = merged.distribution(), distribution(values)
    for name in ("count", "mean", "std", "min", "max"):
        expected = getattr(exact, name)
        assert getattr(got, name) == (None if expected is None else pytest.approx(expected))
    for p in ("p50", "p90", "p95", "p99"):
        for part in ("value", "low", "high"):
            expected = getattr(getattr(exact, p), part)
            assert getattr(getattr(got, p), part) == (
                None if expected is None else pytest.approx(expected, rel=RELATIVE_ERROR * 1.01)
            )


def test_the_shares_are_the_one_schedule_and_hold_no_key() -> None:
    api = Api(parse_url("http://127.0.0.1:1/v1"), "m", key="sk-secret")
    load = parse_load("poisson:50")
    shares = deal(api, "KEY", [BODY] * 100, load, 3, timeout=1, seed=4, tokenizer=None, slo=Slo())
    times = np.sort(np.concatenate([s.load.times for s in shares]))
    assert np.allclose(times, load.arrivals(100, seed=4))
    assert sum(len(s.bodies) for s in shares) == 100
    assert "sk-secret" not in repr(shares)
    assert all(s.api.key is None and b"sk-secret" not in b"".join(s.bodies) for s in shares)
    closed = deal(
        api, None, [BODY] * 9, parse_load("closed:5"), 3, timeout=1, seed=0, tokenizer=None, slo=Slo()
    )
    assert sorted(s.load.concurrency for s in closed) == [1, 2, 2]


def test_a_key_that_a_client_machine_lacks_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    api = Api(parse_url("http://127.0.0.1:1/v1"), "m")
    share = deal(
        api, "NO_SUCH_KEY", [BODY], parse_load("closed:1"), 1, timeout=1, seed=0, tokenizer=None, slo=Slo()
    )
    with pytest.raises(InputError, match="NO_SUCH_KEY"):
        LoadClient().take(share[0])


def test_merged_clients_give_the_figures_of_one() -> None:
    """Two clients, one after the other, on a real server; their tallies together against all their requests."""
    slo = Slo(e2e_ms=60)
    parts: list[Part] = []
    with golden_thread(ttft_ms=10, itl_ms=2, tokens=8, fault="429", every=5) as url:
        api = Api(parse_url(url), "golden")
        load = parse_load("poisson:100")
        for share in deal(api, None, [BODY] * 80, load, 2, timeout=5, seed=1, tokenizer=None, slo=slo):
            share.sample = 80
            one = LoadClient()
            one.take(share)
            parts.append(one.run(time.time() + 0.3))
    tally, client, records, interrupted = merge(parts)
    got, exact = tally.figures(), summarise(records, tally.ended - tally.began, slo)
    assert not interrupted
    assert client.clients == 2
    assert got.errors == exact.errors == {"http 429": 16}
    assert got.answered == exact.answered == 64
    assert (got.tokens, got.goodput, got.error_rate) == (exact.tokens, exact.goodput, exact.error_rate)
    for name in ("requests", "seconds", "requests_per_second", "output_tokens_per_second"):
        assert getattr(got, name) == pytest.approx(getattr(exact, name))
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        for p in ("p50", "p90", "p99"):
            value, expected = (getattr(getattr(f, name), p).value for f in (got, exact))
            assert value == pytest.approx(expected, rel=RELATIVE_ERROR * 1.01)


def test_the_offset_of_a_clock_is_found() -> None:
    offset, doubt = clock_offset(lambda: time.time() + 12.5)
    assert abs(offset - 12.5) <= doubt + 1e-4


@pytest.mark.cli
def test_clients_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (unshot[ray])")
    with golden_server(ttft_ms=10, itl_ms=2, tokens=8) as url:
        command = [sys.executable, "-m", "unshot", "bench", "load", url, "--requests", "60", "--json", "-q"]
        command += ["--load", "constant:60", "--ray", "2", "--out", str(tmp_path / "r")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report, _ = json.JSONDecoder().raw_decode(done.stdout)
    assert report["figures"]["answered"] == 60
    assert report["client"]["clients"] == 2
    assert report["figures"]["seconds"] == pytest.approx(1.0, abs=0.3)
    assert "2 on Ray" in (tmp_path / "r" / "report.html").read_text()
