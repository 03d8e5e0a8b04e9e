"""`scores.json` of `unshot eval`: one or two runs' scores on the same rows, with intervals."""

from __future__ import annotations

from typing import ClassVar

from unshot.contracts.document import Document
from unshot.contracts.record import Record
from unshot.data.seal import Seal
from unshot.metrics.intervals import Interval
from unshot.metrics.judge import Judged


class ClassFigures(Record):
    """One class, with intervals, and how many rows are of it."""

    precision: Interval
    recall: Interval
    f1: Interval
    support: int


class Confusion(Record):
    """Counts by class (rows) and answer (columns, the last for anything else)."""

    rows: list[str]
    columns: list[str]
    counts: list[list[int]]


class FieldFigures(Record):
    """One field of JSON answers, or all of them together."""

    precision: float
    recall: float
    f1: Interval


class JsonFigures(Record):
    """Shares of answers that are JSON objects and that fit the schema; the fields; all fields together."""

    valid: Interval
    schema: Interval
    fields: dict[str, FieldFigures]
    micro: FieldFigures


class Bertscore(Record):
    """BERTScore with an embedder's states after a layer, means over the rows."""

    embedder: str
    layer: int
    precision: Interval
    recall: Interval
    f1: Interval


class Figures(Document, kw_only=True, omit_defaults=True):
    """The scores of one system's answers. `score` is the task's `metric`."""

    FILE: ClassVar[str] = "scores.json"
    WRITTEN_BY: ClassVar[str] = "`unshot eval`"

    rows: int
    metric: str
    score: Interval
    accuracy: Interval
    exact_match: Interval
    # Share of answers that state nothing the task knows.
    invalid: float
    # Why the scores say little; None: nothing to say.
    caution: str | None = None
    macro_f1: Interval | None = None
    classes: dict[str, ClassFigures] | None = None
    confusion: Confusion | None = None
    json: JsonFigures | None = None
    rouge: dict[str, Interval] | None = None
    bertscore: Bertscore | None = None


class Reading(Record):
    """One reading of a test: the how manieth, of which data (file, SHA-256), when, and against which run."""

    reading: int
    data: str
    sha256: str
    at: str
    compared_with: str | None = None


class Seen(Record):
    """A test row like a training row (`line` numbers), by text or by meaning."""

    line: int
    train_line: int
    similarity: float
    by: str


class Unseen(Record):
    """The score without the rows that are like training rows."""

    rows: int
    score: Interval


class System(Figures, kw_only=True, omit_defaults=True):
    """One run's scores, and what its test was."""

    run: str
    reading: Reading
    # Readings of the same rows by any run.
    test_seal: Seal
    like_training: list[Seen]
    without_like_training: Unseen | None = None


class Difference(Record):
    """Second run minus first under one metric, and the two-sided p-value of no difference."""

    difference: Interval
    p: float


class Comparison(Record, kw_only=True, omit_defaults=True):
    """Two runs on the same rows; `score` is by the task's metric. McNemar's test is of right and wrong."""

    rows: int
    only_first_right: int
    only_second_right: int
    mcnemar_p: float
    score: Difference
    accuracy: Difference
    macro_f1: Difference | None = None


class Sheet(Record):
    """A sheet drawn for reviewers: where, how many rows, and the review's name."""

    sheet: str
    rows: int
    name: str


class Evaluation(System, kw_only=True, omit_defaults=True):
    """The whole file: the first run's scores at the top, the second run's in `other`."""

    data: str
    other: System | None = None
    comparison: Comparison | None = None
    judge: Judged | None = None
    review: Sheet | None = None
