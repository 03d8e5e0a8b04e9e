"""Errors a user can act on, and the exit codes every command shares.

Each error is one line that says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_OK = 0
EXIT_NO = 1
EXIT_USAGE = 2
EXIT_OUTSIDE = 3


class UnshotError(Exception):
    """Base of every error unshot raises on purpose; `exit_code` is the process's exit status."""

    exit_code = EXIT_OUTSIDE

    def __init__(self, message: str) -> None:
        # One line, whatever a library put into the text.
        super().__init__(" ".join(message.split()))


class InputError(UnshotError):
    """Bad input or usage (exit 2): the user can mend it."""

    exit_code = EXIT_USAGE


class GateError(UnshotError):
    """The work was done and the answer is no (exit 1): a gate failed or a claim was not met."""

    exit_code = EXIT_NO


class OutsideError(UnshotError):
    """Something outside the program failed (exit 3): disk, memory, network, a missing library."""

    exit_code = EXIT_OUTSIDE


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return `did you mean a, b?` with the known names nearest to `name`, or the first few known ones."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=limit, cutoff=0.45)
    if not close:
        close = [n for n in names if name.lower()[:4] and name.lower()[:4] in n.lower()][:limit]
    if close:
        return f"did you mean {', '.join(close)}?"
    shown = ", ".join(names[:12])
    return f"known: {shown}{', ...' if len(names) > 12 else ''}"
