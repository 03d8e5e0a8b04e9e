"""Which labelled rows are worth a person's minute: a uniform sample for an honest error rate, and a queue of doubts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unshot.errors import OutsideError

Why = Literal["random", "likely wrong", "uncertain", "boundary", "rare", "far"]
# Share of the queue that goes to likely wrong labels, where there are so many.
WRONG = 0.7
FOLDS = 5
# Dimensions to which hashed words are reduced before a classifier learns from them.
DIMENSIONS = 256
# Rows of a rare class in the queue.
PER_CLASS = 3


@dataclass(frozen=True)
class Labelled:
    """What selection looks at, by row: the class (None: not a task of classes), confidence and margin if known."""

    texts: Sequence[str]
    classes: Sequence[str] | None
    confidence: Sequence[float | None]
    margin: Sequence[float | None]


@dataclass(frozen=True)
class Chosen:
    """A row for review, why, and the class that its neighbours speak for (None: the same or none)."""

    row: int
    why: Why
    second: str | None = None


def select(data: Labelled, vectors: Any, *, queue: int, sample: int, seed: int) -> list[Chosen]:
    """`sample` rows drawn uniformly, then up to `queue` doubtful ones, the most doubtful first, without repeats.

    `vectors` has a row per text, dense or sparse.
    """
    count = len(data.texts)
    drawn = random.Random(f"review {seed} {count}").sample(range(count), min(sample, count))
    given = _probabilities(data.classes, vectors, seed) if data.classes else None
    lists: dict[Why, Iterator[int]] = {
        "uncertain": iter(uncertain(data)),
        "boundary": iter(boundary(given) if given else []),
        "rare": iter(rare(data.classes) if data.classes else []),
        "far": iter(k_centre(vectors, min(count, queue + len(drawn)))),
    }
    taken, chosen = set(drawn), [Chosen(row, "random", _second(given, row)) for row in drawn]
    size = min(count, len(drawn) + queue)
    wrong = [row for row in (likely_wrong(given) if given else []) if row not in taken]
    for row in wrong[: round(WRONG * queue)]:
        taken.add(row)
        chosen.append(Chosen(row, "likely wrong", _second(given, row)))
    while len(chosen) < size and lists:
        for why in list(lists):
            found = next((r for r in lists[why] if r not in taken), None)
            if found is None:
                del lists[why]
            elif len(chosen) < size:
                taken.add(found)
                chosen.append(Chosen(found, why, _second(given, found)))
    return chosen


@dataclass(frozen=True)
class Given:
    """Held-out class probabilities of the rows whose class has enough others; `place` is a row's position there."""

    rows: np.ndarray
    classes: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    place: dict[int, int]


def _probabilities(classes: Sequence[str], vectors: Any, seed: int) -> Given | None:
    """By a logistic regression on the vectors, each row predicted from folds without it. None for one class."""
    counts = Counter(classes)
    names = sorted(name for name, n in counts.items() if n >= FOLDS)
    if len(names) < 2:
        return None
    try:
        from scipy import sparse
        from sklearn.decomposition import TruncatedSVD
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    except ImportError as error:
        raise OutsideError(
            f"choosing rows needs scikit-learn ({error}); run `pip install 'unshot[review]'`"
        ) from None

    rows = np.array([i for i, name in enumerate(classes) if name in set(names)])
    labels = np.array([names.index(classes[i]) for i in rows])
    own = vectors[rows]
    if sparse.issparse(own):
        own = own.tocsc()
        own = own[:, own.getnnz(axis=0) > 1]  # most hashed columns are empty
        size = min(DIMENSIONS, len(rows) // 2, own.shape[1] - 1)
        own = TruncatedSVD(size, random_state=seed).fit_transform(own) if size > 0 else own.toarray()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(C=10.0, max_iter=300)
    found = cross_val_predict(model, own, labels, cv=folds, method="predict_proba")
    return Given(rows, names, labels, found, {int(row): i for i, row in enumerate(rows)})


def likely_wrong(given: Given) -> list[int]:
    """Rows whose label is likely wrong, the likeliest first: confident learning (Northcutt, Jiang and Chuang 2021,
    JAIR 70) by cleanlab. Empty where that is not installed: see `has_cleanlab`."""
    if not has_cleanlab():
        return []
    from cleanlab.filter import find_label_issues

    found = find_label_issues(
        given.labels,
        given.probabilities,
        filter_by="predicted_neq_given",
        return_indices_ranked_by="normalized_margin",
        n_jobs=1,
    )
    return [int(row) for row in given.rows[found]]


def has_cleanlab() -> bool:
    """Whether likely wrong labels can be looked for."""
    try:
        import cleanlab.filter  # noqa: F401
    except ImportError:
        return False
    return True


def uncertain(data: Labelled) -> list[int]:
    """Rows whose votes were not all equal, or whose answer had another close to it, the most uncertain first."""
    split = [(c, i) for i, c in enumerate(data.confidence) if c is not None and c < 1]
    close = sorted((m, i) for i, m in enumerate(data.margin) if m is not None)
    first = [i for _, i in sorted(split)]
    return [*first, *(i for _, i in close[: len(close) // 4] if i not in set(first))]


def boundary(given: Given) -> list[int]:
    """Rows between two classes: the smallest lead of the first over the second first."""
    top = np.sort(given.probabilities, axis=1)[:, -2:]
    return [int(row) for row in given.rows[np.argsort(top[:, 1] - top[:, 0], kind="stable")]]


def rare(classes: Sequence[str]) -> list[int]:
    """Up to `PER_CLASS` rows of each class that has less than half of an even share, the rarest first."""
    counts = Counter(classes)
    few = [
        name
        for name, n in sorted(counts.items(), key=lambda p: (p[1], p[0]))
        if n < len(classes) / len(counts) / 2
    ]
    return [i for name in few for i in [i for i, c in enumerate(classes) if c == name][:PER_CLASS]]


def k_centre(vectors: Any, count: int) -> list[int]:
    """Rows that are far from all earlier ones (the greedy k-centre of Gonzalez 1985), by cosine."""
    from scipy import sparse

    dense = not sparse.issparse(vectors)
    norms = np.linalg.norm(vectors, axis=1) if dense else np.sqrt(vectors.multiply(vectors).sum(axis=1)).A1
    scale = 1 / np.maximum(norms, 1e-12)
    unit = vectors * scale[:, None] if dense else sparse.diags(scale) @ vectors

    def likeness(row: int) -> np.ndarray:
        found = unit @ unit[row] if dense else (unit @ unit[row].T).toarray().ravel()
        return np.asarray(found)

    centre = np.asarray(unit.mean(axis=0)).ravel()
    found = [int(np.argmax(np.asarray(unit @ centre).ravel()))]
    nearest = likeness(found[0])
    while len(found) < min(count, len(nearest)):
        nearest[found[-1]] = np.inf
        found.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, likeness(found[-1]))
    return found[1:]


def _second(given: Given | None, row: int) -> str | None:
    if given is None or row not in given.place:
        return None
    at = given.place[row]
    best = int(given.probabilities[at].argmax())
    return given.classes[best] if best != given.labels[at] else None
