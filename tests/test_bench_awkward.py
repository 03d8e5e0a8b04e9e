"""Servers that are awkward in common ways, on real sockets: what is said of them is true, or said to be unknown."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.compare import Comparison, compare_reports
from bench.counters import counted
from bench.records import RequestRecord, summarise
from bench.schedule import parse_load
from bench.single import LoadJob, _rising, load_run, slo_knee
from bench.target import LoadOptions, Target
from bench.traffic import ServerOptions
from tests.golden import golden_server, golden_thread, wait_for_requests
from tests.logs import run_here
from tests.raw_server import Script, delta, event, head, last, raw_server, usage, whole
from unshot.console import Output
from unshot.contracts.figures import Client, Goodput
from unshot.contracts.report import LoadReport, Step, SweepReport

QUIET = Output(verbosity=-1)
WORDS = [delta(content=f" w{i}") for i in range(5)]
END = delta("stop")
# Seconds between the pieces of a timed script.
STEP = 0.02


def timed(*pieces: bytes) -> list[bytes | float | None]:
    """The pieces, one a step."""
    return [x for i, piece in enumerate(pieces, 1) for x in (STEP * i, piece)]


def span(r: RequestRecord) -> float:
    """Seconds from the first arrival to the last."""
    return r.token_times[-1] - r.token_times[0]


def later(r: RequestRecord) -> int:
    """Pieces that came after the first arrival: on a busy machine one read may hold several."""
    return sum(t > r.token_times[0] for t in r.token_times)


def ask(script: Script, *, page: Any = None, **options: Any) -> RequestRecord:
    """One request to a server that answers by the script; `page` is what it says at /models."""
    with raw_server(lambda n, body: script, pages=lambda path: None if page is None else whole(page)) as url:
        target = Target(LoadOptions(url, ServerOptions("m", timeout=5, **options)))
        _, records = target.run(parse_load("closed:1"), 1)
    return records[0]


# 1 and 2. Counts


@pytest.mark.parametrize(
    "counts",
    [
        usage(100, 6, prompt_tokens_details={"cached_tokens": 64}),
        usage(100, 6, prompt_cache_hit_tokens=64, prompt_cache_miss_tokens=36),
        usage(100, 6, cached_tokens=64),
        usage(100, 6, cache_read_input_tokens=64, prompt_tokens_details=None),
        {"input_tokens": 100, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 64}},
        {"prompt_tokens": 100.0, "completion_tokens": 6.0, "prompt_tokens_details": {"cached_tokens": 64.0}},
    ],
)
def test_counts_are_read_under_the_names_that_servers_have_for_them(counts: Any) -> None:
    r = ask([head(), *WORDS, END, last(counts)])
    assert (r.prompt_tokens, r.cached_tokens, r.output_tokens) == (100, 64, 6)


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": usage(100, 6)}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "x_groq": {"usage": usage(100, 6)}},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
         "timings": {"cache_n": 64, "prompt_n": 36, "predicted_n": 6}},
    ],
)  # fmt: skip
def test_counts_are_read_where_servers_put_them(chunk: Any) -> None:
    r = ask([head(), *WORDS, event(chunk), event(b"[DONE]")])
    assert (r.prompt_tokens, r.output_tokens) == (100, 6)


def test_the_last_of_many_counts_holds_and_one_from_before_the_end_does_not() -> None:
    each = [delta(content=f" w{i}", usage=usage(100, i + 1)) for i in range(5)]
    r = ask([head(), *each, delta("stop", usage=usage(100, 6)), event(b"[DONE]")])
    assert (r.prompt_tokens, r.output_tokens) == (100, 6)
    for early in (0, 1):
        begin = delta(role="assistant", usage=usage(100, early))
        r = ask([head(), begin, *WORDS, END, event(b"[DONE]")])
        assert (r.prompt_tokens, r.output_tokens) == (100, None)


@pytest.mark.parametrize(
    ("counts", "prompt", "cached", "output"),
    [
        (None, None, None, None),
        (usage(100, 0), 100, None, None),
        (usage(36, 6, prompt_tokens_details={"cached_tokens": 64}), 36, None, 6),
        ({"prompt_tokens": -1, "completion_tokens": True}, None, None, None),
    ],
)
def test_counts_that_cannot_be_are_not_shown(
    counts: Any, prompt: int | None, cached: int | None, output: int | None
) -> None:
    r = ask([head(), *WORDS, END, last(counts)])
    assert (r.error, r.prompt_tokens, r.cached_tokens, r.output_tokens) == (None, prompt, cached, output)


@pytest.mark.parametrize(
    "page",
    [
        [], {"data": None}, {"data": [{"id": 3}]}, {"data": [{"id": "x" * 5000}]}, {"data": [{"id": "a\0b"}]}, 7,
        {"data": [{"id": "/etc/passwd", "root": "/etc"}]}, {"data": ["m"]},
    ],
)  # fmt: skip
def test_an_odd_list_of_models_costs_nothing(page: Any) -> None:
    assert ask([head(), *WORDS, END, last(usage(9, 6))], page=page).output_tokens == 6


def test_another_models_tokenizer_is_not_taken(embedded_model: Path) -> None:
    """Of two models that are served the one asked for counts; alone it is found, by its directory too."""
    script = [head(), *WORDS, END, event(b"[DONE]")]
    mine = {"id": "m", "root": str(embedded_model)}
    assert ask(script, page={"data": [{"id": str(embedded_model)}, {"id": "m"}]}).output_tokens is None
    assert ask(script, page={"data": [{"id": "other"}, mine]}).output_tokens is not None
    adapter = {"id": "m", "root": "/nowhere", "parent": str(embedded_model)}
    assert ask(script, page={"data": [{"id": "other"}, adapter]}).output_tokens is not None


def test_the_one_model_that_is_served_is_asked_for_where_none_is_named() -> None:
    asked: list[str] = []

    def answer(number: int, body: Any) -> Script:
        asked.append(body["model"])
        return [head(), *WORDS, END, last(usage(9, 6))]

    with raw_server(answer, pages=lambda path: whole({"data": [{"id": "the-one"}]})) as url:
        Target(LoadOptions(url)).run(parse_load("closed:1"), 1)
        Target(LoadOptions(url, ServerOptions("adapter"))).run(parse_load("closed:1"), 1)
    assert asked == ["the-one", "adapter"]


# 3. Reasoning and tools


@pytest.mark.parametrize(
    "thoughts",
    [
        [delta(reasoning_content=f"r{i}") for i in range(4)],
        [delta(reasoning={"text": f"r{i}"}) for i in range(4)],
        [delta(thinking=f"r{i}") for i in range(4)],
        [delta(reasoning_details=[{"type": "reasoning.text", "text": f"r{i}"}]) for i in range(4)],
        [delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": f"r{i}"}]}]) for i in range(4)],
        [delta(content=t) for t in ("<think>", "r0", "r1", "</think>")],
        [delta(content=t) for t in ("<thi", "nk>r0", "r1</th", "ink>")],
        [delta(content=t) for t in ("r0", "r1", "r2", "</think>")],
        [delta(content=t) for t in ("[THINK]", "r0", "r1", "[/THINK]\n\n")],
        [delta(content=t) for t in ("<|channel|>analysis", "<|message|>r0", "<|end|>", "<|channel|>final<|message|>")],
    ],
)  # fmt: skip
def test_thoughts_of_any_form_are_tokens_and_no_part_of_the_answer(thoughts: list[bytes]) -> None:
    answer = [delta(content="red"), delta(content=" kite")]
    r = ask([head(), *timed(*thoughts, *answer, END), last(usage(100, 7))])
    assert (r.text, r.timed_tokens) == ("red kite", later(r) + 1)
    assert (r.ttft, r.ttft_answer) == (r.token_times[0], r.token_times[4])
    assert len(r.token_times) == 6 and r.tpot == span(r) / later(r)


def test_thoughts_that_never_end_leave_no_answer() -> None:
    r = ask([head(), delta(content="<think>"), delta(content="so"), delta("length"), last(usage(9, 2))])
    assert (r.text, r.error) == ("", None) and math.isnan(r.ttft_answer)


def test_reasoning_that_is_kept_back_is_paid_for_and_takes_no_time_on_the_wire(embedded_model: Path) -> None:
    counts = usage(100, 506, completion_tokens_details={"reasoning_tokens": 500})
    script = [head(), *timed(*WORDS, END), last(counts)]
    r = ask(script)
    assert (r.output_tokens, r.reasoning_tokens, r.timed_tokens) == (506, 500, later(r) + 1)
    assert r.tpot == span(r) / later(r)
    assert (ask(script, tokenizer=str(embedded_model)).output_tokens or 0) > 500


def test_a_tool_call_alone_is_an_answer_whatever_form_its_arguments_have() -> None:
    for arguments in ('{"a": 1}', {"a": 1}):
        call = delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": arguments}}])
        r = ask([head(), call, delta("tool_calls"), last(usage(9, 5))])
        assert (r.error, r.text, r.output_tokens) == (None, 'f{"a": 1}', 5)


# 4. Tokens that come together


def test_without_a_tokenizer_nobody_knows_the_time_of_tokens_that_come_together(
    embedded_model: Path, tmp_path: Path
) -> None:
    """Even chunks and a first token alone look the same: 20 tokens in 4 chunks, or 1 and 4 of 5."""
    even = timed(*[delta(content=" a b c d e")] * 4)
    alone = timed(delta(content=" a"), *[delta(content=" a b c d e")] * 4)
    for script, sizes in ((even, [5] * 4), (alone, [1, *[5] * 4])):
        count = sum(sizes)
        whole_answer = [head(), *script, END, last(usage(100, count + 1))]
        assert math.isnan(ask(whole_answer).tpot)
        r = ask(whole_answer, tokenizer=str(embedded_model))
        after = sum(n for n, t in zip(sizes, r.token_times, strict=True) if t > r.token_times[0])
        assert r.tpot == span(r) / after
    with raw_server(lambda n, body: [head(), *even, END, last(usage(100, 21))]) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:1", 3, warm_up=0), QUIET)
    assert any("several tokens at once" in w for w in report.warnings)


@pytest.mark.parametrize("finish", ["stop", "eos_token", "end_turn", {"type": "stop"}])
def test_a_stop_token_is_told_whatever_the_end_is_called(finish: Any) -> None:
    end = event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    r = ask([head(), *timed(*WORDS, end), last(usage(100, 6))])
    assert (r.output_tokens, r.timed_tokens) == (6, later(r) + 1)


# 5. Fewer requests than places


def test_fewer_requests_than_places_are_said_to_be_fewer(tmp_path: Path) -> None:
    script = [head(), *timed(*WORDS, END), last(usage(100, 6))]
    with raw_server(lambda n, body: script) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:8", 3, warm_up=0), QUIET)
    assert any("in flight where 8 were asked for" in w for w in report.warnings), report.warnings


# 8. compare


def test_compare_names_what_differs_and_what_only_one_report_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One report beside copies in which one condition each is another."""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"prompt": "q {i}", "completion": "word"}}\n' for i in range(16)))
    old = tmp_path / "old"
    with golden_thread(ttft_ms=1, itl_ms=0, tokens=2) as url:
        run_here(
            capsys, "bench", "--baseline", url, "--candidate", url, "--data", data, "--requests", "16",
            "--cold-requests", "4", "--price-per-hour", "1", "--out", old, "-q",
        )  # fmt: skip

    # Without the hashes of its files, so that one can be another.
    written = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**written, "outputs": {}}))
    # The machine may have been busy.
    measured = json.loads((old / "report.json").read_text())
    (old / "report.json").write_text(json.dumps({**measured, "valid": True}))

    def changed(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Comparison:
        new = tmp_path / "new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new)
        report, manifest = (json.loads((new / n).read_text()) for n in ("report.json", "manifest.json"))
        change(report, manifest)
        (new / "report.json").write_text(json.dumps(report))
        (new / "manifest.json").write_text(json.dumps(manifest))
        return compare_reports(old, new, side="candidate", threshold=0.05)

    assert changed(lambda r, m: None).warnings == []
    for words, change in (
        ("different precision: q8 / f16", lambda r, m: r["systems"]["candidate"].update(precision="f16")),
        ("different prompt: ", lambda r, m: r["systems"]["candidate"].update(prompt="another")),
        ("different machine (cpu): ", lambda r, m: r["conditions"]["hardware"].update(cpu="another")),
        ("different machine (gpus): ", lambda r, m: r["conditions"]["hardware"].update(gpus=["H100"])),
        ("different contents of the data", lambda r, m: m["inputs"][0].update(sha256="0" * 64)),
        ("different version of unshot: ", lambda r, m: m["tool"].update(version="0.0.1")),
        (
            "different request extra: ",
            lambda r, m: r["conditions"].update(request_extra={"ignore_eos": True}),
        ),
        ("different price: ", lambda r, m: r["price"]["candidate"].update(source="another")),
    ):
        if "precision" in words:
            report = json.loads((old / "report.json").read_text())
            report["systems"]["candidate"]["precision"] = "q8"
            (old / "report.json").write_text(json.dumps(report))
        found = changed(change).warnings
        assert len(found) == 1 and found[0].startswith(words), (words, found)

    late = changed(lambda r, m: r.update(valid=False))
    assert late.invalid == [str(tmp_path / "new")] and late.worse == []
    times = [r for r in late.rows if "cache" in r.name and not r.name.startswith("errors")]
    assert times and {r.verdict for r in times} == {"not comparable"}

    def unpriced(report: dict[str, Any], manifest: dict[str, Any]) -> None:
        report["price"]["candidate"].update(per_hour=None, source="no price")

    row = next(r for r in changed(unpriced).rows if r.name == "$ per 1,000, cache on")
    assert (row.verdict, row.note, row.new) == ("not comparable", "not known in NEW", None)
    records = (old / "records.jsonl").read_text().splitlines(keepends=True)
    (old / "records.jsonl").write_text("".join(line for line in records if '"cache off"' not in line))
    gone = compare_reports(tmp_path / "new", old, side="candidate", threshold=0.05).warnings
    assert any(w.startswith("cache off was measured in") and "is not compared" in w for w in gone)


# 7 and 11. Failures


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (whole({"error": {"message": "no"}}), "server error"),
        (whole({"object": "error", "message": "no", "code": 400}), "server error"),
        (whole({"detail": "no"}), "server error"),
        (whole(b"<html>\n\n<p>hi</p></html>", kind="text/html"), "bad stream"),
        (whole(b"", kind="text/html"), "cut short"),
        ([head(), *WORDS, b"event: error\n" + event({"message": "oom"}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, event({"error": "oom"}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, event({"object": "error", "message": "oom"}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, event({"detail": "oom"}), event(b"[DONE]")], "server error"),
        ([head(), *WORDS, delta("abort"), last(usage(9, 6))], "server error"),
        ([head(), *WORDS, delta("error"), last(usage(9, 6))], "server error"),
        ([head(), *WORDS, delta("content_filter"), last(usage(9, 6))], "content filter"),
        ([head(), *WORDS, None], "cut short"),
        ([head(), delta("length"), last(usage(9, 1))], "empty"),
        ([head(), event({"choices": [{"index": 0, "delta": {"content": "a"}},
                                     {"index": 1, "delta": {"content": "b"}}]}), END], "bad stream"),
        ([head(), event({"choices": {"a": 1}}), END], "bad stream"),
        (whole({"error": "busy"}, 503, more="Retry-After: 0\r\n"), "http 503"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_one_error_of_its_kind(script: Script, error: str) -> None:
    assert ask(script).error == error


@pytest.mark.parametrize(
    "script",
    [
        [head(), b"\xef\xbb\xbf: hi\nid: 3\nretry: 5\n\n", *WORDS, b": ping\n\n", END, last(usage(9, 6))],
        [head(), b"".join([*WORDS, END, last(usage(9, 6))]).replace(b"\n", b"\r")],
        [head(), *WORDS, END, event({"choices": [], "usage": usage(9, 6)}), None],
        [head("application/json"), *WORDS, END, last(usage(9, 6))],
        whole({"choices": [{"message": {"content": " w0 w1 w2 w3 w4"}, "finish_reason": "stop"}],
               "usage": usage(9, 6)}, kind="text/event-stream"),
    ],
)  # fmt: skip
def test_streams_and_labels_that_are_odd_and_right_are_read(script: Script) -> None:
    r = ask(script)
    assert (r.error, r.text, r.output_tokens) == (None, " w0 w1 w2 w3 w4", 6)


def test_a_server_that_asks_to_wait_at_the_very_end_ends_the_run(tmp_path: Path) -> None:
    """The last requests are 429s with a wait: every request is counted, and nothing waits for ever."""
    good = [head(), *WORDS, END, last(usage(9, 6))]
    busy = whole({"error": "slow down"}, 429, more="Retry-After: 0.2\r\n")
    with raw_server(lambda n, body: busy if n >= 8 else good) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:3", 12, warm_up=0), QUIET)
    assert report.figures.errors == {"http 429": 4} and report.figures.answered == 8


@pytest.mark.parametrize("load", ["closed:1", "poisson:200"])
def test_records_of_a_run_can_be_read_back_and_compared(tmp_path: Path, load: str) -> None:
    script = [head(), delta(content="<think>a</think>b"), END, last(usage(9, 6))]
    with raw_server(lambda n, body: script) as url:
        load_run(LoadJob(LoadOptions(url), tmp_path / "r", load, 2, warm_up=0), QUIET)
    lines = (tmp_path / "r" / "records.jsonl").read_text().splitlines()
    records = [RequestRecord.from_json(line) for line in lines]
    assert [r.text for r in records] == ["b", "b"] and all(r.scheduled >= 0 for r in records)
    assert compare_reports(tmp_path / "r", tmp_path / "r", side="candidate", threshold=0.05).worse == []


@pytest.mark.cli
@pytest.mark.parametrize("tool", ["load", "ab"])
def test_ctrl_c_in_the_warm_up_ends_the_run_with_nothing_written(tmp_path: Path, tool: str) -> None:
    """A warm-up of hundreds of requests is stopped at its second: nothing was measured, so there is no report."""
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"prompt": "q {i}", "completion": "word"}}\n' for i in range(4)))
    with golden_server(ttft_ms=300, itl_ms=1, tokens=1) as url:
        command = [sys.executable, "-P", "-m", "unshot", "bench"]
        command += (
            ["load", url] if tool == "load" else ["--baseline", url, "--candidate", url, "--data", str(data)]
        )
        command += ["--warm-up", "300", "--out", str(tmp_path / "r"), "-q"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_requests(url, 2)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not (tmp_path / "r").exists()


# The server's own counters

VLLM = """\
# HELP vllm:prompt_tokens Number of prefill tokens processed.
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{{engine="0",model_name="a"}} {prompt}
vllm:prompt_tokens_total{{engine="1",model_name="a"}} 0.0
vllm:generation_tokens_total{{engine="0",model_name="a"}} {output}
vllm:prefix_cache_hits_total{{engine="0"}} {cached}
vllm:time_to_first_token_seconds_bucket{{le="0.1"}} 1
vllm:time_to_first_token_seconds_sum{{engine="0"}} {ttft}
vllm:time_to_first_token_seconds_count{{engine="0"}} {count}
vllm:request_queue_time_seconds_sum{{engine="0"}} 0.0
vllm:request_queue_time_seconds_count{{engine="0"}} {count}
"""


def test_what_the_server_counts_itself_is_the_difference_over_the_load(tmp_path: Path) -> None:
    answers = [0]

    def page(path: str) -> Script | None:
        assert path in ("/metrics", "/v1/models")
        n = 7 + answers[0]
        text = VLLM.format(prompt=100.0 * n, output=6 * n, cached=f"{64 * n:e}", ttft=0.05 * n, count=n)
        return whole(text.encode(), kind="text/plain") if path == "/metrics" else None

    def answer(number: int, body: Any) -> Script:
        answers[0] += 1
        return [head(), *WORDS, END, last(usage(100, 6))]

    with raw_server(answer, pages=page) as url:
        report = load_run(LoadJob(LoadOptions(url), tmp_path / "r", "closed:1", 5, warm_up=2), QUIET)
    s = report.figures.server
    assert s is not None and (s.engine, s.prompt_tokens, s.cached_tokens, s.output_tokens) == (
        "vLLM",
        500,
        320,
        30,
    )
    assert s.ttft_ms == pytest.approx(50) and s.queue_ms == 0 and s.tpot_ms is None
    assert "TTFT 50.0 ms, queue 0.0 ms, cached 64%" in (tmp_path / "r" / "report.html").read_text()


def test_llama_cpps_counters_are_read_with_its_means_taken_apart() -> None:
    def reading(tokens: float, seconds: float, steps: float, busy: float) -> dict[str, float]:
        return {
            "llamacpp:prompt_tokens_total": 10 * tokens, "llamacpp:tokens_predicted_total": tokens,
            "llamacpp:tokens_predicted_seconds_total": seconds, "llamacpp:n_decode_total": steps,
            "llamacpp:n_busy_slots_per_decode": busy,
        }  # fmt: skip

    found = counted(reading(100, 1.0, 100, 1.0), reading(300, 3.0, 150, 2.0))
    assert found is not None and (found.engine, found.tpot_ms, found.requests_a_step) == (
        "llama.cpp",
        10.0,
        4.0,
    )
    # Begun anew meanwhile, or another server: nothing is said.
    assert counted(reading(300, 3.0, 150, 2.0), reading(10, 0.1, 10, 1.0)) is None
    assert counted({}, {"http_requests_total": 3.0}) is None


# Replay


def test_a_request_log_is_replayed_whole_at_its_own_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """120 requests, out of order, one of them a shadow: each other text once, spaced as it was."""
    log = tmp_path / "log"
    log.mkdir()
    lines = [{"time": 1e9 + 0.002 * i, "input": f"question {i}", "shadow": i == 7} for i in range(120)]
    (log / "requests-20260101.jsonl").write_text("".join(json.dumps(x) + "\n" for x in reversed(lines)))
    seen: list[str] = []

    def answer(number: int, body: Any) -> Script:
        seen.append(body["messages"][-1]["content"])
        return [head(), *WORDS, END, last(usage(9, 6))]

    with raw_server(answer) as url:
        run_here(
            capsys,
            "bench",
            "load",
            url,
            "--load",
            f"trace:{log}",
            "--warm-up",
            "1",
            "--out",
            tmp_path / "r",
            "-q",
        )
    assert sorted(seen[1:]) == sorted(f"question {i}" for i in range(120) if i != 7)
    report = LoadReport.read(tmp_path / "r")
    assert report.figures.requests == 119 and "of the log" in report.conditions.prompts
    records = [json.loads(x) for x in (tmp_path / "r" / "records.jsonl").read_text().splitlines()]
    times = sorted(float(r["scheduled"]) for r in records)
    assert times[-1] - times[0] == pytest.approx(0.238)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"time": 1, "input": "a"}\n{"time": 2}\n')
    done = run_here(
        capsys, "bench", "load", "http://127.0.0.1:9/v1", "--load", f"trace:{mixed}", "--out", tmp_path / "x"
    )
    assert done.code == 2 and "1 of 2 lines have no text" in done.err


# The SLO's knee


def test_a_sweep_of_rates_ends_at_the_greatest_rate_within_the_slo() -> None:
    """A server that holds the SLO up to 11/s: the search closes in on that, from below and from far above."""
    for limit in (11.0, 0.3):
        points: list[Step] = []
        tried = []
        for rate in _rising(points):
            tried.append(rate)
            share = 1.0 if rate <= limit else 0.4
            figures = summarise([], 1.0).changed(goodput=Goodput({"ttft": 100.0}, rate * share, share))
            points.append(Step(0, figures, Client(valid=True, reasons=[]), None, rate))
        found = slo_knee(points)
        assert found.rate is not None and limit / 1.1 <= found.rate <= limit, tried
        assert found.next_rate is not None and limit < found.next_rate <= limit * 1.1
        assert len(tried) < 14
    late = points[0].changed(client=Client(valid=False, reasons=["late"]))
    assert slo_knee([late.changed(rate=0.01), *points]).rate is None


@pytest.mark.slow
def test_rates_are_swept_against_a_server_and_want_an_slo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with golden_thread(ttft_ms=30, itl_ms=0, tokens=1, slots=1) as url:
        done = run_here(
            capsys, "bench", "sweep", url, "--rates", "5,40", "--requests", "20", "--slo", "ttft=20000",
            "--out", tmp_path / "r", "-q",
        )  # fmt: skip
        refused = run_here(capsys, "bench", "sweep", url, "--rates", "auto", "--out", tmp_path / "x", "-q")
    assert refused.code == 2 and "give --slo" in refused.err
    report = SweepReport.read(tmp_path / "r")
    assert [p.load for p in report.points] == ["poisson:5", "poisson:40"] and report.knee is None
    assert "requests/s" in done.out and report.slo_knee is not None
    assert "within the SLO" in (tmp_path / "r" / "report.html").read_text()
