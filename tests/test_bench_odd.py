"""More awkward servers on real sockets: tokens that come together, counts that do not add up, prompts that were cut."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare_reports
from bench.counters import counted
from bench.load import retry_after
from bench.single import LoadJob, load_run
from bench.target import LoadOptions
from bench.traffic import ServerOptions, cache_warning
from tests.raw_server import Script, delta, event, head, last, raw_server, usage, whole
from tests.test_bench_awkward import END, QUIET, STEP, WORDS, ask, later, span, timed
from unshot.contracts.report import LoadReport
from unshot.engines.http import Exchange


def load(script: Script, out: Path, *, model: str = "m", count: int = 4, **options: Any) -> LoadReport:
    with raw_server(lambda n, body: script) as url:
        target = LoadOptions(url, ServerOptions(model, timeout=5), **options)
        return load_run(LoadJob(target, out, "closed:1", count, warm_up=0), QUIET)


# 4. Tokens and arrivals that are not one to one


@pytest.mark.parametrize(
    ("pieces", "tokens", "finish"),
    [
        # A label of three tokens in two chunks: two and one, or one and two.
        (2, 3, "length"),
        # 1.3 tokens a chunk, as speculative decoding has it.
        (10, 13, "length"),
        # More pieces than tokens: they are no tokens.
        (12, 5, "stop"),
    ],
)
def test_no_time_per_token_where_pieces_are_no_tokens(pieces: int, tokens: int, finish: str) -> None:
    words = [delta(content=f" w{i}") for i in range(pieces)]
    r = ask([head(), *timed(*words), delta(finish), last(usage(100, tokens))])
    assert math.isnan(r.tpot) and r.output_tokens == tokens


def test_events_of_one_read_are_one_arrival(tmp_path: Path) -> None:
    """A proxy holds the first three of five tokens back: two came after the first arrival."""
    held = [
        head(),
        STEP,
        b"".join(WORDS[:3]),
        *[x for i in (2, 3) for x in (STEP * i, WORDS[i + 1])],
        4 * STEP,
    ]
    r = ask([*held, END, last(usage(100, 5))])
    assert later(r) <= 2 and r.tpot == span(r) / later(r)
    report = load([head(), STEP, b"".join([*WORDS, END, last(usage(100, 6))])], tmp_path / "r")
    figures = report.figures
    assert (figures.tpot_ms.count, figures.itl_ms.count, figures.tokens.output) == (0, 0, 6)
    assert any("in one piece" in w for w in report.warnings), report.warnings


def test_a_server_that_does_not_stream_is_told(tmp_path: Path) -> None:
    answer = {"choices": [{"message": {"content": "a b c"}, "finish_reason": "stop"}], "usage": usage(9, 4)}
    report = load(whole(answer), tmp_path / "r")
    assert any("in one piece" in w for w in report.warnings), report.warnings


def test_what_follows_the_end_is_no_part_of_the_answer() -> None:
    r = ask(
        [head(), *timed(*WORDS, END), last(usage(100, 6)), delta(content=" more"), event({"error": "late"})]
    )
    assert (r.error, r.text, len(r.token_times)) == (None, " w0 w1 w2 w3 w4", 5)


# 2 and 3. Counts


@pytest.mark.parametrize(
    ("counts", "prompt", "cached", "output", "reasoning"),
    [
        # xAI and Gemini: thoughts are in the total and not in completion_tokens.
        (usage(100, 6, total_tokens=406, completion_tokens_details={"reasoning_tokens": 300}), 100, None, 306, 300),
        (usage(100, 6, total_tokens=406), 100, None, 306, 300),
        # Cached tokens apart from prompt_tokens, by the total; and as Anthropic has it.
        (usage(36, 6, total_tokens=106, prompt_tokens_details={"cached_tokens": 64}), 100, 64, 6, None),
        ({"input_tokens": 30, "output_tokens": 6, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 6},
         100, 64, 6, None),
        (usage(100, 6, total_tokens=106), 100, None, 6, None),
        # A total of something else says nothing.
        (usage(100, 6, total_tokens=0), 100, None, 6, None),
        (usage(100, 6, total_tokens=50), 100, None, 6, None),
    ],
)  # fmt: skip
def test_a_total_that_holds_more_says_what_the_other_counts_leave_out(
    counts: Any, prompt: int, cached: int | None, output: int, reasoning: int | None
) -> None:
    r = ask([head(), *timed(*WORDS, END), last(counts)])
    assert (r.prompt_tokens, r.cached_tokens, r.output_tokens, r.reasoning_tokens) == (
        prompt, cached, output, reasoning,
    )  # fmt: skip
    assert len(r.token_times) == 5 and r.tpot == span(r) / later(r)


def test_a_prompt_that_the_server_cut_is_told(tmp_path: Path) -> None:
    """Some servers drop what does not fit their context without a word: 50 tokens of a prompt of 200 words."""
    good = [head(), *WORDS, END]
    cut = load([*good, last(usage(50, 6))], tmp_path / "a", prompt_words="200")
    assert any("fewer than the words" in w for w in cut.warnings), cut.warnings
    fine = load([*good, last(usage(230, 6))], tmp_path / "b", prompt_words="200")
    assert not any("fewer than the words" in w for w in fine.warnings)


@pytest.mark.parametrize(
    ("asked", "names", "told"),
    [
        ("tuned", ["base"], True),
        ("tuned", ["tuned", "base"], True),
        ("tuned", ["tuned"], False),
        ("gpt-x", ["gpt-x-2026-01-01"], False),
        ("default", ["whatever"], False),
    ],
)
def test_an_answer_of_another_model_is_told(tmp_path: Path, asked: str, names: list[str], told: bool) -> None:
    def answer(number: int, body: Any) -> Script:
        chunk = {"model": names[number % len(names)], "choices": [{"index": 0, "delta": {"content": "a"}}]}
        return [head(), event(chunk), END, last(usage(99, 2))]

    with raw_server(answer) as url:
        target = LoadOptions(url, ServerOptions(asked, timeout=5), prompt_words="10")
        report = load_run(LoadJob(target, tmp_path / "r", "closed:1", 4, warm_up=0), QUIET)
    assert any("another model" in w for w in report.warnings) == told, report.warnings


# 1. Caches


def test_the_templates_own_tokens_in_a_cache_are_no_repetition() -> None:
    """32 of 110 tokens cached are two blocks of the template; 100 of 110 are a repetition."""
    assert cache_warning("m", 0.0, 32 / 110, repeated=False, tokens=110) is None
    assert cache_warning("m", 0.0, 100 / 110, repeated=False, tokens=110) is not None
    assert cache_warning("m", 0.0, 300 / 1000, repeated=False, tokens=1000) is not None


def test_counters_of_another_server_behind_the_address_are_not_shown() -> None:
    def reading(tokens: float, started: float) -> dict[str, float]:
        return {"vllm:prompt_tokens_total": 10 * tokens, "vllm:generation_tokens_total": tokens,
                "process_start_time_seconds": started}  # fmt: skip

    assert counted(reading(100, 5.0), reading(300, 5.0), least=200) is not None
    # Its process is another; or it has counted less than was answered here.
    assert counted(reading(100, 5.0), reading(300, 6.0), least=200) is None
    assert counted(reading(100, 5.0), reading(200, 5.0), least=200) is None


# 11. Forms of answers


def test_a_compressed_answer_is_told_by_its_name() -> None:
    asked: list[Any] = []
    body = gzip.compress(b"".join([*WORDS, END, last(usage(9, 6))]))
    r = ask([head(more="Content-Encoding: gzip\r\n") + body, None])
    assert r.error == "bad stream" and "gzip" in (r.detail or ""), asked


def test_a_heartbeat_of_its_own_type_is_no_answer() -> None:
    beat = b"event: ping\ndata: still here\n\n"
    r = ask([head(), beat, *WORDS[:2], beat, *WORDS[2:], END, last(usage(9, 6))])
    assert (r.error, r.text) == (None, " w0 w1 w2 w3 w4")
    assert ask([head(), b"data: still here\n\n", *WORDS, END, last(usage(9, 6))]).error == "bad stream"


@pytest.mark.parametrize(
    ("value", "seconds"), [("2", 2.0), ("nan", 0.0), ("inf", 0.0), ("-1", 0.0), ("soon", 0.0), ("999", 30.0)]
)
def test_a_wait_that_is_none_is_not_waited_for(value: str, seconds: float) -> None:
    exchange = Exchange(b"", 0.0, 1.0, lambda e: None, status=429, headers={"retry-after": value})
    assert retry_after(exchange) == seconds


# 8. compare


def test_compare_names_another_slo(tmp_path: Path) -> None:
    load([head(), *WORDS, END, last(usage(99, 6))], tmp_path / "old")
    report = json.loads((tmp_path / "old" / "report.json").read_text())
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({**manifest, "outputs": {}}))
    for name, bound in (("old", 100.0), ("new", 200.0)):
        if name == "new":
            shutil.copytree(tmp_path / "old", tmp_path / "new")
        good = {"slo_ms": {"ttft": bound}, "requests_per_second": 1.0, "share": 1.0}
        report["figures"]["goodput"] = good
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    found = compare_reports(tmp_path / "old", tmp_path / "new", side="candidate", threshold=0.05)
    assert any("SLO" in w for w in found.warnings), found.warnings
