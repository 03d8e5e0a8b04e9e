"""How alike the prompts are in form: a model tuned on one wrapping may know the wrapping rather than the task."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

SAMPLE = 2000
COMMON = 0.5
WARN = 0.5


class Reservoir:
    """A uniform sample of a stream (Vitter 1985, algorithm R), always the same for the same stream."""

    def __init__(self, size: int = SAMPLE) -> None:
        self.items: list[str] = []
        self.size = size
        self._seen = 0
        self._random = random.Random(0)

    def add(self, item: str) -> None:
        """Offer one item."""
        self._seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := self._random.randrange(self._seen)) < self.size:
            self.items[place] = item


def template_share(texts: Sequence[str]) -> float:
    """Share of the texts' words that stand in word trigrams which more than half of the texts have.

    Near 0 for free prose; near 1 where a fixed wrapping outweighs what is wrapped. 0 for under 10 texts.
    """
    if len(texts) < 10:
        return 0.0
    split = [["^", *text.casefold().split(), "$"] for text in texts]
    seen: Counter[tuple[str, ...]] = Counter()
    for words in split:
        seen.update({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    common = {gram for gram, count in seen.items() if count > COMMON * len(texts)}
    covered = total = 0
    for words in split:
        hit = [False] * len(words)
        for i in range(len(words) - 2):
            if tuple(words[i : i + 3]) in common:
                hit[i : i + 3] = [True] * 3
        covered += sum(hit[1:-1])
        total += len(words) - 2
    return covered / total if total else 0.0
