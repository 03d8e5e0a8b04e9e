"""Requests of a log put together: what the user was shown, what ran beside it, and what is known to be right."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unshot.case import Case
from unshot.contracts.request_log import Arm, Feedback, Request
from unshot.contracts.task import Task, read_task
from unshot.errors import InputError
from unshot.metrics.answers import INVALID
from unshot.metrics.registry import metric
from unshot.metrics.scores import value_of


@dataclass
class LoggedRequest:
    """One request: all lines that carry its id, by part.

    `tries` are the lines that were meant for the user (the assigned arm's, and the fallback's after it failed),
    `shadows` those that nobody saw.
    """

    id: str
    time: float
    unit: str
    assigned: Arm
    # The candidate's share when the arm was drawn; None where the log did not keep it.
    share: float | None = None
    tries: list[Request] = field(default_factory=list)
    shadows: list[Request] = field(default_factory=list)

    @property
    def shown(self) -> Request | None:
        """The line of the answer that the user got; None where every try failed."""
        good = [r for r in self.tries if r.error is None]
        return next((r for r in reversed(good) if r.fallback), good[-1] if good else None)

    @property
    def fell_back(self) -> bool:
        """Whether another arm than the assigned one had to answer."""
        return any(r.fallback for r in self.tries)

    @property
    def request_fault(self) -> bool:
        """Whether it failed for its own sake, so that it says nothing of an arm."""
        return any(r.request_fault for r in self.tries)

    @property
    def failed(self) -> bool:
        """Whether the assigned arm gave no answer that could be used: an error, a broken schema, a fallback."""
        return self.fell_back or self.shown is None or any(r.schema_ok is False for r in self.tries)

    def answer(self, arm: Arm) -> Request | None:
        """An arm's own answer to this request, shown or not; None where it has none."""
        good = [r for r in (*self.tries, *self.shadows) if r.arm == arm and r.error is None]
        return good[-1] if good else None


def gather(requests: Iterable[Request]) -> list[LoggedRequest]:
    """Requests by id, in the order of arrival. A request that has shadow lines only is left out."""
    found: dict[str, LoggedRequest] = {}
    for line in requests:
        asked = found.setdefault(
            line.id, LoggedRequest(line.id, line.time, line.unit, line.assigned, line.share)
        )
        (asked.shadows if line.shadow else asked.tries).append(line)
        asked.time = min(asked.time, line.time)
    return sorted((a for a in found.values() if a.tries), key=lambda a: (a.time, a.id))


def failed(line: Request) -> bool:
    """Whether an answer is an error or broke the labels or the schema."""
    return line.error is not None or line.schema_ok is False


def find_task(case: Case, path: Path | None) -> Task | None:
    """The task by which corrections are read: `task.json`, or the labels of the case file; None without either."""
    if path is not None:
        own = read_task(path / "task.json" if path.is_dir() else path)
        return own.changed(metric=case.task.metric) if case.task.metric is not None else own
    section = case.task
    if section.labels is None and section.answer_field is None and section.metric is None:
        return None
    return Task(
        name=section.name,
        labels=section.labels,
        answer_field=section.answer_field,
        metric=section.metric or "exact_match",
        judge=section.judge,
        judge_model=section.judge_model,
        judge_key_env=section.judge_key_env,
        embedder=case.tune.embedder,
    )


def stated(text: str, task: Task | None) -> str:
    """The label (or the whole text) that a correction or an answer states.

    With an answer field both the JSON answer and the bare label are understood; `INVALID` where neither fits.
    """
    if task is None:
        return " ".join(text.split())
    label = task.label(text)
    if label == INVALID and task.answer_field is not None:
        return Task(labels=task.labels).label(text) if task.labels else text.strip()
    return label


def said(line: Request, task: Task | None) -> str | None:
    """The label (or the whole text) of an answer; None where the log holds neither."""
    if line.label is not None:
        return line.label
    return stated(line.answer, task) if line.answer is not None else None


def truth(asked: LoggedRequest, feedback: Feedback, task: Task | None) -> str | None:
    """What the right answer is known to be: the correction, or the shown answer where it was called right."""
    if feedback.correction is not None:
        return stated(feedback.correction, task)
    if feedback.correct and asked.shown is not None:
        return said(asked.shown, task)
    return None


def same(answer: str, known: str, task: Task | None) -> bool:
    """Whether two answers say the same: a task's labels are told apart as they are spelt, free texts but for case."""
    return answer == known or (task is None and answer.casefold() == known.casefold())


def is_graded(task: Task | None) -> bool:
    """Whether answers are scored by degrees: free text or JSON under a metric that scores one answer at a time."""
    if task is None or task.labels is not None or task.answer_field is not None:
        return False
    return task.metric not in ("accuracy", "exact_match") and metric(task.metric).form != "macro_f1"


def grade(answer: str | None, correction: str | None, task: Task | None) -> float | None:
    """The score of one answer against its correction under the task's metric; None if there is no such score."""
    if task is None or not is_graded(task) or answer is None or correction is None:
        return None
    answers = task.answers([correction], [answer])
    # A correction that the metric cannot score (no JSON object for json_f1) grades nothing.
    return None if metric(task.metric).problem(answers) else value_of(task.metric, answers)


def right(asked: LoggedRequest, feedback: Feedback, task: Task | None) -> bool | None:
    """Whether the shown answer was right; None where the feedback does not tell, or nothing was shown.

    A correction counts above `correct`: it is compared with what was shown. Where the log holds neither label nor
    answer, a correction means that the answer was wrong, unless `correct` says otherwise.
    """
    if asked.shown is None:
        return None
    shown = said(asked.shown, task)
    if feedback.correction is not None and shown is not None:
        return same(shown, stated(feedback.correction, task), task)
    if feedback.correct is not None:
        return feedback.correct
    return False if feedback.correction is not None else None


def choose(feedback: Mapping[str, Feedback], by: Collection[str]) -> dict[str, Feedback]:
    """Feedback of the given sources only (all where `by` is empty). Raises `InputError` where none is left."""
    if not by:
        return dict(feedback)
    kept = {k: f for k, f in feedback.items() if f.by in by}
    if not kept:
        known = ", ".join(sorted({f.by for f in feedback.values()})) or "none at all"
        raise InputError(f"no feedback by {', '.join(sorted(by))} in the log; there is: {known}")
    return kept
