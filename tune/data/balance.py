"""Answers counted as they stream by: the classes, or that there are none."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from unshot.contracts.task import MAX_LABELS
from unshot.metrics.scores import INVALID, parse_answer


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
        "below_5": sorted(label for label, n in counts.items() if n < 5),
        "counts": dict(counts.most_common()),
    }


def _object(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
