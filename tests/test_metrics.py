"""The metrics: each named one is computed, told apart from nothing, and bounded; gates say when nobody can tell."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from bench.quality import judge as bench_quality
from unshot.case import TaskSettings
from unshot.case_file import keys
from unshot.contracts.task import Task, derive_task
from unshot.data.rows import Example
from unshot.errors import InputError
from unshot.metrics import f1, intervals, registry
from unshot.metrics.answers import INVALID, Answers, Tools, parse_answer
from unshot.metrics.quality import FAILED, INCONCLUSIVE, PASSED, against_target, compare
from unshot.metrics.registry import METRICS, NAMES
from unshot.metrics.scores import all_scores, score, score_difference, score_interval, value_of

WORDS = [
    "the tenant pays the deposit",
    "either side may end the lease",
    "rent is due in advance",
    "no pets at all",
]


class Agreeable:
    """A judge that finds the longer answer better, whatever the order."""

    name = "agreeable"

    def ask(self, messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        first, second = (text.split(f"[Answer {n}]\n")[1].split("\n\n")[0] for n in "AB")
        return "TIE" if len(first) == len(second) else "A" if len(first) > len(second) else "B"

    def close(self) -> None:
        pass


def rows(answers: list[str]) -> list[Example]:
    return [Example(({"role": "user", "content": f"q {i}"},), a, i + 1) for i, a in enumerate(answers)]


def sample(name: str, count: int = 40) -> tuple[Answers, list[str]]:
    """References of a kind that fits the metric, answered rightly; and answers of which half are wrong."""
    if name in ("macro_f1", "accuracy"):
        truth = [("yes", "no", "late")[i % 3] for i in range(count)]
        return Answers(truth, list(truth), ["late", "no", "yes"]), [
            t if i % 2 else "late" for i, t in enumerate(truth)
        ]
    if name == "json_f1":
        truth = [json.dumps({"id": i, "unit": "EUR"}) for i in range(count)]
        return Answers(truth, list(truth)), [t if i % 2 else '{"id": -1}' for i, t in enumerate(truth)]
    truth = [f"{WORDS[i % 4]} number {i}" for i in range(count)]
    return Answers(truth, list(truth), tools=Tools(Agreeable())), [
        t if i % 2 else "no" for i, t in enumerate(truth)
    ]


LOCAL = [name for name in NAMES if name != "bertscore"]


@pytest.mark.parametrize("name", LOCAL)
def test_every_metric_is_computed_bounded_and_compared(name: str) -> None:
    perfect, half = sample(name)
    assert value_of(name, perfect) == pytest.approx(1.0)
    worse = perfect.with_answers(half)
    found = score_interval(name, worse)
    assert 0 < found.low < found.value < found.high < 1
    assert found.value == pytest.approx(value_of(name, worse))
    difference = score_difference(name, perfect, worse)
    assert difference.value == pytest.approx(value_of(name, worse) - 1) and difference.high < 0
    assert compare(name, perfect, worse, 0.02).verdict == FAILED
    # No answer is a wrong answer.
    silent = perfect.with_answers([None] * len(perfect))
    assert value_of(name, silent) == 0
    assert score_interval(name, perfect).low < 1, "no few right rows are certain"


def test_bertscore_is_a_metric_like_the_others(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no embedder"):
        value_of("bertscore", Answers(["a"], ["b"], tools=Tools(None, "off")))
    with pytest.raises(InputError, match="no embedder"):
        derive_task(TaskSettings(metric="bertscore"), rows(WORDS * 3), embedder="off")


def test_the_names_come_from_the_registry_alone() -> None:
    assert set(keys()["task.metric"].accepted()) == set(NAMES) == set(METRICS)
    assert set(get_args(registry.MetricName)) == set(NAMES)
    for name in ("banana", "f1", "rougel", ""):
        with pytest.raises(InputError, match="unknown metric"):
            score(name, ["a"], ["a"])
    docs = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert registry.table() in docs, "write unshot.metrics.registry.table() into docs/evaluation.md"


def test_rouge_is_not_zero_where_the_texts_are_alike() -> None:
    truth = [f"{w} and more of it" for w in WORDS] * 10
    given = [t.replace(" of it", "") for t in truth]
    task = Task(metric="rouge_l")
    assert (
        task.scores(truth, given).score == pytest.approx(score("rouge_l", truth, given))
        and score("rouge_l", truth, given) > 0.8
    )
    with pytest.raises(InputError, match="no word of a-z"):
        derive_task(TaskSettings(metric="rouge_l"), rows(["合同到期", "租金提前付"] * 4))


@pytest.mark.parametrize(
    ("baseline", "candidate", "why"),
    [
        (lambda t: f"{t}.", lambda t: "asdf", "cannot tell"),
        (lambda t: f"The answer is {t}.", lambda t: t if t == "no" else "yes", "cannot tell"),
        (lambda t: "yes", lambda t: "yes", "one answer to every row"),
        (lambda t: "yes", lambda t: "no", "one answer to every row"),
        (lambda t: "asdf", lambda t: t, "nothing right"),
    ],
)
@pytest.mark.parametrize("metric", ["macro_f1", "accuracy", "exact_match"])
def test_the_gate_is_inconclusive_where_the_metric_cannot_tell(baseline, candidate, why, metric) -> None:  # type: ignore[no-untyped-def]
    truth = [("yes", "no", "late")[i % 3] for i in range(60)]
    task = Task(labels=["yes", "no", "late"], metric=metric)
    found = bench_quality(
        task, truth, [baseline(t) for t in truth], [candidate(t) for t in truth], margin=0.02
    )
    assert found.gate == INCONCLUSIVE and why in found.why, found.why


def test_a_baseline_off_by_a_full_stop_now_and_then_is_not_a_weak_one() -> None:
    truth = [("yes", "no")[i % 2] for i in range(200)]
    task = Task(labels=["yes", "no"], metric="accuracy")
    baseline = [t if i % 10 < 7 else f"{t}." for i, t in enumerate(truth)]
    candidate = [t if i % 10 < 8 else {"yes": "no", "no": "yes"}[t] for i, t in enumerate(truth)]
    found = compare("accuracy", task.answers(truth, baseline), task.answers(truth, candidate), 0.02)
    assert found.verdict == INCONCLUSIVE and "wrong only by form" in found.why
    good = compare("accuracy", task.answers(truth, baseline), task.answers(truth, truth), 0.02)
    assert good.verdict == PASSED


def test_one_class_is_nothing_to_tell() -> None:
    task = Task(labels=["USD", "EUR"], metric="macro_f1")
    truth = ["USD"] * 50
    assert bench_quality(task, truth, truth, truth, margin=0.02).gate == INCONCLUSIVE
    verdict, why = against_target(task.scores(truth, truth), 0.8)
    assert verdict == INCONCLUSIVE and "every reference is 'USD'" in why


def test_gates_go_by_the_bound() -> None:
    task = Task(labels=["yes", "no"], metric="accuracy")
    truth = ["yes", "no"] * 4
    few = task.scores(truth, truth)
    assert few.score == 1 and few.low < 0.75 and few.caution
    assert against_target(few, 0.9)[0] == INCONCLUSIVE
    many = ["yes", "no"] * 60
    assert against_target(task.scores(many, many), 0.9)[0] == PASSED
    assert against_target(task.scores(many, many[1:] + many[:1]), 0.9)[0] == FAILED
    # Equal answers on few rows do not show that nothing is lost within 0.02; on enough of them they do.
    for count, verdict in ((20, INCONCLUSIVE), (60, INCONCLUSIVE), (150, PASSED)):
        rows = (["yes", "no"] * count)[:count]
        mostly = [t if i % 10 else {"yes": "no", "no": "yes"}[t] for i, t in enumerate(rows)]
        sides = [task.answers(rows, mostly) for _ in range(2)]
        assert compare("accuracy", *sides, 0.02).verdict == verdict


def test_unanswered_rows_are_wrong_even_if_nothing_was_expected() -> None:
    for name in ("accuracy", "exact_match"):
        assert score(name, ["", "a"], [None, "a"]) == 0.5
    assert Task(labels=["a", "b"]).scores(["a", "b"], ["a", None]).accuracy == 0.5


def test_labels_differ_by_case_if_both_are_there_and_not_by_unicode_form() -> None:
    labels = ["US", "us", "Café"]
    assert [parse_answer(t, labels=labels) for t in ("US", "us", "Us", "CAFÉ")] == [
        "US",
        "us",
        INVALID,
        "Café",
    ]
    for form in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            label, text = unicodedata.normalize(form, "Café"), unicodedata.normalize(other, " Café\n")
            assert parse_answer(text, labels=[label]) == label
            assert score("exact_match", [label], [text]) == 1
            assert score("json_f1", [json.dumps({"a": label})], [json.dumps({"a": text})]) == 1
    assert score("accuracy", ["US", "us"], ["us", "US"], labels=["US", "us"]) == 0
    truth = ["Café", unicodedata.normalize("NFD", "Café"), "Tee", "Tee"]
    assert derive_task(TaskSettings(), rows(truth)).labels == ["Café", "Tee"]


def test_a_json_task_is_scored_on_all_fields_and_says_so() -> None:
    invoices = [json.dumps({"currency": "USD", "total": i, "supplier": f"s{i % 7}"}) for i in range(40)]
    said: list[str] = []
    task = derive_task(TaskSettings(), rows(invoices), said.append)
    assert (task.metric, task.answer_field, task.labels) == ("json_f1", None, None)
    assert any("--answer-field" in line for line in said) and any("--metric" in line for line in said)
    constant = [json.dumps({"currency": "USD", "total": -1, "supplier": "?"})] * 40
    found = task.scores(invoices, constant)
    assert found.score == pytest.approx(1 / 3) and found.high < 0.5
    assert against_target(found, 0.9)[0] == FAILED
    named = derive_task(TaskSettings(answer_field="supplier"), rows(invoices))
    assert named.metric == "macro_f1" and len(named.labels or []) == 7
    with pytest.raises(InputError, match="every reference is 'USD'"):
        derive_task(TaskSettings(answer_field="currency", metric="macro_f1"), rows(invoices))
    with pytest.raises(InputError, match="--answer-field"):
        derive_task(TaskSettings(metric="macro_f1"), rows(invoices))
    only = derive_task(
        TaskSettings(), rows([json.dumps({"risk": r}) for r in ("low", "high") * 6]), said.append
    )
    assert only.answer_field == "risk" and any("the only field" in line for line in said)


def test_a_constant_is_never_the_metric() -> None:
    said: list[str] = []
    task = derive_task(TaskSettings(), rows(["USD"] * 30), said.append)
    assert (
        task.labels is None and task.metric == "exact_match" and any("no metric can tell" in s for s in said)
    )
    with pytest.raises(InputError, match="nothing to tell apart"):
        derive_task(TaskSettings(metric="accuracy"), rows(["USD"] * 30))


def test_an_unreadable_judge_widens_the_bounds_instead_of_deciding() -> None:
    class Fickle(Agreeable):
        def ask(self, messages: list[dict[str, str]]) -> str:
            return "A"

    truth = [f"reference {i}" for i in range(40)]
    given = [t if i % 2 else "other" for i, t in enumerate(truth)]
    found = all_scores("judge", Answers(truth, list(given), tools=Tools(Fickle())))
    assert found.score == 1 and found.low < 0.66 and "unscored" in found.method
    with pytest.raises(InputError, match="no judge"):
        value_of("judge", Answers(truth, list(given)))


def population(classes: int, right: float) -> np.ndarray:
    chances = np.full((classes, classes + 1), (1 - right) / (classes - 1))
    chances[:, classes] = 0
    np.fill_diagonal(chances, right)
    return chances


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "per_class"), [(2, 5), (3, 2), (6, 6), (77, 1), (77, 3)])
@pytest.mark.parametrize("right", [0.5, 0.8, 0.98])
def test_the_interval_of_macro_f1_holds_the_truth(classes: int, per_class: int, right: float) -> None:
    generator = np.random.default_rng([classes, per_class, int(100 * right)])
    truth = np.repeat(np.arange(classes), per_class)
    cumulative = population(classes, right).cumsum(axis=1)
    trials = 120
    held = 0
    for trial in range(trials):
        guess = (generator.random(len(truth))[:, None] > cumulative[truth]).sum(axis=1)
        found = f1.macro_f1(truth, guess, classes, draws=200, seed=trial)
        assert found.high > found.low
        held += found.low <= right <= found.high
    assert held / trials >= 0.88  # within what 120 trials tell; 2,000 stand in docs/evaluation.md


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 10, 35, 200])
@pytest.mark.parametrize("right", [0.5, 0.8, 0.98])
def test_the_intervals_of_shares_means_and_differences_hold_the_truth(count: int, right: float) -> None:
    generator = np.random.default_rng([count, int(100 * right)])
    held = np.zeros(3)
    trials = 400
    for _ in range(trials):
        yes = (generator.random(count) < right).astype(float)
        graded = generator.beta(right * 3, (1 - right) * 3, count)
        other = np.where(generator.random(count) < 0.2, generator.random(count) < right, yes)
        change = intervals.paired(float((other - yes).mean()), other - yes)
        each = intervals.mean(yes), intervals.mean(graded), change
        held += [f.low <= value <= f.high for f, value in zip(each, (right, right, 0.0), strict=True)]
        assert all(f.high > f.low for f in each)
    assert (held / trials >= 0.92).all(), held / trials


def test_a_score_that_a_constant_answer_reaches_meets_no_target() -> None:
    """`currency` is USD in every invoice: an answer that knows nothing else has half of the fields right."""
    references = [json.dumps({"currency": "USD", "total": n}) for n in range(60)]
    wrong = [json.dumps({"total": -n, "currency": "USD"}) for n in range(1, 61)]
    scores = all_scores("json_f1", Answers(references, wrong))
    assert scores.score == 0.5 and against_target(scores, 0.3)[0] == "inconclusive"
    assert against_target(scores, 0.9)[0] == "failed"
    right = all_scores("json_f1", Answers(references, references))
    assert right.cannot_tell is None and against_target(right, 0.8)[0] == "passed"


def test_a_constant_object_in_two_spellings_is_still_a_constant() -> None:
    references = [('{"a": "x", "b": 1}', '{"b":1,"a":"x"}')[n % 2] for n in range(80)]
    given = [('{"b": 1, "a": "x"}', '{"a":"x","b":1.0}')[n % 2] for n in range(80)]
    scores = all_scores("json_f1", Answers(references, given))
    assert scores.score == 1.0 and against_target(scores, 0.5)[0] == "inconclusive"
