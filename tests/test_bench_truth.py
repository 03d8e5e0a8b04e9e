"""The bench against servers whose truth is scripted: what it says must be that, or it must say that it cannot tell."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.claim import Clusters, pairs_to_settle, ratio_of
from bench.compare import compare_reports
from bench.cost import busy_seconds
from bench.load import Driver, drive, time_weighted
from bench.measure import ModeSettings, run_mode
from bench.records import RequestRecord, in_flight, machine_seconds
from bench.schedule import parse_load
from bench.sides import BlockResult
from bench.single import LoadJob, SweepJob, load_run, sweep_run
from bench.target import LoadOptions, Target
from bench.traffic import ServerOptions
from tests.conftest import measured
from tests.golden import certificate, golden_server, golden_thread, wait_for_requests
from tests.logs import run_here
from unshot.console import Output
from unshot.contracts.figures import Client
from unshot.contracts.manifest import Manifest
from unshot.contracts.report import BenchReport, LoadReport
from unshot.data.prompts import Prompt
from unshot.data.rows import Example

pytestmark = pytest.mark.cli
QUIET = Output(verbosity=-1)
Capture = pytest.CaptureFixture[str]


def options(url: str, **fields: Any) -> LoadOptions:
    server = ServerOptions("golden", timeout=fields.pop("timeout", 20.0), extra=fields.pop("extra", {}))
    return LoadOptions(url, server, **fields)


def record(number: int, scheduled: float, seconds: float, **fields: Any) -> RequestRecord:
    return RequestRecord(
        **{
            "side": "candidate", "mode": "m", "row": number, "block": 0, "request": number, "scheduled": scheduled,
            "start": scheduled, "e2e": seconds, "elapsed": seconds, **fields,
        }
    )  # fmt: skip


# 1. Caches


def test_no_request_is_sent_twice_across_steps_warm_up_and_runs(tmp_path: Path) -> None:
    """A server that caches prompts: a sweep reads what every fresh step gives, and the cached share is said."""
    with golden_thread(ttft_ms=40, itl_ms=0, tokens=1, slots=1, cache=True) as url:
        for name in ("first", "second"):
            job = SweepJob(options(url), tmp_path / name, "1,2,4", 4, 8, warm_up=2)
            report = sweep_run(job, QUIET)
            for point in report.points:
                assert point.figures.tokens.cached == 0
                assert point.figures.requests_per_second is not None
                assert point.figures.requests_per_second < 1 / 0.040 * 1.05
            assert report.warnings == []


def test_repetition_is_asked_for_by_name_and_the_cached_share_shown(tmp_path: Path, capsys: Capture) -> None:
    with golden_thread(ttft_ms=5, itl_ms=0, tokens=1, cache=True) as url:
        done = run_here(
            capsys, "bench", "load", url, "--requests", "20", "--repeat", "2", "--out", tmp_path / "r", "-q"
        )
        assert "cached prompt tokens" in done.out and "warning" not in done.out
        again = load_run(LoadJob(options(url, repeat=2), tmp_path / "s", "closed:1", 10), QUIET)
    assert again.figures.tokens.cached_share is not None and again.figures.tokens.cached_share > 0.9


def test_a_cache_that_was_not_asked_for_is_a_warning_at_the_top(tmp_path: Path, capsys: Capture) -> None:
    data = rows(tmp_path / "d.jsonl", 6)
    with golden_thread(ttft_ms=5, itl_ms=0, tokens=2, cache=True, echo=True) as url:
        for name in ("first", "second"):
            done = run_here(
                capsys, "bench", "--baseline", url, "--candidate", url, "--data", data, "--cache", "on",
                "--requests", "6", "--price-per-hour", "1", "--out", tmp_path / name, "-q",
            )  # fmt: skip
    # The second run asks a server that has seen every row.
    head = " ".join(done.out.partition("closed loop")[0].split())
    assert "from its cache" in head, done.out
    assert "from its cache" in (tmp_path / "second" / "report.html").read_text()


# 2. Tokens


def test_without_usage_tokens_and_cost_are_absent_and_nothing_is_counted_by_pieces(
    tmp_path: Path, capsys: Capture
) -> None:
    data = rows(tmp_path / "d.jsonl", 6)
    with golden_thread(ttft_ms=20, itl_ms=1, tokens=2, fault="no-usage", echo=True) as url:
        done = run_here(
            capsys, "bench", "--baseline", url, "--candidate", url, "--data", data, "--cache", "on", "--json",
            "--requests", "6", "--baseline-price", "1,2", "--candidate-price", "1,2", "--out", tmp_path / "r", "-q",
        )  # fmt: skip
    report = BenchReport.read(tmp_path / "r")
    mode = report.modes["cache on"]
    assert mode.baseline.tokens.output is None and mode.baseline.tokens.prompt is None
    assert mode.claim.cost is None and "no usage" in (mode.claim.no_cost or "")
    assert done.code == 1 and report.verdict != "met"
    assert mode.baseline.tpot_ms.count == 0


def test_without_usage_a_tokenizer_counts_prompt_and_answer_template_included(
    tmp_path: Path, embedded_model: Path
) -> None:
    """The name in /v1/models is looked for on this machine; here the flag names it."""
    from unshot.text.tokenizers import counter_for

    counter = counter_for(str(embedded_model), api=False)
    with golden_thread(ttft_ms=5, itl_ms=1, tokens=5, fault="no-usage") as url:
        server = ServerOptions("golden", tokenizer=str(embedded_model))
        target = Target(LoadOptions(url, server, prompt_words="20"))
        _, records = target.run(parse_load("closed:1"), 4)
    for r in records:
        assert r.prompt_tokens == counter.prompt(target.messages(r.request))
        assert r.output_tokens == counter.text(" word" * 5) + 1  # and the stop token


def test_the_tokenizer_of_the_model_that_the_server_lists_is_found_on_this_machine(
    tmp_path: Path, embedded_model: Path
) -> None:
    with golden_thread(ttft_ms=2, itl_ms=0, tokens=3, fault="no-usage", model=str(embedded_model)) as url:
        report = load_run(LoadJob(options(url), tmp_path / "r", "closed:1", 3), QUIET)
    assert report.figures.tokens.output == 4 and report.figures.tokens.prompt is not None


# 3. Reasoning and tools, 4. the stop token


def test_the_first_token_is_a_reasoning_token_and_both_first_tokens_are_told(tmp_path: Path) -> None:
    def check() -> None:
        job = LoadJob(options(url), tmp_path / "r", "closed:1", 5, overwrite=True)
        f = load_run(job, QUIET).figures
        assert (f.tokens.reasoning, f.tokens.output) == (15, 21)
        assert f.ttft_ms.p50 and f.ttft_answer_ms.p50 and f.tpot_ms.p50
        assert f.ttft_ms.p50.value == pytest.approx(30, abs=15)
        assert f.ttft_answer_ms.p50.value - f.ttft_ms.p50.value == pytest.approx(150, abs=20)
        assert f.tpot_ms.p50.value == pytest.approx(10, abs=2)

    with golden_thread(ttft_ms=30, itl_ms=10, tokens=20, reasoning=15, stop_token="counted") as url:
        measured(check)


@pytest.mark.parametrize("script", [{"reasoning": 9}, {"tools": True}])
def test_an_answer_of_reasoning_or_tool_calls_alone_is_an_answer(tmp_path: Path, script: Any) -> None:
    with golden_thread(ttft_ms=5, itl_ms=1, tokens=4, **script) as url:
        report = load_run(LoadJob(options(url), tmp_path / "r", "closed:1", 3), QUIET)
    assert report.figures.errors == {} and report.figures.answered == 3


@pytest.mark.parametrize("stop_token", ["uncounted", "counted", "timed"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_time_per_token_is_the_scripts_with_a_stop_token_of_any_kind(tokens: int, stop_token: str) -> None:
    def check() -> None:
        _, records = Target(options(url)).run(parse_load("closed:1"), 3)
        # Fewer where one read held the first ones together.
        assert all(r.ok and 1 <= (r.timed_tokens or 0) <= tokens for r in records)
        assert all(r.output_tokens == tokens + (stop_token != "uncounted") for r in records)
        for r in records:
            sent = r.golden["sent"] if r.golden else []
            if tokens > 1 and len(r.token_times) == 1:  # one read held them all: no time between them
                assert math.isnan(r.tpot)
                continue
            truth = (sent[-1] - sent[0]) / (tokens - 1) if tokens > 1 else math.nan
            assert r.tpot == pytest.approx(truth, abs=0.015, nan_ok=True)

    with golden_thread(ttft_ms=10, itl_ms=20, tokens=tokens, stop_token=stop_token) as url:
        measured(check)


# 5. Concurrency


def test_as_many_requests_are_in_flight_as_were_asked_for(tmp_path: Path, capsys: Capture) -> None:
    data = rows(tmp_path / "d.jsonl", 8)

    def check() -> None:
        with golden_thread(ttft_ms=60, itl_ms=1, tokens=2, echo=True) as url:
            run_here(
                capsys, "bench", "--baseline", url, "--candidate", url, "--data", data, "--requests", "64",
                "--block", "4", "--concurrency", "8", "--cold-requests", "32", "--price-per-hour", "3600",
                "--out", tmp_path / "r", "-q", "--overwrite",
            )  # fmt: skip
        report = BenchReport.read(tmp_path / "r")
        for mode in report.modes.values():
            for side in (mode.baseline, mode.candidate):
                assert side.in_flight is not None and side.in_flight.peak == 8
                assert side.in_flight.mean > 7
                # Eight share the machine: a request costs an eighth of its time and not all of it.
                assert side.cost is not None and side.cost.machine_seconds_per_request is not None
                assert side.e2e_ms.mean is not None
                assert side.cost.machine_seconds_per_request < 0.4 * side.e2e_ms.mean / 1000

    measured(check)


def test_machine_time_is_shared_by_what_is_under_way() -> None:
    together = [record(0, 0.0, 2.0), record(1, 0.0, 2.0), record(2, 2.0, 1.0)]
    assert machine_seconds(together) == pytest.approx([1.0, 1.0, 1.0])
    failed = record(3, 3.0, 0.0, e2e=None, elapsed=3.0, error="http 500")
    shares = busy_seconds([*together, failed])
    assert sum(shares.values()) == pytest.approx(6.0) and 3 not in shares
    flying = in_flight([*together, record(4, 3.0, 1.0)], 2)
    assert (flying.peak, flying.mean) == (2, pytest.approx(5 / 3))


# 6. Intervals


def test_pairs_of_one_block_have_no_interval_and_no_verdict() -> None:
    one = ratio_of([5.0] * 8, [1.0] * 8, Clusters([0] * 8, list(range(8))))
    assert (one.low, one.high) == (0.0, math.inf) and one.verdict(5) == "inconclusive"


def test_rows_asked_again_do_not_narrow_the_ratio() -> None:
    generator = np.random.default_rng(0)
    a, b = 5 * np.exp(0.3 * generator.standard_normal(8)), np.exp(0.3 * generator.standard_normal(8))
    once = ratio_of(a.tolist(), b.tolist(), Clusters(list(range(8)), list(range(8))))
    many = Clusters([i // 4 for i in range(256)], [i % 8 for i in range(256)])
    often = ratio_of(np.tile(a, 32).tolist(), np.tile(b, 32).tolist(), many)
    assert math.log(often.high / often.low) >= 0.9 * math.log(once.high / once.low)


# 7. Failures and lengths


def test_a_candidate_that_refuses_half_its_requests_is_never_met(tmp_path: Path, capsys: Capture) -> None:
    data = rows(tmp_path / "d.jsonl", 12)
    with (
        golden_thread(ttft_ms=60, itl_ms=1, tokens=2, echo=True) as slow,
        golden_thread(ttft_ms=2, itl_ms=0, tokens=2, echo=True, fault="500", every=2) as fast,
    ):
        done = run_here(
            capsys, "bench", "--baseline", slow, "--candidate", fast, "--data", data, "--cache", "on",
            "--margin", "0.5", "--requests", "48", "--price-per-hour", "1", "--out", tmp_path / "r", "-q",
        )  # fmt: skip
    report = BenchReport.read(tmp_path / "r")
    # On a busy machine the client may be late as well, which leaves the whole inconclusive.
    assert done.code == 1 and report.verdict != "met"
    assert report.modes["cache on"].claim.verdict == "not met"
    assert "failed 24 of 48 requests, 1.0% are allowed" in report.reason
    assert report.modes["cache on"].claim.errors["candidate"].verdict == "failed"
    # A row whose first request failed is a wrong answer, though its repetition was answered.
    assert report.quality.unanswered == {"baseline": 0, "candidate": 6}
    assert report.quality.candidate.accuracy == pytest.approx(0.5)


def test_the_verdict_says_how_much_of_the_ratio_is_the_answers_length(
    tmp_path: Path, capsys: Capture
) -> None:
    data = rows(tmp_path / "d.jsonl", 8)
    with (
        golden_thread(ttft_ms=10, itl_ms=5, tokens=32, echo=True) as talks,
        golden_thread(ttft_ms=10, itl_ms=5, tokens=2, echo=True) as brief,
    ):
        run_here(
            capsys, "bench", "--baseline", talks, "--candidate", brief, "--data", data, "--cache", "on",
            "--requests", "8", "--price-per-hour", "1", "--out", tmp_path / "r", "-q",
        )  # fmt: skip
    report = BenchReport.read(tmp_path / "r")
    mode = report.modes["cache on"]
    length = next(f.value for f in mode.split if f.name == "output length")
    # On a quiet machine it is the whole ratio; a busy one adds to the time to first token of both.
    assert length is not None and 1.5 < length < 1.5 * mode.claim.speed.value
    assert "the answers have 32.0 tokens against 2.0" in report.reason
    assert "per token" in report.reason


# 8. compare


def load_report(folder: Path, url: str, **fields: Any) -> Path:
    load_run(LoadJob(options(url, **fields), folder, "closed:2", 48, warm_up=1), QUIET)
    return folder


def test_compare_fails_a_release_whose_answers_are_errors_and_refuses_other_work(tmp_path: Path) -> None:
    with golden_thread(ttft_ms=10, itl_ms=2, tokens=4) as url:
        old = load_report(tmp_path / "old", url, max_tokens="16")
        same = load_report(tmp_path / "same", url, max_tokens="16")
        other = load_report(tmp_path / "other", url, max_tokens="2")
    with golden_thread(ttft_ms=5, itl_ms=1, tokens=4, fault="500", every=2) as url:
        broken = load_report(tmp_path / "broken", url, max_tokens="16")
    assert compare_reports(old, same, side="candidate", threshold=0.5).worse == []
    found = compare_reports(old, broken, side="candidate", threshold=0.05)
    assert "errors, closed:2" in found.worse
    with pytest.raises(Exception, match=r"max tokens is 2, in .* it is 16"):
        compare_reports(old, other, side="candidate", threshold=0.05)


def test_compare_takes_a_time_per_token_of_zero(tmp_path: Path) -> None:
    with golden_thread(ttft_ms=5, itl_ms=0, tokens=4) as url:
        a, b = (load_report(tmp_path / name, url) for name in ("a", "b"))
    rows_ = {r.name: r for r in compare_reports(a, b, side="candidate", threshold=0.05).rows}
    assert rows_["TPOT, closed:2"].verdict in (
        "no change shown",
        "not comparable",
        "improvement",
        "regression",
    )
    ratio = rows_["TPOT, closed:2"].ratio
    assert ratio is None or 1e-3 < ratio.value < 1e3


def test_compare_seldom_cries_regression_of_a_server_with_itself(tmp_path: Path) -> None:
    """A machine with moods: noise shared by neighbouring requests, another level in every run; no socket needed."""
    from bench import compare as module

    def run(seed: int) -> module._Measured:
        generator = np.random.default_rng(seed)
        mood = np.exp(0.08 * np.repeat(generator.standard_normal(12), 10))
        now, made = 0.0, []
        for i, level in enumerate(mood):
            seconds = 0.1 * level * float(np.exp(0.05 * generator.standard_normal()))
            made.append(
                record(i, now, seconds, token_times=[seconds / 2, seconds], timed_tokens=4, output_tokens=4)
            )
            now += seconds
        report: Any = type("R", (), {})()
        return module._Measured(tmp_path, report, Manifest("bench"), {"m": made})

    wrong = 0
    for seed in range(60):
        a, b = run(2 * seed), run(2 * seed + 1)
        found = [
            module._ratio(n, [module._batches(x.modes["m"], v) for x in (a, b)], 1.0, "ms", 0.05, 0.05 / 7,
                          more_is_better=False)
            for n, v in module.TIMES.items()
        ]  # fmt: skip
        wrong += any(f.verdict == "regression" for f in found)
    assert wrong <= 3


# 9. The client itself


def test_stalls_count_by_their_time_and_not_by_their_number() -> None:
    """250 ms every 2.5 s: nine ticks in ten are on time, and one moment in ten is late by 125 ms on average."""
    ticks = np.array(([0.0] * 225 + [0.25]) * 10)
    lag = time_weighted(ticks, 25.0)
    assert lag is not None and lag.p99_ms == pytest.approx(225, abs=1) and lag.p50_ms == 0
    assert np.percentile(ticks, 99) == 0


def test_a_client_that_was_stopped_is_found_out(tmp_path: Path) -> None:
    with golden_server(ttft_ms=20, itl_ms=1, tokens=2) as url:
        command = [
            sys.executable,
            "-P",
            "-m",
            "unshot",
            "bench",
            "load",
            url,
            "--requests",
            "150",
            "--load",
            "closed:1",
        ]
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "r"), "-q"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.15)
            os.kill(process.pid, signal.SIGCONT)
    report = LoadReport.read(tmp_path / "r")
    assert process.returncode == 1 and not report.client.valid


def test_a_tls_handshake_is_a_figure_of_its_own_and_not_the_clients_lateness(tmp_path: Path) -> None:
    made, context = certificate(tmp_path)
    with golden_thread(tls=context, ttft_ms=20, itl_ms=1, tokens=2) as url:
        refused = load_run(LoadJob(options(url), tmp_path / "refused", "closed:1", 2, warm_up=0), QUIET)
        server = ServerOptions("golden", authorities=str(made))
        target = Target(LoadOptions(url, server))
        target.options.server.open(url)
        # Ten requests at once on connections that are not open yet.
        driver = Driver(
            target.api.address,
            [target.api.wrap(target.body(i)) for i in range(10)],
            parse_load("constant:1000"),
        )
        result = drive(driver)
        loose = Target(LoadOptions(url, ServerOptions("golden", verify=False)))
        _, trusting = loose.run(parse_load("closed:1"), 2)
    assert refused.figures.errors == {"tls": 2} and all(r.ok for r in trusting)
    assert all(e.status == 200 and e.opened_connection for e in result.exchanges)
    connecting = [e.started - e.handed for e in result.exchanges]
    assert min(connecting) > 0.0005
    assert result.lateness.max() < max(connecting)


class Moody:
    """A side in this process whose client was late in some blocks."""

    def __init__(self, side: Any, seconds: float, late: set[int]) -> None:
        self.side, self.seconds, self.late = side, seconds, late
        self.prompt, self.max_tokens, self.concurrency, self.pid, self.local = Prompt(), 4, 1, None, True
        self.calls = 0
        self.words: list[str | None] = []

    def reset(self) -> None: ...

    def counters(self) -> dict[str, float]:
        return {}

    def run_block(
        self, items: Any, *, mode: str, block: int, clock: float, progress: Any = None
    ) -> BlockResult:
        self.calls += block >= 0
        self.words += [i.words for i in items]
        valid = self.calls not in self.late
        made = [
            record(
                i.request, float(self.calls), self.seconds, side=self.side, mode=mode, block=block, row=i.row
            )
            for i in items
        ]
        return BlockResult(made, Client(valid=valid, reasons=[] if valid else ["late"]))


def measure(late: set[int], looks: Any = ((32, 0.95),), **more: Any) -> Any:
    sides: Any = [Moody("baseline", 1.0, late), Moody("candidate", 0.1, set())]
    examples = [Example(({"role": "user", "content": str(i)},), "a", i) for i in range(8)]
    return run_mode(
        sides, examples, ModeSettings("cache on", looks, 4, 2, **more), settled=lambda r, level: len(r) >= 24
    ), sides


def test_blocks_that_the_client_spoilt_are_measured_again_for_at_most_a_quarter() -> None:
    got, _ = measure({2})
    assert (got.spoilt, got.blocks) == ({"cache on": 1}, {"cache on": 8})
    assert len(got.records) == 64 and len(got.dropped) == 8 and len(got.asked) == 72
    assert all(c.valid for c in got.clients["baseline"])
    got, _ = measure(set(range(1, 40)))
    assert got.spoilt == {"cache on": 2} and not all(c.valid for c in got.clients["baseline"])


def test_what_is_asked_again_begins_with_words_of_its_own_unless_repetition_is_asked_for() -> None:
    _, sides = measure(set())
    words = sides[0].words
    assert all(words[:2]) and not any(words[2:10]) and all(words[10:]) and len(set(words[10:])) == 24
    assert sides[1].words[2:] == words[2:]
    _, sides = measure(set(), repeat=True)
    assert not any(sides[0].words)


def test_a_sequential_measurement_ends_at_the_look_that_settles() -> None:
    got, _ = measure(set(), looks=((4, 0.99), (12, 0.99), (32, 0.97)))
    assert got.looks == {"cache on": 2} and got.levels == {"cache on": 0.99} and len(got.records) == 24


# 10. Prices


def test_without_a_price_there_is_no_cost_verdict_and_each_side_has_its_own(
    tmp_path: Path, capsys: Capture
) -> None:
    data = rows(tmp_path / "d.jsonl", 6)
    with (
        golden_thread(ttft_ms=80, itl_ms=1, tokens=2, echo=True) as slow,
        golden_thread(ttft_ms=5, itl_ms=0, tokens=2, echo=True) as fast,
    ):
        common = ("bench", "--baseline", slow, "--candidate", fast, "--data", data, "--cache", "on", "--requests", "12",
                  "--margin", "1")  # fmt: skip
        done = run_here(capsys, *common, "--out", tmp_path / "none", "-q")
        none = BenchReport.read(tmp_path / "none")
        run_here(
            capsys, *common, "--baseline-price-per-hour", "8", "--baseline-machines", "2",
            "--candidate-price-per-hour", "1", "--out", tmp_path / "both", "-q",
        )  # fmt: skip
        both = BenchReport.read(tmp_path / "both")
    claim = none.modes["cache on"].claim
    assert claim.cost is None and claim.verdict != "met" and none.verdict != "met"
    assert done.code == 1 and "no cost verdict (no price" in none.reason
    assert (
        none.modes["cache on"].baseline.cost
        and none.modes["cache on"].baseline.cost.per_1000_requests is None
    )
    claim = both.modes["cache on"].claim
    assert claim.cost is not None
    assert claim.cost.value == pytest.approx(16 * claim.speed.value, rel=0.05)
    assert (both.price["baseline"].per_hour, both.price["baseline"].machines) == (8, 2)


# 11. Awkward servers


@pytest.mark.parametrize(
    ("fault", "error"),
    [("content-list", "bad stream"), ("null-choice", "bad stream"), ("text-delta", "bad stream"), ("done-inside", None),
     ("cr-lines", None), ("data-lines", None)],
)  # fmt: skip
def test_one_bad_answer_is_one_counted_error(tmp_path: Path, fault: str, error: str | None) -> None:
    with golden_thread(ttft_ms=2, itl_ms=1, tokens=6, fault=fault, every=3) as url:
        report = load_run(LoadJob(options(url), tmp_path / "r", "closed:2", 9, warm_up=0), QUIET)
    assert report.figures.errors == ({error: 3} if error else {})
    assert report.figures.tokens.output == 6


def test_a_server_that_wants_max_completion_tokens_gets_it(tmp_path: Path) -> None:
    with golden_thread(ttft_ms=2, itl_ms=0, tokens=9, fault="new-limit-only") as url:
        report = load_run(LoadJob(options(url, max_tokens="3"), tmp_path / "r", "closed:1", 4), QUIET)
    assert report.figures.errors == {} and report.figures.tokens.output == 3


def test_a_server_that_knows_no_stream_options_is_measured_without(tmp_path: Path) -> None:
    with golden_thread(ttft_ms=2, itl_ms=0, tokens=3, fault="no-options") as url:
        report = load_run(LoadJob(options(url), tmp_path / "r", "closed:1", 4), QUIET)
    assert report.figures.errors == {} and report.figures.tokens.output is None
    assert any("reports no usage" in w for w in report.warnings)


def test_a_duration_ends_the_load_and_the_steady_state_is_what_counts(tmp_path: Path) -> None:
    def check() -> None:
        with golden_thread(ttft_ms=40, itl_ms=0, tokens=1) as url:
            job = LoadJob(options(url), tmp_path / "r", "closed:4", None, duration=1.5, overwrite=True)
            report = load_run(job, QUIET)
        f = report.figures
        assert "steady state" in report.conditions.window
        assert f.in_flight is not None and f.in_flight.mean > 3.5
        assert f.requests_per_second is not None and f.requests_per_second < 4 / 0.040 * 1.1
        lines = (tmp_path / "r" / "records.jsonl").read_text().splitlines()
        assert f.requests < len(lines)  # the ramp-up is cut off

    measured(check)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_a_timeout_that_is_none_is_refused(tmp_path: Path, capsys: Capture, value: str) -> None:
    done = run_here(
        capsys, "bench", "load", "http://127.0.0.1:9/v1", "--timeout", value, "--out", tmp_path / "r"
    )
    assert done.code == 2 and "--timeout" in done.err


def test_ctrl_c_with_several_processes_keeps_what_was_measured(tmp_path: Path) -> None:
    with golden_server(ttft_ms=100, itl_ms=1, tokens=2) as url:
        command = [sys.executable, "-P", "-m", "unshot", "bench", "load", url, "--requests", "100000"]
        command += [
            "--load",
            "closed:4",
            "--processes",
            "2",
            "--out",
            str(tmp_path / "r"),
            "-q",
            "--warm-up",
            "1",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for_requests(url, 40)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
    report = LoadReport.read(tmp_path / "r")
    assert report.partial and 20 < report.figures.answered < 100_000, err


# 12. What would settle it


def test_what_would_settle_it_follows_the_spread_and_not_the_number_of_pairs() -> None:
    generator = np.random.default_rng(4)
    alone = Clusters(list(range(8)), list(range(8)))
    needed = []
    for spread in (0.05, 0.2):
        noise = np.exp(spread * generator.standard_normal(8))
        needed.append(pairs_to_settle((5.6 * noise).tolist(), [1.0] * 8, alone, 5.0))
    assert needed[0] is not None and needed[1] is not None and needed[1] > needed[0]
    assert pairs_to_settle([5.0, 6.0], [1.0, 1.0], Clusters([0, 0], [0, 1]), 5.0) is None


def rows(path: Path, count: int) -> Path:
    """Labelled rows whose answer is the end of the question, as the golden server's `echo` answers."""
    label = [("red", "kite"), ("blue", "boat"), ("green", "door")]
    lines = [
        {
            "prompt": f"number {i} {'asks again and again ' * 10}for the {' '.join(label[i % 3])}",
            "completion": " ".join(label[i % 3]),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
