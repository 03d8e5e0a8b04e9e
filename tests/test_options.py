"""Costs as functions of the rate: replicas, break-even, payback, error bars."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace

from planner.breakeven import GRID, break_even, exact_break_even, payback
from planner.latency.replica import Load, replica
from planner.options import HOURS_PER_MONTH, SECONDS_PER_MONTH, Option, Shape, World
from planner.uncertainty import Assumption, Band, analyse, draw, tornado
from tests.test_worked_example import api, tuned, usage


def flat(option: Option) -> Option:
    """No recurring costs: only what scales."""
    return replace(option, costs=replace(option.costs, monthly={}))


@pytest.mark.parametrize("peak", [1.0, 1.5, 2.0, 4.0, 10.0])
def test_a_day_has_its_mean_and_its_peak(peak: float) -> None:
    shape = Shape.of(peak)
    assert sum(shape.hourly) / 24 == pytest.approx(1.0)
    assert max(shape.hourly) == pytest.approx(peak, rel=1e-6)
    assert min(shape.hourly) >= 0


def test_replicas_hold_the_peak_in_whole_numbers() -> None:
    option = replace(tuned(), min_replicas=1)
    assert [float(option.replicas(r)) for r in (0.1, 10.0, 10.1, 95.0)] == [1, 1, 2, 10]
    busy = replace(option, shape=Shape.of(3.0))
    assert float(busy.replicas(10.0)) == 3
    assert float(replace(option, min_replicas=4).replicas(0.1)) == 4


def test_idle_hours_are_paid_and_shown() -> None:
    option = replace(tuned(), min_replicas=2)
    assert option.utilisation(2.0) == pytest.approx(0.1)
    assert float(option.parts(2.0)["GPU hours"]) == pytest.approx(2 * HOURS_PER_MONTH * 0.8)
    peaky = replace(option, shape=Shape.of(8.0), min_replicas=1)
    assert peaky.scaled_by_hour(10.0) < float(peaky.parts(10.0)["GPU hours"])
    assert option.scaled_by_hour(2.0) == pytest.approx(float(option.parts(2.0)["GPU hours"]))


def test_shared_adapters_pay_their_share_and_no_less() -> None:
    shared = replace(tuned(), shared_by=8)
    assert float(shared.replicas(0.01)) == pytest.approx(2 / 8)
    # 15% of the throughput is lost to adapters.
    assert float(shared.replicas(85.0)) == pytest.approx(10.0)


def test_caching_needs_traffic() -> None:
    cached, plain = api("cached"), api("plain")
    assert float(cached.request_cost(1e-6).total) == pytest.approx(
        float(plain.request_cost(1.0).total), rel=1e-3
    )
    assert float(cached.request_cost(10.0).total) < 0.6 * float(plain.request_cost(10.0).total)
    quiet_nights = replace(cached, shape=Shape.of(12.0))
    assert float(quiet_nights.hit(0.005)) != pytest.approx(float(cached.hit(0.005)), rel=1e-3)


def test_arrays_and_numbers_agree() -> None:
    rates = np.array([0.01, 1.0, 50.0])
    for option in (api("plain"), api("cached"), api("batch"), tuned()):
        one_by_one = [float(option.monthly(r)) for r in rates]
        assert np.allclose(option.monthly(rates), one_by_one)
        parts = option.parts(rates)
        assert np.allclose(sum(parts.values()), one_by_one)


def test_break_even_of_two_straight_lines_is_exact() -> None:
    small = flat(replace(tuned(), min_replicas=1))
    found = exact_break_even(small, api("plain"))
    assert found == pytest.approx(HOURS_PER_MONTH * 0.8 / (SECONDS_PER_MONTH * 0.0042), rel=1e-6)


def test_break_even_takes_the_last_crossing() -> None:
    """One replica pays from 0.3/s on, but the second one, needed at once, does not until later."""
    dear = flat(replace(tuned(), min_replicas=1))
    assert dear.serving is not None
    dear = replace(dear, serving=replace(dear.serving, capacity=0.06))
    found = exact_break_even(dear, api("plain"))
    assert found is not None
    after = GRID[found * 1.001 < GRID]
    assert (dear.monthly(after) < api("plain").monthly(after)).all()
    before = np.linspace(found * 0.97, found * 0.9999, 200)
    assert (dear.monthly(before) >= api("plain").monthly(before) - 1e-6).any()


def test_break_even_at_the_ends() -> None:
    dear = flat(tuned())
    assert dear.serving is not None
    never = replace(dear, serving=replace(dear.serving, capacity=1e-3))
    assert exact_break_even(never, api("plain")) is None
    assert math.isnan(break_even(never, api("plain")))
    unpaid = replace(dear.serving.machine, dollars_per_hour=0.0)
    free = replace(dear, serving=replace(dear.serving, machine=unpaid))
    assert exact_break_even(free, api("plain")) == 0.0


def test_payback_is_never_where_nothing_is_saved() -> None:
    assert payback(tuned(), api("cached"), 0.01) == math.inf
    assert payback(tuned(), api("cached"), 2.0) < payback(tuned(), api("cached"), 1.0)


def test_longer_requests_lower_the_capacity() -> None:
    """The capacity is worked out at the drawn length, not by a power of it."""
    option = tuned()
    assert option.serving is not None
    base, double = float(option.replicas(1e4)), float(option.replicas(1e4, World(length=2.0)))
    there = float(option.serving.length_factor(280.0, 40.0, 0.0))
    assert 0.3 < there < 0.7 and double == pytest.approx(base / there, rel=1e-3)


def test_a_cached_prefix_does_not_make_the_length_a_cliff() -> None:
    """Found: elasticity 12.8 where the new tokens are a hundredth of the prompt, so a band of $1,975 to $79,896."""
    load = Load(1.0, 2500.0, 20.0, cached_tokens=2480.0)
    one = replica("llama-3.1-8b", "h100-sxm", "fp16", load)
    serving = replace(tuned().serving, load=load, one=one)
    option = replace(tuned(), serving=serving, usage=usage(2480, 20, 20))
    longer = float(option.replicas(1e4, World(length=1.1))) / float(option.replicas(1e4))
    # A tenth longer answers over a tenth longer context: 1.1 x 1.1 the cache read, at most.
    assert 1.0 <= longer < 1.22


ASSUMPTIONS = [
    Assumption("rate", "rate", 0.5, 2.0, ""),
    Assumption("api_price", "API price", 0.8, 1.1, ""),
    Assumption("gpu_price", "GPU price", 0.5, 2.0, ""),
    Assumption("training", "training", 0.99, 1.01, ""),
]


def test_draws_have_the_quantiles_that_were_asked_for() -> None:
    world, rates = draw(ASSUMPTIONS, 40_000, 3)
    assert np.quantile(rates, [0.05, 0.95]) == pytest.approx([0.5, 2.0], rel=0.03)
    assert np.quantile(world.api_price, [0.05, 0.5, 0.95]) == pytest.approx([0.8, 1.0, 1.1], rel=0.01)


def test_bands_hold_the_forecast_and_widen_with_doubt() -> None:
    keep, small = api("cached"), tuned()
    found = analyse([keep, small], ASSUMPTIONS, 2.0, tuned=small, keep=keep, draws=2000)
    band = found.monthly["cached"]
    assert band.p5 is not None and band.p95 is not None
    assert band.p5 < float(keep.monthly(2.0)) < band.p95
    point = exact_break_even(small, keep)
    assert (
        found.break_even is not None and found.break_even.p5 is not None and found.break_even.p95 is not None
    )
    assert point is not None and found.break_even.p5 < point < found.break_even.p95
    doubt = [replace(a, low=a.low / 2, high=a.high * 2) for a in ASSUMPTIONS]
    wider = analyse([keep, small], doubt, 2.0, tuned=small, keep=keep, draws=2000).break_even
    assert wider is not None and wider.p5 is not None and wider.p95 is not None
    assert wider.p95 / wider.p5 > found.break_even.p95 / found.break_even.p5


def test_the_same_seed_gives_the_same_answer() -> None:
    keep, small = api("cached"), tuned()
    one = analyse([keep, small], ASSUMPTIONS, 2.0, tuned=small, keep=keep, draws=200, seed=4)
    two = analyse([keep, small], ASSUMPTIONS, 2.0, tuned=small, keep=keep, draws=200, seed=4)
    assert one == two


def test_vector_break_even_is_the_scalar_one() -> None:
    world, _ = draw(ASSUMPTIONS, 50, 5)
    many = np.asarray(break_even(tuned(), api("cached"), world))
    for i in (0, 7, 49):
        alone = World(
            api_price=float(world.api_price[i, 0]),
            gpu_price=float(world.gpu_price[i, 0]),
            training=float(world.training[i, 0]),
        )
        assert many[i] == pytest.approx(break_even(tuned(), api("cached"), alone), rel=1e-9)


def test_the_tornado_is_sorted_and_signed() -> None:
    swings = tornado(tuned(), api("cached"), ASSUMPTIONS, 2.0)
    assert [s.width for s in swings] == sorted((s.width for s in swings), reverse=True)
    assert swings[0].label == "rate" and swings[0].high > swings[0].low
    gpu = swings[-1]
    assert gpu.label == "GPU price" and gpu.high < gpu.low
    # Training is paid once and does not move a month's saving, so it is left out.
    assert "training" not in {s.label for s in swings}


def test_a_band_with_never_in_it_is_open() -> None:
    never = np.array([1.0] * 60 + [np.nan] * 40)
    assert Band.of(never) == Band(1.0, 1.0, None)
    assert Band.of(np.full(10, np.inf)) == Band(None, None, None)
