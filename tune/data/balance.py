"""Answers counted as they stream by: the classes, or that there are none."""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from unshot.contracts.task import MAX_LABELS
from unshot.metrics.answers import INVALID, parse_answer

_WHOLE = re.compile(r"[+-]?\d+\.0+")


class Labels:
    """Counts of the answers and of each text field of JSON answers, as long as they stay few enough to be classes."""

    def __init__(self, field: str | None = None) -> None:
        self.wanted = field
        self.rows = 0
        self.whole: Counter[str] | None = Counter()
        self.fields: dict[str, Counter[str]] | None = None

    def add(self, answer: str) -> None:
        """Count one answer."""
        text = answer.strip()
        self.rows += 1
        if self.whole is not None:
            self.whole[text] += 1
            if len(self.whole) > MAX_LABELS:
                self.whole = None
        self._add_fields(_object(text))

    def _add_fields(self, value: dict[str, Any] | None) -> None:
        texts = {k: v.strip() for k, v in (value or {}).items() if isinstance(v, str)}
        if self.fields is None:
            self.fields = {k: Counter() for k in texts} if self.rows == 1 else {}
        # A field is a label's only where every row has it.
        for name in [k for k in self.fields if k not in texts]:
            del self.fields[name]
        for name, counts in list(self.fields.items()):
            counts[texts[name]] += 1
            if len(counts) > MAX_LABELS:
                del self.fields[name]

    def field(self) -> str | None:
        """The JSON field that holds the label: the given one, else the one with the fewest recurring values."""
        if self.wanted is not None:
            return self.wanted
        few = {k: len(c) for k, c in (self.fields or {}).items() if len(c) <= self.rows // 2}
        return min(few, key=lambda k: (few[k], k)) if few else None

    def counts(self) -> Counter[str] | None:
        """Rows of each class; None where the answers are free text."""
        field = self.field()
        if field is not None:
            return (self.fields or {}).get(field)
        if self.whole is not None and len(self.whole) <= max(1, self.rows // 2):
            return self.whole
        return None

    def label(self, answer: str) -> str:
        """What two answers are compared by: the label, or the whole text (JSON with its keys in order)."""
        field = self.field()
        if field is not None:
            found = parse_answer(answer, field=field)
            if found != INVALID:
                return found
        value = _object(answer.strip())
        if value is not None:
            return json.dumps(value, sort_keys=True)
        return " ".join(answer.split())


def balance(counts: Counter[str], field: str | None) -> dict[str, Any]:
    """Classes with their rows, most first; evenness is the entropy over its maximum (1: all classes alike)."""
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    (_, most), (_, least) = counts.most_common(1)[0], counts.most_common()[-1]
    return {
        "field": field,
        "classes": len(counts),
        "largest": most,
        "smallest": least,
        "evenness": entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
        "alike": alike_labels(list(counts)),
        "missing": missing_labels(list(counts)),
        "below_5": sorted(label for label, n in counts.items() if n < 5),
        "counts": dict(counts.most_common()),
    }


def alike_labels(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of labels that may be one written twice: equal but for case, form, blanks and signs, or for one letter.

    Labels that differ in a digit (`level 1`, `level 2`), or are shorter than five letters, are two.
    """
    folded = [_letters(label) for label in labels]
    found = []
    for (a, one), (b, other) in itertools.combinations(zip(labels, folded, strict=True), 2):
        if one == other or (min(len(one), len(other)) >= 5 and one_edit(one, other)):
            found.append((a, b))
    return sorted(found)


# How programs write that there is no value. `none` in small letters is a class that people choose.
NO_VALUE = {"None", "null", "NULL", "Null", "N/A", "n/a", "NA", "#N/A", "-", "?"}


def missing_labels(labels: Sequence[str]) -> str | None:
    """Labels that may be missing values, in words; None where there are none."""
    found = sorted(NO_VALUE & set(labels)) if len(labels) > 1 else []
    named = ", ".join(f"`{label}`" for label in found)
    return f"labels that may be missing values: {named}; remove those rows if they are" if found else None


def _letters(label: str) -> str:
    """Letters and digits of a label in one form (1.0 as 1); the label itself where it has none."""
    text = unicodedata.normalize("NFKC", label).casefold().strip()
    if _WHOLE.fullmatch(text):
        text = text.split(".")[0]
    return "".join(c for c in text if c.isalnum()) or text


def one_edit(one: str, other: str) -> bool:
    """Whether two different texts are one inserted, lost, changed or swapped letter apart."""
    if len(one) > len(other):
        one, other = other, one
    if len(other) - len(one) > 1:
        return False
    start = next((i for i in range(len(one)) if one[i] != other[i]), len(one))
    if len(one) < len(other):
        return one[start:] == other[start + 1 :] and other[start].isalpha()
    rest, same = one[start:], other[start:]
    if rest[1:] == same[1:]:
        return rest[0].isalpha() and same[0].isalpha()
    return rest[:2] == same[1::-1] and rest[2:] == same[2:] and rest[:2].isalpha()


def _object(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
