"""Roofline, queueing and simulation: known limits, monotony, memory, and the formulas against the simulation."""

from __future__ import annotations

import functools
import math
from itertools import islice
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from planner import capacity, queueing
from planner.capacity import Forecast, gpus_needed
from planner.moments import fixed_wait
from planner.replica import Load, Slo, setup
from planner.roofline import StepCost, requests_in_memory
from planner.simulate import simulate, simulate_cost, simulated_forecast
from planner.sweep import sweep
from planner.waiting_fit import draw
from unshot import catalog
from unshot.errors import InputError


def forecast(model: str, gpu: str, form: str, load: Load, **options: Any) -> Forecast:
    """One replica's forecast, by names."""
    return capacity.forecast(setup(model, gpu, form, load, **options), load)


@pytest.mark.parametrize("law", ["deterministic", "exponential"])
@pytest.mark.parametrize(("rho", "within"), [(0.3, 0.03), (0.6, 0.04), (0.85, 0.08)])
def test_simulation_reproduces_single_server_queues(law: str, rho: float, within: float) -> None:
    """M/D/1 and M/M/1 (geometric with mean 200) mean waits by Pollaczek-Khinchine; with 1.6 million requests in place
    of 120,000 they are within 2%."""
    tokens, step, count = 200, 1e-3, 30_000
    waits = []
    for seed in range(4):
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
    assert np.mean(waits) == pytest.approx(expected, rel=within)


CASES = [
    ("llama-3.1-8b", "l40s", "fp16", 200, 400),
    ("llama-3-8b", "rtx-4090", "q4_k_m", 1000, 150),
    ("llama-3.1-8b", "h100-sxm", "fp8", 1000, 100),
    ("qwen2.5-7b", "a100-sxm-80", "fp16", 500, 200),
]
# Plans as people make them: the long prompt, the short one, small and large devices.
PLANS = [
    *CASES,
    ("llama-3.1-8b", "h100-sxm", "fp16", 2000, 200),
    ("llama-2-13b", "a100-sxm-80", "fp16", 1500, 60),
    ("mistral-7b", "l4", "int8", 300, 50),
    ("llama-3.1-8b", "a10g", "int4", 1800, 20),
]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("case", PLANS, ids=lambda c: f"{c[1]}-{c[3]}-{c[4]}")
def test_formula_follows_the_simulation(case: tuple, share: float) -> None:
    """p95 time to first token, analytic against simulated, at three utilisations."""
    model, gpu, form, prompt, output = case
    load = Load(1.0, prompt, output)
    one = setup(model, gpu, form, load)
    busy = replace(load, rate=share * float(queueing.capacity(one.cost, one.shape(load))))
    requests = 20_000 if share > 0.8 else 10_000
    seen = [simulate(one, busy, requests=requests, seed=s).quantiles("ttft").p95 for s in range(2)]
    assert forecast(model, gpu, form, busy).ttft.p95 == pytest.approx(np.mean(seen), rel=0.12)


@pytest.mark.parametrize("rho", [0.06, 0.3, 0.7, 0.9])
def test_wait_for_one_server_and_one_size(rho: float) -> None:
    """`fixed_wait` against Lindley's recursion, p95 and p99 of M/D/1."""
    rng = np.random.default_rng(3)
    steps = 1.0 - rng.exponential(1.0 / rho, 400_000)
    walk = np.cumsum(steps)
    waits = walk - np.minimum(np.minimum.accumulate(walk), 0.0)
    for p in (95.0, 99.0):
        assert fixed_wait(rho, p) == pytest.approx(np.quantile(waits, p / 100), rel=0.08)


def test_unfilled_iteration_is_a_sawtooth_that_spread_blurs() -> None:
    """A prompt of 1.1 chunks leaves 0.9 of its second iteration, one of 0.9 leaves 0.1; unequal ones half of it."""
    assert queueing.unfilled(1 / 1.1, 1.0, 0.0) == pytest.approx(0.9)
    assert queueing.unfilled(1 / 0.9, 1.0, 0.0) == pytest.approx(0.1)
    assert queueing.unfilled(0.3, 1.0, 0.5) == pytest.approx(0.5, abs=0.2)


@functools.cache
def _random_errors() -> dict[float, list[float]]:
    """Relative error of the analytic p95 time to first token on 16 random loads, by utilisation.

    The seed is not one that the correction was fitted on. Requests are as many as keep the simulation's own p95 within
    about 3% (standard error over seeds) at 30% and 60%, 5% at 85%.
    """
    runs = {0.3: (8_000, 2), 0.6: (10_000, 2), 0.85: (25_000, 2)}
    errors: dict[float, list[float]] = {share: [] for share in runs}
    for drawn in islice(draw(7), 16):
        for share, (requests, seeds) in runs.items():
            load = drawn.at(share)
            one = drawn.setup()
            seen = [
                simulate(one, load, requests=requests, seed=s).quantiles("ttft").p95 for s in range(seeds)
            ]
            guess = queueing.respond(one.cost, one.shape(load), load.rate, (95.0,)).ttft[95.0]
            errors[share].append(float(guess) / float(np.mean(seen)) - 1.0)
    return errors


# Utilisation, median absolute error, share of loads within a tenth, 90th percentile.
@pytest.mark.parametrize(
    ("share", "median", "within", "p90"),
    [(0.3, 0.03, 0.9, 0.10), (0.6, 0.03, 0.87, 0.12), (0.85, 0.05, 0.75, 0.18)],
)
def test_formula_on_random_loads(share: float, median: float, within: float, p90: float) -> None:
    error = np.abs(_random_errors()[share])
    assert np.median(error) <= median
    assert np.mean(error <= 0.10) >= within
    assert np.quantile(error, 0.9) <= p90


def test_one_token_answers_have_a_tail() -> None:
    """Nothing decodes, so the number decoding has no spread; the quantiles stay finite and in order."""
    answer = forecast("qwen2.5-14b", "a40", "fp16", Load(0.5, 2000, 1))
    assert 0 < answer.ttft.p50 < answer.ttft.p95 <= answer.ttft.p99 < 60


def test_busy_replicas_show_simulated_latency() -> None:
    """Above 70% of the capacity what a plan shows is the simulation's, below it the closed form's."""
    from planner.serving import REQUESTS, Serving, latencies

    load = Load(1.0, 1500, 60)
    one = setup("llama-2-13b", "a100-sxm-80", "fp16", load)
    top = float(queueing.capacity(one.cost, one.shape(load)))
    serving = Serving(
        True, "", top, 1, 1.0, "test", "-", 1e12, 0.0, 0.0, (1.0, 1.0), (1.0, 1.0), load, one,
    )  # fmt: skip
    calm, busy = latencies([(serving, 0.4 * top), (serving, 0.85 * top)])
    assert calm["from"] == "closed form" and busy["from"] == "simulation"
    assert latencies([(serving, 0.4 * top)]) == [calm]  # what stands beside it changes nothing
    run = simulate(one, replace(load, rate=0.85 * top), requests=REQUESTS)
    assert busy["ttft"]["p95"] == pytest.approx(1e3 * run.quantiles("ttft").p95)
    assert busy["ttft"]["p95_interval"][0] < busy["ttft"]["p95"] < busy["ttft"]["p95_interval"][1]


def test_simulated_forecast_replaces_the_tail() -> None:
    load = Load(1.3, 1500, 300)
    one = setup("llama-2-13b", "a100-sxm-80", "fp16", load)
    answer = simulated_forecast(one, load, requests=4000)
    assert answer.ttft.p95 == simulate(one, load, requests=4000).quantiles("ttft").p95
    assert answer.low["ttft_p95"] < answer.ttft.p95 < answer.high["ttft_p95"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}-{c[3]}-{c[4]}")
def test_capacity_is_what_a_saturated_simulation_reaches(case: tuple) -> None:
    model, gpu, form, prompt, output = case
    one = setup(model, gpu, form, Load(1.0, prompt, output))
    count = max(4000, 6 * one.max_batch)
    # Answers of one length march in step, which no real load does.
    mixed = np.rint(np.random.default_rng(1).uniform(0.6, 1.4, count) * output)
    run = simulate_cost(
        one.cost, np.arange(count) * 1e-9, np.full(count, prompt), mixed,
        limit=one.max_batch, chunk=one.chunk, cache_tokens=one.cache_tokens,
    )  # fmt: skip
    ends = np.sort(run.arrival + run.e2e)
    rate = 0.6 * count / (ends[int(0.8 * count)] - ends[int(0.2 * count)])
    assert float(queueing.capacity(one.cost, one.shape(Load(1.0, prompt, output)))) == pytest.approx(
        rate, rel=0.06
    )


def test_simulation_is_reproducible_and_consistent() -> None:
    load = Load(4.0, 1500, 120, output_cv=0.5, prompt_cv=0.3, arrival_cv=1.5)
    one = setup("llama-3.1-8b", "l40s", "fp8", load)
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
    one = setup("llama-3.1-8b", "h100-sxm", "fp16", load)
    calm = simulate(one, load, requests=8000).quantiles("ttft").p95
    bursty = simulate(one, replace(load, arrival_cv=2.5), requests=8000).quantiles("ttft").p95
    assert bursty > 1.3 * calm
    assert (
        forecast("llama-3.1-8b", "h100-sxm", "fp16", replace(load, arrival_cv=2.5)).ttft.p95
        > forecast("llama-3.1-8b", "h100-sxm", "fp16", load).ttft.p95
    )


def test_memory_limits() -> None:
    arch, form = catalog.model("llama-3.1-8b"), catalog.precision("fp16")
    h100, l4 = catalog.gpu("h100-sxm"), catalog.gpu("l4")
    # 80 GiB less 1.5%, 2 GB of workspace and 16.06 GB of weights, 95% of it at 131,072 bytes a token.
    tokens = ((80 * 2**30 * 0.985 - 2e9) - 16.06e9) * 0.95 / 131072
    assert requests_in_memory(arch, h100, form, 2000) == pytest.approx(tokens / 2000, rel=1e-3)
    assert requests_in_memory(catalog.model("llama-3.1-70b"), h100, form, 2000) == 0
    assert requests_in_memory(catalog.model("llama-3.1-70b"), h100, form, 2000, tensor_parallel=4) > 0
    assert requests_in_memory(arch, h100, form, 2000, shared=1800) > 5 * requests_in_memory(
        arch, h100, form, 2000
    )
    assert requests_in_memory(arch, l4, form, 2000) < requests_in_memory(arch, h100, form, 2000)


def test_what_does_not_fit_says_so() -> None:
    answer = forecast("llama-3.1-70b", "l4", "fp16", Load(1, 500, 100))
    assert not answer.fits and answer.capacity == 0 and math.isinf(answer.ttft.p95)
    assert "l4" in answer.reason and "141.1 GB" in answer.reason
    sized = gpus_needed(setup("llama-3.1-70b", "l4", "fp16", Load(1, 500, 100)), Load(1, 500, 100), Slo())
    assert not sized.feasible and sized.replicas == 0


def test_overload_is_unstable() -> None:
    answer = forecast("llama-3.1-8b", "l4", "fp16", Load(50, 2000, 300))
    assert answer.fits and not answer.stable and answer.utilisation > 1 and math.isinf(answer.e2e.p95)


def test_monotone_in_what_must_help_or_hurt() -> None:
    base = Load(3.0, 2000, 200)

    def p95(load: Load, gpu: str = "h100-sxm", form: str = "fp16") -> tuple[float, float]:
        answer = forecast("llama-3.1-8b", gpu, form, load)
        return answer.ttft.p95, answer.e2e.p95

    rates = [p95(replace(base, rate=r)) for r in (0.5, 2, 4, 6, 8, 10)]
    assert rates == sorted(rates)
    assert p95(replace(base, prompt_tokens=500))[0] < p95(base)[0] < p95(replace(base, prompt_tokens=4000))[0]
    assert p95(replace(base, cached_tokens=1800))[0] < p95(base)[0]
    assert p95(replace(base, output_tokens=400))[1] > p95(base)[1]
    assert p95(base, form="fp8") < p95(base) < p95(base, gpu="a100-sxm-80")


@pytest.mark.parametrize("output", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("rate", [0.02, 0.4, 0.8])
def test_a_whole_answer_never_comes_before_its_first_token(rate: float, output: float) -> None:
    """Found on a page: each percentile has its own correction, and short answers end just after their first token."""
    answer = forecast("smollm2-135m", "cpu", "int8", Load(rate, 1268.0, output))
    for p in ("p50", "p95", "p99"):
        assert getattr(answer.e2e, p) >= getattr(answer.ttft, p)


def test_the_interval_holds_the_estimate_and_widens_where_nothing_was_measured() -> None:
    load = Load(3.0, 2000, 200)
    answer = forecast("llama-3.1-8b", "h100-sxm", "fp16", load)
    for name, value in (
        ("ttft_p95", answer.ttft.p95),
        ("e2e_p95", answer.e2e.p95),
        ("capacity", answer.capacity),
    ):
        assert answer.low[name] < value < answer.high[name]
    unseen = forecast("llama-3.1-8b", "mi300x", "fp16", load)
    assert unseen.spread > answer.spread


def test_sizing_holds_the_slo_and_one_less_does_not() -> None:
    load, slo = Load(20.0, 2000, 150), Slo(ttft=1.0, tpot=0.04)
    sized = gpus_needed(setup("llama-3.1-8b", "a100-sxm-80", "fp16", load), load, slo, peak_factor=2.0)
    assert sized.feasible and sized.forecast.ttft.p95 <= 1.0 and sized.forecast.tpot.p95 <= 0.04
    less = forecast("llama-3.1-8b", "a100-sxm-80", "fp16", replace(load, rate=40.0 / (sized.replicas - 1)))
    assert less.ttft.p95 > 1.0 or less.tpot.p95 > 0.04 or less.utilisation > 0.9
    hopeless = gpus_needed(setup("llama-3.1-8b", "l4", "fp16", load), load, Slo(tpot=0.001))
    assert not hopeless.feasible and "TPOT" in hopeless.reason


def test_tensor_parallel_speeds_up_less_than_linearly() -> None:
    load = Load(0.1, 2000, 200)
    one = forecast("llama-3.1-8b", "h100-sxm", "fp16", load)
    four = forecast("llama-3.1-8b", "h100-sxm", "fp16", load, tensor_parallel=4)
    assert 1.5 < one.tpot.p50 / four.tpot.p50 < 4.0


def test_experts_cost_by_use() -> None:
    load = Load(0.05, 200, 200)
    dense, routed = (forecast(m, "h200", "fp16", load) for m in ("qwen2.5-32b", "mixtral-8x7b"))
    # One stream reads two experts of eight: faster than a dense model of less weight.
    assert routed.weight_bytes > dense.weight_bytes and routed.tpot.p50 < dense.tpot.p50


def test_sweep_equals_single_forecasts() -> None:
    grid = sweep(
        ["llama-3.1-8b", "mistral-nemo-12b"], ["l4", "h100-sxm"], ["fp16", "fp8"], [500.0, 2000.0], [0.5, 4.0],
        output_tokens=100,
    )  # fmt: skip
    assert grid.ttft.shape == (2, 2, 2, 2, 2)
    for m, model in enumerate(grid.models):
        for g, gpu in enumerate(grid.gpu_names):
            one = forecast(model, gpu, "fp8", Load(4.0, 2000.0, 100))
            assert grid.ttft[m, g, 1, 1, 1] == pytest.approx(one.ttft.p95, rel=1e-6)
            assert grid.capacity[m, g, 1, 1, 1] == pytest.approx(one.capacity, rel=1e-6)


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
        forecast("llama-3.1-8b", "l4", "fp16", Load(1, 100, 10), engine="vlmm")


def test_samples_give_means_and_spread() -> None:
    load = Load.of_samples(2.0, [(100, 10), (300, 30)])
    assert (load.prompt_tokens, load.output_tokens, load.prompt_cv) == (200, 20, 0.5)
    one = setup("llama-3.1-8b", "h100-sxm", "fp16", load)
    assert len(simulate(one, load, requests=500).ttft) == 500


def test_cold_import_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, planner.capacity; print(any(m in sys.modules for m in ('torch', 'transformers', 'scipy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
