"""Damped least squares with a robust loss, for a handful of numbers; `unshot plan` never loads scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROBUST = 0.1  # log error beyond which a row's pull grows only linearly


def loss(r: np.ndarray, x: np.ndarray, *, weight: np.ndarray, toward: np.ndarray, robust: float) -> float:
    """Pseudo-Huber(r) + half of |weight (x - toward)|^2: what `least_squares` makes small. `r` is residual(x)."""
    data = robust**2 * np.sum(np.sqrt(1 + (r / robust) ** 2) - 1)
    return float(data + 0.5 * np.sum((weight * (x - toward)) ** 2))


def least_squares(
    residual: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    *,
    weight: np.ndarray,
    toward: np.ndarray,
    rounds: int = 60,
    robust: float = ROBUST,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise pseudo-Huber(residual(x)) + |weight (x - toward)|^2; return x and its covariance.

    `residual` maps (k,) to (n,); `weight`, `toward` are (k,). The covariance, (k, k), is the inverse curvature
    scaled by the residual variance.
    """

    def of(r: np.ndarray, x: np.ndarray) -> float:
        return loss(r, x, weight=weight, toward=toward, robust=robust)

    x = np.array(start, dtype=float)
    r = residual(x)
    now, damping = of(r, x), 1e-2
    curvature = np.eye(len(x))
    for _ in range(rounds):
        jacobian = np.empty((len(r), len(x)))
        for j in range(len(x)):
            moved = x.copy()
            moved[j] += 1e-4
            jacobian[:, j] = (residual(moved) - r) / 1e-4
        pull = 1.0 / np.sqrt(1 + (r / robust) ** 2)
        curvature = jacobian.T @ (jacobian * pull[:, None]) + np.diag(weight**2)
        slope = jacobian.T @ (pull * r) + weight**2 * (x - toward)
        for _ in range(8):
            step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -slope)
            tried = residual(x + step)
            new = of(tried, x + step)
            if new < now:
                break
            damping *= 4.0
        else:
            break
        gained = now - new
        x, r, now, damping = x + step, tried, new, max(damping / 5.0, 1e-9)
        if gained < 1e-9:
            break
    variance = float(np.sum(r**2)) / max(1, len(r) - len(x))
    return x, np.linalg.inv(curvature) * max(variance, 1e-4)
