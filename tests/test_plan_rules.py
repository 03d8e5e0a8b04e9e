"""What a plan refuses, warns of and assumes: retired models, reasoning, prices in other units, SLO, context."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_unshot
from tests.planner_files import few_shot, inputs, model_folder

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rules")
    base = {
        "--prompt": few_shot(folder / "shots.jsonl", 40), "--inputs": inputs(folder / "inputs.jsonl"),
        "--rate": 5, "--baseline": "gpt-5.4", "--model": "llama-3.1-8b", "--gpu": "l4", "--cheaper-api": "none",
        "--tokenizer": f"llama-3.1-8b={model_folder(folder / 'model')}",
    }  # fmt: skip

    def call(*more: str, **changed: object) -> Any:
        flags = {**base, **{f"--{k.replace('_', '-')}": v for k, v in changed.items()}}
        words = [str(part) for pair in flags.items() if pair[1] is not None for part in pair]
        environment = {**os.environ, "UNSHOT_OFFLINE": "1", "COLUMNS": "120"}
        return run_unshot("plan", *words, "--approximate", "--json", "-q", *more, cwd=folder, env=environment)

    return call


def planned(done: Any) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("model", "date", "successor"),
    [("gpt-4", "2026-10-23", "gpt-5.6-sol"), ("o4-mini", "2026-10-23", "gpt-5.6-terra")],
)
def test_a_model_that_was_shut_down_is_refused_with_its_successor(
    run: Run, model: str, date: str, successor: str
) -> None:
    done = run(baseline=model)
    assert done.returncode == 2 and date in done.stderr and successor in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_horizon_that_crosses_an_end_is_the_first_warning(run: Run) -> None:
    warning = planned(run(baseline="gpt-4.1"))["warnings"][0]
    for part in ("2027-01-14", "gpt-6-luna", "tuned from it end", "2027-01-06", "read 2026-11-26"):
        assert part in warning
    assert not any("shut down" in w for w in planned(run())["warnings"])


def test_reasoning_tokens_count_in_cost_and_latency(run: Run) -> None:
    """500 tokens more per request at gpt-5.4's $15 per million: $0.0075, and 500 x 7.6 ms before the answer."""
    silent, told = planned(run()), planned(run(reasoning_tokens=500))
    assert any("gpt-5.4: reasons" in w and "--reasoning-tokens" in w for w in silent["warnings"])
    assert not any("reasons" in w for w in told["warnings"])
    before, after = silent["options"][0], told["options"][0]
    assert after["per_request"] - before["per_request"] == pytest.approx(500 * 15e-6, rel=1e-6)
    slower = after["latency_ms"]["ttft"]["p50"] - before["latency_ms"]["ttft"]["p50"]
    assert slower == pytest.approx(500 * 7.6)
    assert any(s["label"] == "reasoning tokens" for s in told["uncertainty"]["tornado"])


def test_a_sibling_with_unknown_reasoning_does_not_win_the_verdict(run: Run) -> None:
    silent = planned(run(cheaper_api="gpt-6-luna"))
    luna = next(o for o in silent["options"] if o["model"] == "gpt-6-luna")
    assert any("reasoning is not counted" in n for n in luna["notes"])
    assert "gpt-6-luna" not in silent["verdict"]["headline"]
    told = planned(run(cheaper_api="gpt-6-luna", reasoning_tokens=100))
    assert told["verdict"]["answer"] == "try first" and "gpt-6-luna" in told["verdict"]["headline"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpu-price", "l4=590"), ("month's price", "0.81")),
        (("--gpu-price", "1500"), ("month's price", "2.05")),
        (("--gpu-price", "h100-sxm=2"), ("not in this plan", "l4")),
        (("--price", "gpt-5.5:input=1,output=2"), ("not in this plan", "gpt-5.4")),
        (("--price", "input=2.5e-6,output=15e-6"), ("per token", "input=2.5")),
        (("--engine", "vlmm"), ("vllm",)),
    ],
)
def test_figures_in_other_units_are_refused_with_a_guess(
    run: Run, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = run(*flags)
    assert done.returncode == 2, done.stdout[-300:]
    for word in words:
        assert word in done.stderr


def test_without_an_slo_the_baseline_sets_it(run: Run) -> None:
    """OpenAI's typical 450 ms times 2.5; a CPU that takes longer is not usable."""
    found = planned(run())
    assert found["slo"]["ttft_ms"] == pytest.approx(1125) and "gpt-5.4" in found["slo_source"]
    slow = planned(run(gpu="cpu"))
    tuned = [o for o in slow["options"] if o["tuned"] and o["kind"] == "hosted"]
    assert tuned and not any(o["usable"] for o in tuned) and "on an idle server" in tuned[0]["notes"][0]
    assert slow["verdict"]["answer"] == "keep the prompt"


def test_an_instance_is_charged_at_its_own_price(run: Run) -> None:
    """Two replicas at an eighth of $55.04 an hour: 2 x 730 x 6.88; the device's own price elsewhere is 3.99."""
    found = planned(run(gpu="p5.48xlarge"))
    tuned = next(o for o in found["options"] if o["tuned"] and o["kind"] == "hosted")
    assert tuned["replicas"] == 2
    assert tuned["parts_per_month"]["GPU hours"] == pytest.approx(2 * 730 * 55.04 / 8)
    assert any("rented whole, with 8 GPUs" in w and "$40,179 a month" in w for w in found["warnings"])
    own = planned(run("--gpu-price", "p5.48xlarge=40", gpu="p5.48xlarge"))
    assert own["price_per_hour"] == pytest.approx(5.0)
    other = planned(run(gpu="a3-highgpu-8g"))
    assert any("no price of a3-highgpu-8g" in w for w in other["warnings"])
    done = run("--gpu", "h100-sxm", gpu="p5.48xlarge")
    assert done.returncode == 2 and "two prices" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpu-price", "0.01"), ("minute", "0.60")),
        (("--gpu-price", "86.4"), ("day", "3.60")),
        (("--slo-ttft", "0.2"), ("milliseconds", "200")),
        (("--peak-factor", "30"), ("<= 24",)),
        (("--price-factor", "40"), ("<= 10",)),
        (("--baseline", "gemini-1.5-pro"), ("2025-09-24",)),
        (("--baseline", "grok-4-fast-reasoning"), ("2026-05-15", "grok-4.3", "prices")),
        (("--baseline", "claude-opus-4-1-20250805"), ("2026-08-05",)),
        (("--baseline", "claude-3-5-haiku-20241022"), ("2026-02-19", "claude-haiku-4-5")),
        (("--baseline", "claude-2.1"), ("2025-07-21",)),
    ],
)
def test_figures_that_cannot_be_meant_and_models_that_are_gone(
    run: Run, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    changed = {flags[0].strip("-").replace("-", "_"): flags[1]}
    done = run(gpu="l40s", **changed)
    assert done.returncode == 2, done.stdout[-200:]
    for word in words:
        assert word in done.stderr


def test_a_calibrated_device_is_not_said_to_be_unmeasured(run: Run, tmp_path: Path) -> None:
    side = {
        "side": "baseline", "mode": "cache off", "model": "llama-3.1-8b", "precision": "fp16",
        "prompt_tokens": [2900] * 3, "output_tokens": [20] * 3, "ttft_s": [0.3] * 3, "tpot_s": [0.024] * 3,
    }  # fmt: skip
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"gpu": "l40s", "engine": "vllm", "sides": [side]}))
    found = planned(run(calibrate=report, gpu="l40s"))
    assert not any("no measured rows" in w for w in found["warnings"])
    assert any("vLLM on l40s (your report)" in a for a in found["assumptions"])


def test_a_plan_says_that_a_given_length_stands_for_the_answers(run: Run) -> None:
    found = planned(run(output_tokens=50))
    assert sum("answers: 50 tokens each, as given" in a for a in found["assumptions"]) == 1


def test_prices_of_fine_tuning_that_were_not_read_again_are_said(run: Run) -> None:
    warnings = planned(run(baseline="gpt-4.1"))["warnings"]
    assert any("gpt-4.1 fine-tuned: its prices, of 2025-09-30" in w for w in warnings)


def test_what_misses_the_slo_today_is_not_what_to_keep(run: Run) -> None:
    """A 70B prompt takes longer than 75 ms on idle H100s; the 8B model holds that on one."""
    today = {"baseline": None, "baseline_model": "llama-3.1-70b", "cheaper_api": None}
    found = planned(run(**today, gpu="h100-sxm", slo_ttft=75))
    assert not any(o["usable"] for o in found["options"] if o["baseline"])
    assert (
        found["verdict"]["answer"] in ("try first", "tune")
        and "misses the SLO" in found["verdict"]["summary"]
    )
    assert found["compared"]["saving_per_month"] is None


def test_what_cannot_run_today_is_compared_with_nothing(run: Run) -> None:
    found = planned(
        run(baseline=None, baseline_model="llama-3.1-8b", cheaper_api=None, gpu="cpu", precision="int8")
    )
    assert found["verdict"]["headline"].startswith("No comparison")
    assert "no int8 kernels" in found["verdict"]["summary"]


def test_the_shipped_case_has_a_usable_option_today() -> None:
    case = Path(__file__).resolve().parents[1] / "unshot" / "demo" / "unshot.toml"
    found = planned(run_unshot("plan", "--case", case, "--json", "-q", cwd=case.parent))
    assert all(o["usable"] for o in found["options"] if o["baseline"])
    assert found["verdict"]["answer"] == "not for money" and "the format" in found["verdict"]["headline"]


def test_a_request_over_the_context_makes_an_option_unusable(run: Run, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    found = planned(run(model="tinyllama-1.1b", tokenizer=f"tinyllama-1.1b={folder}"))
    base = next(o for o in found["options"] if not o["tuned"] and o["kind"] == "hosted")
    assert not base["usable"] and "takes 2,048" in base["notes"][0]
    assert next(o for o in found["options"] if o["tuned"] and o["kind"] == "hosted")["usable"]


def test_a_model_and_a_card_of_ones_own(run: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 8192, "head_dim": 64,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }  # fmt: skip
    folder = model_folder(tmp_path / "mine")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    case = tmp_path / "case.toml"
    case.write_text(
        '[gpu.card]\nmemory_gib = 24\nbandwidth_gbs = 800\nfp16 = 150\nprice = 0.5\n[model.mine]\nconfig = "mine"\n'
    )
    found = planned(run("--case", str(case), model="mine", gpu="card", tokenizer=f"mine={folder}"))
    assert found["price_per_hour"] == 0.5 and found["prices"]["machine"]["source"] == "your case file"
    assert any(o["usable"] and o["model"] == "mine" for o in found["options"])
    path = planned(run(model=str(folder), tokenizer=None))
    assert any(o["usable"] and o["tuned"] and o["kind"] == "hosted" for o in path["options"])


@pytest.mark.parametrize(
    ("price", "said"),
    [
        ("gpt-5.4:training=25", "give it as ft-gpt-5.4:training"),
        ("gpt-5.4:cached=3", "above the input price"),
        ("mine:input=2,output=8,cache_ttl=3600", "without a cached price"),
        ("mine:input=2,output=8,batch_input=1", "needs both batch_input"),
        ("ft-gpt-4.1:cache_ttl=60", "cache_ttl is not counted"),
        ("ft-gpt-5.4:input=3", "give output, training too"),
    ],
)
def test_a_price_that_would_change_nothing_is_refused(run: Run, price: str, said: str) -> None:
    model = price.partition(":")[0].removeprefix("ft-")
    done = run("--price", price, baseline=model)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_engine_that_the_device_does_not_run_is_exchanged_with_a_line(run: Run) -> None:
    warnings = planned(run("--engine", "sglang", gpu="m2-ultra-60-core"))["warnings"]
    assert any("SGLang does not run on" in w and "llama.cpp is forecast" in w for w in warnings)
    assert not any("does not run on" in w for w in planned(run("--engine", "sglang"))["warnings"])


def test_what_contradicts_or_counts_for_nothing_is_refused(run: Run) -> None:
    for flags, said in (
        (("--acceptance", "0.7"), "counts only with speculative_tokens"),
        (("--baseline-model", "llama-3.1-8b"), "leave one out"),
    ):
        done = run(*flags)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_heads_that_do_not_divide_among_devices_make_an_option_unusable(run: Run) -> None:
    options = planned(run("--tensor-parallel", "3"))["options"]
    hosted = [o for o in options if o["engine"]]
    assert hosted and all(not o["usable"] for o in hosted)
    assert any("32 heads do not divide among 3" in note for o in hosted for note in o["notes"])


def test_reasoning_tokens_that_no_model_thinks_are_said(run: Run) -> None:
    def said(*flags: str, **changed: object) -> bool:
        return any(
            "reasoning tokens are not counted" in w for w in planned(run(*flags, **changed))["warnings"]
        )

    assert said("--reasoning-tokens", "500", baseline="gpt-4.1-mini")
    assert not said("--reasoning-tokens", "500")


def test_formats_that_an_engine_cannot_read_are_unusable_or_said(run: Run) -> None:
    cpu = [o for o in planned(run("--precision", "fp8", gpu="cpu"))["options"] if ":fp8:" in o["key"]]
    assert cpu and all(not o["usable"] and "llama.cpp has no fp8 kernels" in o["notes"][0] for o in cpu)
    warnings = planned(run("--precision", "q4_k_m", gpu="h100-sxm"))["warnings"]
    assert any("GGUF kernels experimental" in w for w in warnings)
    turing = planned(run("--precision", "fp8", gpu="t4"))["assumptions"]
    assert any("it has no fp8 units" in line for line in turing)
    # vLLM's host takes 24 ms per request: 1 / 0.024 = 42 a second, however fast the GPU.
    assert any("24 ms per request" in line and "at most 42 requests/s" in line for line in turing)


def test_names_given_twice_count_once(run: Run) -> None:
    options = planned(run("--gpu", "L4", cheaper_api="gpt-5.4-mini,gpt-5.4-mini"))["options"]
    keys = [o["key"] for o in options]
    assert len(keys) == len(set(keys))
    done = run(cheaper_api="gpt-5.4")
    assert done.returncode == 2 and "which runs today" in done.stderr
