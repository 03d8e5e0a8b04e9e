"""Test rows that the model has as good as seen: found after the split, reported, and moved to where they do no harm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tune import near
from tune.meaning import Meaning
from tune.split import NAMES, Split, order
from unshot.data.example import fold
from unshot.data.rows import Example
from unshot.errors import InputError

ASIDE = "aside"


@dataclass(frozen=True)
class Move:
    """A row taken from one part to another (`aside`: left out), with the row that it is like.

    `by` says how: `text` (MinHash, `similarity` is Jaccard's), `meaning` (an embedder's cosine), or `unit` (it goes
    along with a row of its group).
    """

    line: int
    source: str
    to: str
    like_line: int
    similarity: float
    by: str = "text"


@dataclass(frozen=True)
class Cleaned:
    """Parts without near-duplicates across them, what was moved, and the rows taken from train in their place."""

    parts: Split
    moved: list[Move]
    refilled: list[int]
    aside: list[Example]
    meaning: Meaning | None = None
    # Rows of the user's own validation and test files that are like an earlier row: they stay where they were put.
    kept: list[Move] = field(default_factory=list)
    # Training rows whose input a model wrote, and those left out since they are like a validation or test row.
    synthetic: int = 0
    synthetic_left_out: int = 0

    def report(self) -> dict[str, Any]:
        """The contamination as `metrics.json` has it; `refilled` are lines moved from train."""
        return {
            "threshold": near.THRESHOLD,
            "meaning": self.meaning.record() if self.meaning else None,
            "moved": [vars(m) for m in self.moved],
            "kept": [vars(m) for m in self.kept],
            "refilled": self.refilled,
            "synthetic": self.synthetic,
            "synthetic_left_out": self.synthetic_left_out,
        }


def separate(
    parts: Split,
    *,
    stratum: Callable[[Example], Hashable],
    seed: int = 0,
    unit: Callable[[Example], Hashable] | None = None,
    refill: bool = True,
    set_aside: bool = False,
    fixed: Collection[str] = (),
    threshold: float = near.THRESHOLD,
    meaning: Callable[[Sequence[str]], Meaning | None] | None = None,
) -> Cleaned:
    """Move every near-duplicate of a train row into train, and of a validation row into validation.

    Near-duplicates of near-duplicates go along, and so do the rows of the same `unit`. `refill` gives
    validation and test rows of the same stratum from train instead, where train has ones like no other.
    `set_aside` leaves contaminated rows out instead of moving them (for splits by time, where a later row has
    no place in train). Rows of the `fixed` parts are reported and stay.
    `meaning` finds pairs alike in other words (`tune.meaning.by_meaning`); they count as the
    others do. Raises `InputError` where no test row is left.
    """
    rows = [(number, example) for number, name in enumerate(NAMES) for example in getattr(parts, name)]
    home = [number for number, _ in rows]
    texts = [example.dialogue for _, example in rows]
    pairs = near.similar_inputs([example.system for _, example in rows], texts, threshold=threshold)
    links = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    close = meaning(texts) if meaning else None
    if close:
        links += [(a, b) for a, b, _ in close.pairs]
    if unit is not None:
        seen: dict[Hashable, int] = {}
        for index, (_, example) in enumerate(rows):
            key = unit(example)
            if key is not None:
                links.append((seen.setdefault(key, index), index))
    component = near.components(len(rows), links)
    target: dict[int, int] = {}
    for index, root in enumerate(component.tolist()):
        target[root] = min(target.get(root, home[index]), home[index])
    like = _likeness(pairs, links, close)
    place, moved, kept = list(home), [], []
    for index, root in enumerate(component.tolist()):
        to = target[root]
        if to == home[index]:
            continue
        other, similarity, by = like[index]
        source = NAMES[home[index]]
        name = source if source in fixed else ASIDE if set_aside else NAMES[to]
        move = Move(rows[index][1].line, source, name, rows[other][1].line, round(float(similarity), 3), by)
        if source in fixed:
            kept.append(move)
            continue
        place[index] = len(NAMES) if set_aside else to
        moved.append(move)
    refilled = []
    if refill and moved and not set_aside and not fixed:
        refilled = _refill(rows, home, place, component.tolist(), stratum, seed)
    result = Split(*([rows[i][1] for i in range(len(rows)) if place[i] == n] for n in range(3)))
    if not result.test:
        raise InputError(
            f"all {len(parts.test)} test rows are near-duplicates of training rows; the data holds too few different "
            "inputs to test on"
        )
    aside = [rows[i][1] for i in range(len(rows)) if place[i] == len(NAMES)]
    return Cleaned(result, moved, refilled, aside, close, kept)


def with_synthetic(cleaned: Cleaned, synthetic: Sequence[Example]) -> Cleaned:
    """The parts with rows that a model wrote among the training rows, but for those like a validation or test row."""
    if not synthetic:
        return cleaned
    held_out = [row.dialogue for row in (*cleaned.parts.validation, *cleaned.parts.test)]
    pairs = near.similar_pairs([*held_out, *(row.dialogue for row in synthetic)])
    alike = {b - len(held_out) for a, b, _ in pairs if a < len(held_out) <= b}
    good = [row for number, row in enumerate(synthetic) if number not in alike]
    parts = replace(cleaned.parts, train=[*cleaned.parts.train, *good])
    return replace(cleaned, parts=parts, synthetic=len(good), synthetic_left_out=len(alike))


def _likeness(
    pairs: near.Pairs, links: Sequence[tuple[int, int]], close: Meaning | None
) -> dict[int, tuple[int, float, str]]:
    """For each linked row the row it is most like, how much, and by what; texts before meaning before units."""
    best: dict[int, tuple[int, float, str]] = {}
    for a, b in links:
        best.setdefault(a, (b, 0.0, "unit"))
        best.setdefault(b, (a, 0.0, "unit"))
    found = [(a, b, s, "meaning") for a, b, s in close.pairs] if close else []
    for a, b, similarity, by in [*found, *((a, b, s, "text") for a, b, s in pairs)]:
        for one, other in ((a, b), (b, a)):
            if similarity > best[one][1] or best[one][2] != by:
                best[one] = (other, similarity, by)
    return best


def _refill(
    rows: Sequence[tuple[int, Example]],
    home: Sequence[int],
    place: list[int],
    component: Sequence[int],
    stratum: Callable[[Example], Hashable],
    seed: int,
) -> list[int]:
    sizes: dict[int, int] = {}
    for root in component:
        sizes[root] = sizes.get(root, 0) + 1
    spare: dict[Hashable, list[int]] = {}
    left: dict[Hashable, int] = {}
    for index, (_, example) in enumerate(rows):
        if place[index] != 0:
            continue
        key = stratum(example)
        left[key] = left.get(key, 0) + 1
        if home[index] == 0 and sizes[component[index]] == 1:
            spare.setdefault(key, []).append(index)
    for waiting in spare.values():
        waiting.sort(key=lambda i: order(seed, fold(rows[i][1].identity)), reverse=True)
    lines = []
    for index in range(len(rows)):
        if place[index] == home[index]:
            continue
        key = stratum(rows[index][1])
        # A class keeps a row in train.
        if spare.get(key) and left[key] > 1:
            chosen = spare[key].pop()
            place[chosen] = home[index]
            left[key] -= 1
            lines.append(rows[chosen][1].line)
    return sorted(lines)
