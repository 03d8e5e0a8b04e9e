"""A lock file beside a place that one process writes at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is removed afterwards.

    Raises `BlockingIOError` where another process holds it, unless `wait`; `OSError` where it cannot be made. Nobody
    removes a lock that another holds, and a lock on a file that was removed meanwhile counts for nothing: else the
    third process would lock a new file while the first still writes.
    """
    while True:
        with path.open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _is_there(path, lock.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
