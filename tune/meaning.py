"""Rows that say the same in other words: cosine of sentence embeddings, beside the comparison of the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unshot.console import Output
from unshot.data.example import fold
from unshot.engines.embedder import OFF, Embedder, find_embedder

# See `python -m tests.benchmarks.bench_meaning` and docs/data.md.
THRESHOLD = 0.85
# More rows than this are embedded only where an embedder was asked for by name.
ROWS = 5000
BLOCK = 1024


@dataclass(frozen=True)
class Meaning:
    """Pairs of rows close in meaning, by index (`first < second`) with their cosine; and what found them."""

    pairs: list[tuple[int, int, float]]
    embedder: str
    threshold: float

    def record(self) -> dict[str, Any]:
        """`{embedder, threshold, pairs}`."""
        return {"embedder": self.embedder, "threshold": self.threshold, "pairs": len(self.pairs)}


def close_pairs(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of unit vectors, shape `(rows, width)`, with a cosine of at least `threshold`; block by block."""
    first, second, similarity = [], [], []
    for start in range(0, len(vectors), BLOCK):
        for other in range(start, len(vectors), BLOCK):
            table = vectors[start : start + BLOCK] @ vectors[other : other + BLOCK].T
            rows, columns = np.nonzero(table >= threshold)
            kept = rows + start < columns + other
            rows, columns = rows[kept], columns[kept]
            first.append(rows + start)
            second.append(columns + other)
            similarity.append(table[rows, columns])
    if not first:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    return np.concatenate(first), np.concatenate(second), np.concatenate(similarity)


def choose(wanted: str | None, rows: int, out: Output | None) -> Path | None:
    """The embedder to use: the one asked for, else one that is installed where there are up to 5,000 rows."""
    path = find_embedder(wanted)
    if path is not None and wanted in (None, "") and rows > ROWS:
        if out:
            out.log(
                f"{rows} rows: meaning is compared up to {ROWS} by default; --embedder {Embedder.name_of(path)} does it"
            )
        return None
    return path


def by_meaning(
    texts: Sequence[str],
    wanted: str | None = None,
    *,
    threshold: float = THRESHOLD,
    out: Output | None = None,
    progress: Callable[[int], None] | None = None,
) -> Meaning | None:
    """Pairs of texts close in meaning; None where no embedder is installed, it is `off`, or there are too many rows."""
    path = choose(wanted, len(texts), out)
    if path is None:
        return None
    embedder = Embedder(path)
    # Equal texts are the other comparison's: one of each is embedded.
    firsts: dict[str, int] = {}
    for number, text in enumerate(texts):
        firsts.setdefault(fold(text), number)
    chosen = np.array(list(firsts.values()), dtype=np.int64)
    vectors = embedder.sentences([texts[i] for i in chosen], progress)
    first, second, similarity = close_pairs(vectors, threshold)
    pairs = [
        (int(chosen[a]), int(chosen[b]), float(s)) for a, b, s in zip(first, second, similarity, strict=True)
    ]
    return Meaning(sorted(pairs), embedder.name, threshold)


__all__ = ["OFF", "THRESHOLD", "Meaning", "by_meaning", "close_pairs"]
