"""`unshot deploy ab`: error rates under peeking, who counts for which arm, verdicts and exit codes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deploy.ab.outcomes import by_assignment, by_pair, counts
from deploy.ab.sequential import BURN_IN, EQUAL, Outlook, compare, design, follow, outlook, paired
from deploy.answers import gather, right, stated
from tests.benchmarks.bench_ab_heavy import Users, measure
from tests.benchmarks.bench_ab_peeking import clustered, margin_error, pair_error, peeked, power, shares
from tests.logs import request, run_here, split_log
from unshot.contracts.request_log import Arm, Feedback, Request, Writer
from unshot.contracts.task import Task

Capture = pytest.CaptureFixture[str]


def at_most(count: int, total: int, share: float) -> bool:
    """Whether a count is compatible with a rate of at most `share` (one-sided, 1 in 1,000)."""
    return bool(stats.binomtest(count, total, share, alternative="greater").pvalue > 0.001)


@pytest.mark.slow
def test_peeking_after_every_request_keeps_the_error_rate_which_a_z_test_does_not() -> None:
    own, naive, _ = peeked(shares(0.9, 0.9), 1500, 600, effect=0.05, scale=0.5, seed=10)
    assert at_most(own, 600, 0.05)
    assert naive > 0.15 * 600


@pytest.mark.slow
def test_requests_of_one_unit_that_agree_do_not_count_as_many() -> None:
    own, _, once = peeked(clustered(0.9, 2.0, 50), 4000, 200, effect=0.05, scale=0.5, seed=11)
    assert at_most(own, 200, 0.05)
    assert once > 0.2 * 200, "by requests even one look at the end is wrong too often"


@pytest.mark.slow
def test_a_candidate_worse_by_the_margin_is_seldom_called_not_worse() -> None:
    assert at_most(margin_error(400, 1500, 0.9, 0.05, seed=12), 400, 0.05)
    assert at_most(pair_error(400, 1500, seed=13), 400, 0.05)


@pytest.mark.slow
def test_power_is_as_planned() -> None:
    for equal in (False, True):
        planned, hits, middle = power(0.85, 0.1, 0.8, 400, seed=14, equal=equal)
        low, high = stats.binomtest(hits, 400).proportion_ci(0.999)
        assert low < 0.85 and high > 0.78, f"{hits} of 400 by {planned}"
        assert middle < planned


def test_the_running_variance_is_the_one_by_units() -> None:
    generator = np.random.default_rng(0)
    unit = generator.integers(40, size=500)
    arm = generator.random(40)[unit] < 0.5
    value = generator.normal(size=500) + generator.normal(size=40)[unit]
    path = compare(value, unit, arm, scale=0.01)
    for end in (120, 500):
        expected = 0.0
        for side in (arm[:end], ~arm[:end]):
            y, u = value[:end][side], unit[:end][side]
            sums = [(y[u == k] - y.mean()).sum() for k in np.unique(u)]
            equal = len(y) ** 2 / sum(float((u == k).sum()) ** 2 for k in np.unique(u))
            expected += equal / (equal - 1) * sum(s**2 for s in sums) / len(y) ** 2
        assert math.isclose(path.variance[end - 1], expected, rel_tol=1e-9)


def test_no_bound_before_the_burn_in_and_none_from_answers_that_never_varied() -> None:
    everything = np.ones(200)
    arm = np.arange(200) % 2 == 1
    bounds = follow(
        compare(everything, np.arange(200), arm, scale=0.5), mixing=design(0.05).mixing, alpha=0.05
    )
    assert not np.isfinite(bounds.low[: 2 * BURN_IN - 1]).any()
    assert np.isfinite(bounds.low[2 * BURN_IN :]).all()
    assert bounds.low[-1] < -0.02, "100 right answers of each arm prove no equality"
    pairs = follow(paired(np.zeros(100), np.arange(100), scale=1.0), mixing=design(0.05).mixing, alpha=0.05)
    assert pairs.low[-1] < -0.02


def verdict(capsys: Capture, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    done = run_here(capsys, "deploy", "ab", *arguments, "--json", "-q")
    return done.code, json.loads(done.out)


def test_a_better_candidate_passes_and_a_worse_or_open_one_does_not(capsys: Capture, tmp_path: Path) -> None:
    better = split_log(tmp_path / "better", 600, right=(0.6, 0.9), seconds=(0.4, 0.2))
    code, report = verdict(capsys, better, "--margin", "0.05", "--out", tmp_path / "report")
    assert (code, report["verdict"]) == (0, "candidate better")
    assert report["metrics"]["e2e"]["verdict"] == "better" and report["metrics"]["cost"]["verdict"] == "worse"
    assert 0.45 < report["metrics"]["e2e"]["estimate"] < 0.55
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") >= 5 and "confidence sequence" in page
    worse = split_log(tmp_path / "worse", 600, right=(0.9, 0.6))
    assert verdict(capsys, worse, "--margin", "0.05")[0] == 1
    early = split_log(tmp_path / "early", 80, right=(0.9, 0.9))
    code, report = verdict(capsys, early, "--margin", "0.05")
    assert (code, report["verdict"]) == (1, "keep going")
    assert report["sample"]["needed"] > 500


def test_a_plan_that_changes_after_a_look_is_told(capsys: Capture, tmp_path: Path) -> None:
    log = split_log(tmp_path / "log", 80, right=(0.9, 0.9))
    assert not verdict(capsys, log, "--margin", "0.05")[1]["warnings"]
    warned = verdict(capsys, log, "--margin", "0.2")[1]["warnings"]
    assert any("margin 0.05 -> 0.2" in w for w in warned)


def test_bad_input_is_one_line(capsys: Capture, tmp_path: Path) -> None:
    for arguments, word in (
        ((tmp_path / "none",), "no such directory"),
        ((tmp_path, "--alpha", "2"), "--alpha is 2"),
        ((tmp_path, "--since", "yesterday"), "give ISO 8601"),
        ((tmp_path, "--margin", "0"), "--effect"),
    ):
        done = run_here(capsys, "deploy", "ab", *arguments)
        assert done.code == 2 and word in done.err, done.err
    Writer(tmp_path / "one").write(request(1))
    done = run_here(capsys, "deploy", "ab", tmp_path / "one")
    assert done.code == 2 and "no second arm" in done.err


def failed_over() -> list[Request]:
    """The candidate was drawn and failed; the baseline answered in its place."""
    return [
        request(1, assigned="candidate", error="timeout", e2e_s=1.0, cost_usd=0.001),
        request(1, assigned="candidate", arm="baseline", fallback=True, label="a", e2e_s=1.5, cost_usd=0.01),
    ]


def test_a_fallback_counts_for_the_arm_that_was_drawn() -> None:
    asked = gather(failed_over())
    seen = by_assignment(asked, {"r1": Feedback(id="r1", time=9, correct=True)}, None)
    assert seen["quality"].candidate.tolist() == [True] and seen["quality"].value.tolist() == [1.0]
    assert seen["failures"].value.tolist() == [1.0]
    assert seen["cost"].raw["candidate"].tolist() == [0.011], "the failed try was paid as well"
    assert seen["e2e"].raw["candidate"].tolist() == [1.5]
    assert counts(asked)["candidate"]["fallbacks"] == 1


def test_shadowed_pairs_are_scored_by_what_is_known_to_be_right() -> None:
    lines = []
    for number, (shown, shadow) in enumerate([("a", "a"), ("a", "b"), ("a", "b"), ("a", "b"), ("a", "a")]):
        lines.append(request(number, label=shown, e2e_s=0.4))
        lines.append(request(number, arm="candidate", version="2", shadow=True, label=shadow, e2e_s=0.2))
    said = {
        "r0": Feedback(id="r0", time=1, correction="a"),
        "r1": Feedback(id="r1", time=2, correction="b"),
        "r2": Feedback(id="r2", time=3, correct=True),
        "r3": Feedback(id="r3", time=4, correct=False),
        "r4": Feedback(id="r4", time=5, correct=False),
    }
    seen, dropped = by_pair(gather(lines), said, None)
    assert seen["quality"].value.tolist() == [0.0, 1.0, -1.0, 0.0]
    assert dropped == 1, "wrong without a correction says nothing of a different shadow answer"
    assert np.allclose(seen["e2e"].value, math.log(0.5))


def test_a_correction_is_compared_with_what_was_shown() -> None:
    task = Task(labels=["high", "low"], answer_field="risk")
    assert stated('{"risk": "High"}', task) == "high" == stated(" HIGH ", task)
    shown = gather([request(1, answer='{"risk": "low", "reason": "short"}')])[0]
    assert right(shown, Feedback(id="r1", time=1, correction="low"), task) is True
    assert right(shown, Feedback(id="r1", time=1, correction='{"risk": "high"}'), task) is False
    bare = gather([request(2)])[0]
    assert right(bare, Feedback(id="r2", time=1, correction="high"), task) is False
    assert right(bare, Feedback(id="r2", time=1), task) is None


def test_a_look_that_cannot_be_written_fixes_no_plan(capsys: Capture, tmp_path: Path) -> None:
    split_log(tmp_path / "log", 40, right=(0.9, 0.9))
    (tmp_path / "file").write_text("a thesis")
    assert run_here(capsys, "deploy", "ab", tmp_path / "log", "--out", tmp_path / "file").code == 2
    assert not (tmp_path / "log" / "ab-plan.json").exists()


def told(generator: np.random.Generator, users: int, *, heavy: bool) -> tuple[Outlook, Any]:
    """What is said to be needed after 1,000 answers, and the path of 12,000."""
    n = 12_000
    weight = generator.pareto(1.5, users) + 1 if heavy else np.ones(users)
    unit = generator.choice(users, size=n, p=weight / weight.sum())
    candidate = (generator.random(users) < 0.5)[unit]
    skill = generator.normal(0, 0.15 if heavy else 0.0, users)[unit]
    value = (generator.random(n) < np.clip(0.75 + skill - 0.1 * candidate, 0.02, 0.98)).astype(float)
    return ahead(value, unit, candidate, 1000), compare(value, unit, candidate, scale=0.5)


def ahead(value: np.ndarray, unit: np.ndarray, candidate: np.ndarray, at: int) -> Outlook:
    early = compare(value[:at], unit[:at], candidate[:at], scale=0.5)
    alone = compare(value[:at], np.arange(at), candidate[:at], scale=0.5).last()
    return outlook(early, alone, design(0.1).target_variance)


def test_the_number_that_is_needed_is_the_one_at_which_the_plan_is_met() -> None:
    generator, met = np.random.default_rng(6), []
    for users in (500, 500, 500, 20_000, 20_000, 20_000):
        plan, path = told(generator, users, heavy=False)
        assert plan.needed is not None
        met.append(plan.needed / (np.argmax(path.variance <= design(0.1).target_variance) + 1))
    assert min(met) > 0.9 and max(met) < 1.1, met


def test_a_few_heavy_users_who_can_never_tell_are_said_to() -> None:
    # By the variance's fall as 1 / n it would be some 3,000 answers; after 12,000 it is still above the plan.
    generator, right = np.random.default_rng(7), 0
    for _ in range(12):
        plan, path = told(generator, 100, heavy=True)
        never = path.variance[-1] > design(0.1).target_variance
        right += (plan.needed is None) == never
        assert plan.needed is not None or plan.users > path.equal[999]
    assert right >= 9, f"{right} of 12"


def test_no_number_is_told_for_users_of_whom_no_look_will_ever_count() -> None:
    # One user in each arm has most of its answers: the variance would do, but they weigh as fewer than ten users.
    told, generator = 0, np.random.default_rng(9)
    for _ in range(10):
        value, unit, candidate = Users("zipf", 1.3, 400, 0.0).draw(generator, 2000, -0.1)
        plan = ahead(value, unit, candidate, 2000)
        told += plan.needed is not None
        assert plan.users >= EQUAL
    assert not told


@pytest.mark.slow
def test_heavy_users_get_the_power_that_was_planned_and_no_more_false_alarms() -> None:
    parts = [
        measure(Users(law, spread, 1600, alike), 100, 31)
        for law, spread in (("zipf", 0.8), ("log-normal", 1.5))
        for alike in (0.0, 0.05)
    ]
    told = sum(part.told for part in parts)
    assert told > 350
    assert 0.76 <= sum(part.seen for part in parts) / told <= 0.88
    assert sum(part.false for part in parts) <= 0.05 * 400


def test_the_report_says_what_its_number_takes_for_granted(capsys: Capture, tmp_path: Path) -> None:
    def line(folder: Path) -> str:
        return " ".join(run_here(capsys, "deploy", "ab", folder).out.split())

    split_log(tmp_path / "alone", 200, right=(0.9, 0.9))
    assert "answers as independent, since no user has two yet" in line(tmp_path / "alone")
    writer, generator = Writer(tmp_path / "alike"), np.random.default_rng(3)
    for number in range(1200):
        arm: Arm = "candidate" if number % 2 else "baseline"
        asked = request(number, unit=f"user {number % 200}", assigned=arm, share=0.5, label="a", answer="a")
        writer.write(asked)
        good = number % 200 < 150 if generator.random() < 0.9 else number % 200 >= 150
        writer.write(Feedback(id=asked.id, time=asked.time + 5, correct=good, by="reviewer"))
    alike = re.search(
        r"the answers of one user are alike: ([0-9.]+) times the variance", line(tmp_path / "alike")
    )
    assert alike and 3 < float(alike[1]) < 6
    Writer(tmp_path / "none").write(request(1, assigned="candidate"))
    Writer(tmp_path / "none").write(request(2))
    assert "how many answers that takes is not known" in line(tmp_path / "none")


def test_the_report_says_what_more_answers_of_the_same_users_cannot_do(
    capsys: Capture, tmp_path: Path
) -> None:
    writer, generator = Writer(tmp_path), np.random.default_rng(2)
    for number in range(900):
        user = number % 64 if number % 3 else number % 2  # two users ask for a third of everything
        arm: Arm = "candidate" if user % 2 else "baseline"
        good = bool(generator.random() < (0.9 if user % 7 else 0.1))
        line = request(number, unit=f"user {user}", assigned=arm, share=0.5, label="a", answer="a")
        writer.write(line)
        writer.write(Feedback(id=line.id, time=line.time + 5, correct=good, by="reviewer"))
    done = run_here(capsys, "deploy", "ab", tmp_path, "--effect", "0.02")
    assert done.code == 1
    assert "more answers of the same users hardly get there" in " ".join(done.out.split())


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_sequence_is_tightest_where_it_was_planned_to_be(alpha: float) -> None:
    """Against the plan's own mixing, other mixings are wider at the planned variance."""
    planned = design(0.05, alpha=alpha)
    v = planned.target_variance

    def radius(mixing: float) -> float:
        return math.sqrt(v * (v + mixing) / mixing * math.log((v + mixing) / (v * alpha**2)))

    assert radius(planned.mixing) < min(radius(planned.mixing * f) for f in (0.5, 0.8, 1.25, 2.0))


def test_free_text_is_compared_by_the_case_s_metric() -> None:
    lines, feedback = [], {}
    for number in range(80):
        arm = "candidate" if number % 2 else "baseline"
        answer = "the rent is due on monday" if arm == "baseline" else "the rent is due"
        lines.append(request(number, assigned=arm, answer=answer))
        feedback[f"r{number}"] = Feedback(
            id=f"r{number}", time=number, correction="the rent is due on monday"
        )
    asked = gather(lines)
    plain = by_assignment(asked, feedback, Task(), [0] * len(asked))["quality"]
    assert plain.raw["candidate"].mean() == 0
    graded = by_assignment(asked, feedback, Task(metric="rouge_l"), [0] * len(asked))["quality"]
    assert graded.raw["baseline"].mean() == 1 and graded.raw["candidate"].mean() == pytest.approx(8 / 10)


def test_a_correction_that_the_metric_cannot_score_is_compared_as_it_is_written() -> None:
    """Under json_f1 a correction that is no JSON object ended `ab` in an internal error."""
    asked = gather(
        [request(0, assigned="baseline", answer="low"), request(1, assigned="candidate", answer="{}")]
    )
    feedback = {f"r{n}": Feedback(id=f"r{n}", time=n, correction="low") for n in (0, 1)}
    found = by_assignment(asked, feedback, Task(metric="json_f1"), [0, 0])["quality"]
    assert list(found.raw["baseline"]) == [1.0] and list(found.raw["candidate"]) == [0.0]
