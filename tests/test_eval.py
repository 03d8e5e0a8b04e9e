"""`unshot eval`: scores equal to scikit-learn and rouge-score, readings on record, two runs compared."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Run
from tests.test_judge import Server, longer, serve
from tune.evaluate.scores import compare, figures
from unshot.contracts.manifest import read_manifest
from unshot.contracts.task import Task
from unshot.metrics.intervals import mcnemar
from unshot.metrics.rouge import KINDS, rouge

__all__ = ["serve"]  # a fixture
LABELS = ["high", "low", "medium", "none"]


def answers(seed: int, rows: int = 120, right: float = 0.6) -> tuple[list[str], list[str]]:
    chance = random.Random(seed)
    truth = [chance.choice(LABELS[:3]) for _ in range(rows)]
    return truth, [t if chance.random() < right else chance.choice([*LABELS, "what?"]) for t in truth]


def test_class_scores_equal_scikit_learn() -> None:
    from sklearn import metrics

    truth, given = answers(1)
    task = Task(labels=LABELS, metric="macro_f1")
    result = figures(task, task.answers(truth, given))
    assert result.classes is not None and result.macro_f1 is not None and result.confusion is not None
    p, r, f, n = metrics.precision_recall_fscore_support(truth, given, labels=LABELS, zero_division=0)
    for i, label in enumerate(LABELS):
        row = result.classes[label]
        assert (row.precision.value, row.recall.value, row.f1.value) == pytest.approx(
            (p[i], r[i], f[i]), abs=1e-6
        )
        assert row.support == n[i]
    present = sorted(set(truth))
    expected = metrics.f1_score(truth, given, labels=present, average="macro", zero_division=0)
    assert result.macro_f1.value == pytest.approx(expected, abs=1e-6)
    assert result.accuracy.value == pytest.approx(metrics.accuracy_score(truth, given), abs=1e-6)
    table = metrics.confusion_matrix(
        truth, [g if g in LABELS else "(invalid)" for g in given], labels=[*LABELS, "(invalid)"]
    )
    assert np.array_equal(result.confusion.counts, table[:4])
    for value in (result.macro_f1, result.accuracy, result.classes["low"].f1):
        assert value.low < value.value < value.high


def test_rouge_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS), use_stemmer=False)
    chance = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]
    texts = ["", "The tenant's deposit (EUR 1,000) is due.", "na\u00efve caf\u00e9!", "a a a b"]
    texts += [" ".join(chance.choices(words, k=chance.randint(1, 30))) for _ in range(30)]
    for truth in texts:
        for answer in texts:
            theirs = scorer.score(truth, answer)
            assert rouge(truth, answer) == pytest.approx({k: theirs[k].fmeasure for k in KINDS}, abs=1e-6)


def test_json_answers_are_scored_field_by_field() -> None:
    truth = [
        '{"risk": "high", "days": 3}',
        '{"risk": "low", "days": 5}',
        '{"risk": "low", "days": 1}',
        '{"risk": "low", "days": 2}',
    ]
    given = [
        '{"risk": "high", "days": 3.0}',
        '{"risk": "high"}',
        "no json",
        '```json\n{"risk": "low", "days": "2"}\n```',
    ]
    task = Task(labels=["high", "low"], answer_field="risk")
    result = figures(task, task.answers(truth, given))
    assert result.json is not None
    assert result.json.valid.value == 0.75 and result.json.schema.value == 0.25
    assert result.json.fields["risk"].precision == pytest.approx(2 / 3)
    assert result.json.fields["risk"].recall == 0.5
    assert result.json.fields["days"].f1.value == pytest.approx(2 / 6)
    assert result.invalid == 0.25


def test_mcnemar_is_the_exact_binomial_test_and_differences_are_paired() -> None:
    from scipy.stats import binomtest

    for b, c in ((0, 0), (1, 5), (10, 12), (300, 220)):
        expected = binomtest(min(b, c), b + c).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, abs=1e-9)
    task = Task(labels=LABELS, metric="macro_f1")
    truth, weak = answers(1, 300, 0.3)
    strong = [
        t if random.Random(i).random() < 0.8 else w for i, (t, w) in enumerate(zip(truth, weak, strict=True))
    ]
    same = compare(task, task.answers(truth, weak), task.answers(truth, weak))
    assert same.mcnemar_p == 1 and same.macro_f1 is not None and same.macro_f1.p == 1
    # No row differs: the difference is bounded, not shown to be 0.
    assert same.score.difference.low < 0 < same.score.difference.high
    better = compare(task, task.answers(truth, weak), task.answers(truth, strong))
    assert better.mcnemar_p < 1e-6 and better.accuracy.p < 0.01
    assert better.macro_f1 is not None and better.macro_f1.difference.low > 0.2


@pytest.fixture(scope="module")
def runs(
    unshot: Run, tiny_model: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two runs of the tiny model with different ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rank in (("one", "2"), ("two", "4")):
        done = unshot(
            "tune", small_data, "--base", tiny_model, "--out", folder / name, "--epochs", "1", "--rank", rank, "-q",
            "--instruction", "Classify the clause.", "--no-gates",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return [folder / "one", folder / "two"]


def test_the_scores_are_tune_s_own_and_each_reading_is_recorded(unshot: Run, runs: list[Path]) -> None:
    first, second = (unshot("eval", runs[0], "--json") for _ in range(2))
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    tuned = json.loads((runs[0] / "metrics.json").read_text())["test"]
    assert result["accuracy"]["value"] == pytest.approx(tuned["accuracy"], abs=1e-9)
    assert result["macro_f1"]["value"] == pytest.approx(tuned["macro_f1"], abs=1e-9)
    assert result["reading"]["reading"] == 2 and json.loads(second.stdout)["reading"]["reading"] == 3
    assert "reading 3" in second.stderr
    assert len((runs[0] / "readings.jsonl").read_text().splitlines()) == 2
    read_manifest(runs[0], stage="tune")  # the run's hashes still hold


def test_two_runs_on_rows_of_one_s_own_and_rows_like_training_are_listed(
    unshot: Run, runs: list[Path], tmp_path: Path
) -> None:
    train = [json.loads(line) for line in (runs[0] / "splits" / "train.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (runs[0] / "splits" / "test.jsonl").read_text().splitlines()]
    known = train[0]
    known["messages"][-2]["content"] += " Thanks!"
    rows = [known, *test]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    done = unshot(
        "eval", runs[0], "--compare", runs[1], "--data", data, "--out", tmp_path / "out", "--json", "-q"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [s["line"] for s in result["like_training"]] == [1] and result["like_training"][0][
        "train_line"
    ] == 1
    assert result["without_like_training"]["rows"] == len(rows) - 1
    assert result["reading"]["reading"] == 1
    pair = result["comparison"]
    assert pair["rows"] == len(rows) and pair["accuracy"]["difference"]["value"] == pytest.approx(
        result["other"]["accuracy"]["value"] - result["accuracy"]["value"]
    )
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == len(rows)
    read_manifest(tmp_path / "out", stage="eval")
    table = unshot("eval", runs[0], "--compare", runs[1], "-q")
    assert table.returncode == 0 and "McNemar" in table.stdout, table.stderr


@pytest.mark.slow
def test_a_metric_by_name_and_a_judge_score_a_run(
    unshot: Run, runs: list[Path], serve: Callable[..., Server]
) -> None:
    done = unshot("eval", runs[0], "--metric", "rouge_l", "--json", "-q")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metric"] == "rouge_l" and result["score"]["low"] < result["score"]["high"]
    none = unshot("eval", runs[0], "--metric", "judge", "--json", "-q")
    assert none.returncode == 2 and "--judge" in none.stderr
    server = serve(longer)
    judged = unshot(
        "eval", runs[0], "--metric", "judge", "--judge", server.url, "--judge-model", "m", "--json", "-q"
    )
    assert judged.returncode == 0, judged.stderr
    assert json.loads(judged.stdout)["metric"] == "judge" and server.asked
    unknown = unshot("eval", runs[0], "--metric", "banana")
    assert unknown.returncode == 2 and "banana" in unknown.stderr


def test_rows_of_another_task_are_refused_before_they_are_read(
    unshot: Run, runs: list[Path], tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "x", "completion": "purple"}\n')
    before = (runs[1] / "readings.jsonl").read_text() if (runs[1] / "readings.jsonl").exists() else ""
    done = unshot("eval", runs[1], "--data", data)
    assert done.returncode == 2 and "line 1" in done.stderr and "purple" in done.stderr
    after = (runs[1] / "readings.jsonl").read_text() if (runs[1] / "readings.jsonl").exists() else ""
    assert before == after


def test_answers_are_held_to_the_case_s_schema(tmp_path: Path) -> None:
    from unshot.case import TaskSettings as Section
    from unshot.contracts.task import derive_task
    from unshot.data.rows import Example
    from unshot.errors import InputError

    path = tmp_path / "answer.schema.json"
    path.write_text(
        json.dumps(
            {
                "type": "object",
                "required": ["days"],
                "properties": {"days": {"type": "integer", "minimum": 1}},
            }
        )
    )
    rows = [
        Example(({"role": "user", "content": f"q {i}"},), json.dumps({"days": i + 1}), i) for i in range(12)
    ]
    task = derive_task(Section(answer_schema=path, metric="exact_match"), rows)
    truth = [r.answer or "" for r in rows[:4]]
    given = ['{"days": 9}', '{"days": 0}', '{"days": "3"}', '{"days": 4, "more": 1}']
    found = figures(task, task.answers(truth, given)).json
    assert found is not None and found.schema.value == 0.5
    with pytest.raises(InputError, match=r"line 12: the answer does not fit .*minimum"):
        bad = Example(({"role": "user", "content": "q"},), '{"days": 0}', 12)
        derive_task(Section(answer_schema=path, metric="exact_match"), [*rows, bad])
    path.write_text('{"type": "objekt"}')
    with pytest.raises(InputError, match="not a JSON schema"):
        derive_task(Section(answer_schema=path), rows)
