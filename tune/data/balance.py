"""Answers counted as they stream by: the classes, or that there are none."""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from unshot.contracts.record import Record
from unshot.contracts.task import MAX_LABELS
from unshot.data.example import normal
from unshot.metrics.answers import INVALID, find_label, json_object, parse_answer

# Fields of JSON answers that a message names.
MAX_NAMED = 8

_WHOLE = re.compile(r"[+-]?\d+\.0+")


class Labels:
    """Counts of the answers, or of one text field of JSON answers, as long as they stay few enough to be classes.

    As in `derive_task` a field is never guessed: it is the given one, or the only one that there is; an answer that
    states one of the given `labels` is counted as that.
    """

    def __init__(self, field: str | None = None, labels: Sequence[str] | None = None) -> None:
        self.wanted, self.known = field, labels or ()
        self.rows = 0
        self.json = True
        self.names: dict[str, None] = {}
        self.whole: Counter[str] | None = Counter()
        self.values: Counter[str] | None = Counter()

    def add(self, answer: str) -> None:
        """Count one answer."""
        text = self._stated(answer)
        self.rows += 1
        value = json_object(text)
        self.json = self.json and value is not None
        self.names |= dict.fromkeys(value or ()) if len(self.names) < MAX_NAMED else {}
        self.whole = _counted(self.whole, text)
        name = self.wanted if self.wanted is not None else next(iter(self.names), None)
        found = (value or {}).get(name or "")
        self.values = _counted(self.values, self._stated(found)) if isinstance(found, str) else None

    def _stated(self, text: str) -> str:
        label = find_label(text, self.known)
        return normal(text) if label == INVALID else label

    def field(self) -> str | None:
        """The JSON field that holds the label: the given one, or the only one of all answers."""
        if self.wanted is not None or not self.json or len(self.names) != 1:
            return self.wanted
        return next(iter(self.names)) if self._few(self.values) else None

    def counts(self) -> Counter[str] | None:
        """Rows of each class; None where the answers are free text, or JSON without a field that is known to be it."""
        if self.field() is not None:
            return self.values or None
        return self.whole if self._few(self.whole) and not (self.json and self.names) else None

    def note(self) -> str | None:
        """How JSON answers are compared where no field is known to hold the label."""
        if not (self.json and self.names) or self.field() is not None:
            return None
        return (
            f"the answers are JSON objects with the fields {', '.join(list(self.names)[:MAX_NAMED])}: whole answers "
            "are compared, and classes are not counted; where one field holds the class, name it by --answer-field"
        )

    def _few(self, counts: Counter[str] | None) -> bool:
        return counts is not None and len(counts) <= max(1, self.rows // 2)

    def label(self, answer: str) -> str:
        """What two answers are compared by: the label, or the whole text (JSON with its keys in order)."""
        field, text = self.field(), normal(answer)
        if field is not None:
            found = parse_answer(text, field=field)
            if found != INVALID:
                return self._stated(found)
        value = json_object(text)
        return " ".join(self._stated(text).split()) if value is None else json.dumps(value, sort_keys=True)


def _counted(counts: Counter[str] | None, text: str) -> Counter[str] | None:
    """`counts` with one `text` more; None once they are too many for classes."""
    if counts is None or (len(counts) == MAX_LABELS and text not in counts):
        return None
    counts[text] += 1
    return counts


class Balance(Record):
    """The classes with their rows, most first; `evenness` is the entropy over its maximum (1: all classes alike)."""

    field: str | None
    classes: int
    largest: int
    smallest: int
    evenness: float
    # Pairs of labels that may be one, and labels that may be missing values.
    alike: list[tuple[str, str]]
    missing: str | None
    below_5: list[str]
    counts: dict[str, int]


def balance(counts: Counter[str], field: str | None) -> Balance:
    """The classes of `field` (None: of whole answers)."""
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    (_, most), (_, least) = counts.most_common(1)[0], counts.most_common()[-1]
    return Balance(
        field=field,
        classes=len(counts),
        largest=most,
        smallest=least,
        evenness=entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
        alike=alike_labels(list(counts)),
        missing=missing_labels(list(counts)),
        below_5=sorted(label for label, n in counts.items() if n < 5),
        counts=dict(counts.most_common()),
    )


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
