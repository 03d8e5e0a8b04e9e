"""Texts that are nearly the same: MinHash sketches, banded lookup, every hit checked on the texts themselves.

The permutations are datasketch's (scheme `affine32`); they are applied to whole blocks of texts at once, and the bands
are sorted arrays instead of datasketch's dictionaries, which would need some 5 GB for a million texts.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unshot.data.example import fold
from unshot.errors import OutsideError

# Two texts are near-duplicates from this Jaccard similarity of their character trigrams on: in 60 characters two
# typing errors, or a greeting more. Among 5,000 customer questions of a bank (banking77) 0.7 finds 432 pairs, 0.8 138.
THRESHOLD = 0.7
SHINGLE = 3
BANDS, ROWS = 16, 4
# Texts of one band that are compared: each with the next ones only, so that a bucket of n costs n, not n squared.
REACH = 8
# A shingle in more than this share of the texts belongs to a common template and says nothing about likeness.
COMMON = 0.5
SAMPLE = 2000
BLOCK = 512


@dataclass(frozen=True)
class Pairs:
    """Pairs of similar texts by index, `first < second`, with their Jaccard similarity; all of shape `(pairs,)`.

    A text equal to an earlier one (after case and whitespace) is paired with the first such, at similarity 1, and
    `equal` is True there; only first ones are paired with merely similar texts.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    equal: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        for a, b, s in zip(self.first, self.second, self.similarity, strict=True):
            yield int(a), int(b), float(s)


def plain(text: str) -> str:
    """The words alone, between blanks: what is cut into shingles."""
    folded = fold(text)
    words = re.sub(r"[\W_]+", " ", folded).strip()
    return f" {words or folded} "


def similar_pairs(texts: Sequence[str], *, threshold: float = THRESHOLD) -> Pairs:
    """All pairs of equal texts, and of texts with a Jaccard similarity of at least `threshold`.

    With 16 bands of 4 rows a pair at similarity 0.8 is looked at with probability 0.9998, at 0.7 with 0.988
    (1 - (1 - s^4)^16; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", ch. 3). Similarities are
    exact, not estimated. Shingles of a template that most texts share are left out.
    """
    keys = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(fold(t).encode(errors="surrogatepass"), digest_size=8).digest())
            for t in texts
        ),
        dtype=np.uint64,
        count=len(texts),
    )
    _, chosen, inverse = np.unique(keys, return_index=True, return_inverse=True)
    del keys
    origin = chosen[inverse]
    equal = np.flatnonzero(origin != np.arange(len(texts)))
    # `chosen` stays in the order of its hashes: what is found depends on the texts and not on their order.
    common = common_shingles([texts[int(i)] for i in chosen[:SAMPLE]])
    bands, sketch = _sketches(texts, chosen, common)
    left, right = _candidates(bands, sketch, threshold)
    del bands, sketch
    similarity = np.fromiter(
        (
            jaccard(shingles(texts[int(chosen[a])], common), shingles(texts[int(chosen[b])], common))
            for a, b in zip(left, right, strict=True)
        ),
        dtype=np.float64,
        count=len(left),
    )
    kept = similarity >= threshold
    one, other = chosen[left[kept]], chosen[right[kept]]
    first = np.concatenate([origin[equal], np.minimum(one, other)])
    second = np.concatenate([equal, np.maximum(one, other)])
    order = np.lexsort((first, second))
    return Pairs(
        first[order],
        second[order],
        np.concatenate([np.ones(len(equal)), similarity[kept]])[order],
        (np.arange(len(first)) < len(equal))[order],
    )


def similar_inputs(systems: Sequence[str], texts: Sequence[str], *, threshold: float = THRESHOLD) -> Pairs:
    """`similar_pairs` of inputs that are a system prompt and a text: both must be alike.

    One question about sixty documents is sixty inputs, whichever of the two the document stands in; and a system
    prompt that many rows share does not make them alike. `equal` means that both are equal.
    """
    folded = [fold(system) for system in systems]
    distinct = {text: number for number, text in enumerate(dict.fromkeys(folded))}
    if len(distinct) <= 1:
        return similar_pairs(texts, threshold=threshold)
    names = list(distinct)
    close = similar_pairs(names, threshold=threshold)
    group = components(len(names), list(zip(close.first.tolist(), close.second.tolist(), strict=True)))
    own = np.fromiter((distinct[text] for text in folded), dtype=np.int64, count=len(folded))
    order = np.argsort(group[own], kind="stable")
    _, starts = np.unique(group[own][order], return_index=True)
    found = []
    for members in np.split(order, starts[1:]):
        if len(members) < 2:
            continue
        pairs = similar_pairs([texts[int(i)] for i in members], threshold=threshold)
        first, second = members[pairs.first], members[pairs.second]
        equal = pairs.equal & (own[first] == own[second])
        found.append(Pairs(first, second, pairs.similarity, equal))
    if not found:
        return similar_pairs([])
    columns = [np.concatenate([getattr(p, name) for p in found]) for name in Pairs.__annotations__]
    order = np.lexsort((columns[0], columns[1]))
    return Pairs(*(column[order] for column in columns))


def common_shingles(sample: Sequence[str]) -> np.ndarray:
    """Sorted hashes of the shingles that more than half of the sample has; none from under 10 texts."""
    if len(sample) < 10:
        return np.empty(0, dtype=np.uint32)
    values, counts = np.unique(
        np.concatenate([np.unique(_hashes(plain(text))) for text in sample]), return_counts=True
    )
    found: np.ndarray = values[counts > COMMON * len(sample)]
    return found


def shingles(text: str, common: np.ndarray) -> np.ndarray:
    """Sorted distinct shingle hashes of a text without the common ones (with them where nothing else is left)."""
    own = np.unique(_hashes(plain(text)))
    rest = own[~_among(own, common)]
    return rest if len(rest) else own


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted distinct arrays."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def components(size: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """The smallest index of each item's connected component, shape `(size,)`."""
    parent = np.arange(size)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for a, b in pairs:
        one, other = root(a), root(b)
        parent[max(one, other)] = min(one, other)
    return np.fromiter((root(i) for i in range(size)), dtype=np.int64, count=size)


def _hashes(text: str) -> np.ndarray:
    """uint32 hash of each shingle (fewer where the text is shorter), before datasketch's mixing."""
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    if len(points) < SHINGLE:
        points = np.pad(points, (0, SHINGLE - len(points)))
    value = points[SHINGLE - 1 :].copy()
    for k in range(SHINGLE - 1):
        value = value * np.uint32(0x9E3779B1) + points[k : len(points) - SHINGLE + 1 + k]
    return _mix(value)


def _mix(value: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser on uint32: a bijection that spreads neighbouring values."""
    value = (value ^ (value >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    value = (value ^ (value >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return value ^ (value >> np.uint32(16))


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found: np.ndarray = known[place] == values
    return found


@functools.cache
def permutations() -> tuple[np.ndarray, np.ndarray]:
    """datasketch's permutations, two uint32 arrays of shape `(64,)`; `OutsideError` where it is missing."""
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise OutsideError(
            f"looking for near-duplicates needs datasketch ({error}); run `pip install 'unshot[tune]'`"
        ) from None
    a, b = MinHash(num_perm=BANDS * ROWS, seed=1, scheme="affine32").permutations
    return a, b


def signatures(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """MinHash values of several sets of uint32 hashes, shape `(sets, 64)`; equal to datasketch's `update_batch`."""
    a, b = permutations()
    joined = _mix(np.concatenate(hashes))
    starts = np.cumsum([0, *(len(h) for h in hashes[:-1])])
    return np.minimum.reduceat(joined[:, None] * a + b, starts, axis=0)


def _sketches(texts: Sequence[str], chosen: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Band keys, uint32 of shape `(16, texts)`, and the low byte of each MinHash value, shape `(texts, 64)`."""
    bands = np.empty((BANDS, len(chosen)), dtype=np.uint32)
    sketch = np.empty((len(chosen), BANDS * ROWS), dtype=np.uint8)
    start, waiting, size = 0, [], 0
    for number, index in enumerate(chosen, start=1):
        own = _hashes(plain(texts[int(index)]))
        rest = own[~_among(own, common)]
        waiting.append(rest if len(rest) else own)
        size += len(waiting[-1])
        if len(waiting) == BLOCK or size > BLOCK * 128 or number == len(chosen):
            values = signatures(waiting)
            stop = start + len(waiting)
            sketch[start:stop] = values.astype(np.uint8)
            for band in range(BANDS):
                key = np.zeros(len(values), dtype=np.uint32)
                for row in range(ROWS):
                    key = _mix(key * np.uint32(31) + values[:, band * ROWS + row])
                bands[band, start:stop] = key
            start, waiting, size = stop, [], 0
    return bands, sketch


def _candidates(bands: np.ndarray, sketch: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that share a band and whose estimated similarity is not hopeless (4 standard errors below)."""
    count = bands.shape[1]
    found: list[np.ndarray] = []
    for keys in bands:
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        for reach in range(1, min(REACH, count - 1) + 1):
            at = np.flatnonzero(ranked[:-reach] == ranked[reach:])
            if not len(at):
                break
            for part in np.array_split(at, len(at) // 100_000 + 1):
                a, b = order[part], order[part + reach]
                share = (sketch[a] == sketch[b]).mean(axis=1)
                good = share >= threshold - 0.2
                found.append(a[good].astype(np.uint64) * np.uint64(count) + b[good].astype(np.uint64))
    codes = np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)
    return (codes // np.uint64(max(1, count))).astype(np.int64), (codes % np.uint64(max(1, count))).astype(
        np.int64
    )
