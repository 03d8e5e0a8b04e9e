"""The intervals cover what they say they cover, and the verdict follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench import claim as claims
from unshot.case import Claim
from unshot.metrics.intervals import (
    INCONCLUSIVE,
    MET,
    NOT_MET,
    Ratio,
    fieller,
    paired_score_difference,
    pairs_needed,
    percentile_interval,
    t_quantile,
)
from unshot.metrics.scores import macro_f1

TRIALS = 2000
PAIRS = 32


def service_times(
    generator: np.random.Generator, pairs: int, ratio: float, *, trials: int = 1, drift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal times whose means have `ratio`: spread 20% and 30%, correlation 0.5, and a shared slow drift."""
    first = generator.standard_normal((trials, pairs))
    second = 0.5 * first + math.sqrt(0.75) * generator.standard_normal((trials, pairs))
    widths = [math.sqrt(math.log1p(cv**2)) for cv in (0.2, 0.3)]
    machine = 1 + drift * np.sin(np.linspace(0, 3 * math.pi, pairs))
    a = ratio * np.exp(widths[0] * first - widths[0] ** 2 / 2) * machine
    b = np.exp(widths[1] * second - widths[1] ** 2 / 2) * machine
    return a, b


@pytest.mark.parametrize("truth", [1.0, 3.0, 5.0, 10.0])
def test_interval_covers_the_true_ratio_and_seldom_says_met_wrongly(
    truth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = claims.bootstrap_ratio
    monkeypatch.setattr(claims, "bootstrap_ratio", lambda a, b, seed=0: real(a, b, draws=500, seed=seed))
    generator = np.random.default_rng(int(truth))
    a, b = service_times(generator, PAIRS, truth, trials=TRIALS)
    covered = wrong = 0
    for i in range(TRIALS):
        ratio = claims.widest(a[i], b[i], seed=i)
        covered += ratio.low <= truth <= ratio.high
        # A claim a hair above the truth is false, and the hardest false one to tell.
        wrong += ratio.verdict(truth * 1.0001) == MET
    assert 0.93 <= covered / TRIALS <= 0.97
    assert wrong / TRIALS <= 0.05


def test_drift_of_the_machine_cancels_in_pairs() -> None:
    generator = np.random.default_rng(3)
    a, b = service_times(generator, PAIRS, 5.0, trials=500, drift=0.4)
    covered = sum((r := fieller(x, y)).low <= 5.0 <= r.high for x, y in zip(a, b, strict=True))
    assert covered / 500 >= 0.92


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    # scipy.stats.t.ppf
    [(0.975, 1, 12.706204736), (0.975, 7, 2.364624252), (0.95, 30, 1.697260887), (0.1, 3, -1.637744354)],
)
def test_t_quantile(p: float, df: int, expected: float) -> None:
    assert t_quantile(p, df) == pytest.approx(expected, abs=1e-7)


def test_fieller_is_unbounded_where_the_denominator_may_be_zero() -> None:
    ratio = fieller([5.0, 6.0, 7.0], [0.01, 3.0, 0.01])
    assert math.isinf(ratio.high)
    assert ratio.verdict(5) == INCONCLUSIVE


def test_verdict_follows_the_interval() -> None:
    assert Ratio(6, 5.0, 7, 10, "x").verdict(5) == MET
    assert Ratio(6, 4.9, 7, 10, "x").verdict(5) == INCONCLUSIVE
    assert Ratio(4, 3, 4.99, 10, "x").verdict(5) == NOT_MET


def test_as_many_pairs_as_named_settle_the_verdict_about_as_often_as_promised() -> None:
    generator = np.random.default_rng(5)
    a, b = service_times(generator, 20, 5.3, trials=200)
    widths = [math.log(r.high / r.low) / 2 for r in (fieller(x, y) for x, y in zip(a, b, strict=True))]
    # The plan is made at the true ratio and the usual width, so that only the size formula is under test.
    half = float(np.mean(widths))
    plan = Ratio(5.3, 5.3 * math.exp(-half), 5.3 * math.exp(half), 20, "fieller")
    assert plan.verdict(5) == INCONCLUSIVE
    needed = pairs_needed(plan, 5.0)
    assert needed is not None
    a, b = service_times(generator, needed, 5.3, trials=400)
    settled = sum(fieller(x, y).verdict(5.0) == MET for x, y in zip(a, b, strict=True))
    assert 0.7 <= settled / 400 <= 0.92


def test_percentile_interval_covers_the_percentile() -> None:
    generator = np.random.default_rng(1)
    truth = -math.log(0.05)
    covered = 0
    for _ in range(500):
        low, high = percentile_interval(np.sort(generator.exponential(size=200)), 95)
        assert low is not None and high is not None
        covered += low <= truth <= high
    assert 0.93 <= covered / 500 <= 0.995
    assert percentile_interval(np.arange(10.0), 99)[1] is None


def test_score_difference_equals_the_metric_and_its_bounds_hold_it() -> None:
    generator = np.random.default_rng(2)
    labels = ["a", "b", "c"]
    truth = generator.choice(labels, 90).tolist()
    good = [t if generator.random() < 0.9 else "b" for t in truth]
    poor = [t if generator.random() < 0.5 else "(invalid)" for t in truth]
    got = paired_score_difference("macro_f1", truth, poor, good)
    assert got.value == pytest.approx(macro_f1(truth, good) - macro_f1(truth, poor))
    assert 0 < got.low < got.value < got.high
    same = paired_score_difference("accuracy", truth, good, good)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_per_correct_ratio_is_none_where_a_side_has_no_right_answer() -> None:
    costs = ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9])
    assert claims.per_correct_ratio(costs, ([False, False], [True, True])) is None
    got = claims.per_correct_ratio(costs, ([True, False] * 20, [True, True] * 20))
    assert got is not None
    assert got["value"] == pytest.approx(4.0)
    assert got["low"] < 4 < got["high"]


def test_per_correct_ratio_with_few_right_answers_has_a_lower_bound_and_no_upper() -> None:
    costs = ([2.0, 2.1, 1.9] * 4, [1.0, 1.1, 0.9] * 4)
    got = claims.per_correct_ratio(costs, ([True] + [False] * 9, [True] * 2 + [False] * 8))
    assert got is not None
    assert got["value"] == pytest.approx(4.0)
    assert got["low"] < 4
    assert got["high"] is None


def facts(verdict: str) -> dict[str, str]:
    return {"verdict": verdict}


@pytest.mark.parametrize(
    ("on", "off", "gate", "expected"),
    [
        (MET, MET, "passed", MET),
        (MET, MET, "failed", NOT_MET),
        (MET, MET, "inconclusive", INCONCLUSIVE),
        (NOT_MET, MET, "passed", NOT_MET),
        (INCONCLUSIVE, MET, "passed", INCONCLUSIVE),
        (INCONCLUSIVE, NOT_MET, "passed", NOT_MET),
    ],
)
def test_overall_needs_every_mode_and_the_gate(on: str, off: str, gate: str, expected: str) -> None:
    verdict, reason = claims.overall({"cache on": facts(on), "cache off": facts(off)}, gate)
    assert verdict == expected
    assert reason


def test_claim_check_asks_for_speed_and_cost() -> None:
    fast, slow = Ratio(7, 6, 8, 20, "x"), Ratio(3, 2.5, 3.5, 20, "x")
    assert claims.check(fast, fast, Claim())["verdict"] == MET
    assert claims.check(fast, slow, Claim())["verdict"] == NOT_MET
    unsure = Ratio(5.5, 4.5, 6.5, 20, "x")
    checked = claims.check(fast, unsure, Claim())
    assert checked["verdict"] == INCONCLUSIVE
    assert checked["pairs_to_settle"] > 20
