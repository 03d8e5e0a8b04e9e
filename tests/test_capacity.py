"""Step times, the closed form, the simulation and the sizing: known limits, monotony, memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from planner.latency.closed_form import Response, capacity
from planner.latency.replica import Load, Replica, Slo, replica
from planner.latency.simulate import serve, simulate, simulate_cost, taken_in
from planner.latency.sizing import MAX_UTILISATION, closed_form, rate_within, saturated, simulated
from planner.latency.step import Overhead, StepCost, overheads
from unshot.errors import InputError


def trt(model: str, gpu: str, form: str, load: Load, **options: Any) -> Replica:
    """One replica of an engine without host costs."""
    engine = "llamacpp" if gpu.startswith("rtx") else "trtllm"
    return replica(model, gpu, form, load, engine=engine, overhead=Overhead(), **options)


def at(one: Replica, load: Load) -> Response:
    """The closed form."""
    return closed_form(one, load, load.rate, (50.0, 95.0))


@pytest.mark.parametrize("law", ["deterministic", "exponential"])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.85])
@pytest.mark.slow
def test_simulation_reproduces_single_server_queues(law: str, rho: float) -> None:
    """M/D/1 and M/M/1 (geometric with mean 200) mean waits by Pollaczek-Khinchine, within 3%."""
    tokens, step, count = 200, 1e-3, 50_000
    waits = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        service = np.full(count, tokens) if law == "deterministic" else rng.geometric(1 / tokens, count)
        # Drawn loads are scaled to the exact utilisation: less sampling error, the same law.
        gaps = rng.exponential(1.0, count)
        gaps *= tokens * step / rho / gaps.mean()
        service_mean = service.mean()
        gaps *= service_mean / tokens
        run = simulate_cost(
            StepCost(fixed=step), np.cumsum(gaps), np.ones(count), service, limit=1, chunk=512
        )
        waits.append(run.wait.mean() * tokens / service_mean)
    cv2 = 0.0 if law == "deterministic" else 1.0 - 1.0 / tokens
    expected = rho * tokens * step * (1 + cv2) / 2 / (1 - rho)
    assert np.mean(waits) == pytest.approx(expected, rel=0.03)


CASES = [
    ("llama-3.1-8b", "l40s", "fp16", 200, 400),
    ("llama-3-8b", "rtx-4090", "q4_k_m", 1000, 150),
    ("llama-3.1-8b", "h100-sxm", "fp8", 1000, 100),
    ("qwen2.5-7b", "a100-sxm-80", "fp16", 500, 200),
]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}-{c[3]}-{c[4]}")
def test_the_closed_form_is_a_good_first_guess(case: tuple, share: float) -> None:
    """p95 TTFT within a quarter and TPOT within a third of the simulation, which is what is shown."""
    model, gpu, form, prompt, output = case
    load = Load(1.0, prompt, output)
    one = trt(model, gpu, form, load)
    busy = replace(load, rate=share * saturated(one, load))
    seen, guess = simulate(one, busy, requests=8_000), at(one, busy)
    assert float(guess.ttft[95.0]) == pytest.approx(seen.at("ttft", 95), rel=0.25)
    assert float(guess.tpot[95.0]) == pytest.approx(seen.at("tpot", 95), rel=0.35)


def test_what_is_shown_is_the_simulation() -> None:
    load = Load(1.3, 1500, 300)
    one = trt("llama-2-13b", "a100-sxm-80", "fp16", load)
    found = simulated(one, load, requests=4000)
    assert found["ttft"].at[95.0] == simulate(one, load, requests=4000).at("ttft", 95)
    low, high = found["ttft"].p95_interval
    assert high is not None and low < found["ttft"].at[95.0] < high
    busy = replace(load, rate=0.98 * saturated(one, load))
    assert simulated(one, busy, requests=1000)["ttft"].p95_interval[1] is None


def test_the_host_takes_requests_in_one_after_the_other() -> None:
    assert taken_in([0.0, 0.0, 5.0], 1.0) == [1.0, 2.0, 6.0]
    load = Load(2.0, 100, 10)
    one = trt("llama-3.1-8b", "h100-sxm", "fp16", load)
    slow = replace(one, overhead=Overhead(request=0.05, accept=0.02))
    assert saturated(slow, load) == pytest.approx(20.0)
    calm = replace(load, rate=0.1)
    extra = simulate(slow, calm, requests=300).at("ttft", 50) - simulate(one, calm, requests=300).at(
        "ttft", 50
    )
    assert extra == pytest.approx(0.07, rel=0.1)


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    load = Load(1.0, 200, 50)
    one = trt("llama-3.1-8b", "h100-sxm", "fp16", load)
    count = 400
    run = serve(one, load, np.zeros(count), np.full(count, 200.0), np.full(count, 50.0), clients=8)
    # Little: clients = throughput x time of a request.
    throughput = count / float((run.arrival + run.e2e).max())
    assert throughput * run.e2e.mean() == pytest.approx(8, rel=0.05)
    assert len(np.unique(np.round(run.arrival, 9))) > 8


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}-{c[3]}-{c[4]}")
def test_capacity_is_what_a_saturated_simulation_reaches(case: tuple) -> None:
    model, gpu, form, prompt, output = case
    one = trt(model, gpu, form, Load(1.0, prompt, output))
    count = max(4000, 6 * one.limit)
    # Answers of one length march in step, which no real load does.
    mixed = np.rint(np.random.default_rng(1).uniform(0.6, 1.4, count) * output)
    run = simulate_cost(
        one.cost, np.arange(count) * 1e-9, np.full(count, prompt), mixed,
        limit=one.limit, chunk=one.chunk,
    )  # fmt: skip
    ends = np.sort(run.arrival + run.e2e)
    rate = 0.6 * count / (ends[int(0.8 * count)] - ends[int(0.2 * count)])
    assert float(capacity(one.cost, one.shape(Load(1.0, prompt, output)))) == pytest.approx(rate, rel=0.06)


def test_simulation_is_reproducible_and_consistent() -> None:
    load = Load(4.0, 1500, 120, output_cv=0.5, prompt_cv=0.3, arrival_cv=1.5)
    one = trt("llama-3.1-8b", "l40s", "fp8", load)
    first, second = (simulate(one, load, requests=3000, seed=5) for _ in range(2))
    assert np.array_equal(first.ttft, second.ttft)
    assert np.all(first.wait >= -1e-12) and np.all(first.ttft > first.wait - 1e-12)
    assert np.all(first.e2e >= first.ttft - 1e-12)
    # Little: sequences present = rate x time in decode.
    decode = (first.e2e - first.ttft).sum() / (first.arrival[-1] - first.arrival[0])
    assert first.batch * first.busy == pytest.approx(decode, rel=0.03)


def test_span_arithmetic_equals_iteration_by_iteration() -> None:
    """One request alone: its time is the plain sum of its iterations."""
    cost = StepCost(fixed=1e-3, weights=2e-3, token=1e-5, context=1e-6, pair=1e-9)
    run = simulate_cost(cost, np.zeros(1), np.array([700]), np.array([50]), limit=4, chunk=512)
    first = cost.step(512, 512 * 513 / 2, 0, 0) + cost.step(188, 188 * 512 + 188 * 189 / 2, 0, 0, prompts=1)
    rest = sum(cost.step(0, 0, 1, 700 + i) for i in range(49))
    assert run.ttft[0] == pytest.approx(float(first))
    assert run.e2e[0] == pytest.approx(float(first + rest))


def test_bursts_wait_longer() -> None:
    load = Load(6.0, 2000, 150)
    one = trt("llama-3.1-8b", "h100-sxm", "fp16", load)
    bursty = replace(load, arrival_cv=2.5)
    calm = simulate(one, load, requests=8000).at("ttft", 95)
    assert simulate(one, bursty, requests=8000).at("ttft", 95) > 1.3 * calm
    assert at(one, bursty).ttft[95.0] > at(one, load).ttft[95.0]


def test_memory_limits() -> None:
    def slots(model: str, gpu: str, cached: float = 0.0, **options: Any) -> float:
        one = trt(model, gpu, "fp16", Load(1.0, 2000, 1), **options)
        return float(one.slots_in_memory(1999.0, 1.0, cached))

    # 80 GiB less 1.5%, 2 GB of workspace and 16.06 GB of weights, 95% of it at 131,072 bytes a token.
    tokens = ((80 * 2**30 * 0.985 - 2e9) - 16.06e9) * 0.95 / 131072
    assert slots("llama-3.1-8b", "h100-sxm") == pytest.approx(tokens / 2000, rel=1e-3)
    assert slots("llama-3.1-70b", "h100-sxm") == 0
    assert slots("llama-3.1-70b", "h100-sxm", tensor_parallel=4) > 0
    assert slots("llama-3.1-8b", "h100-sxm", 1800) > 5 * slots("llama-3.1-8b", "h100-sxm")
    assert slots("llama-3.1-8b", "l4") < slots("llama-3.1-8b", "h100-sxm")


def test_an_engine_takes_its_share_of_the_memory() -> None:
    load = Load(1.0, 2000, 200)
    one, whole = (replica("llama-3.1-8b", "h100-sxm", "fp16", load, engine=e) for e in ("vllm", "trtllm"))
    # vLLM: 90% of 80 GiB, less 2 GB of workspace and the weights.
    assert one.room == pytest.approx(0.9 * 80 * 2**30 - 2e9 - 16.06e9, rel=1e-3) and one.room < whole.room
    assert (one.chunk, one.slots) == (8192, 1024)
    small = replica("llama-3.1-8b", "l4", "fp16", load, engine="vllm")
    assert (small.chunk, small.slots) == (2048, 256)
    asked = replica("llama-3.1-8b", "l4", "fp16", load, engine="vllm", slots=8, chunk=512)
    assert (asked.chunk, asked.slots) == (512, 8)


def test_fp8_without_fp8_units_is_weight_only() -> None:
    """An A100 multiplies fp8 weights in fp16: no faster in prefill, but less to read in decode."""
    load = Load(1.0, 2000, 200)
    costs = {
        f: trt("llama-3.1-8b", "a100-sxm-80", f, load).cost for f in ("fp16", "fp8", "int8", "int4", "w8a8")
    }
    assert costs["fp8"].token >= costs["fp16"].token and costs["fp8"].weights < costs["fp16"].weights
    assert costs["int8"].token == costs["fp8"].token == costs["int4"].token
    assert costs["w8a8"].token < costs["fp16"].token  # int8 units do multiply int8
    hopper = {f: trt("llama-3.1-8b", "h100-sxm", f, load).cost for f in ("fp16", "fp8")}
    assert hopper["fp8"].token == pytest.approx(hopper["fp16"].token / 2, rel=1e-3)


def test_fp8_gains_less_where_activations_are_scaled_as_they_come() -> None:
    """vLLM documents 1.6 times fp16's throughput at most; TensorRT-LLM's static scales give 2."""
    load = Load(1.0, 2000, 200)
    for gpu, gain in (("h100-sxm", 1.6), ("a100-sxm-80", 1 / 1.3)):  # an A100 has no fp8 units: weight-only
        plain, fp8 = (replica("llama-3.1-8b", gpu, f, load, engine="vllm").cost for f in ("fp16", "fp8"))
        assert plain.token / fp8.token == pytest.approx(gain, rel=1e-3)


def test_unpacking_costs_by_format() -> None:
    """llama.cpp on Apple: a prefill product takes 1 + 0.2 x the format's unpacking, of fp16's time."""
    load = Load(1.0, 512, 64)
    cost = {
        f: replica("llama-2-7b", "m2-max-30-core", f, load).cost for f in ("fp16", "q8_0", "q4_0", "q4_k_m")
    }
    ratios = [cost[f].token / cost["fp16"].token for f in ("q8_0", "q4_0", "q4_k_m")]
    assert ratios == pytest.approx([1.12, 1.15, 1.2], rel=1e-3)


def test_the_kv_cache_has_its_own_precision() -> None:
    load = Load(1.0, 2000, 200)
    plain = replica("llama-3.1-8b", "h100-sxm", "fp16", load, engine="vllm")
    half = replica("llama-3.1-8b", "h100-sxm", "fp16", load, engine="vllm", cache="fp8")
    assert half.cost.context == plain.cost.context / 2 and half.element == 1.0
    # vLLM keeps an fp16 cache beside fp8 weights; TensorRT-LLM's tables were taken with an fp8 cache.
    assert replica("llama-3.1-8b", "h100-sxm", "fp8", load, engine="vllm").element == 2.0
    assert replica("llama-3.1-8b", "h100-sxm", "fp8", load, engine="trtllm").element == 1.0


def test_what_does_not_fit_says_so() -> None:
    load = Load(1, 500, 100)
    one = trt("llama-3.1-70b", "l4", "fp16", load)
    assert one.limit == 0 and "l4" in one.why_not and "141.1 GB" in one.why_not
    assert rate_within(one, load, Slo()).rate == 0 and saturated(one, load) == 0
    with pytest.raises(InputError, match="141"):
        simulate(one, load)


def test_overload_is_unstable() -> None:
    load = Load(50, 2000, 300)
    answer = at(trt("llama-3.1-8b", "l4", "fp16", load), load)
    assert answer.utilisation > 1 and math.isinf(answer.e2e[95.0])


def test_monotone_in_what_must_help_or_hurt() -> None:
    base = Load(3.0, 2000, 200)

    def p95(load: Load, gpu: str = "h100-sxm", form: str = "fp16") -> tuple[float, float]:
        answer = at(trt("llama-3.1-8b", gpu, form, load), load)
        return float(answer.ttft[95.0]), float(answer.e2e[95.0])

    rates = [p95(replace(base, rate=r)) for r in (0.5, 2, 4, 6, 8, 10)]
    assert rates == sorted(rates)
    assert p95(replace(base, prompt_tokens=500))[0] < p95(base)[0] < p95(replace(base, prompt_tokens=4000))[0]
    assert p95(replace(base, cached_tokens=1800))[0] < p95(base)[0]
    assert p95(replace(base, output_tokens=400))[1] > p95(base)[1]
    assert p95(base, form="fp8") < p95(base) < p95(base, gpu="a100-sxm-80")


def test_an_engine_without_rows_of_a_family_is_less_sure() -> None:
    load = Load(3.0, 2000, 200)
    known = replica("llama-3.1-8b", "h100-sxm", "fp16", load, engine="vllm")
    unseen = replica("llama-3.1-8b", "mi300x", "fp16", load, engine="vllm")
    assert unseen.eff.spread > known.eff.spread > 0
    assert "hopper" in overheads()["vllm"].families and overheads()["vllm"].rows > 0


def test_sizing_finds_the_highest_rate_within_the_slo() -> None:
    load, slo = Load(20.0, 2000, 150), Slo(ttft=1.0, tpot=0.04)
    one = trt("llama-3.1-8b", "a100-sxm-80", "fp16", load)
    rate = rate_within(one, load, slo, searched=6000).rate
    assert 0 < rate <= MAX_UTILISATION * saturated(one, load)

    def worst(at_rate: float) -> float:
        run = simulate(one, replace(load, rate=at_rate), requests=6000)
        return max(run.at("ttft", 95) / 1.0, run.at("tpot", 95) / 0.04)

    assert worst(rate) <= 1.0 < worst(1.1 * rate)
    hopeless = rate_within(trt("llama-3.1-8b", "l4", "fp16", load), load, Slo(tpot=0.001))
    assert hopeless.rate == 0 and "TPOT" in hopeless.reason and "idle" in hopeless.reason


def test_tensor_parallel_speeds_up_less_than_linearly() -> None:
    load = Load(0.1, 2000, 200)
    one, four = (
        at(trt("llama-3.1-8b", "h100-sxm", "fp16", load, tensor_parallel=n), load).tpot[50.0] for n in (1, 4)
    )
    assert 1.5 < one / four < 4.0


def test_experts_cost_by_use() -> None:
    load = Load(0.05, 200, 200)
    dense, routed = (
        at(trt(m, "h200", "fp16", load), load).tpot[50.0] for m in ("qwen2.5-32b", "mixtral-8x7b")
    )
    # One stream reads two experts of eight: faster than a dense model of less weight.
    assert routed < dense


def test_bad_loads_are_refused() -> None:
    for change in (
        {"rate": 0.0},
        {"prompt_tokens": math.nan},
        {"cached_tokens": 3000.0},
        {"output_cv": -1.0},
    ):
        with pytest.raises(InputError, match="load"):
            replace(Load(1.0, 2000, 100), **change)
    with pytest.raises(InputError, match="samples"):
        Load.of_samples(1.0, [])
    with pytest.raises(InputError, match="engine"):
        replica("llama-3.1-8b", "l4", "fp16", Load(1, 100, 10), engine="vlmm")


def test_samples_give_means_and_spread() -> None:
    load = Load.of_samples(2.0, [(100, 10), (300, 30)])
    assert (load.prompt_tokens, load.output_tokens, load.prompt_cv) == (200, 20, 0.5)
    one = trt("llama-3.1-8b", "h100-sxm", "fp16", load)
    assert len(simulate(one, load, requests=500).ttft) == 500


def test_cold_import_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, planner.latency.sizing; print({'torch', 'transformers', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
