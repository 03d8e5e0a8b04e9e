"""What servers put on the wire in ways of their own: counts, thoughts, ends, trailers. Real sockets, truth stated."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from bench.single import LoadJob, load_run
from bench.target import LoadOptions
from bench.traffic import ServerOptions
from tests.raw_server import Script, delta, event, head, last, raw_server, usage, whole
from tests.test_bench_awkward import END, QUIET, WORDS, ask, later, span, timed
from tests.test_bench_odd import load

# 1 and 2. Counts


@pytest.mark.parametrize(
    "counts",
    [
        usage(100, 6, prompt_tokens_details={"cached_tokens": 0}, prompt_cache_hit_tokens=64),
        usage(100, 6, prompt_tokens_details={"cache_read_tokens": 64, "cache_creation_tokens": 9}),
        usage(100, 6, num_cached_tokens=64, uncached_tokens=36),
        usage(100, 6, input_token_details={"cache_read": 64}, cache_write_tokens=80),
    ],
)
def test_cached_tokens_are_read_by_what_their_name_says(counts: Any) -> None:
    assert ask([head(), *WORDS, END, last(counts)]).cached_tokens == 64


def test_a_count_left_out_where_it_is_zero_does_not_hide_the_others(tmp_path: Path) -> None:
    """vLLM leaves out cached tokens of 0: three of four answers have 90 of 100 from the cache."""

    def answer(number: int, body: Any) -> Script:
        return [
            head(),
            *WORDS,
            END,
            last(usage(100, 6, **({"prompt_tokens_details": {"cached_tokens": 90}} if number else {}))),
        ]

    with raw_server(answer) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:1", 4, warm_up=0), QUIET)
    assert report.figures.tokens.cached == 67.5 and report.figures.tokens.cached_share == 0.675
    assert any("68% of the prompt tokens from its cache" in w for w in report.warnings), report.warnings
    assert any("3 of 4 answers say how many" in w for w in report.warnings), report.warnings


@pytest.mark.parametrize(
    ("script", "prompt", "output"),
    [
        # A prompt of no tokens; and one that the last chunk alone has none of.
        ([*timed(*WORDS, END), last(usage(0, 6))], None, 6),
        ([delta(role="assistant", usage=usage(100, 1)), *timed(*WORDS, END), last(usage(0, 6))], 100, 6),
        # Each chunk counts itself.
        ([*timed(*[delta(content=f" w{i}", usage=usage(100, 1)) for i in range(5)], END), event(b"[DONE]")], 100, None),
        # The same number in each, and the whole in the last.
        ([*timed(*[delta(content=f" w{i}", usage=usage(100, 1)) for i in range(5)], END), last(usage(100, 6))], 100, 6),
        ([*timed(*WORDS, END), last({"prompt_tokens": 100, "completion_tokens": 10**30})], 100, None),
        ([*timed(*WORDS, END), last({"prompt_tokens": 1e300, "completion_tokens": 6})], None, 6),
    ],
)  # fmt: skip
def test_counts_that_are_not_the_answers_are_not_shown(
    script: list[Any], prompt: int | None, output: int | None
) -> None:
    r = ask([head(), *script])
    assert (r.error, r.prompt_tokens, r.output_tokens) == (None, prompt, output)


# 3. Reasoning


@pytest.mark.parametrize(
    "thoughts",
    [
        [delta(reasoning_text=f"r{i}") for i in range(4)],
        [delta(thought=f"r{i}") for i in range(4)],
        [delta(thinking_blocks=[{"type": "thinking", "thinking": f"r{i}", "signature": "s"}]) for i in range(4)],
        [delta(reasoning_summary=[{"type": "summary_text", "text": f"r{i}"}]) for i in range(4)],
        [delta(content=[{"type": "reasoning", "reasoning": f"r{i}"}]) for i in range(4)],
        [delta(content=[{"type": "reasoning", "summary": [{"text": f"r{i}"}]}]) for i in range(4)],
    ],
)  # fmt: skip
def test_thoughts_in_a_field_of_any_name_are_the_first_tokens(thoughts: list[bytes]) -> None:
    ids = delta(reasoning_id="rs_1", thinking_signature="abc", finish_reason="x", content="")
    answer = [delta(content="red"), delta(content=" kite")]
    r = ask([head(), ids, *timed(*thoughts, *answer, END), last(usage(100, 7))])
    assert (r.error, r.text, len(r.token_times)) == (None, "red kite", 6)
    assert (r.ttft, r.ttft_answer) == (r.token_times[0], r.token_times[4])


def test_parts_without_text_and_refusals_are_read() -> None:
    parts = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "a"},
        {"type": "refusal", "refusal": "b"},
    ]
    r = ask([head(), delta(content=parts), END, last(usage(9, 3))])
    assert (r.error, r.text) == (None, "ab")


# 4 and 11. Ends


@pytest.mark.parametrize(
    ("finish", "error"),
    [
        ("insufficient_system_resource", "server error"), ("network_error", "server error"),
        ("CANCELLED", "server error"), ("failed", "server error"), ("SAFETY", "content filter"),
        ("sensitive", "content filter"), ("STOP", None), ("MAX_TOKENS", None), ("COMPLETE", None),
    ],
)  # fmt: skip
def test_how_an_answer_ended_is_read_in_any_servers_words(finish: str, error: str | None) -> None:
    r = ask([head(), *timed(*WORDS, delta(finish)), last(usage(100, 6 if finish != "MAX_TOKENS" else 5))])
    assert r.error == error
    if error is None:
        assert r.tpot == span(r) / later(r) and r.finish == {"MAX_TOKENS": "length"}.get(
            finish, finish.lower()
        )


def test_a_finish_reason_that_says_null_is_none() -> None:
    pieces = [delta("null", content=f" w{i}") for i in range(5)]
    assert ask([head(), *pieces, None]).error == "cut short"
    r = ask([head(), *pieces, END, last(usage(9, 6))])
    assert (r.error, r.finish) == (None, "stop")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        # Tokens that were counted and never sent are no answer.
        ([head(), END, last(usage(100, 6))], "empty"),
        (whole({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}], "usage": usage(9, 4)}), "empty"),
        ([head(), END, last(usage(100, 501, completion_tokens_details={"reasoning_tokens": 500}))], None),
        ([head(), END, last(usage(100, 1))], None),
        # Text where no chunk of the API has it.
        ([head(), *[event({"choices": [{"index": 0, "message": {"content": "a"}}]})] * 3, END], "bad stream"),
        ([head(), *[event({"choices": [{"index": 0, "text": "a"}]})] * 3, END], "bad stream"),
        ([head(), *WORDS, event({"choices": [{"index": 0, "message": {"content": " w0 w1"}, "finish_reason": "stop"}]}),
          event(b"[DONE]")], None),
        # Two choices, whatever their numbers.
        ([head(), event({"choices": [{"index": 0, "delta": {"content": "a"}}] * 2}), END], "bad stream"),
        ([head(), event({"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}), END], "bad stream"),
        (whole({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}] * 2}), "bad stream"),
        # Failures told in other words, with a [DONE] behind them.
        ([head(), *WORDS, event({"type": "error", "code": 529}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, event({"code": 500, "msg": "busy"}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, event({"success": False, "error_code": 3}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, event({"choices": [{"index": 0, "delta": {}, "error": "down"}]}), END], "server error"),
        (whole({"code": 500, "msg": "busy"}), "server error"),
        ([head(), event({"type": "ping"}), *WORDS, event({"id": "x", "code": 0}), END, event(b"[DONE]")], None),
    ],
)  # fmt: skip
def test_what_is_an_answer_and_what_is_none(script: Script, error: str | None) -> None:
    assert ask(script).error == error


def test_a_completions_stream_with_chat_chunks_is_no_empty_answer() -> None:
    assert ask([head(), *WORDS, END, last(usage(100, 6))], api="completions").error == "bad stream"


def test_a_character_in_two_halves_is_one_and_half_a_character_loses_nothing(tmp_path: Path) -> None:
    """Servers that count in UTF-16 cut an emoji in two chunks, each half of which is no text."""

    def half(text: bytes) -> bytes:
        return b'data: {"model":"m\\ud83d","choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % text

    whole_answer = [half(b"a\\ud83d"), half(b"\\ude00b"), END, last(usage(100, 3))]
    assert ask([head(), *whole_answer]).text == "a\U0001f600b"
    for script in (
        [head(), half(b"a\\ud83d"), END, last(usage(9, 2))],
        whole(b'{"error":{"message":"\\ud83d"}}'),
    ):
        report = load(script, tmp_path / str(len(script)), turns=2)
        page = (tmp_path / str(len(script)) / "report.html").read_text()
        assert report.figures.requests and "\ud83d" not in page


# 9. Connections


def chunked(body: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + f"{len(body):x}\r\n".encode()
        + body
        + b"\r\n"
    )


ANSWER = b"".join([*WORDS, END, last(usage(99, 6))])


def test_trailers_belong_to_the_response_before(tmp_path: Path) -> None:
    late: Script = [chunked(ANSWER) + b"0\r\nX-A: b\r\n", 0.02, b"X-C: d\r\n\r\n"]
    report = load(late, tmp_path / "r", count=6)
    assert (report.figures.errors, report.figures.answered, report.client.connections) == ({}, 6, 0)


def test_a_response_that_stays_open_after_its_end_is_told(tmp_path: Path) -> None:
    """The answer takes milliseconds, and the client waits half a second for the response's end each time."""
    report = load([chunked(ANSWER), 1.5, b"0\r\n\r\n"], tmp_path / "r", count=3)
    assert any("3 of 3 responses stayed open" in w for w in report.warnings), report.warnings


def test_a_request_that_a_server_died_of_is_not_asked_again_in_silence(tmp_path: Path) -> None:
    """A connection that closes at once was closed while idle; one that closes 0.4 s later, over the request."""
    good = [head(length=len(ANSWER)) + ANSWER]
    for wait, errors in ((0.4, {"cut short": 2}), (0.0, {})):
        with raw_server(lambda n, body, wait=wait: [wait, None] if n in (2, 5) else good) as url:  # type: ignore[misc]
            job = LoadJob(LoadOptions(url), tmp_path / str(wait), "closed:1", 8, warm_up=0)
            report = load_run(job, QUIET)
        assert report.figures.errors == errors


@pytest.mark.parametrize("form", ["date", "ms"])
def test_a_wait_is_heeded_in_every_form(tmp_path: Path, form: str) -> None:
    def answer(number: int, body: Any) -> Script:
        if number:
            return [head(length=len(ANSWER)) + ANSWER]
        at = time.time() + 2
        asked = {
            "date": time.strftime("Retry-After: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(at)),
            "ms": "Retry-After-Ms: 900\r\nRetry-After: 1\r\n",
        }
        return whole({"error": "slow down"}, 429, more=asked[form])

    with raw_server(answer) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:1", 2, warm_up=0), QUIET)
    assert report.figures.errors == {"http 429": 1} and report.figures.seconds >= 0.9


# What was asked for and not done


def test_a_limit_that_the_server_ignores_is_told(tmp_path: Path) -> None:
    script = [head(), *timed(*WORDS, END), last(usage(99, 6))]
    report = load(script, tmp_path / "a", max_tokens="2")
    assert any("4 of 4 answers are longer than was asked for" in w for w in report.warnings), report.warnings
    assert not load(script, tmp_path / "b", max_tokens="5").warnings
    with raw_server(lambda n, body: script) as url:
        target = LoadOptions(url, ServerOptions(extra={"ignore_eos": True}))
        report = load_run(LoadJob(target, tmp_path / "c", "closed:1", 4, warm_up=0), QUIET)
    assert any("4 of 4 answers ended before" in w for w in report.warnings), report.warnings


def test_answers_that_come_whole_among_streamed_ones_are_told(tmp_path: Path) -> None:
    json_answer = {"choices": [{"message": {"content": "a b c d e"}, "finish_reason": "stop"}]}

    def answer(number: int, body: Any) -> Script:
        streamed = [head(), *timed(*WORDS, END), last(usage(99, 6))]
        return whole({**json_answer, "usage": usage(99, 6)}) if number % 2 else streamed

    with raw_server(answer) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:1", 6, warm_up=0), QUIET)
    assert any("3 of 6 answers came in one piece" in w for w in report.warnings), report.warnings
    assert math.isclose(report.figures.tokens.output or 0, 6)


def test_what_came_at_once_has_no_time_between(tmp_path: Path) -> None:
    """Pairs of tokens, 20 ms apart: there is nothing to wait for inside a pair, and no latency of 0."""
    pairs = [b"".join(WORDS[i : i + 2]) for i in (0, 2)]
    r = ask([head(), *timed(*pairs, WORDS[4], END), last(usage(99, 6))])
    assert len(r.token_times) == 5 and len(r.gaps) <= 2 and all(gap > 0 for gap in r.gaps)


def test_an_answer_at_its_limit_has_no_stop_token_whatever_its_end_is_called(
    tmp_path: Path, embedded_model: Path
) -> None:
    """`transformers serve` says `stop` of an answer that its limit of five tokens cut."""
    script = [head(), *timed(delta(content=" a b c d e"), END), event(b"[DONE]")]
    for limit, tokens in (("5", 5), ("6", 6)):
        with raw_server(lambda n, body: script) as url:
            server = ServerOptions("m", tokenizer=str(embedded_model))
            target = LoadOptions(url, server, max_tokens=limit)
            report = load_run(LoadJob(target, tmp_path / limit, "closed:1", 2, warm_up=0), QUIET)
        assert report.figures.tokens.output == tokens
