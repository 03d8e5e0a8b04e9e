"""Figures that compare an export's logits with the reference's. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unshot.contracts.parity import LogitFigures


@dataclass
class Drift:
    """Sums over positions; `add` takes one sequence at a time so that no more than one is in memory."""

    tie: float
    positions: int = 0
    kl: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    same: int = 0
    same_or_tied: int = 0
    gap: list[float] = field(default_factory=list)
    reference_nll: float = 0.0
    export_nll: float = 0.0
    tokens: int = 0
    worst: float = 0.0

    def add(self, reference: np.ndarray, export: np.ndarray, following: np.ndarray) -> None:
        """Compare logits of shape `(positions, vocab)`; `following` holds the token id after each position."""
        width = min(reference.shape[1], export.shape[1])
        expected, found = reference[:, :width].astype(np.float64), export[:, :width].astype(np.float64)
        if not np.isfinite(found).all():
            found = np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
            self.worst = float("inf")
        true, guess = log_softmax(expected), log_softmax(found)
        self.positions += len(expected)
        self.kl.extend(np.maximum((np.exp(true) * (true - guess)).sum(axis=1), 0.0).tolist())
        self.cosine.extend(cosine(expected, found).tolist())
        best, other = expected.argmax(axis=1), found.argmax(axis=1)
        rows = np.arange(len(expected))
        gaps = expected[rows, best] - expected[rows, other]
        self.same += int((best == other).sum())
        self.same_or_tied += int((gaps <= self.tie).sum())
        self.gap.extend(gaps[best != other].tolist())
        self.worst = max(self.worst, float(np.abs(expected - found).max()))
        count = len(following)
        self.reference_nll -= float(true[rows[:count], following].sum())
        self.export_nll -= float(guess[rows[:count], following].sum())
        self.tokens += count

    def figures(self) -> LogitFigures:
        """The figures of `unshot.metrics.thresholds.Limits`, plus percentiles."""
        known = self.tokens > 0
        return LogitFigures(
            positions=self.positions,
            kl=float(np.mean(self.kl)),
            kl_p99=float(np.quantile(self.kl, 0.99)),
            kl_max=float(np.max(self.kl)),
            top1=self.same_or_tied / self.positions,
            top1_strict=self.same / self.positions,
            largest_gap=float(max(self.gap, default=0.0)),
            cosine=float(np.mean(self.cosine)),
            cosine_min=float(np.min(self.cosine)),
            largest_difference=self.worst if np.isfinite(self.worst) else None,
            perplexity_reference=float(np.exp(self.reference_nll / self.tokens)) if known else None,
            perplexity=float(np.exp((self.export_nll - self.reference_nll) / self.tokens)) if known else None,
        )


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row-wise cosine of logits less their mean: a constant added to all logits changes no probability."""
    a = first - first.mean(axis=1, keepdims=True)
    b = second - second.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(norms, 1e-30))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-softmax, shape unchanged."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
