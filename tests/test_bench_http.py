"""The HTTP client against a real server on real sockets whose delays, tokens and faults are scripted."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.answer import read_answer
from bench.load import Driver, LoadResult, drive
from bench.records import RequestRecord, summarise
from bench.schedule import parse_load
from bench.sides import make_record
from bench.single import _steps
from bench.target import LoadOptions, Target
from bench.traffic import ServerOptions
from tests.golden import golden_server, wait_for_requests
from unshot.contracts.figures import Client
from unshot.contracts.report import Step
from unshot.engines.address import parse_url
from unshot.engines.http import Exchange
from unshot.engines.openai import Api
from unshot.errors import InputError

pytestmark = pytest.mark.cli

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with golden_server(ttft_ms=20, itl_ms=5, tokens=10) as url:
        yield url


def run(
    url: str,
    load: str,
    count: int,
    *,
    timeout: float = 10.0,
    golden: dict[str, object] | None = None,
    kind: str = "chat",
) -> tuple[LoadResult, list[RequestRecord]]:
    api = Api(parse_url(url), "golden", kind, extra={"golden": golden or {}})
    payload = api.request(MESSAGES if kind == "chat" else "hello", 64)
    streams = int(load.split(":")[1]) if load.startswith("closed") else 32
    result = drive(
        Driver(
            api.address,
            [payload] * count,
            parse_load(load),
            timeout=timeout,
            warm_connections=streams,
            ramp=0.0 if streams == 1 else 0.3,
        )
    )
    records = [
        make_record(e, api, side="candidate", row=i, mode=load, block=0, clock=result.began)
        for i, e in enumerate(result.exchanges)
    ]
    return result, records


def errors_against_truth(records: list[RequestRecord]) -> dict[str, np.ndarray]:
    """Measured minus what the server really did, milliseconds."""
    ttft, e2e, itl = [], [], []
    for record in records:
        assert record.ok, record.detail
        truth = record.golden
        assert truth is not None
        sent = np.asarray(truth["sent"])
        ttft.append(record.ttft - (sent[0] - truth["received"]))
        e2e.append(record.seconds - (sent[-1] - truth["received"]))
        if len(record.token_times) == len(sent):  # else one read held them all, and there are no gaps
            itl.append(np.median(np.diff(record.token_times) - np.diff(sent)))
    return {k: np.asarray(v) * 1000 for k, v in (("ttft", ttft), ("e2e", e2e), ("itl", itl))}


@pytest.mark.parametrize(("streams", "count"), [(1, 20), (50, 200)])
def test_latencies_agree_with_the_server(server: str, streams: int, count: int) -> None:
    """How far they are off on a quiet machine is measured by tests/benchmarks/bench_client_accuracy.py."""
    _, records = run(server, f"closed:{streams}", count)
    found = errors_against_truth(records)
    # Nothing is seen before it was sent (both processes share one clock); gaps are as the server made them.
    assert min(found["ttft"]) > -0.1 and min(found["e2e"]) > -0.1
    assert abs(np.median(found["itl"])) < 5
    assert all(r.output_tokens == 10 and r.finish == "stop" for r in records)


def test_open_loop_latency_counts_from_the_schedule(server: str) -> None:
    _, records = run(server, "constant:100", 50, golden={"ttft_ms": 5, "itl_ms": 1, "tokens": 3})
    times = np.array([r.scheduled for r in records])
    assert np.allclose(np.diff(times), 0.01, atol=1e-6)
    assert all(r.start >= r.scheduled - 1e-4 for r in records)


def test_a_stall_shows_in_the_tail() -> None:
    with golden_server(ttft_ms=5, itl_ms=1, tokens=10, fault="stall", every=20, stall_ms=400) as url:
        _, records = run(url, "constant:100", 100)
    e2e = np.array([r.seconds for r in records])
    assert np.percentile(e2e, 50) < 0.2
    assert np.percentile(e2e, 99) > 0.4
    assert max(gap for r in records for gap in r.gaps) > 0.39


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", "http 429"),
        ("500", "http 500"),
        ("reset", "reset"),
        ("cut", "cut short"),
        ("endless", "timeout"),
        ("bad-json", "bad stream"),
        ("bad-chunk", "bad stream"),
        ("no-done", None),
        ("no-usage", None),
    ],
)
def test_each_fault_is_counted_as_what_it_is(server: str, fault: str, kind: str | None) -> None:
    script = {"fault": fault, "ttft_ms": 5, "itl_ms": 2, "retry_after": 0}
    _, records = run(server, "closed:2", 6, timeout=1.0, golden=script)
    assert [r.error for r in records] == [kind] * 6


class WordCounter:
    """Words for tokens."""

    name = "words"

    def text(self, text: str) -> int:
        return len(text.split())


def test_wrong_token_counts_of_a_server_are_told_apart(server: str) -> None:
    api = Api(parse_url(server), "golden", extra={"golden": {"fault": "wrong-usage"}})
    result = drive(Driver(api.address, [api.request(MESSAGES, 10)], parse_load("closed:1")))
    words = make_record(
        result.exchanges[0],
        api,
        side="candidate",
        row=0,
        mode="x",
        block=0,
        clock=0.0,
        counter=WordCounter(),  # type: ignore[arg-type]
    )
    # Ten words and the stop token, whatever the server claims.
    assert words.output_tokens == 11
    assert words.server_tokens == 20


def test_tokens_are_not_counted_by_chunks(server: str) -> None:
    _, records = run(server, "closed:1", 3, golden={"tokens": 10, "per_chunk": 4})
    assert all(len(r.token_times) in (1, 3) and r.output_tokens == 10 for r in records)
    # The first chunk brought four: who does not know how many cannot say what the others took.
    assert all(math.isnan(r.tpot) for r in records)


def test_sampled_lengths_are_asked_for_and_answered(server: str, tmp_path: Path) -> None:
    extra = {"golden": {"tokens": 99, "ttft_ms": 1, "itl_ms": 0.1}}
    options = LoadOptions(
        server,
        ServerOptions("golden", timeout=10.0, extra=extra),
        prompt_words="5-50",
        max_tokens="2-12",
        seed=7,
    )
    target = Target(options)
    bodies = [json.loads(b) for b in target.bodies(200)]
    lengths = [b["max_tokens"] for b in bodies]
    words = [len(b["messages"][-1]["content"].split()) for b in bodies]
    assert (min(lengths), max(lengths)) == (2, 12)
    assert 5 <= min(words) < 10 and 45 < max(words) <= 50
    assert [json.loads(b)["max_tokens"] for b in Target(options).bodies(200)] == lengths
    _, records = Target(options).run(parse_load("closed:4"), 20)
    assert [r.output_tokens for r in sorted(records, key=lambda r: r.row)] == lengths[:20]
    assert all(r.finish == "length" for r in records)


def test_completions_api(server: str) -> None:
    _, records = run(server, "closed:1", 2, kind="completions")
    assert all(r.ok and r.text == " word" * 10 for r in records)


def test_back_off_of_a_closed_loop_follows_retry_after() -> None:
    with golden_server(ttft_ms=1, itl_ms=1, tokens=2, fault="429", every=2, retry_after=1) as url:
        result, records = run(url, "closed:1", 4)
    assert [r.error for r in records].count("http 429") == 2
    assert result.seconds > 1.0


def test_refused_connection_and_unknown_host() -> None:
    _, records = run("http://127.0.0.1:9", "closed:1", 2)
    assert {r.error for r in records} == {"connect"}
    _, records = run("http://no-such-host.invalid:80", "closed:1", 1)
    assert records[0].error == "dns"


def test_a_slow_name_server_is_counted_as_what_it_is(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that answers late: waiting for it is latency; one that answers after the timeout is a dns error."""
    real, port = socket.getaddrinfo, parse_url(server).port
    answer = threading.Event()
    answer.set()

    def slow(host: object, *arguments: object, **named: object) -> object:
        if host == "slow.test":
            time.sleep(0.4)
            answer.wait(30)
            host = "127.0.0.1"
        return real(host, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    result, records = run(f"http://slow.test:{port}/v1", "closed:2", 6, timeout=5.0)
    assert all(r.ok for r in records)
    assert (result.client().dns_seconds or 0) >= 0.4
    answer.clear()
    _, records = run(f"http://slow.test:{port}/v1", "constant:100", 6, timeout=0.5)
    assert [r.error for r in records] == ["dns"] * 6  # while the resolver has not answered yet
    answer.set()


def test_utf8_split_between_pieces_is_put_together() -> None:
    text = (
        "data: "
        + json.dumps({"choices": [{"delta": {"content": "naïve 😀"}}]}, ensure_ascii=False)
        + "\r\n\r\n"
    )
    raw = text.encode() + b"data: [DONE]\n\n"
    exchange = Exchange(b"", 0.0, 1.0, lambda e: None)
    exchange.status = 200
    exchange.pieces = [(float(i), raw[i : i + 1]) for i in range(len(raw))]
    answer = read_answer(exchange, "chat")
    assert answer.error is None
    assert answer.text == "naïve 😀"


@pytest.mark.parametrize(
    "bad", ["ftp://x", "localhost:8000", "http://", "http://h:99999/v1", "http://u:p@h/v1"]
)
def test_bad_urls_are_refused(bad: str) -> None:
    with pytest.raises(InputError):
        parse_url(bad)


@pytest.mark.parametrize(
    "bad", ["closed:0", "closed:1.5", "poisson:-1", "constant:nan", "gamma:5", "burst:3", "closed:"]
)
def test_bad_loads_are_refused(bad: str) -> None:
    with pytest.raises(InputError):
        parse_load(bad)


def test_schedules_have_their_rate_and_burstiness(tmp_path: Path) -> None:
    for text, cv in (("constant:50", 0.0), ("poisson:50", 1.0), ("gamma:50:2", 2.0)):
        gaps = np.diff(parse_load(text).arrivals(20000, seed=1))
        assert gaps.mean() == pytest.approx(0.02, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.1)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 1500}\n{"timestamp": 1000}\n')
    assert parse_load(f"trace:{trace}").times == (0.0, 0.5)


def test_the_automatic_sweep_ends_at_saturation(tmp_path: Path) -> None:
    def point(rate: float) -> Step:
        return Step(1, summarise([], 1.0).changed(requests_per_second=rate), Client(valid=True, reasons=[]))

    points: list[Step] = []
    steps = []
    for step in _steps("auto", 256, points):
        steps.append(step)
        points.append(point(min(step, 4) * 10.0))
    assert steps == [1, 2, 4, 8, 16]  # two steps without more throughput
    assert list(_steps("8,2", 256, [])) == [2, 8]
    for bad in ("0,1", "x", ""):
        with pytest.raises(InputError):
            _steps(bad, 256, [])


def test_ctrl_c_leaves_a_partial_report(tmp_path: Path) -> None:
    with golden_server(ttft_ms=50, itl_ms=10, tokens=10) as url:
        command = [sys.executable, "-m", "unshot", "bench", "load", url, "--requests", "2000"]
        command += ["--load", "closed:2", "--out", str(tmp_path / "r"), "-q", "--warm-up", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for_requests(url, 10)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=300)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["partial"] is True
    assert 0 < report["figures"]["answered"] < 2000
    assert "Partial" in (tmp_path / "r" / "report.html").read_text()


def test_a_run_without_one_answer_is_reported_whole(tmp_path: Path) -> None:
    with golden_server(fault="500") as url:
        command = [sys.executable, "-m", "unshot", "bench", "load", url, "--requests", "5", "--out"]
        done = subprocess.run(
            [*command, str(tmp_path / "r"), "-q"], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 3
    assert "http 500" in done.stderr and "Traceback" not in done.stderr
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["figures"]["errors"] == {"http 500": 5}
    assert "5 http 500" in (tmp_path / "r" / "report.html").read_text()


def test_several_client_processes_send_one_schedule(tmp_path: Path) -> None:
    with golden_server(ttft_ms=5, itl_ms=1, tokens=3) as url:
        command = [sys.executable, "-m", "unshot", "bench", "load", url, "--requests", "100", "--json", "-q"]
        command += ["--load", "constant:100", "--processes", "2", "--out", str(tmp_path / "r")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert report["figures"]["answered"] == 100
