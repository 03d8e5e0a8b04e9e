"""What goes back to the planner: measured times in its form, and forecasts only where they are about this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from bench.forecast import calibration_sides, forecast
from bench.records import RequestRecord, summarise
from planner.latency.calibrate import calibrate
from unshot.case import Case, Slo
from unshot.console import jsonable
from unshot.contracts.plan import (
    Compared,
    LatencyMs,
    MachinePrice,
    Percentiles,
    PlanFile,
    PlannedOption,
    Prices,
    Uncertainty,
    Verdict,
)
from unshot.contracts.report import SystemFacts
from unshot.engines.llama_cpp import precision_of

CONFIG = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "intermediate_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip


def system(**changes: Any) -> SystemFacts:
    facts: dict[str, Any] = {
        "config": CONFIG, "precision": "q8_0", "device": "cpu", "engine": "llama.cpp", "library": "x", "model": "m",
        "spec": "gguf:m.gguf", "examples_in_prompt": 0, "system_prompt": False,
    }  # fmt: skip
    return SystemFacts(**{**facts, **changes})


def records() -> list[RequestRecord]:
    made = []
    for side, prompt in (("baseline", 1500), ("candidate", 80)):
        for mode, cached in (("cache on", prompt - 60), ("cache off", 0)):
            for i in range(4):
                first = (prompt - cached) * 1e-3
                made.append(
                    RequestRecord(
                        side=side,
                        mode=mode,
                        row=i,
                        block=0,
                        scheduled=0.0,
                        start=0.0,
                        token_times=[first, first + 0.01, first + 0.02],
                        e2e=first + 0.02,
                        prompt_tokens=prompt,
                        output_tokens=3,
                        timed_tokens=3,
                        cached_tokens=cached,
                    )
                )
    return made


def test_the_planner_takes_the_measured_sides() -> None:
    facts = {"baseline": system(), "candidate": system()}
    report: dict[str, Any] = {"gpu": "cpu", "sides": jsonable(calibration_sides(records(), facts))}
    assert len(report["sides"]) == 4
    fitted = calibrate(report).efficiency
    assert fitted.rows == 8
    # A machine twice as slow must come out as less efficient.
    slow = json.loads(json.dumps(report))
    for side in slow["sides"]:
        side["ttft_s"] = [2 * t for t in side["ttft_s"]]
        side["tpot_s"] = [2 * t for t in side["tpot_s"]]
    assert calibrate(slow).efficiency.compute < fitted.compute


def test_sides_that_do_not_tell_about_one_stream_on_a_cpu_are_left_out() -> None:
    assert (
        calibration_sides(
            records(), {"baseline": system(device="of the server"), "candidate": system(concurrency=4)}
        )
        == []
    )
    assert (
        calibration_sides(records(), {"baseline": system(config=None), "candidate": system(precision=None)})
        == []
    )


def plan(folder: Path, kind: Literal["cpu", "gpu"]) -> Path:
    def option(key: str, *, tuned: bool, precision: str, ttft: float, e2e: float) -> PlannedOption:
        times = LatencyMs("simulation", Percentiles(ttft), Percentiles(1.0), Percentiles(e2e))
        return PlannedOption(
            key=key, name=key, kind="hosted", model="m", prompt="long", tuned=tuned, baseline=False,
            mode="prefix cache", usable=True, notes=[], input_tokens=1.0, prefix_tokens=0, output_tokens=1.0,
            one_off={}, one_off_total=0.0, retraining={}, precision=precision, latency_ms=times,
        )  # fmt: skip

    options = [
        option("a", tuned=False, precision="int8", ttft=50.0, e2e=90.0),
        option("b", tuned=True, precision="int8", ttft=10.0, e2e=30.0),
        option("c", tuned=True, precision="q8_0", ttft=11.0, e2e=31.0),
    ]
    PlanFile(
        case=Case(), rate=1.0, verdict=Verdict("tune", "", "", [], [], []),
        compared=Compared(None, None, None, None, None, None), slo=Slo(), slo_source="", price_per_hour=1.0,
        prices=Prices(None, MachinePrice("m", "m", kind, 1.0, "by hand", "")), tokens={}, options=options,
        uncertainty=Uncertainty({}, None, None, None, None, None, []), assumptions=[], warnings=[],
    ).write(folder)  # fmt: skip
    return folder


def test_forecast_stands_beside_the_measurement_of_the_same_option(tmp_path: Path) -> None:
    figures = summarise([r for r in records() if r.side == "baseline" and r.mode == "cache on"])
    mode = SimpleNamespace(side=lambda name: figures)
    report: Any = SimpleNamespace(
        systems={"baseline": system(), "candidate": system()}, modes={"cache on": mode, "cache off": mode}
    )
    rows = forecast(plan(tmp_path, "cpu"), report)
    assert [(r.mode, r.side, r.figure, r.option) for r in rows] == [
        ("cache on", "baseline", "ttft", "a"),
        ("cache on", "baseline", "e2e", "a"),
        ("cache on", "candidate", "ttft", "c"),
        ("cache on", "candidate", "e2e", "c"),
    ]
    assert rows[2].forecast_ms == 11.0
    assert forecast(plan(tmp_path, "gpu"), report) == []
    assert forecast(None, report) == []


@pytest.mark.parametrize(
    ("description", "expected"),
    [("llama 135M Q8_0", "q8_0"), ("llama 8B Q4_K - Medium", "q4_k_m"), ("llama 256M all F32", "f32")],
)
def test_precision_out_of_llama_cpps_words(description: str, expected: str) -> None:
    assert precision_of(description) == expected
