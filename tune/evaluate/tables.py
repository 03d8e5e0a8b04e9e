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
    return shown


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
