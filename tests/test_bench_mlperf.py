"""The run in LoadGen's form: its names, its percentile rule, its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.mlperf import queries_to_pass, scenario_of, write_logs
from bench.records import RequestRecord, goodput, summarise
from bench.schedule import Load, parse_load
from unshot.errors import InputError


def records(count: int, spacing: float) -> list[RequestRecord]:
    """Answers of 3 tokens in 30 ms, 2 ms longer each; scheduled `spacing` seconds apart."""
    return [
        RequestRecord(
            side="candidate", mode="x", row=i, block=0, scheduled=i * spacing, start=i * spacing,
            token_times=[0.010, 0.020 + 0.002 * i, 0.030 + 0.002 * i], e2e=0.030 + 0.002 * i, prompt_tokens=5,
            output_tokens=3, timed_tokens=3,
        )
        for i in range(count)
    ]  # fmt: skip


def logs(
    folder: Path, load: Load, rows: list[RequestRecord], slo: dict[str, float]
) -> tuple[str, dict[str, object]]:
    figures = summarise(rows)
    report: Any = SimpleNamespace(
        model="m",
        url="http://h/v1",
        conditions=SimpleNamespace(requests=len(rows), seed=3),
        figures=figures.changed(goodput=goodput(1, 1, 1.0, slo) if slo else None),
    )
    write_logs(folder, report, rows, load)
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    values = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    return (folder / "mlperf_log_summary.txt").read_text(), {v["key"]: v["value"] for v in values}


def test_early_stopping_needs_as_many_queries_as_loadgen_says() -> None:
    # What LoadGen itself prints for one query that may be late, at the 90th and 99th percentile.
    assert [queries_to_pass(1, p) + 1 for p in (0.90, 0.99)] == [64, 662]


def test_a_long_server_run_within_its_bounds_is_valid(tmp_path: Path) -> None:
    rows = records(1000, 0.7)
    text, values = logs(tmp_path, parse_load("poisson:1.5"), rows, {"ttft": 20, "tpot": 1500})
    assert "Scenario : Server" in text
    assert "Result is : VALID" in text
    assert values["result_validity"] == "VALID"
    # Rank floor(n p) of the sorted latencies, in nanoseconds.
    assert values["result_99.00_percentile_latency_ns"] == round((0.030 + 0.002 * 990) * 1e9)
    assert values["result_first_token_50.00_percentile_latency_ns"] == 10_000_000
    assert values["result_scheduled_samples_per_sec"] == pytest.approx(1 / 0.7)
    assert "99.00 percentile latency (ns)   : 2010000000" in text


@pytest.mark.parametrize(
    ("rows", "slo", "words"),
    [
        (records(200, 0.01), {}, "Min duration satisfied : NO"),
        (records(1000, 0.7), {"ttft": 5}, "Performance constraints satisfied : NO"),
        (records(300, 3.0), {}, "Early stopping satisfied: NO"),
    ],
)
def test_what_loadgen_would_not_accept_is_invalid(
    tmp_path: Path, rows: list[RequestRecord], slo: dict[str, float], words: str
) -> None:
    text, values = logs(tmp_path, parse_load("poisson:9"), rows, slo)
    assert words in text
    assert values["result_validity"] == "INVALID"
    assert "not an MLPerf result" in text


def test_scenarios(tmp_path: Path) -> None:
    assert scenario_of(parse_load("closed:1"), 10) == "SingleStream"
    assert scenario_of(parse_load("closed:10"), 10) == "Offline"
    with pytest.raises(InputError, match="LoadGen has no load like constant:5"):
        scenario_of(parse_load("constant:5"), 10)
    text, values = logs(tmp_path, parse_load("closed:1"), records(100, 0.25), {})
    assert "90th percentile latency (ns) : 210000000" in text
    text, values = logs(tmp_path, parse_load("closed:100"), records(100, 0.0), {})
    assert values["result_samples_per_second"] == pytest.approx(100 / 0.228)
    assert values["result_tokens_per_second"] == pytest.approx(300 / 0.228)
