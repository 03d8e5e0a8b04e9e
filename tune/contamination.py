"""Test rows that the model has as good as seen: found after the split, reported, and moved to where they do no harm."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from tune import near
from tune.split import NAMES, Split, order
from unshot.data import Example
from unshot.errors import InputError

ASIDE = "aside"


@dataclass(frozen=True)
class Move:
    """A row taken from one part to another (`aside`: left out), with the row that it is like."""

    line: int
    source: str
    to: str
    like_line: int
    similarity: float


@dataclass(frozen=True)
class Cleaned:
    """Parts without near-duplicates across them, what was moved, and the rows taken from train in their place."""

    parts: Split
    moved: list[Move]
    refilled: list[int]
    aside: list[Example]

    def report(self) -> dict[str, Any]:
        """The contamination as `metrics.json` has it; `refilled` are lines moved from train."""
        return {
            "threshold": near.THRESHOLD,
            "moved": [vars(m) for m in self.moved],
            "refilled": self.refilled,
        }


def separate(
    parts: Split,
    *,
    stratum: Callable[[Example], Hashable],
    seed: int = 0,
    unit: Callable[[Example], Hashable] | None = None,
    refill: bool = True,
    set_aside: bool = False,
    threshold: float = near.THRESHOLD,
) -> Cleaned:
    """Move every near-duplicate of a train row into train, and of a validation row into validation.

    Near-duplicates of near-duplicates go along, and so do the rows of the same `unit`. `refill` gives
    validation and test rows of the same stratum from train instead, where train has ones like no other.
    `set_aside` leaves contaminated rows out instead of moving them (for splits by time, where a later row has
    no place in train). Raises `InputError` where no test row is left.
    """
    rows = [(number, example) for number, name in enumerate(NAMES) for example in getattr(parts, name)]
    home = [number for number, _ in rows]
    pairs = near.similar_pairs([example.text for _, example in rows], threshold=threshold)
    links = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
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
    like = _likeness(pairs, links)
    place, moved = list(home), []
    for index, root in enumerate(component.tolist()):
        to = target[root]
        if to == home[index]:
            continue
        other, similarity = like[index]
        name = ASIDE if set_aside else NAMES[to]
        place[index] = len(NAMES) if set_aside else to
        moved.append(
            Move(
                rows[index][1].line,
                NAMES[home[index]],
                name,
                rows[other][1].line,
                round(float(similarity), 3),
            )
        )
    refilled = []
    if refill and moved and not set_aside:
        refilled = _refill(rows, home, place, component.tolist(), stratum, seed)
    result = Split(*([rows[i][1] for i in range(len(rows)) if place[i] == n] for n in range(3)))
    if not result.test:
        raise InputError(
            f"all {len(parts.test)} test rows are near-duplicates of training rows; the data holds too few different "
            "inputs to test on"
        )
    aside = [rows[i][1] for i in range(len(rows)) if place[i] == len(NAMES)]
    return Cleaned(result, moved, refilled, aside)


def _likeness(pairs: near.Pairs, links: Sequence[tuple[int, int]]) -> dict[int, tuple[int, float]]:
    """For each linked row the row it is most like (similarity 0: of the same unit only)."""
    best: dict[int, tuple[int, float]] = {}
    for a, b in links:
        best.setdefault(a, (b, 0.0))
        best.setdefault(b, (a, 0.0))
    for a, b, similarity in pairs:
        for one, other in ((a, b), (b, a)):
            if similarity > best[one][1]:
                best[one] = (other, similarity)
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
        waiting.sort(key=lambda i: order(seed, near.fold(rows[i][1].text)), reverse=True)
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
