"""Moments on the command line."""

from __future__ import annotations

from datetime import UTC, datetime

from unshot.errors import InputError


def moment(text: str | None, option: str) -> float | None:
    """ISO 8601 (UTC where it names no zone) or seconds since 1970, as seconds; None stays None."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{option} is `{text}`; give ISO 8601, e.g. 2026-01-31T12:00, or seconds since 1970"
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
