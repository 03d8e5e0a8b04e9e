"""How often each printed interval holds the truth, by simulation, as Markdown tables for docs/evaluation.md.

Run: python -m tests.benchmarks.bench_interval_coverage [TRIALS]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

from tests.test_metrics import population
from unshot.metrics import f1, intervals
from unshot.metrics.answers import Answers
from unshot.metrics.intervals import Interval
from unshot.metrics.scores import score_difference

ROWS, TRUTHS, CLASSES = (5, 10, 35, 200), (0.5, 0.8, 0.98), (2, 6, 77)
# An interval found in a trial, and the value that it should hold.
Trial = Callable[[np.random.Generator, int, float], tuple[Interval, float]]


def share(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    return intervals.mean((generator.random(rows) < truth).astype(float)), truth


def graded(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    """Rows from a beta distribution that piles up at both ends."""
    return intervals.mean(generator.beta(2 * truth, 2 * (1 - truth), rows)), truth


def half_exact(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    """Rows that are exactly right, or a quarter right on average."""
    exact = generator.random(rows) < (truth - 0.25) / 0.75
    return intervals.mean(np.where(exact, 1.0, generator.beta(1, 3, rows))), truth


def fields(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    """Five JSON fields a row whose chances differ from row to row."""
    own = generator.beta(4 * truth, 4 * (1 - truth), rows)
    return intervals.ratio_of_sums(
        np.stack([2.0 * generator.binomial(5, own), np.full(rows, 10.0)], axis=1)
    ), truth


def sides(generator: np.random.Generator, rows: int, truth: float) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of two systems that differ on a fifth of the rows by chance."""
    first = generator.random(rows) < truth
    return first, np.where(generator.random(rows) < 0.2, generator.random(rows) < truth, first)


def paired_share(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    first, second = sides(generator, rows, truth)
    each = second.astype(float) - first
    return intervals.paired(float(each.mean()), each), 0.0


def paired_graded(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    first = generator.beta(6 * truth, 6 * (1 - truth), rows)
    same = generator.random(rows) < 0.5
    each = np.where(same, 0.0, generator.beta(6 * truth, 6 * (1 - truth), rows) - first)
    return intervals.paired(float(each.mean()), each), 0.0


def paired_macro_f1(generator: np.random.Generator, rows: int, truth: float) -> tuple[Interval, float]:
    """Six classes; the systems differ on a fifth of the rows by chance."""
    classes = [str(i) for i in range(6)]
    labels = generator.integers(0, 6, rows)
    wrong = (labels + generator.integers(1, 6, rows)) % 6
    given = [np.where(right, labels, wrong).astype(str).tolist() for right in sides(generator, rows, truth)]
    first = Answers(labels.astype(str).tolist(), given[0], classes)
    return score_difference("macro_f1", first, first.with_answers(given[1])), 0.0


KINDS: dict[str, Trial] = {
    "share": share,
    "mean, graded": graded,
    "mean, half exact": half_exact,
    "F1 over JSON fields": fields,
    "difference of shares": paired_share,
    "difference of means": paired_graded,
    "difference of macro-F1": paired_macro_f1,
}


def coverage(trial: Trial, rows: int, truth: float, trials: int) -> float:
    generator = np.random.default_rng([rows, int(truth * 1000)])
    held = 0
    for _ in range(trials):
        found, value = trial(generator, rows, truth)
        held += found.low <= value <= found.high
    return held / trials


def macro(classes: int, truth: np.ndarray | int, right: float, trials: int) -> float:
    """Macro-F1 of a system right with one chance in every class, errors alike: its true value is that chance."""
    generator = np.random.default_rng([classes, int(right * 1000)])
    cumulative = population(classes, right).cumsum(axis=1)
    held = 0
    for seed in range(trials):
        labels = generator.integers(0, classes, truth) if isinstance(truth, int) else truth
        guess = (generator.random(len(labels))[:, None] > cumulative[labels]).sum(axis=1)
        found = f1.macro_f1(labels, guess, classes, draws=300, seed=seed)
        held += found.low <= right <= found.high
    return held / trials


def lines(trials: int) -> Iterator[str]:
    yield "| interval | rows | " + " | ".join(f"truth {t:g}" for t in TRUTHS) + " |"
    yield "|---|---|" + "---|" * len(TRUTHS)
    for name, trial in KINDS.items():
        for rows in ROWS:
            cells = " | ".join(f"{coverage(trial, rows, t, trials):.1%}" for t in TRUTHS)
            yield f"| {name} | {rows} | {cells} |"
    for classes in CLASSES:
        for rows in ROWS:
            cells = " | ".join(f"{macro(classes, rows, t, trials):.1%}" for t in TRUTHS)
            yield f"| macro-F1, {classes} classes | {rows} | {cells} |"
    for classes, each in ((3, 2), (77, 1), (77, 2), (77, 3)):
        fixed = np.repeat(np.arange(classes), each)
        cells = " | ".join(f"{macro(classes, fixed, t, trials):.1%}" for t in TRUTHS)
        yield f"| macro-F1, {classes} classes | {each} each | {cells} |"


def main() -> None:
    """Print the tables."""
    for line in lines(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
        print(line, flush=True)


if __name__ == "__main__":
    main()
