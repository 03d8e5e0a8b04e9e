"""The quality gates: a score against a target, and a candidate's score against a baseline's on the same rows.

Both go by the bound of an interval, not by the point, and both may end `inconclusive`: too few rows, or answers on
which the metric cannot tell a good system from a bad one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unshot.data.example import normal
from unshot.metrics.answers import INVALID, Answers, json_object
from unshot.metrics.intervals import Interval
from unshot.metrics.scores import Scores, doubts, floor, score_difference, score_interval, value_of

Verdict = Literal["passed", "failed", "inconclusive"]
PASSED: Literal["passed"] = "passed"
FAILED: Literal["failed"] = "failed"
INCONCLUSIVE: Literal["inconclusive"] = "inconclusive"
# One-sided error of the gate: the bound is that of a two-sided interval at 1 - 2 times this.
ERROR = 0.05


@dataclass(frozen=True)
class Comparison:
    """Candidate minus baseline, its one-sided lower bound, the gate's verdict and the reason in words."""

    difference: Interval
    lower_bound: float
    verdict: Verdict
    why: str


def against_target(scores: Scores, target: float) -> tuple[Verdict, str]:
    """Whether a score reaches `target`, and why: passed if its whole interval does, failed if none of it does."""
    if scores.high < target:
        return FAILED, f"the whole interval is below the target {target:g}"
    if scores.cannot_tell:
        return INCONCLUSIVE, f"{scores.metric} cannot tell: {scores.cannot_tell}"
    if scores.low >= target:
        return PASSED, f"the whole interval is at or above the target {target:g}"
    return INCONCLUSIVE, f"{scores.rows} rows are too few: the interval holds the target {target:g}"


def compare(name: str, baseline: Answers, candidate: Answers, margin: float, *, seed: int = 0) -> Comparison:
    """Non-inferiority of the candidate by `margin`, at one-sided 95%.

    Passed if the lower bound of the difference is at or above -margin, failed if its upper bound is below it, else
    inconclusive. It is inconclusive too if the metric cannot tell: one reference for all rows, both sides no better
    than a constant answer, a baseline without any right answer, or a baseline whose answers are wrong only by form
    (a full stop, words around the label), so that the candidate would not pass if they counted as right.
    """
    wide = score_difference(name, baseline, candidate)
    found = score_difference(name, baseline, candidate, level=1 - 2 * ERROR)
    if found.high < -margin:
        return Comparison(
            wide, found.low, FAILED, f"the candidate is worse by more than the margin {margin:g}"
        )
    if doubt := cannot_tell(name, baseline, candidate, margin, seed=seed):
        return Comparison(wide, found.low, INCONCLUSIVE, doubt)
    if found.low >= -margin:
        return Comparison(
            wide, found.low, PASSED, f"at most {max(0.0, -found.low):.3f} worse, margin {margin:g}"
        )
    return Comparison(
        wide,
        found.low,
        INCONCLUSIVE,
        f"{len(baseline)} rows are too few: up to {-found.low:.3f} worse is not ruled out, margin {margin:g}",
    )


def cannot_tell(
    name: str, baseline: Answers, candidate: Answers, margin: float, *, seed: int = 0
) -> str | None:
    """Why the metric cannot tell whether the candidate is as good as the baseline; None if it can."""
    if len(set(baseline.truth)) == 1 and len(baseline) > 1:
        return f"{name} cannot tell: {doubts(baseline)[0]}"
    if doubts(baseline) and doubts(candidate):
        return f"{name} cannot tell: both sides give one answer to every row"
    least = floor(name, baseline)
    sides = [score_interval(name, side, seed=seed) for side in (baseline, candidate)]
    form = misread(baseline)
    hint = f" ({form.sum()} of its answers are wrong only by form)" if form.any() else ""
    if all(side.low <= least + 1e-9 for side in sides):
        return (
            f"{name} cannot tell: neither side ({sides[0].value:.3f}, {sides[1].value:.3f}) is above what a constant "
            f"answer scores ({least:.3f}); look at the baseline's answers{hint}"
        )
    if sides[0].value <= 1e-9:
        return (
            f"{name} cannot tell: the baseline has nothing right; look at its answers, the metric may misread "
            f"them{hint}"
        )
    if form.any():
        forgiven = baseline.with_answers(
            [r if fine else g for r, g, fine in zip(baseline.references, baseline.given, form, strict=True)]
        )
        if score_difference(name, forgiven, candidate, level=1 - 2 * ERROR).low < -margin:
            return (
                f"{name} may misread the baseline: {form.sum()} of its {len(baseline)} answers are wrong only by form "
                f"(as {_example(baseline, form)}); with them it scores {value_of(name, forgiven):.3f}"
            )
    return None


def misread(answers: Answers) -> np.ndarray:
    """Answers that are wrong by form alone, bool of shape `(rows,)`: other punctuation or case, words around the label.

    Only of answers that can be right or wrong: labels, whole texts, JSON objects inside other text.
    """
    found = np.zeros(len(answers), dtype=bool)
    labels = answers.labels or (answers.classes if len(answers.classes) <= 200 else [])
    for row, (reference, given) in enumerate(zip(answers.references, answers.given, strict=True)):
        if given is None or answers.right[row]:
            continue
        if json_object(reference) is not None:
            inner = re.search(r"\{.*\}", given, flags=re.DOTALL)
            again = inner is not None and inner[0].strip() != given.strip()
            found[row] = again and bool(answers.subset([row]).with_answers([inner[0]]).right[0])  # type: ignore[index]
            continue
        truth = answers.truth[row]
        if truth == INVALID:
            continue
        if _plain(given) == _plain(truth):
            found[row] = True
        elif labels:
            named = {label for label in labels if _names(given, label)}
            # A label within another (`late`, `late fee`) counts as the longer one.
            named = {n for n in named if not any(n != m and _plain(n) in _plain(m) for m in named)}
            found[row] = named == {truth}
    return found


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", normal(text).casefold()))


def _names(text: str, label: str) -> bool:
    return bool(_plain(label)) and f" {_plain(label)} " in f" {_plain(text)} "


def _example(answers: Answers, form: Sequence[bool] | np.ndarray) -> str:
    row = int(np.flatnonzero(form)[0])
    return f"{answers.given[row]!r:.60} for {answers.references[row]!r:.60}"
