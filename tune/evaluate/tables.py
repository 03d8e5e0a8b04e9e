"""Results of `unshot eval` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune.evaluate.agreement import Agreement
from tune.evaluate.review import Reviewed
from unshot.contracts.evaluation import Confusion, Evaluation, System
from unshot.metrics.intervals import Interval
from unshot.metrics.judge import Judged

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 15


def tables(result: Evaluation) -> list[RenderableType]:
    """Scores of one or two runs, the weakest classes, the usual confusions, the comparison."""
    from rich.table import Table
    from rich.text import Text

    systems = [result, *([result.other] if result.other else [])]
    scores = Table(title=f"{result.rows} rows of {result.data}", title_justify="left")
    scores.add_column("")
    for system in systems:
        scores.add_column(Text(system.run), justify="right")
    lines = [_lines(system) for system in systems]
    for name in lines[0]:
        scores.add_row(name, *(line.get(name, "") for line in lines))
    shown: list[RenderableType] = [scores]
    if result.caution:
        shown.append(f"mind the score: {result.caution}")
    if result.classes is not None:
        worst = sorted(result.classes.items(), key=lambda item: (item[1].f1.value, item[0]))
        table = Table(title="classes, weakest first", title_justify="left")
        for name in ("class", "precision", "recall", "F1", "rows"):
            table.add_column(name)
        for label, row in worst[:SHOWN]:
            table.add_row(Text(label), str(row.precision), str(row.recall), str(row.f1), str(row.support))
        shown.append(table)
        if len(worst) > SHOWN:
            shown.append(f"... {len(worst) - SHOWN} more with --json")
    if result.confusion is not None:
        shown += _confusions(result.confusion)
    if (c := result.comparison) is not None:
        shown.append(
            f"second minus first: {result.metric} {_signed(c.score.difference)}, p {c.score.p:.3g}; accuracy "
            f"{_signed(c.accuracy.difference)}, McNemar p {c.mcnemar_p:.3g} ({c.only_first_right} only the first "
            f"right, {c.only_second_right} only the second)"
        )
    if result.judge is not None:
        shown.append(_judge(result.judge))
    if result.review is not None:
        shown.append(
            f"{result.review.rows} rows for review in {result.review.sheet}; read it back with --from-review"
        )
    return shown


def review_tables(result: Reviewed) -> list[RenderableType]:
    """What the reviewers said of the run, of the other side, and how far metric and judge agree with them."""
    other = "the other run" if result.against == "run" else "the reference"
    shown: list[RenderableType] = [
        f"review {result.review}: {result.rows} of {result.drawn} rows judged by {result.reviewers} reviewer(s)",
        f"accepted: {result.accepted}"
        + (f"; {other}: {result.other_accepted}" if result.other_accepted else ""),
    ]
    if (p := result.preference) is not None:
        shown.append(
            f"preferred: the run {p.run}, {other} {p.other}, ties {p.ties}"
            + (f"; of those with a preference {p.run_preferred} for the run" if p.run_preferred else "")
        )
    if result.metric_human is not None:
        shown.append(f"metric and people agree: {_agreement(result.metric_human)}")
    if (c := result.corrected) is not None:
        by = "the teacher's labels" if result.taught else "the references"
        shown.append(
            f"accuracy of all {c.rows} rows: {c.by_teacher} by {by}, {c.corrected} corrected by the {c.reviewed} "
            "reviewed rows (prediction-powered)"
        )
    if result.between_reviewers:
        alpha = result.between_reviewers.krippendorff_alpha
        shown.append(f"reviewers among themselves: Krippendorff's alpha {alpha:.3f}")
    if result.judge is not None:
        shown.append(_judge(result.judge))
    if result.judge_human is not None:
        shown.append(f"judge and people agree: {_agreement(result.judge_human)}")
    word = {True: "passed", False: "failed", None: "undecided"}[result.gate.passed]
    return [*shown, f"gate review {word}: {result.gate.detail}"]


def _agreement(found: Agreement) -> str:
    kappa = f", Cohen's kappa {found.kappa}" if found.kappa else ""
    return f"{found.agreement} of {found.items} rows{kappa}"


def _judge(found: Judged) -> str:
    position = f", {found.position:.0%} contradicted themselves when swapped" if found.position else ""
    lost = f", {found.unreadable:.0%} unreadable" if found.unreadable else ""
    return (
        f"judge {found.judge}, {found.pairs} pairs: {found.wins} won, {found.losses} lost, {found.ties} "
        f"ties ({found.equal_answers} equal answers); win rate {found.win_rate}{position}{lost}"
    )


def _lines(system: System) -> dict[str, str]:
    found = {system.metric: str(system.score), "accuracy": str(system.accuracy)}
    if system.macro_f1 is not None:
        found["macro_f1"] = str(system.macro_f1)
    found["exact_match"] = str(system.exact_match)
    found["invalid"] = f"{system.invalid:.1%}"
    if system.json is not None:
        found["valid JSON"] = str(system.json.valid)
        found["fields and types fit"] = str(system.json.schema)
        found["F1 over all fields"] = str(system.json.micro.f1)
        for name, row in system.json.fields.items():
            found[f"F1 of `{name}`"] = str(row.f1)
    for name, value in (system.rouge or {}).items():
        found[name] = str(value)
    if system.bertscore is not None:
        found[f"BERTScore F1 ({system.bertscore.embedder})"] = str(system.bertscore.f1)
    found["like training rows"] = str(len(system.like_training))
    if system.without_like_training is not None:
        found[f"{system.metric} without them"] = str(system.without_like_training.score)
    found["reading of this test"] = str(system.reading.reading)
    return found


def _confusions(table: Confusion) -> list[str]:
    pairs = [
        (count, truth, guess)
        for truth, row in zip(table.rows, table.counts, strict=True)
        for guess, count in zip(table.columns, row, strict=True)
        if count and truth != guess
    ]
    pairs.sort(key=lambda p: (-p[0], p[1], p[2]))
    if not pairs:
        return []
    return ["most usual confusions: " + ", ".join(f"{t} as {g} ({n})" for n, t, g in pairs[:5])]


def _signed(value: Interval) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
