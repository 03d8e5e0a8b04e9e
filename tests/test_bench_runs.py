"""Runs whose course is awkward: too short, failing as they rise, cold at first, priced at nothing. Truth stated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.compare import Comparison, compare_reports
from bench.records import RequestRecord, steady_window, summarise
from bench.schedule import deal_out, parse_load
from bench.single import LoadJob, SweepJob, _rising, gathered, knee, load_run, slo_knee, sweep_run
from bench.single_page import slo_words
from bench.target import LoadOptions
from bench.traffic import ServerOptions
from tests.golden import golden_thread
from tests.logs import run_here
from tests.raw_server import (
    Script,
    delta,
    event,
    head,
    last,
    listening,
    raw_server,
    read_request,
    usage,
    whole,
)
from tests.test_bench_awkward import END, QUIET, WORDS, timed
from unshot.contracts.figures import Client, Goodput
from unshot.contracts.report import Step

ANSWER = b"".join([*WORDS, END, last(usage(99, 6))])
GOOD: Script = [head(length=len(ANSWER)) + ANSWER]
Capture = pytest.CaptureFixture[str]


def records(spans: list[tuple[float, float]]) -> list[RequestRecord]:
    """Answered requests from when to when."""
    return [
        RequestRecord(
            side="candidate", mode="m", row=i, block=0, scheduled=a, start=a, token_times=[b - a],
            e2e=b - a, elapsed=b - a, prompt_tokens=10, output_tokens=1,
        )
        for i, (a, b) in enumerate(spans)
    ]  # fmt: skip


# Steady state


@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize("cycles", [3, 5, 50])
def test_the_steady_throughput_is_the_servers_however_short_the_run(streams: int, cycles: int) -> None:
    """Each stream has an answer every 0.1 s: 10 a second each, in a window of 2 cycles as in one of 50."""
    jitter = [0.00001 * i for i in range(streams)]
    spans = [(0.1 * c + j, 0.1 * (c + 1) + j) for c in range(cycles) for j in jitter]
    window = steady_window(records(spans), parse_load(f"closed:{streams}"))
    assert window is not None
    sent, ended, seconds = window
    rate = summarise(sent, seconds, flow=ended).requests_per_second
    assert rate == pytest.approx(10 * streams, rel=0.001)


def test_a_duration_without_a_steady_state_is_told(tmp_path: Path) -> None:
    """One request of 0.25 s in 0.1 s; and two, of which none was sent and answered after the first."""
    script: Script = [head(), 0.25, *WORDS, END, last(usage(99, 6))]
    for name, duration in (("one", 0.1), ("two", 0.3)):
        with raw_server(lambda n, body: script) as url:
            job = LoadJob(LoadOptions(url), tmp_path / name, "closed:1", None, warm_up=0, duration=duration)
            report = load_run(job, QUIET)
        assert report.conditions.window == "all requests" and (report.figures.requests_per_second or 0) < 4.1
        assert any("too short for a steady state" in w for w in report.warnings), report.warnings


# Processes


@pytest.mark.parametrize(
    ("load", "clients", "requests"),
    [
        # Two of three streams have two thirds of the requests: all are busy to the end.
        ("closed:3", 2, [40, 20]),
        ("closed:5", 3, [24, 24, 12]),
        ("closed:2", 8, [30, 30]),
        ("constant:10", 3, [20, 20, 20]),
    ],
)
def test_clients_get_as_many_requests_as_their_streams_take(
    load: str, clients: int, requests: list[int]
) -> None:
    payloads = [b"%d" % i for i in range(60)]
    dealt = deal_out(parse_load(load), payloads, clients, seed=0)
    assert [len(part) for _, part in dealt] == requests
    assert sorted(p for _, part in dealt for p in part) == sorted(payloads)


def test_clients_without_a_request_are_left_out(tmp_path: Path) -> None:
    with golden_thread(ttft_ms=1, itl_ms=0, tokens=1) as url:
        job = LoadJob(LoadOptions(url), tmp_path / "r", "constant:50", 3, warm_up=0, processes=5)
        assert load_run(job, QUIET).figures.answered == 3
    assert len(deal_out(parse_load("poisson:5"), [b"a"], 4, seed=0)) == 1


# Failing as it rises


@contextmanager
def limited(most: int, seconds: float) -> Iterator[str]:
    """A server that answers `most` requests at once, each after `seconds`, and refuses the others."""
    active = 0

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal active
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                line, _ = await read_request(reader)
                if line.startswith("POST") and active < most:
                    active += 1
                    await asyncio.sleep(seconds)
                    active -= 1
                    writer.write(GOOD[0])  # type: ignore[arg-type]
                else:
                    writer.write(whole({"error": "busy"}, 429 if line.startswith("POST") else 404)[0])

    with listening(client) as port:
        yield f"http://127.0.0.1:{port}/v1"


def test_a_step_that_fails_is_no_knee(tmp_path: Path) -> None:
    """Four at once is all that the server takes: with eight it refuses most, and those that it takes are as fast."""
    with limited(4, 0.05) as url:
        target = LoadOptions(url, ServerOptions("m", timeout=10))
        report = sweep_run(SweepJob(target, tmp_path / "r", "1,2,4,8,16", 16, 40, warm_up=0), QUIET)
    failing = [p.concurrency for p in report.points if p.figures.errors]
    assert failing == [8, 16]
    assert report.knee is None or report.knee.concurrency <= 4
    told = [w for w in report.warnings if "requests failed: this step does not count" in w]
    assert len(told) == 1 and told[0].startswith("8 at once, 16 at once: at the last, "), report.warnings


def step(concurrency: int, rate: float, mean: float, failed: int = 0, **client: Any) -> Step:
    figures = summarise(records([(0, mean)] * (100 - failed)), 1.0)
    figures = figures.changed(requests_per_second=rate, requests=100, errors={"http 500": failed})
    return Step(concurrency, figures, Client(**{"valid": True, "reasons": [], **client}), None)


def test_the_knee_is_of_steps_that_hold() -> None:
    rising = [step(1, 10, 0.1), step(2, 20, 0.1), step(4, 40, 0.1)]
    found = knee([*rising, step(8, 80, 0.1, failed=50), step(16, 90, 0.1, failed=90)])
    assert found is not None and (found.concurrency, found.saturated) == (4, True)
    late = knee([*rising, step(8, 80, 0.1, valid=False, reasons=["late"])])
    assert late is not None and (late.concurrency, late.saturated) == (4, False)
    assert knee(rising[:2]) is None


def test_a_rate_at_which_the_client_was_late_says_nothing_of_the_server() -> None:
    slo = Goodput({"ttft": 60.0}, 1.0, 0.26)
    late = step(0, 5, 0.1, valid=False, reasons=["late"])
    found = slo_knee([late.changed(rate=5.0, figures=late.figures.changed(goodput=slo))])
    assert (found.rate, found.next_rate, found.next_share) == (None, 5.0, None)
    assert slo_words(found).endswith("at 5/s the client itself was late")


def test_warnings_of_steps_that_say_the_same_are_one() -> None:
    said = [("1 at once", "5 of 30 in one"), ("2 at once", "late"), ("4 at once", "7 of 30 in one")]
    assert gathered(said) == ["1 at once, 4 at once: at the last, 7 of 30 in one", "2 at once: late"]


def test_a_search_that_no_rate_can_help_ends() -> None:
    """An answer takes 50 ms and may take 1: at a request a second they hardly meet, and fewer would not help."""
    points: list[Step] = []
    for rate in _rising(points):
        points.append(step(0, rate, 0.05).changed(rate=rate))
    assert [p.rate for p in points] == [1.0]


# Cold at first


def test_a_warm_up_that_failed_is_told(tmp_path: Path, capsys: Capture) -> None:
    def answer(number: int, body: Any) -> Script:
        return whole({"error": "loading"}, 503) if number < 2 else GOOD

    with raw_server(answer) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "l", "closed:1", 3, warm_up=3), QUIET)
    assert any("2 of 3 warm-up requests failed (2 http 503)" in w for w in report.warnings), report.warnings
    with raw_server(answer) as url:
        job = SweepJob(LoadOptions(url), tmp_path / "s", "1", 1, 3, warm_up=2)
        assert any("2 of 2 warm-up" in w for w in sweep_run(job, QUIET).warnings)


def ab(tmp_path: Path, capsys: Capture, url: str, *more: str | Path, name: str = "r") -> dict[str, Any]:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"prompt": "q {i}", "completion": "word"}}\n' for i in range(8)))
    done = run_here(
        capsys, "bench", "--baseline", url, "--candidate", url, "--data", data, "--requests", "8",
        "--cache", "on", "--out", tmp_path / name, "-q", *more,
    )  # fmt: skip
    if done.code == 2:
        return {"refused": done.err}
    assert done.code == 1, done.err
    found: dict[str, Any] = json.loads((tmp_path / name / "report.json").read_text())
    return found


def test_a_warm_up_that_failed_is_told_of_a_side_and_fills_no_prefix(tmp_path: Path, capsys: Capture) -> None:
    def answer(number: int, body: Any) -> Script:
        return whole({"error": "loading"}, 503) if number == 0 else GOOD

    with raw_server(answer) as url:
        report = ab(tmp_path, capsys, url, "--price-per-hour", "1")
    assert any(w.startswith("baseline: 1 of 2 warm-up requests failed") for w in report["warnings"])
    assert report["prefix_fill_ms"]["baseline"] is None and report["prefix_fill_ms"]["candidate"] is not None


# Prices and limits


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_a_price_of_nothing_has_no_ratio(tmp_path: Path, capsys: Capture, side: str) -> None:
    other = "candidate" if side == "baseline" else "baseline"
    with raw_server(lambda n, body: GOOD) as url:
        report = ab(tmp_path, capsys, url, f"--{side}-price", "0,0", f"--{other}-price-per-hour", "1")
    mode = report["modes"]["cache on"]
    assert mode["claim"]["cost"] is None and f"the {side} cost nothing" in mode["claim"]["no_cost"]
    assert mode[side]["cost"]["per_1000_requests"] == 0 and report["verdict"] != "met"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ("--baseline-price", "1,2", "--baseline-price-per-hour", "3"),
            "--baseline-price-per-hour goes with",
        ),
        (("--candidate-price", "1,2", "--candidate-machines", "2"), "--candidate-machines goes with"),
    ],
)
def test_two_kinds_of_price_for_one_side_are_refused(
    tmp_path: Path, capsys: Capture, more: tuple[str, ...], words: str
) -> None:
    assert words in ab(tmp_path, capsys, "http://127.0.0.1:9/v1", *more)["refused"]


def test_cached_input_at_its_own_price_needs_the_count_of_it(tmp_path: Path, capsys: Capture) -> None:
    """Counted in full, a baseline whose server says nothing of its cache would look ten times dearer than it is."""
    told = b"".join([*WORDS, END, last(usage(99, 6, prompt_tokens_details={"cached_tokens": 50}))])
    for name, body, cost in (("untold", ANSWER, None), ("told", told, (49 * 2 + 50 * 0.2 + 60) / 1000)):
        with raw_server(lambda n, b, body=body: [head(length=len(body)) + body]) as url:  # type: ignore[misc]
            report = ab(
                tmp_path, capsys, url, "--baseline-price", "2,10,0.2", "--candidate-price-per-hour", "1",
                name=name,
            )  # fmt: skip
        mode = report["modes"]["cache on"]
        assert mode["baseline"]["cost"]["per_1000_requests"] == (cost and pytest.approx(cost))
        assert ("cached tokens are not known" in (mode["claim"]["no_cost"] or "")) == (cost is None)


def test_answers_that_the_limit_cut_are_told(tmp_path: Path, capsys: Capture) -> None:
    with golden_thread(ttft_ms=1, itl_ms=0, tokens=5) as url:
        report = ab(tmp_path, capsys, url, "--price-per-hour", "1", "--max-tokens", "2")
    told = [w for w in report["warnings"] if "8 of 8 answers were cut at the limit of 2 tokens" in w]
    assert len(told) == 2, report["warnings"]


# Compare


def run(folder: Path, *pieces: bytes, counts: Any, model: str | None = None, count: int = 40) -> Path:
    named = event({"model": model, "choices": []}) if model else b""
    script = [head(), named, *timed(*pieces, END), last(counts)]
    with raw_server(lambda n, body: script) as url:
        load_run(LoadJob(LoadOptions(url), folder, "closed:4", count, warm_up=0), QUIET)
    # The machine may have been busy.
    report, manifest = (json.loads((folder / n).read_text()) for n in ("report.json", "manifest.json"))
    report["client"]["valid"] = True
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "outputs": {}}))
    return folder


def compared(old: Path, new: Path) -> Comparison:
    return compare_reports(old, new, side="candidate", threshold=0.05)


def test_compare_sees_thoughts_before_the_answer(tmp_path: Path) -> None:
    """The first token comes as early as before and is of a thought now: the answer begins three steps later."""
    old = run(tmp_path / "old", *WORDS, counts=usage(99, 6))
    thoughts = [delta(reasoning_content=f"r{i}") for i in range(3)]
    new = run(tmp_path / "new", *thoughts, *WORDS[:2], counts=usage(99, 6))
    # By the script's times, whatever the machine did.
    for folder, first in ((old, 0), (new, 3)):
        lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        for n, line in enumerate(lines):
            times = [0.02 * (i + 1) + 0.0001 * (n % 3) for i in range(5)]
            line |= {
                "token_times": times,
                "first_answer": times[first],
                "e2e": times[-1],
                "scheduled": 0.1 * n,
            }
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compared(old, new).worse == ["first answer token, closed:4"]
    assert not any("first answer token" in r.name for r in compared(old, old).rows)


def test_compare_names_other_answers_than_were_asked_for_before(tmp_path: Path) -> None:
    cached = usage(99, 6, prompt_tokens_details={"cached_tokens": 10})
    old = run(tmp_path / "old", *WORDS, counts=cached, model="a")
    assert not [w for w in compared(old, old).warnings if "OLD" in w or "different" in w]
    more = usage(99, 6, prompt_tokens_details={"cached_tokens": 60})
    new = compared(old, run(tmp_path / "new", *WORDS, counts=more, model="b")).warnings
    assert "different model that answered: a / b" in new
    assert any("10% of the prompt tokens are from the cache in OLD and 61% in NEW" in w for w in new), new
    new = compared(old, run(tmp_path / "fewer", *WORDS, counts=usage(70, 6), model="a")).warnings
    assert any("the prompts have 99.0 tokens in OLD and 70.0 in NEW" in w for w in new), new


def test_compare_says_that_requests_are_too_few(tmp_path: Path) -> None:
    old = run(tmp_path / "old", *WORDS, counts=usage(99, 6))
    rows = compared(old, run(tmp_path / "new", *WORDS, counts=usage(99, 6), count=4)).rows
    times = [r for r in rows if not r.name.startswith("errors")]
    assert {(r.verdict, r.note) for r in times} == {("not comparable", "too few requests")}
    assert all(r.new for r in times)
