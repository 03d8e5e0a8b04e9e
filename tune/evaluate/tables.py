"""Results of `unshot eval` for people."""

from __future__ import annotations

from typing import Any

SHOWN = 15
_MAIN: tuple[str, ...] = ("accuracy", "macro_f1", "exact_match")


def tables(result: dict[str, Any]) -> list[Any]:
    """Scores of one or two runs, the weakest classes, the usual confusions, the comparison."""
    from rich.table import Table
    from rich.text import Text

    systems = [result, *([result["other"]] if "other" in result else [])]
    scores = Table(title=f"{result['rows']} rows of {result['data']}", title_justify="left")
    scores.add_column("")
    for system in systems:
        scores.add_column(Text(system["run"]), justify="right")
    lines = [_lines(system) for system in systems]
    for name in lines[0]:
        scores.add_row(name, *(line.get(name, "") for line in lines))
    shown: list[Any] = [scores]
    if "classes" in result:
        worst = sorted(result["classes"].items(), key=lambda item: (item[1]["f1"].value, item[0]))
        classes = Table(title="classes, weakest first", title_justify="left")
        for name in ("class", "precision", "recall", "F1", "rows"):
            classes.add_column(name)
        for label, row in worst[:SHOWN]:
            classes.add_row(
                Text(label), *(str(row[k]) for k in ("precision", "recall", "f1")), str(row["support"])
            )
        shown.append(classes)
        if len(worst) > SHOWN:
            shown.append(f"... {len(worst) - SHOWN} more with --json")
        shown += _confusions(result["confusion"])
    if "comparison" in result:
        c = result["comparison"]
        shown.append(
            f"second minus first: accuracy {_signed(c['accuracy']['difference'])}, McNemar p {c['mcnemar_p']:.3g} "
            f"({c['only_first_right']} only the first right, {c['only_second_right']} only the second)"
        )
        if "macro_f1" in c:
            macro = c["macro_f1"]
            shown.append(
                f"macro-F1 {_signed(macro['difference'])}, paired bootstrap p {macro['p_bootstrap']:.3g}"
            )
    if "judge" in result:
        shown.append(_judge(result["judge"]))
    if "review" in result:
        shown.append(
            f"{result['review']['rows']} rows for review in {result['review']['sheet']}; read it back with "
            "--from-review"
        )
    return shown


def review_tables(result: dict[str, Any]) -> list[Any]:
    """What the reviewers said of the run, of the other side, and how far metric and judge agree with them."""
    other = "the other run" if result["against"] == "run" else "the reference"
    shown = [
        f"review {result['review']}: {result['rows']} of {result['drawn']} rows judged by {result['reviewers']} "
        f"reviewer(s)",
        f"accepted: {result['accepted']}"
        + (f"; {other}: {result['other_accepted']}" if result["other_accepted"] else ""),
    ]
    if "preference" in result:
        p = result["preference"]
        shown.append(
            f"preferred: the run {p['run']}, {other} {p['other']}, ties {p['ties']}"
            + (f"; of those with a preference {p['run_preferred']} for the run" if p["run_preferred"] else "")
        )
    if "metric_human" in result:
        shown.append(f"metric and people agree: {_agreement(result['metric_human'])}")
    if between := result.get("between_reviewers"):
        shown.append(f"reviewers among themselves: Krippendorff's alpha {between['krippendorff_alpha']:.3f}")
    if "judge" in result:
        shown += [_judge(result["judge"]), f"judge and people agree: {_agreement(result['judge']['human'])}"]
    word = {True: "passed", False: "failed", None: "undecided"}[result["gate"]["passed"]]
    return [*shown, f"gate review {word}: {result['gate']['detail']}"]


def _agreement(found: dict[str, Any]) -> str:
    kappa = f", Cohen's kappa {found['kappa']}" if found["kappa"] else ""
    return f"{found['agreement']} of {found['items']} rows{kappa}"


def _judge(found: dict[str, Any]) -> str:
    position = f", {found['position']:.0%} contradicted themselves when swapped" if found["position"] else ""
    lost = f", {found['unreadable']:.0%} unreadable" if found["unreadable"] else ""
    return (
        f"judge {found['judge']}, {found['pairs']} pairs: {found['wins']} won, {found['losses']} lost, {found['ties']} "
        f"ties ({found['equal_answers']} equal answers); win rate {found['win_rate']}{position}{lost}"
    )


def _lines(system: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {name: str(system[name]) for name in _MAIN if name in system}
    found["invalid"] = f"{system['invalid']:.1%}"
    if "json" in system:
        found["valid JSON"] = str(system["json"]["valid"])
        found["fields and types fit"] = str(system["json"]["schema"])
        for name, row in system["json"]["fields"].items():
            found[f"F1 of `{name}`"] = str(row["f1"])
    for name, value in system.get("rouge", {}).items():
        found[name] = str(value)
    if "bertscore" in system:
        found[f"BERTScore F1 ({system['bertscore']['embedder']})"] = str(system["bertscore"]["f1"])
    found["like training rows"] = str(len(system["like_training"]))
    if "without_like_training" in system:
        found[f"{system['metric']} without them"] = str(system["without_like_training"]["score"])
    found["reading of this test"] = str(system["reading"]["reading"])
    return found


def _confusions(table: dict[str, Any]) -> list[str]:
    pairs = [
        (count, truth, guess)
        for truth, row in zip(table["rows"], table["counts"], strict=True)
        for guess, count in zip(table["columns"], row, strict=True)
        if count and truth != guess
    ]
    pairs.sort(key=lambda p: (-p[0], p[1], p[2]))
    if not pairs:
        return []
    return ["most usual confusions: " + ", ".join(f"{t} as {g} ({n})" for n, t, g in pairs[:5])]


def _signed(value: Any) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
