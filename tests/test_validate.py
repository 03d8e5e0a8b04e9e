"""Validation against published rows, refusals of bad files, and calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planner.latency.calibrate import calibrate
from planner.latency.measured import predict, read_measured
from planner.latency.step import cost_of, efficiency
from planner.latency.validate import judge, validate
from tests.conftest import run_unshot
from unshot import catalog
from unshot.errors import InputError

LLAMA = catalog.engine("llamacpp")
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "published"
TRT, LLAMACPP = PUBLISHED / "trtllm_v0.14_throughput.csv", PUBLISHED / "llamacpp_single_stream.csv"
needs_data = pytest.mark.skipif(not TRT.is_file(), reason=f"published measurements are not at {PUBLISHED}")


@needs_data
@pytest.mark.parametrize("hold_out", ["gpu", "model", "none"])
def test_throughput_rows_left_out(hold_out: str) -> None:
    summary = validate(TRT, hold_out).summary["throughput"]
    assert summary.rows == 54
    assert summary.median_abs_error < 0.10
    assert summary.p90_abs_error < 0.30


@needs_data
@pytest.mark.parametrize("hold_out", ["gpu", "none"])
def test_single_stream_rows_left_out(hold_out: str) -> None:
    summary = validate(LLAMACPP, hold_out).summary
    assert summary["decode"].median_abs_error < 0.12
    assert summary["prefill"].median_abs_error < 0.25


@needs_data
def test_one_model_cannot_be_left_out() -> None:
    with pytest.raises(InputError, match="two or more"):
        validate(LLAMACPP, "model")


@needs_data
def test_left_out_rows_are_not_in_their_fit() -> None:
    """Spoiling the measurements of one device must not move that device's own left-out forecasts."""
    from msgspec.structs import replace

    rows = read_measured(TRT)
    spoiled = [replace(r, measured=r.measured * 3) if r.gpu.name == "l40s" else r for r in rows]
    before, after = judge(rows, "gpu"), judge(spoiled, "gpu")
    for a, b in zip(before, after, strict=True):
        if a.row.gpu.name == "l40s":
            assert a.forecast == pytest.approx(b.forecast)
    assert any(a.forecast != pytest.approx(b.forecast) for a, b in zip(before, after, strict=True))


@needs_data
def test_stored_spread_is_honest() -> None:
    """About two thirds of left-out log errors lie within one stored spread, not far fewer."""
    inside = [
        abs(np.log(j.forecast / j.row.measured)) <= 1.5 * efficiency(j.row.gpu, j.row.engine).spread
        for path in (TRT, LLAMACPP)
        for j in judge(read_measured(path))
    ]
    assert np.mean(inside) > 0.7


HEADER = "model,gpu,precision,tensor_parallel,input_tokens,output_tokens,output_tokens_per_s\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model,MODEL,gpu,precision,input_tokens,output_tokens,output_tokens_per_s\na,b,h100,fp16,1,1,1\n",
            "two columns",
        ),
        (
            "model,gpu,precision,prompt_tokens,input_tokens,output_tokens,ttft_ms\na,h100,fp16,1,1,1,9\n",
            "`input_tokens`",
        ),
        (
            "model,gpu,precision,input_tokens,output_tokens,concurrency,ttft_ms\n"
            "llama-3.1-8b,h100,fp16,1000,128,4,0.064\n",
            "did you mean 64",
        ),
        (
            "model,gpu,precision,input_tokens,output_tokens,concurrency,itl_ms\n"
            "llama-3.1-8b,h100,fp16,1000,128,4,0.0074\n",
            "did you mean 7.4",
        ),
    ],
)
def test_columns_twice_and_times_in_seconds_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_measured(path)


def test_new_file_of_the_same_columns(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text(
        HEADER + "llama-3.1-70b,H200,fp8,2,1000,1000,6000\nllama-2-13b,A100-SXM-80GB,fp16,1,128,128,3000\n"
    )
    report = validate(path)
    assert [row.line for row in report.rows] == [2, 3]
    assert all(row.forecast and row.forecast > 0 for row in report.rows)
    two, one = (predict(r) for r in read_measured(path))
    assert 500 < one < 20_000 and 500 < two < 20_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"bad\.csv:1: columns missing"),
        (HEADER, "no rows"),
        (HEADER + "llama-9,L40S,fp8,1,10,10,5\n", r"bad\.csv:2: unknown model"),
        (HEADER + "llama-3-8b,L40Z9,fp8,1,10,10,5\n", r"bad\.csv:2: unknown GPU"),
        (HEADER + "llama-3-8b,L40S,fp9,1,10,10,5\n", r"bad\.csv:2: unknown precision"),
        (
            HEADER + "llama-3-8b,L40S,fp8,1,10,10,5\nllama-3-8b,L40S,fp8,1,10,x,5\n",
            r"bad\.csv:3: `output_tokens`",
        ),
        (HEADER + "llama-3-8b,L40S,fp8,1,10,10,nan\n", r"bad\.csv:2: `output_tokens_per_s`"),
        (HEADER.replace("gpu,", "") + "llama-3-8b,fp8,1,10,10,5\n", r"bad\.csv:1: columns missing: gpu"),
        (HEADER + "llama-3-8b,L40S,fp8,0,10,10,5\n", r"bad\.csv:2: `tensor_parallel`"),
        (HEADER + "llama-3-8b,L40S,fp8,1,10,10\n", r"bad\.csv:2: fewer fields"),
        (HEADER + "llama-3-8b,L40S,fp8,1,10,10,5,6\n", r"bad\.csv:2: more fields"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_measured(path)


SERVED = (
    "model;gpu;precision;concurrency;input_tokens;output_tokens;ttft_ms;itl_ms;output_tokens_per_s;engine\n"
)


def test_latency_tables_with_semicolons_thousands_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "served.csv"
    path.write_text(
        SERVED + "qwen3-8b;h100-sxm;fp16;8;233;221;74.57;7.71;917.28;vllm-0.11\n"
        "qwen3-8b;h100-sxm;fp16;64;2,048;128;;20;28,312;sglang\n\n"
    )
    rows = read_measured(path)
    assert [(r.quantity, r.measured, r.concurrency, r.engine.name) for r in rows] == [
        ("throughput", 917.28, 8, "vllm"), ("ttft", 74.57, 8, "vllm"), ("itl", 7.71, 8, "vllm"),
        ("throughput", 28312.0, 64, "sglang"), ("itl", 20.0, 64, "sglang"),
    ]  # fmt: skip
    assert rows[3].input_tokens == 2048
    report = validate(path)
    assert set(report.summary) == {
        "vllm throughput",
        "vllm ttft",
        "vllm itl",
        "sglang throughput",
        "sglang itl",
    }
    assert {r.unit for r in report.rows} == {"tokens/s", "ms"}
    assert all(r.forecast and 0.2 < r.forecast / r.measured < 5 for r in report.rows if r.engine == "vllm")


def test_rows_that_do_not_fit_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        HEADER + "llama-3.1-70b,L40S,fp16,1,1000,1000,100\nllama-3.1-8b,L40S,fp8,1,1000,1000,3700\n"
    )
    report = validate(path)
    assert [r.line for r in report.does_not_fit] == [2] and report.summary["throughput"].rows == 1
    assert report.rows[0].error is None and abs(report.summary["throughput"].mean_error) < 0.5


def test_generation_speed_is_taken_over_its_true_context(tmp_path: Path) -> None:
    """llama-bench generates from an empty context; a table may name another one."""
    path = tmp_path / "single.csv"
    head = "model,gpu,precision,prompt_tokens,generated_tokens,generated_tokens_per_s,context_tokens\n"
    path.write_text(head + "llama-3-8b,rtx-4090,f16,512,128,50,\nllama-3-8b,rtx-4090,f16,512,128,50,8000\n")
    empty, long = read_measured(path)
    assert (empty.context, long.context) == (64.0, 8000.0)
    assert predict(empty) > predict(long)


def test_command_prints_json_and_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HEADER + "llama-3.1-8b,H100-SXM-80GB,fp16,1,1000,1000,7000\n")
    done = run_unshot("plan", "validate", path, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["summary"]["throughput"]["rows"] == 1
    plain = run_unshot("plan", "validate", path)
    assert plain.returncode == 0 and "median" in plain.stdout


def test_several_files_one_of_which_cannot_be_left_out(tmp_path: Path) -> None:
    """Two files at once; the one with a single model falls back to the catalog and says so."""
    two, one = tmp_path / "two.csv", tmp_path / "one.csv"
    rows = [
        f"{m},H100-SXM-80GB,fp16,1,{n},{n},7000\n"
        for m in ("llama-3.1-8b", "mistral-7b")
        for n in (500, 1000)
    ]
    two.write_text(HEADER + "".join(rows))
    one.write_text(HEADER + "llama-3.1-8b,H100-SXM-80GB,fp16,1,1000,1000,7000\n")
    done = run_unshot("plan", "validate", two, one, "--json", "--hold-out", "model")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [f["hold_out"] for f in report["files"]] == ["model", "none"]
    assert set(report["summary"]) == {"two.csv: throughput", "one.csv: throughput"}
    assert "one.csv" in done.stderr and "catalog" in done.stderr


def test_unknown_names_are_skipped_with_a_count(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(HEADER + "llama-3.1-8b,l40s,fp8,1,10,10,5\nllama-3.1-8b,H10-SXM,fp8,1,10,10,5\n")
    done = run_unshot("plan", "validate", path, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and len(report["rows"]) == 1 and len(report["skipped"]) == 1
    assert done.stderr.count("\n") == 1 and "1 rows skipped" in done.stderr
    assert "odd.csv:3" in done.stderr and "'H10-SXM'" in done.stderr and "h100-sxm" in done.stderr
    path.write_text(HEADER + "llama-3.1-8b,H10-SXM,fp8,1,10,10,5\n")
    done = run_unshot("plan", "validate", path, "--json")
    assert done.returncode == 2 and "odd.csv:2" in done.stderr and done.stderr.count("\n") == 1


ELSEWHERE = Path(__file__).parent / "published"


@pytest.mark.parametrize(
    ("name", "quantity", "rows", "median", "p90"),
    [
        ("trtllm_v0.14_other_devices.csv", "throughput", 54, 0.10, 0.20),
        # Tensor parallelism: the all-reduces have one engine-wide constant, chosen on the Llama 70B rows.
        ("trtllm_v0.14_large_models.csv", "throughput", 367, 0.16, 0.40),
        ("llamacpp_other_devices.csv", "decode", 12, 0.12, 0.30),
        ("llamacpp_other_devices.csv", "prefill", 12, 0.25, 0.30),
    ],
)
def test_rows_that_nothing_was_fitted_on(
    name: str, quantity: str, rows: int, median: float, p90: float
) -> None:
    summary = validate(ELSEWHERE / name).summary[quantity]
    assert summary.rows == rows
    assert summary.median_abs_error < median
    assert summary.p90_abs_error < p90


# As `unshot bench` writes it (the parts that calibration reads), times of a slow laptop typed in by hand.
CONFIG = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "head_dim": 64, "intermediate_size": 1536,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
RECORDED = {
    "schema": 1, "verdict": "pass", "gpu": "cpu",
    "sides": [
        {"side": "baseline", "mode": "cache off", "model": CONFIG, "precision": "q8_0",
         "prompt_tokens": [1583, 1618, 1601], "cached_tokens": [0, 0, 0], "output_tokens": [17, 26, 20],
         "ttft_s": [9.9, 10.4, 10.1], "tpot_s": [0.029, 0.028, 0.030]},
        {"side": "candidate", "mode": "cache off", "model": CONFIG, "precision": "q8_0",
         "prompt_tokens": [59, 94, 71], "cached_tokens": [0, 0, 0], "output_tokens": [20, 21, 19],
         "ttft_s": [0.41, 0.52, 0.46], "tpot_s": [0.024, 0.022, 0.023]},
    ],
}  # fmt: skip


def test_plan_moves_to_a_recorded_report(tmp_path: Path) -> None:
    """`unshot plan --calibrate`: an almost idle CPU answers as fast as the report's, not as the catalog's."""
    (tmp_path / "report.json").write_text(json.dumps(RECORDED))
    rows = [
        {"prompt": f"Clause {i}: either party may end it on {i} days' notice.", "completion": "ends"}
        for i in range(60)
    ]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = [
        "plan", "--prompt", str(tmp_path / "shots.jsonl"), "--rate", "0.001", "--json",
        "-q", "--model", "smollm2-135m", "--baseline-model", "smollm2-135m", "--gpu", "cpu", "--precision", "q8_0",
    ]  # fmt: skip

    def tuned(*extra: str) -> tuple[float, float, float]:
        done = run_unshot(*base, *extra)
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        option = next(o for o in plan["options"] if o["tuned"] and o["precision"] == "q8_0")
        return (
            option["latency_ms"]["tpot"]["p50"],
            option["latency_ms"]["ttft"]["p50"],
            option["input_tokens"],
        )

    (catalog_tpot, catalog_ttft, _), (tpot, ttft, tokens) = (
        tuned(),
        tuned("--calibrate", str(tmp_path / "report.json")),
    )
    assert catalog_tpot < 10 and abs(tpot - 23) < 3
    # Prompts of the plan are shorter than the report's 71 tokens, so its time to first token bounds theirs.
    assert tokens < 94 and catalog_ttft < 100 < ttft < 600


def _report(compute: float, bandwidth: float) -> dict:
    from msgspec.structs import replace

    arch, gpu, form = catalog.model("smollm2-135m"), catalog.gpu("cpu"), catalog.precision("q8_0")
    eff = replace(efficiency(gpu, LLAMA), compute=compute, bandwidth=bandwidth)
    cost = cost_of(arch, gpu, form, engine=LLAMA, eff=eff)
    sides = {}
    for name, prompt in (("baseline", 1500), ("candidate", 120)):
        chunks = -(-prompt // 512)
        pairs = prompt * (prompt + 1) / 2
        step = cost.step(
            prompt / chunks, pairs / chunks, 0, 0, prompts=1 / chunks, chunks=prompt / 512 / chunks
        )
        noise = np.random.default_rng(prompt).lognormal(0, 0.03, 31)
        sides[name] = {
            "model": "smollm2-135m", "precision": "q8_0", "prompt_tokens": [prompt] * 31, "output_tokens": [8] * 31,
            "ttft_s": (chunks * float(step) * noise).tolist(),
            "tpot_s": (float(cost.step(0, 0, 1, prompt + 4)) * noise).tolist(),
        }  # fmt: skip
    return {"gpu": "cpu", "sides": sides}


def test_calibration_finds_the_machine(tmp_path: Path) -> None:
    """A machine at other efficiencies than the catalog's: the calibrated forecast hits its times within 8%."""
    report = _report(compute=0.2, bandwidth=0.4)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    fitted = calibrate(path).efficiency
    prior = efficiency(catalog.gpu("cpu"), LLAMA)
    assert fitted.rows == 4
    assert abs(np.log(fitted.compute / 0.2)) < abs(np.log(prior.compute / 0.2)) / 3
    assert all(e <= p for e, p in zip(fitted.errors, prior.errors, strict=True))
    assert fitted.spread < prior.spread
    arch, gpu, form = catalog.model("smollm2-135m"), catalog.gpu("cpu"), catalog.precision("q8_0")
    step = float(cost_of(arch, gpu, form, engine=LLAMA, eff=fitted).step(0, 0, 1, 124))
    assert step == pytest.approx(np.median(report["sides"]["candidate"]["tpot_s"]), rel=0.08)


def test_calibration_takes_a_gpu_by_its_drivers_name_and_its_engine() -> None:
    """An H100 behind vLLM whose tokens take twice the catalog's time: the calibrated forecast follows."""
    from msgspec.structs import replace

    gpu, engine = catalog.gpu("h100-sxm"), catalog.engine("vllm")
    prior = efficiency(gpu, engine)
    slow = replace(prior, bandwidth=prior.bandwidth / 2, step=prior.step * 2)
    cost = cost_of(catalog.model("llama-3.1-8b"), gpu, catalog.precision("fp16"), engine=engine, eff=slow)
    step = float(cost.step(0, 0, 1, 2050))
    side = {"model": "llama-3.1-8b", "precision": "fp16", "prompt_tokens": 2000, "output_tokens": 100,
            "ttft_s": [0.15], "tpot_s": [step]}  # fmt: skip
    found = calibrate({"gpu": "NVIDIA H100 80GB HBM3", "engine": "vllm", "sides": [side]})
    assert found.gpu.name == "h100-sxm" and found.engine.name == "vllm" and found.holds_for(gpu)
    assert not found.holds_for(catalog.gpu("l4"))
    eff = found.efficiency
    fitted = cost_of(catalog.model("llama-3.1-8b"), gpu, catalog.precision("fp16"), engine=engine, eff=eff)
    assert float(fitted.step(0, 0, 1, 2050)) == pytest.approx(step, rel=0.2)


@pytest.mark.parametrize(
    "report", [{}, {"sides": []}, {"sides": [{"model": "smollm2-135m"}]}, {"sides": {"a": 3}}]
)
def test_calibration_refuses_what_it_cannot_read(report: dict) -> None:
    with pytest.raises(InputError, match="report"):
        calibrate(report)
