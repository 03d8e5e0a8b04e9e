"""Stratified train / validation / test splits that keep equal inputs on one side."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from unshot.data.example import fold
from unshot.data.rows import Example
from unshot.errors import InputError

SHARES = (0.8, 0.1, 0.1)
NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of rows."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def normalised(example: Example) -> str:
    """The whole input with case and whitespace folded: what makes two inputs equal."""
    return fold(example.identity)


def order(seed: int, key: str) -> bytes:
    """Sorting by this shuffles texts, the same way in every file order."""
    return hashlib.sha256(f"{seed}\n{key}".encode(errors="surrogatepass")).digest()


def split(
    examples: Sequence[Example],
    *,
    stratum: Callable[[Example], Hashable],
    shares: tuple[float, float, float] = SHARES,
    seed: int = 0,
) -> Split:
    """Split by `shares`, each stratum apart; rows with equal inputs stay together.

    The order depends only on the texts and the seed, not on the order of the file. Every part gets at least one
    row. Raises `InputError` with fewer than 10 distinct inputs.
    """
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[normalised(example)].append(example)
    if len(groups) < 10:
        raise InputError(f"{len(groups)} distinct inputs; an 80/10/10 split needs at least 10")
    strata: dict[Hashable, list[str]] = defaultdict(list)
    for key, rows in groups.items():
        rows.sort(key=lambda e: (e.identity, e.answer or ""))
        strata[stratum(rows[0])].append(key)
    parts: tuple[list[Example], ...] = ([], [], [])
    # What a stratum owes to validation and test carries over to the next, so that small classes do not all round
    # their share to nothing.
    owed = [0.0, 0.0]
    for name in sorted(strata, key=str):
        keys = sorted(strata[name], key=lambda key: order(seed, key))
        for part, share in ((1, shares[1]), (2, shares[2])):
            owed[part - 1] += share * len(strata[name])
            take = min(round(owed[part - 1]), max(len(keys) - 1, 0))
            owed[part - 1] -= take
            for key in keys[:take]:
                parts[part].extend(groups[key])
            keys = keys[take:]
        for key in keys:
            parts[0].extend(groups[key])
    return Split(*parts)
