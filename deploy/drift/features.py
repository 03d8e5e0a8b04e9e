"""Two-sample tests, one per feature. Statistics come from SciPy, the classifier from scikit-learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from deploy.answers import failed
from deploy.drift.sample import Inputs, words
from unshot.contracts.request_log import Request
from unshot.engines.embedder import Vectors

# Fewer rows than this on a side and a test is not made.
LEAST = 20
# A label expected fewer times than this on a side joins the others (Cochran 1954).
RARE = 5
TELLING = 6


@dataclass(frozen=True)
class Shift:
    """One feature's test: its p-value, and what changed in words."""

    feature: str
    p: float
    detail: str


def input_shifts(reference: Inputs, live: Inputs, embed: Vectors, *, seed: int = 0) -> list[Shift]:
    """Length, vocabulary and embedding."""
    found = [length(reference, live)]
    one, other = reference.distinct(), live.distinct()
    if one.texts is not None and other.texts is not None:
        found += [vocabulary(one, other, seed=seed), embedding(one, other, embed, seed=seed)]
    return [shift for shift in found if shift is not None]


def output_shifts(reference: Sequence[Request], live: Sequence[Request]) -> list[Shift]:
    """Labels, failures and uncertainty of one version's answers."""
    found = [labels(reference, live), failures(reference, live), uncertainty(reference, live)]
    return [shift for shift in found if shift is not None]


def length(reference: Inputs, live: Inputs) -> Shift | None:
    """Words of the input: two-sample Kolmogorov-Smirnov test."""
    a, b = (side.lengths[np.isfinite(side.lengths)] for side in (reference, live))
    if min(len(a), len(b)) < LEAST:
        return None
    p = float(stats.ks_2samp(a, b).pvalue)
    return Shift("length", p, f"median {np.median(a):.0f} -> {np.median(b):.0f} words")


def vocabulary(reference: Inputs, live: Inputs, *, seed: int) -> Shift | None:
    """Share of a text's words that are unknown to half of the reference: the other half against live (Mann-Whitney).

    Both sides are measured by texts they are not part of, so that they are alike where nothing changed.
    """
    assert reference.texts is not None and live.texts is not None
    if min(len(reference) // 2, len(live)) < LEAST:
        return None
    order = np.random.default_rng(seed).permutation(len(reference))
    half = len(order) // 2
    known = set().union(*(words(reference.texts[i]) for i in order[:half]))

    def unknown(texts: Sequence[str]) -> np.ndarray:
        each = [words(text) for text in texts]
        return np.array([len(w - known) / len(w) if w else 0.0 for w in each])

    a, b = unknown([reference.texts[i] for i in order[half:]]), unknown(live.texts)
    p = float(stats.mannwhitneyu(a, b, alternative="two-sided").pvalue)
    return Shift("vocabulary", p, f"unknown words {a.mean():.0%} -> {b.mean():.0%}")


def embedding(reference: Inputs, live: Inputs, embed: Vectors, *, seed: int) -> Shift | None:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): can the two be told apart?

    A linear classifier (kernel ridge regression on the two sides' signs, quick with few rows and many columns) learns
    on one half of both sides; its scores of the other halves are compared by Mann-Whitney's test, whose statistic is
    the area under the ROC curve.
    """
    if min(len(reference), len(live)) < 2 * LEAST:
        return None
    from sklearn.kernel_ridge import KernelRidge

    generator = np.random.default_rng(seed)
    halves = []
    for side in (reference, live):
        order = generator.permutation(len(side))
        halves.append((order[: len(order) // 2], order[len(order) // 2 :]))
    (train_a, test_a), (train_b, test_b) = halves
    sizes = len(train_a), len(train_b)
    seen = _stack(reference.vectors[train_a], live.vectors[train_b])
    model = KernelRidge(alpha=1.0, kernel="linear")
    # Each side weighs the same, and the sides' targets sum to zero.
    model.fit(seen, np.repeat([-1.0 / sizes[0], 1.0 / sizes[1]], sizes) * sum(sizes) / 2)
    a, b = model.predict(reference.vectors[test_a]), model.predict(live.vectors[test_b])
    result = stats.mannwhitneyu(b, a, alternative="greater")
    auc = float(result.statistic) / (len(a) * len(b))
    assert live.texts is not None
    told = embed.words(np.asarray(seen.T @ model.dual_coef_).ravel(), live.texts, TELLING)
    detail = f"told apart with AUC {auc:.2f}" + (f", live by: {', '.join(told)}" if told else "")
    return Shift("embedding", float(result.pvalue), detail)


def _stack(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if isinstance(a, np.ndarray):
        return np.concatenate([a, b])
    from scipy import sparse

    both: np.ndarray = sparse.vstack([a, b], format="csr")
    return both


def labels(reference: Sequence[Request], live: Sequence[Request]) -> Shift | None:
    """Labels that the answers state: chi-squared test of homogeneity, rare labels taken together."""
    a, b = (Counter(line.label for line in side if line.label is not None) for side in (reference, live))
    sizes = a.total(), b.total()
    if min(sizes) < LEAST:
        return None
    rare = {name for name in a | b if (a[name] + b[name]) * min(sizes) / sum(sizes) < RARE}
    table = [[side[name] for name in sorted((a | b).keys() - rare)] for side in (a, b)]
    rest = [sum(side[name] for name in rare) for side in (a, b)]
    if sum(rest) * min(sizes) / sum(sizes) >= RARE:
        table = [[*row, more] for row, more in zip(table, rest, strict=True)]
    if len(table[0]) < 2:
        return None
    p = float(stats.chi2_contingency(np.array(table), correction=False).pvalue)
    changes = sorted(((b[n] / sizes[1] - a[n] / sizes[0], n) for n in a | b), key=lambda c: -abs(c[0]))
    detail = ", ".join(f"{n} {a[n] / sizes[0]:.0%} -> {b[n] / sizes[1]:.0%}" for _, n in changes[:2])
    return Shift("labels", p, detail)


def failures(reference: Sequence[Request], live: Sequence[Request]) -> Shift | None:
    """Errors and answers outside the labels or schema: Fisher's exact test for more of them."""
    if min(len(reference), len(live)) < LEAST:
        return None
    bad = [sum(failed(line) for line in side) for side in (live, reference)]
    table = [[bad[0], len(live) - bad[0]], [bad[1], len(reference) - bad[1]]]
    p = float(stats.fisher_exact(table, alternative="greater").pvalue)
    return Shift("failures", p, f"{bad[1] / len(reference):.1%} -> {bad[0] / len(live):.1%}")


def uncertainty(reference: Sequence[Request], live: Sequence[Request]) -> Shift | None:
    """Mean log-probability of an answer's tokens: two-sample Kolmogorov-Smirnov test."""
    a, b = (np.array([x.logprob for x in side if x.logprob is not None]) for side in (reference, live))
    if min(len(a), len(b)) < LEAST:
        return None
    p = float(stats.ks_2samp(a, b).pvalue)
    return Shift("uncertainty", p, f"median log-probability {np.median(a):.3f} -> {np.median(b):.3f}")
