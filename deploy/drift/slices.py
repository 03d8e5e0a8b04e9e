"""Parts of the traffic in which the model is worse than elsewhere: by tag, input length, answer, and kind of input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from deploy.answers import LoggedRequest, failed, right, said
from deploy.drift.sample import Inputs, words
from unshot.contracts.request_log import Feedback, Request
from unshot.contracts.task import Task

# A slice and what is outside of it have at least this many requests.
LEAST = 10
# With this many judged answers slices are compared by what is wrong, else by failures alone.
JUDGED = 30
CLUSTERS = 6
RATE = 0.05


@dataclass(frozen=True)
class Slice:
    """A part of the traffic: how often it is bad inside and outside, and the p-value corrected for all slices."""

    name: str
    rows: int
    bad: int
    share: float
    elsewhere: float
    p: float
    q: float

    @property
    def worse(self) -> bool:
        """Whether it is named: expected share of wrongly named slices at most 5%."""
        return self.q <= RATE


def verdicts(
    lines: Sequence[Request], feedback: Mapping[str, Feedback], task: Task | None
) -> tuple[str, np.ndarray]:
    """What is counted and whether each line is bad: 1, 0, or NaN where it is not known, shape `(lines,)`."""
    wrong = np.full(len(lines), np.nan)
    for index, line in enumerate(lines):
        if line.id in feedback and not line.shadow:
            asked = LoggedRequest(line.id, line.time, line.unit, line.assigned, tries=[line])
            good = right(asked, feedback[line.id], task)
            wrong[index] = np.nan if good is None else float(not good)
    if int(np.isfinite(wrong).sum()) >= JUDGED:
        return "wrong", wrong
    return "failed", np.array([float(failed(line)) for line in lines])


def find(
    lines: Sequence[Request], inputs: Inputs, bad: np.ndarray, task: Task | None, *, seed: int = 0
) -> list[Slice]:
    """All slices that are large enough, worst first. One-sided Fisher tests, Benjamini-Hochberg over all slices."""
    known = np.isfinite(bad)
    members = {**_tags(lines), **_lengths(inputs), **_answers(lines, task), **_clusters(inputs, seed)}
    rows = []
    for name, inside in members.items():
        mine, other = bad[inside & known], bad[~inside & known]
        if min(len(mine), len(other)) < LEAST:
            continue
        table = [[mine.sum(), len(mine) - mine.sum()], [other.sum(), len(other) - other.sum()]]
        p = float(stats.fisher_exact(np.array(table, dtype=int), alternative="greater").pvalue)
        rows.append((name, len(mine), int(mine.sum()), float(mine.mean()), float(other.mean()), p))
    if not rows:
        return []
    corrected = stats.false_discovery_control([r[-1] for r in rows])
    found = [Slice(*row, float(q)) for row, q in zip(rows, corrected, strict=True)]
    return sorted(found, key=lambda s: (s.q, s.p, -s.share))


def _tags(lines: Sequence[Request]) -> dict[str, np.ndarray]:
    names = {line.slice for line in lines if line.slice is not None}
    return {f"slice {n}": np.array([line.slice == n for line in lines]) for n in sorted(names)}


def _lengths(inputs: Inputs) -> dict[str, np.ndarray]:
    sizes = inputs.lengths
    known = sizes[np.isfinite(sizes)]
    if len(known) < 4 * LEAST:
        return {}
    edges = sorted({math.floor(e) for e in np.quantile(known, [0.25, 0.5, 0.75])})
    bounds = list(zip([-np.inf, *edges], [*edges, np.inf], strict=True))
    names = [
        f"up to {high:.0f} words" if low == -np.inf else f"over {low:.0f} words" if high == np.inf
        else f"{low + 1:.0f} to {high:.0f} words"
        for low, high in bounds
    ]  # fmt: skip
    return {n: (sizes > low) & (sizes <= high) for n, (low, high) in zip(names, bounds, strict=True)}


def _answers(lines: Sequence[Request], task: Task | None) -> dict[str, np.ndarray]:
    stated = [said(line, task) if line.label is not None or task is not None else None for line in lines]
    names = {s for s in stated if s is not None}
    return (
        {f"answer {n}": np.array([s == n for s in stated]) for n in sorted(names)} if len(names) < 100 else {}
    )


def _clusters(inputs: Inputs, seed: int) -> dict[str, np.ndarray]:
    """Kinds of inputs, by k-means on the first components of their vectors, named by their own words."""
    if inputs.texts is None or len(inputs) < 2 * CLUSTERS * LEAST:
        return {}
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    vectors = inputs.vectors
    if vectors.shape[1] > 50:
        vectors = TruncatedSVD(n_components=20, random_state=seed).fit_transform(vectors)
    code = KMeans(n_clusters=CLUSTERS, n_init=3, random_state=seed).fit_predict(vectors)
    each = [words(text) for text in inputs.texts]
    found = {}
    for number in range(CLUSTERS):
        inside = code == number
        found[f"inputs about {_name(each, inside)}"] = inside
    return found


def _name(each: Sequence[frozenset[str]], inside: np.ndarray) -> str:
    """The three words whose share inside is most above that outside."""
    counts: dict[str, list[int]] = {}
    for own, mine in zip(each, inside, strict=True):
        for word in own:
            counts.setdefault(word, [0, 0])[int(mine)] += 1
    size = max(1, int(inside.sum())), max(1, int((~inside).sum()))
    ranked = sorted(counts, key=lambda w: (counts[w][0] / size[1] - counts[w][1] / size[0], w))
    return ", ".join([w for w in ranked if len(w) > 3][:3])
