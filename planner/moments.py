"""Three moments to quantiles: Pearson type III through Wilson and Hilferty's cube root, and mixtures of it.

Every argument may be a float or an array; nothing here needs scipy, whose import alone would cost a cold plan 0.3 s.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Number = Any

_Z = {50.0: 0.0, 90.0: 1.2815516, 95.0: 1.6448536, 99.0: 2.3263479}


def lgamma(x: Number) -> Number:
    """log Gamma by Stirling's series, shifted up by three for small arguments."""
    y = x + 3.0
    series = (y - 0.5) * np.log(y) - y + 0.9189385332 + 1.0 / (12.0 * y) - 1.0 / (360.0 * y**3)
    return series - np.log(x * (x + 1.0) * (x + 2.0))


def normal(percentile: float) -> float:
    """Quantile of the standard normal at `percentile` (0-100)."""
    if percentile in _Z:
        return _Z[percentile]
    from statistics import NormalDist

    return NormalDist().inv_cdf(percentile / 100.0)


def cdf(z: Number) -> Number:
    """Standard normal distribution function, within 1.5e-4 (logistic with a cubic term)."""
    return 1.0 / (1.0 + 1.0 / _odds(z))


def _odds(z: Number) -> Number:
    return np.exp(np.clip((1.5976 + 0.07056 * z * z) * z, -60.0, 60.0))


def skew(variance: Number, third: Number) -> Number:
    return np.clip(third / np.maximum(variance, 1e-100) ** 1.5, 0.0, 3.9)


def pearson(mean: Number, variance: Number, third: Number, z: Number) -> Number:
    """Quantile from mean, variance and third cumulant (Pearson III through Wilson-Hilferty)."""
    g = skew(variance, third)
    k = np.maximum(g, 1e-3)
    unit = (2.0 / k) * (np.maximum(1.0 + k * z / 6.0 - k**2 / 36.0, 0.0) ** 3 - 1.0)
    return mean + np.sqrt(variance) * unit


def survival(mean: Number, variance: Number, third: Number, t: Number) -> Number:
    """P(X > t) for the same distribution."""
    k, inverse = _scale(variance, third)
    unit = (t - mean) * inverse
    z = (np.cbrt(np.maximum(1.0 + k * unit / 2.0, 0.0)) - 1.0 + k * k / 36.0) * (6.0 / k)
    return 1.0 - cdf(z)


def _scale(variance: Number, third: Number) -> tuple[Number, Number]:
    """Skew and inverse standard deviation: what does not change with the value asked for."""
    return np.maximum(skew(variance, third), 1e-3), 1.0 / np.sqrt(np.maximum(variance, 1e-100))


def fixed_wait(rho: Number, percentile: float) -> Number:
    """A percentile of the wait in M/D/1, in service times, good to a few per cent.

    Exact where it ends with the service under way; from there on the exponential tail, whose rate r solves
    rho (exp(r) - 1) = r.
    """
    rho = np.clip(rho, 1e-6, 0.97)
    beyond = 1.0 - percentile / 100.0
    first = np.maximum(np.log((1.0 - beyond) / (1.0 - rho)) / rho, 0.0)
    rate = -2.0 * np.log(rho)
    for _ in range(6):
        rate = rate - (np.log1p(rate / rho) - rate) / (1.0 / (rho + rate) - 1.0)
    tail = np.log((1.0 - rho) / (rho + rate - 1.0) / beyond) / rate
    return np.where(first <= 1.0, first, np.maximum(tail, 1.0))


def mix(parts: list[tuple[Number, ...]]) -> tuple[Number, Number, Number]:
    """Mean, variance and third cumulant of a mixture of `(weight, mean, variance, third)`."""
    mean = sum(w * m for w, m, _, _ in parts)
    variance = sum(w * (v + (m - mean) ** 2) for w, m, v, _ in parts)
    third = sum(w * (t + 3.0 * (m - mean) * v + (m - mean) ** 3) for w, m, v, t in parts)
    return mean, variance, third


def mixture_quantiles(parts: list[tuple[Number, ...]], percentiles: tuple[float, ...]) -> dict[float, Number]:
    """The percentiles of a mixture, all at once, by bisection on its survival function."""
    shape = np.broadcast_shapes(*(np.shape(x) for part in parts for x in part))
    # Shape (4, 1, parts, ...): weight, mean, variance, third cumulant.
    table = np.stack([[np.broadcast_to(x, shape) for x in part] for part in parts], axis=1)[:, None]
    weight, mean, variance, third = table
    target = np.reshape([1.0 - p / 100.0 for p in percentiles], (-1, *(1,) * len(shape)))
    low = np.minimum(mean[:, 0], mean[:, 1]) * 0.3 + 0.0 * target
    high = np.maximum(low, (mean + 8.0 * np.sqrt(variance)).max(1))
    k, inverse = _scale(variance, third)
    # In 32 bits, and with all that does not change taken out of the loop: this is most of a sweep's time.
    mean, weight, slope, shift, size, target, low, high = (
        np.asarray(x, dtype=np.float32)
        for x in (
            mean,
            weight,
            np.minimum(0.5 * k * inverse, 1e30),
            k * k / 36.0 - 1.0,
            6.0 / k,
            target,
            low,
            high,
        )
    )
    for _ in range(18):
        middle = np.float32(0.5) * (low + high)
        inside = np.maximum(np.float32(1.0) + slope * (middle[:, None] - mean), np.float32(1e-30))
        z = (np.exp(np.log(inside) * np.float32(1.0 / 3.0)) + shift) * size
        above = (weight / (np.float32(1.0) + _odds(z))).sum(1) > target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return dict(zip(percentiles, (0.5 * (low + high)).astype(float), strict=True))
