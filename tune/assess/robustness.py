"""Whether the model knows the task or the format: the same test rows asked in another form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tune.evaluate.scores import Answers, compare
from tune.near import fold
from tune.split import order
from unshot.contracts.gates import Gate
from unshot.contracts.task import Task
from unshot.data.rows import Example

# Test rows that are asked again; more would only cost time, an interval at 96 rows is some 0.06 wide each side.
ROWS = 96


def sample(rows: Sequence[Example], seed: int) -> list[int]:
    """Up to `ROWS` indices, the same for the same rows and seed."""
    ranked = sorted(range(len(rows)), key=lambda i: order(seed, fold(rows[i].text)))
    return sorted(ranked[:ROWS])


def robustness(
    task: Task, truth: Sequence[str], plain: Sequence[str], other: Sequence[str], allowed: float, seed: int
) -> Gate:
    """The gate: answers to the reformatted rows (`other`) against those to the rows as they are (`plain`).

    It fails where the score falls by more than `allowed` and the paired interval lies below 0; a fall that large
    with an interval across 0 leaves it undecided (too few rows), and so does a model that answers nothing right.
    """
    first, second = Answers(task, truth, plain, seed=seed), Answers(task, truth, other, seed=seed)
    found = compare(first, second)
    metric = "macro_f1" if task.metric == "macro_f1" and task.labels else "accuracy"
    difference = found[metric]["difference"]
    gap = -difference.value
    passed: bool | None = True
    word = "no more than"
    if not first.right.any():
        passed, word = None, "nothing right to lose; allowed"
    elif gap > allowed:
        passed = False if difference.high < 0 else None
        word = (
            "format overfitting: more than" if passed is False else "too few rows to tell whether more than"
        )
    figures: dict[str, Any] = {
        "rows": len(truth),
        "metric": metric,
        "as_they_are": vars(first.metric()),
        "reformatted": vars(second.metric()),
        "difference": vars(difference),
        "mcnemar_p": found["mcnemar_p"],
        "allowed_gap": allowed,
    }
    return Gate(
        name="robustness",
        passed=passed,
        detail=(
            f"{len(truth)} test rows asked in another form: {metric} {figures['as_they_are']['value']:.3f} as they "
            f"are, {figures['reformatted']['value']:.3f} reformatted, difference {difference.value:+.3f} "
            f"[{difference.low:+.3f}, {difference.high:+.3f}] ({word} {allowed:g})"
        ),
        figures=figures,
    )
