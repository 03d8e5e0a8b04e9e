"""Figures of a plan that were wrong, each beside its calculation by hand."""

import csv
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from planner import price_data
from planner.interactive import with_values
from planner.latency.measured import read_measured
from planner.latency.replica import Load, replica
from planner.latency.simulate import simulate
from planner.latency.step import Draft, StepCost, efficiency
from planner.options import Shape
from planner.prices import api_price
from planner.run import gpu_prices
from tests.conftest import run_unshot
from tests.planner_files import few_shot, inputs
from tests.test_worked_example import tuned
from unshot import catalog
from unshot.errors import InputError

NOW = datetime(2026, 11, 26, tzinfo=UTC)


@pytest.mark.parametrize(
    ("asked", "provider", "date"),
    [
        ("gpt-4o-2024-08-06", "openai", "2027-01-14"),
        ("ft:gpt-4o-mini-2024-07-18:acme::abc", "openai", "2027-01-14"),
        ("gpt-4o-2024-05-13", "openai", "2026-10-23"),
        ("gpt-5-codex", "openai", "2026-07-23"),
        ("o3-pro-2025-06-10", "openai", "2026-12-11"),
        ("claude-3-7-sonnet-20250219", "anthropic", "2026-02-19"),
        ("models/gemini-2.5-flash", "google", "2026-12-01"),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "aws", None),
    ],
)
def test_a_model_ends_by_whatever_name_it_is_called(asked: str, provider: str, date: str | None) -> None:
    found = price_data.look_up(asked, NOW)
    end = price_data.retirement(found, asked)
    assert found.provider == provider
    assert (end.date if end else None) == date


def test_what_the_price_data_lacks_may_still_be_known_to_be_gone() -> None:
    with pytest.raises(InputError, match=r"chatgpt-4o-latest: shut down on 2026-02-17 .*successor"):
        price_data.look_up("chatgpt-4o-latest", NOW)


def test_a_resellers_model_is_held_to_its_makers_day() -> None:
    azure = price_data.look_up("azure/gpt-4o", NOW)
    end = price_data.maker_retirement(azure)
    assert price_data.retirement(azure, "azure/gpt-4o") is None
    assert end is not None and end.date == "2027-01-14"
    bedrock = price_data.maker_retirement(price_data.look_up("anthropic.claude-sonnet-4-20250514-v1:0", NOW))
    assert bedrock is not None and bedrock.date == "2026-06-15"
    # o4-mini is gone at its maker since October: no cheaper sibling to try.
    assert "o4-mini" not in [s.id for s in price_data.siblings(azure, NOW)]


def test_bedrocks_cross_region_price_is_its_own() -> None:
    # Published: $3 globally, a tenth more in a region.
    price = {
        where: api_price(f"{where}.anthropic.claude-sonnet-4-5-20250929-v1:0", when=NOW).input
        for where in ("global", "us")
    }
    assert price == pytest.approx({"global": 3.0, "us": 3.3})


@pytest.mark.parametrize(
    ("given", "guess"),
    [
        ("input=0.0000025,output=0.000015", "per token.*input=2.5"),
        ("input=0.0025,output=0.015", "per 1,000 tokens.*input=2.5"),
        ("input=250,output=1500", "cents.*input=2.5"),
    ],
)
def test_prices_in_other_units(given: str, guess: str) -> None:
    from planner.overrides import Overrides

    with pytest.raises(InputError, match=guess):
        api_price("gpt-5.4", overrides=Overrides([f"gpt-5.4:{given}"]))
    # A hard bargain and a dear contract are prices.
    for input_ in (0.25, 10.0):
        assert (
            api_price("gpt-5.4", overrides=Overrides([f"gpt-5.4:input={input_},output=15"])).input == input_
        )


def test_a_seconds_and_a_months_gpu_price_are_refused() -> None:
    with pytest.raises(InputError, match=r"second's price, did you mean 0\.72"):  # 0.0002 x 3,600
        gpu_prices(["l4=0.0002"])
    with pytest.raises(InputError, match=r"month's price, did you mean 0\.79"):  # 580 x 12 / 8,760
        gpu_prices(["l4=580"])
    assert gpu_prices(["l4=0.4"]) == {"l4": 0.4}


def test_weights_and_cache_of_uneven_layers() -> None:
    # Qwen3.5-27B: 16 of 64 layers attend, with a gated output; 48 are linear.
    full = 5120 * 256 * (2 * 24 + 24 + 2 * 4)
    linear = 5120 * (2 * 16 * 128 + 3 * 48 * 128)
    qwen = catalog.model("Qwen/Qwen3.5-27B")
    assert qwen.attention_params == 16 * full + 48 * linear
    assert qwen.params == pytest.approx(26.9e9, rel=0.005)
    # Its cache grows by 16 layers' keys and values alone.
    each = qwen.kv_elements * (qwen.cached_tokens(10_001) - qwen.cached_tokens(10_000))
    assert each == pytest.approx(16 * 2 * 4 * 256)
    # Gemma 4 31B: 50 layers of 16 heads of 256 in a window of 1,024, 10 of 4 heads of 512.
    gemma = catalog.model("google/gemma-4-31B-it")
    kept = 50 * 1024 * 2 * 16 * 256 + 10 * 4096 * 2 * 4 * 512
    assert gemma.kv_elements * gemma.cached_tokens(4096) == pytest.approx(kept, rel=1e-4)
    assert gemma.params == pytest.approx(30.7e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("microsoft/Phi-3-mini-128k-instruct", 131072),
        ("microsoft/Phi-3-mini-4k-instruct", 4096),
        ("microsoft/Phi-3.5-mini-instruct", 131072),
        ("Qwen/Qwen2.5-7B-Instruct", 32768),
        ("microsoft/Phi-4-reasoning-plus", 32768),
    ],
)
def test_contexts_are_the_models_own(name: str, context: int) -> None:
    assert catalog.model(name).context == context


def test_geforce_cards_serve_at_half_their_fp16_rate() -> None:
    load = Load(1.0, 4000, 10)
    card = catalog.gpu("rtx-4090")
    one = replica("llama-3.1-8b", card, "fp16", load)
    share = efficiency(card, catalog.engine("vllm")).reached(card)
    assert card.flops["fp16"] == 330.3e12
    assert one.cost.token == pytest.approx(2 * one.arch.active_params / (330.3e12 / 2 * share))
    # llama.cpp was fitted on the rate with sums in fp16.
    assert replica("llama-3-8b", card, "q4_k_m", load, engine="llamacpp").cost.sampled == pytest.approx(
        2 * one.arch.head_params / (330.3e12 * efficiency(card, catalog.engine("llamacpp")).compute)
    )


def test_llamacpp_unpacks_quantised_weights_before_cublas_and_beside_apples_arithmetic() -> None:
    load = Load(1.0, 512, 10)

    def costs(card: str) -> list[StepCost]:
        return [
            replica("llama-2-7b", card, form, load, engine="llamacpp").cost for form in ("q4_k_m", "fp16")
        ]

    # CUDA: a pass that reads the quantised weights and writes fp16; the products are those of fp16.
    quantised, plain = costs("a100-pcie-80")
    arch = catalog.model("llama-2-7b")
    rate = 4.83 / 8 * arch.linear_params / quantised.weights  # bytes/s at which weights are read
    assert quantised.chunk - plain.chunk == pytest.approx(arch.linear_params * (4.83 / 8 + 2.0) / rate)
    assert quantised.token == plain.token
    # Metal: q4_k adds a fifth to a product, from M3 on as a second side of a right angle: sqrt(1 + 0.2^2).
    for card, slower in (("m1-max", 1.2), ("m3-max", 1.0198), ("m4-pro", 1.0198)):
        quantised, plain = costs(card)
        assert quantised.token / plain.token == pytest.approx(slower, abs=1e-4)
        assert quantised.chunk == plain.chunk


def test_speculative_decoding_follows_its_acceptance() -> None:
    draft = Draft(4, 0.7, 0.1)
    assert draft.gain == pytest.approx(1 + 0.7 + 0.7**2 + 0.7**3 + 0.7**4)
    assert Draft(4, 1.0, 0.1).gain == 5.0
    load = Load(0.5, 233, 221)
    plain = replica("qwen3-8b", "h100-sxm", "fp16", load, engine="sglang")
    fast = replica("qwen3-8b", "h100-sxm", "fp16", load, engine="sglang", draft=draft)
    c = plain.cost
    whole = (
        c.fixed + 4 * 0.1 * (c.fixed + c.weights) + math.hypot(c.weights, 5 * c.token)
        + math.hypot(c.head, 5 * c.sampled) + 5 * c.move + 343 * c.context + c.sequence
    )  # fmt: skip
    assert float(fast.cost.step(0.0, 0.0, 1, 343)) == pytest.approx(whole / draft.gain)
    first, then = (simulate(one, load, requests=300).at("tpot", 50) for one in (plain, fast))
    # At 342 tokens of context on average.
    assert then / first == pytest.approx(whole / draft.gain / float(c.step(0.0, 0.0, 1, 343)), rel=0.03)


def test_a_plan_says_what_its_speculative_decoding_rests_on(tmp_path: Path) -> None:
    prompt, rows = few_shot(tmp_path / "shots.jsonl", 12), inputs(tmp_path / "inputs.jsonl")
    done = run_unshot(
        "plan", "--prompt", prompt, "--inputs", rows, "--baseline", "gpt-4o", "--approximate", "--rate", "5",
        "--model", "llama-3.1-8b", "--gpu", "l4", "--speculative-tokens", "4", "--acceptance", "0.7", "-q",
        "--out", tmp_path / "p", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "4 tokens drafted per iteration, 70% accepted as you gave it; a drafted token takes 10% of an iteration"
    assert said in (tmp_path / "p" / "plan.json").read_text()


def test_a_table_with_decimal_commas(tmp_path: Path) -> None:
    head = [
        "model",
        "gpu",
        "precision",
        "engine",
        "concurrency",
        "input_tokens",
        "output_tokens",
        "itl_ms",
        "ttft_ms",
    ]
    rows = [
        ["qwen3-8b", "h100-sxm", "fp16", "vllm", "4", "233", "221", "7,385", "64,05"],
        ["qwen3-8b", "h100-sxm", "fp16", "vllm", "4", "233", "221", "", "1.064,5"],
    ]
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([head, *rows])
    assert sorted(row.measured for row in read_measured(path)) == [7.385, 64.05, 1064.5]
    # Without a sign of decimal commas "7,385" is seven thousand.
    path.write_text("model;gpu;precision;engine;input_tokens;output_tokens;output_tokens_per_s\n"
                    "qwen3-8b;h100-sxm;fp16;vllm;233;221;7,385\n")  # fmt: skip
    assert [row.measured for row in read_measured(path)] == [7385.0]


def test_answers_go_to_their_tables() -> None:
    text = '# mine\n[task]\nname = "x"\n\n[baseline]\napi = "gpt-5.4"\n'
    found = with_values(text, {"task.fails": ["cost"], "traffic.slo.ttft_ms": 500.0})
    import tomllib

    assert tomllib.loads(found) == {
        "task": {"name": "x", "fails": ["cost"]},
        "baseline": {"api": "gpt-5.4"},
        "traffic": {"slo": {"ttft_ms": 500.0}},
    }
    assert found.startswith("# mine")


def test_scaling_to_zero_by_hand() -> None:
    option = replace(tuned(), shape=Shape.of(1.0))
    rate, cold = 1 / 600, 90.0
    dollars, waiting = option.to_zero(rate, cold)
    up = cold + math.expm1(300 / 600) * 600  # 90 + 389.2 s, then 600 s off
    hours = 730 * up / (up + 600)
    assert dollars == pytest.approx(hours * option.serving.machine.dollars_per_hour, rel=1e-6)
    assert waiting == pytest.approx((1 + cold / 600) / (up / 600 + 1))
    # By simulation: Poisson arrivals, a stop after five idle minutes.
    gaps = np.random.default_rng(0).exponential(600, 40_000)
    now = on_until = 0.0
    on = late = 0.0
    for gap in gaps:
        now += gap
        if now > on_until:  # it was off
            late += 1
            ready = now + cold
            on += cold + 300
            on_until = ready + 300
        elif now < ready:
            late += 1
        else:
            on += now + 300 - on_until
            on_until = now + 300
    assert on / now == pytest.approx(up / (up + 600), rel=0.03)
    assert late / len(gaps) == pytest.approx(waiting, rel=0.03)


def test_interactive_writes_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from planner.interactive import ask
    from unshot.case_file import load_case

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "unshot.toml"
    path.write_text('[baseline]\napi = "gpt-5.4"\n')

    @click.command()
    def run() -> None:
        case = ask(load_case(path), path)
        assert (
            case.task.fails == ["cost"] and case.traffic.rate == 7.0 and case.traffic.reasoning_tokens == 400
        )

    answers = "nonsense\ncost\n7\n400\n\n\n\n\n"
    result = CliRunner().invoke(run, input=answers, catch_exceptions=False)
    assert result.exit_code == 0 and "unknown 'nonsense'" in result.output
    again = load_case(path)
    assert again.task.fails == ["cost"] and again.traffic.rate == 7.0 and again.task.current is None
    with pytest.raises(InputError, match=r"the input ended before `traffic.slo.ttft_ms`"):
        CliRunner().invoke(run, input="", catch_exceptions=False, standalone_mode=False)


def test_formats_without_kernels_and_rates_of_a_month(tmp_path: Path) -> None:
    engine = catalog.engine("vllm")
    # docs.vllm.ai, supported hardware: fp8 from Turing on (weight-only), no AWQ or GPTQ on AMD.
    assert "fp8" in engine.lacks["volta"] and "turing" not in engine.lacks and "int4" in engine.lacks["cdna3"]
    from planner.run import check_names
    from planner.settings import Settings
    from unshot.case import Case, TrafficSettings

    with pytest.raises(
        InputError, match=r"that is a month's, did you mean 3\.81\?"
    ):  # 10,000,000 / 2,628,000
        check_names(Case(traffic=TrafficSettings(rate=1e7)), Settings())
