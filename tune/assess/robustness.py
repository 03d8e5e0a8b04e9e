"""Whether the model knows the task or the format: the same test rows asked in another form."""

from __future__ import annotations

from collections.abc import Sequence

from tune.evaluate.scores import compare
from tune.split import order
from unshot.contracts.gates import Gate
from unshot.contracts.task import Task
from unshot.data.example import fold
from unshot.data.rows import Example
from unshot.metrics.quality import ERROR
from unshot.metrics.scores import score_difference, score_interval

# Test rows that are asked again; more would only cost time, 0.03 is what 96 rows rule out if no answer changes.
ROWS = 96


def sample(rows: Sequence[Example], seed: int) -> list[int]:
    """Up to `ROWS` indices, the same for the same rows and seed."""
    ranked = sorted(range(len(rows)), key=lambda i: order(seed, fold(rows[i].text)))
    return sorted(ranked[:ROWS])


def robustness(
    task: Task,
    rows: Sequence[Example],
    plain: Sequence[str],
    other: Sequence[str],
    allowed: float,
) -> Gate:
    """The gate: answers to the reformatted rows (`other`) against those to the rows as they are (`plain`).

    By the one-sided 95% bounds of the paired difference: passed if the score falls by no more than `allowed`, failed if
    it falls by more, else undecided (too few rows), and so is a model that answers nothing right.
    """
    truth = [row.answer or "" for row in rows]
    first = task.answers(truth, plain, requests=[row.text for row in rows])
    second = first.with_answers(other)
    found = compare(task, first, second)
    sides = [score_interval(task.metric, answers) for answers in (first, second)]
    bound = score_difference(task.metric, first, second, level=1 - 2 * ERROR)
    passed = True if bound.low >= -allowed else False if bound.high < -allowed else None
    word = {
        True: "no more than the allowed",
        False: "format overfitting: more than the allowed",
        None: "too few rows to tell whether more than the allowed",
    }[passed]
    if sides[0].value <= 0:
        passed, word = None, "nothing right to lose; allowed"
    difference = found.score.difference
    return Gate(
        name="robustness",
        passed=passed,
        detail=(
            f"{len(truth)} test rows asked in another form: {task.metric} {sides[0].value:.3f} as they are, "
            f"{sides[1].value:.3f} reformatted, difference {difference.value:+.3f} [{difference.low:+.3f}, "
            f"{difference.high:+.3f}] ({word} {allowed:g})"
        ),
        figures={
            "rows": len(truth),
            "metric": task.metric,
            "as_they_are": vars(sides[0]),
            "reformatted": vars(sides[1]),
            "difference": vars(difference),
            "mcnemar_p": found.mcnemar_p,
            "allowed_gap": allowed,
        },
    )
