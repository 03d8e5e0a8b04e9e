"""The metrics: one entry each, from which the command line, the case file, `unshot init` and the docs take their names.

To add a metric, add an entry to `METRICS` below; nothing else. Its function gets the answers and returns a row of
figures for each of them; `form` says what the figures are and so how value, interval and paired difference are drawn
(`unshot.metrics.scores`). Imports nothing heavy: the command line's help reads the names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unshot.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np

    from unshot.metrics.answers import Answers

# `mean`: a figure in [0, 1] a row, shape `(rows,)`, NaN where it cannot be had. `ratio`: part and whole of each row,
# shape `(rows, 2)`, of which the sums' ratio is the score. `macro_f1`: codes of class and answer, shape `(rows, 2)`.
Form = Literal["mean", "ratio", "macro_f1"]
Need = Literal["classes", "json", "embedder", "judge"]


@dataclass(frozen=True)
class Metric:
    """A score from 0 to 1 of answers against references, higher is better.

    `constants` is of how many constant answers the best is taken for what can be had without knowing anything.
    """

    name: str
    help: str
    form: Form
    rows: Callable[[Answers], np.ndarray]
    needs: tuple[Need, ...] = ()
    # Name in the metadata of the Hugging Face hub.
    hub: str | None = None
    constants: int = 20
    # Why it cannot be computed on these references, and why it would tell nothing on them; None: it can, it would.
    problem: Callable[[Answers], str | None] = lambda answers: None
    blind: Callable[[Answers], str | None] = lambda answers: None

    def of(self, answers: Answers) -> np.ndarray:
        """The figures of each row, computed once for one `Answers`."""
        if self.name not in answers.cache:
            answers.cache[self.name] = self.rows(answers)
        return answers.cache[self.name]


def _accuracy(answers: Answers) -> np.ndarray:
    return answers.right


def _exact_match(answers: Answers) -> np.ndarray:
    import numpy as np

    from unshot.data.example import normal

    pairs = zip(answers.references, answers.given, strict=True)
    return np.array([g is not None and normal(t) == normal(g) for t, g in pairs], dtype=float)


def _macro_f1(answers: Answers) -> np.ndarray:
    import numpy as np

    return np.stack(answers.codes, axis=1)


def _one_class(answers: Answers) -> str | None:
    if len(set(answers.truth)) == 1:
        return f"every reference is {answers.truth[0]!r:.60}: there is nothing to tell apart"
    return None


def _rouge_l(answers: Answers) -> np.ndarray:
    import numpy as np

    from unshot.metrics.rouge import rouge_l

    pairs = zip(answers.references, answers.given, strict=True)
    return np.array([0.0 if g is None else rouge_l(t, g) for t, g in pairs])


def _no_words(answers: Answers) -> str | None:
    from unshot.metrics.rouge import words

    silent = sum(not words(text) for text in answers.references)
    if silent:
        return f"{silent} of {len(answers)} references hold no word of a-z or 0-9, which is all that ROUGE counts"
    return None


def _json_f1(answers: Answers) -> np.ndarray:
    import numpy as np

    from unshot.metrics.answers import field_table

    table = sum(field_table(answers, name) for name in answers.fields)
    return np.stack([2 * table[:, 0], table[:, 1] + table[:, 2]], axis=1)  # type: ignore[index]


def _no_objects(answers: Answers) -> str | None:
    if answers.objects:
        return None
    from unshot.metrics.answers import json_object

    row = next(i for i, text in enumerate(answers.references) if json_object(text) is None)
    return f"the reference of row {row + 1} is no JSON object: {answers.references[row]!r:.60}"


def _bertscore(answers: Answers) -> np.ndarray:
    import numpy as np

    from unshot.engines.embedder import Embedder, find_embedder
    from unshot.metrics.bertscore import bertscore

    path = find_embedder(answers.tools.embedder)
    if path is None:
        raise InputError(f"metric bertscore: {_no_embedder(answers)}")
    found = bertscore(Embedder(path), answers.references, answers.texts)["f1"]
    return np.where(answers.answered, np.clip(found, 0.0, 1.0), 0.0)


def _no_embedder(answers: Answers) -> str | None:
    from unshot.engines.embedder import find_embedder

    if find_embedder(answers.tools.embedder) is None:
        return "no embedder; run `pip install 'unshot[embed]'` or give --embedder DIRECTORY"
    return None


def _judge(answers: Answers) -> np.ndarray:
    from unshot.metrics.judge import judge_rows

    if (problem := _no_judge(answers)) or answers.tools.judge is None:
        raise InputError(f"metric judge: {problem}")
    requests = answers.requests or ["(not given)"] * len(answers)
    return judge_rows(answers.tools.judge, requests, answers.references, answers.given)


def _no_judge(answers: Answers) -> str | None:
    if answers.tools.judge is not None:
        return None
    return (
        "no judge; give --judge http://HOST/v1 with --judge-model NAME, or --judge gguf:PATH (`judge` and "
        "`judge_model` under [task] in the case file)"
    )


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "macro_f1", "mean F1 over the classes, each class counting alike", "macro_f1", _macro_f1, ("classes",),
            hub="f1", blind=_one_class,
        ),
        Metric(
            "accuracy", "share of rows whose label (all whose fields, or whose text) is right", "mean", _accuracy,
            hub="accuracy", blind=_one_class,
        ),
        Metric(
            "exact_match", "share of answers whose text equals the reference, outer white space aside", "mean",
            _exact_match, hub="exact_match",
        ),
        Metric(
            "rouge_l", "ROUGE-L: F1 of the longest common subsequence of words (Lin 2004)", "mean", _rouge_l,
            hub="rouge", constants=5, problem=_no_words,
        ),
        Metric(
            "json_f1", "micro-F1 over all fields of JSON answers: a field counts if its value equals the reference's",
            "ratio", _json_f1, ("json",), problem=_no_objects,
        ),
        Metric(
            "bertscore", "BERTScore F1 (Zhang et al. 2020) with a local embedder", "mean", _bertscore, ("embedder",),
            hub="bertscore", constants=3, problem=_no_embedder,
        ),
        Metric(
            "judge", "share of answers that a language model, asked in both orders, finds at least as good as the "
            "reference", "mean", _judge, ("judge",), constants=0, problem=_no_judge,
        ),
    )
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(METRICS)
# The accepted values in records: the case file's `metric`, `task.json`.
if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[NAMES]


def metric(name: str) -> Metric:
    """The metric of a name. Raises `InputError` that names it and the known ones."""
    if name not in METRICS:
        raise InputError(f"unknown metric `{name}`; {nearest(name, NAMES)}")
    return METRICS[name]


def table() -> str:
    """The metrics as a Markdown table, for the docs."""
    lines = ["| metric | what it is | needs |", "|---|---|---|"]
    lines += [f"| `{m.name}` | {m.help} | {', '.join(m.needs) or 'nothing'} |" for m in METRICS.values()]
    return "\n".join(lines)
