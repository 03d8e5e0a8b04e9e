"""Figures as short text: for axes, tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable

# What a formula may begin with, the full-width forms too.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def number(value: float) -> str:
    """A short number for an axis or a label: 1,234 · 12.3 · 0.0042 · 1.2e-06 · 3.4M."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}B"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    if size < 1e-4:
        return f"{value:.1e}"
    return f"{value:.3g}"


def dollars(value: float) -> str:
    """`number` with a dollar sign."""
    if not math.isfinite(value):
        return number(value)
    size = abs(value)
    text = f"{size:.2f}" if 1 <= size < 100 and round(size, 2) != round(size) else number(size)
    return f"{'-' if value < 0 else ''}${text}"


def milliseconds(value: float) -> str:
    """A time given in milliseconds: 0.42 ms · 38 ms · 1.2 s."""
    return f"{number(value / 1000)} s" if abs(value) >= 1000 else f"{number(value)} ms"


def sheet_cell(text: str) -> str:
    """A cell of a CSV sheet that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    return f"'{text}" if text.lstrip(" \u00a0\u3000")[:1] in FORMULA and text.strip() else text


def months(value: float | None) -> str:
    """A payback time."""
    if value is None:
        return "never"
    return "at once" if value < 0.05 else f"{value:.1f} months" if value < 100 else "over 8 years"


def per_second(value: float | None, beside: float | None = None) -> str:
    """A break-even rate: requests per second, or per hour if that (or the figure it stands `beside`) is small."""
    if value is None:
        return "never"
    if value == 0:
        return "always"
    return f"{number(value)}/s" if (beside or value) >= 0.1 else f"{number(value * 3600)}/h"


def share(value: float | None) -> str:
    """A utilisation; empty if there is none."""
    if value is None:
        return ""
    return "under 1%" if value < 0.01 else f"{value:.0%}"


def interval(low: float | None, high: float | None, form: Callable[[float], str] = dollars) -> str:
    """`low to high`; an open end where a bound is not finite."""
    return f"{form(low) if low is not None else '–'} to {form(high) if high is not None else 'never'}"
