"""The user's cache directory: what is made once, and small results, so that a repeated plan starts at once.

The keys of results hold everything that a result depends on (versions, dates, the load). Written are their SHA-256
and the result: prices and simulated latencies, never a prompt. A result that cannot be read or written changes nothing
but the time. `UNSHOT_NO_CACHE=1` turns these off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unshot import __version__
from unshot.locks import exclusive

KEPT = 500


def cache_dir() -> Path:
    """`$UNSHOT_CACHE`, else `unshot` under the platform's user cache directory."""
    if os.environ.get("UNSHOT_CACHE"):
        return Path(os.environ["UNSHOT_CACHE"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "unshot"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unshot"


@contextlib.contextmanager
def making(name: str) -> Iterator[Path]:
    """The place of `name` in the cache while no other process makes it; waits for one that does."""
    place = cache_dir() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(place.with_name(f".{place.name}.making"), wait=True):
        yield place


def made_once(name: str, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """The place of `name` in the cache, which `make` makes where it is not whole, in one process alone."""
    place = cache_dir() / name
    if not is_whole(place):
        with making(name):
            if not is_whole(place):  # else another process was faster
                make(place)
    return place


def cached(kind: str, key: Any, compute: Callable[[], Any]) -> Any:
    """The JSON value that `compute` gives for `key` (anything with a stable `repr`), from the cache where it is."""
    if os.environ.get("UNSHOT_NO_CACHE"):
        return compute()
    path = _place(kind, key)
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    value = compute()
    with contextlib.suppress(OSError):
        _write(path, json.dumps(value))
    return value


def digest(value: Any) -> str:
    """Hex SHA-256 of a value's `repr`: stands for it in a key where it is long and asked for more than once."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _place(kind: str, key: Any) -> Path:
    return cache_dir() / "plan" / f"{kind}-{digest((__version__, kind, key))[:32]}.json"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = list(path.parent.glob("*.json"))
    if len(kept) >= KEPT:  # a fifth goes at once, so that not every write asks for all times
        for stale in sorted(kept, key=lambda p: p.stat().st_mtime)[: KEPT // 5]:
            stale.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@functools.cache
def package_state(name: str) -> tuple[str, int, int] | None:
    """What tells one installed version of a package or module from another in a key, without an import of it."""
    spec = importlib.util.find_spec(name)
    return stat_of(Path(spec.origin)) if spec and spec.origin else None


def stat_of(path: Path) -> tuple[str, int, int] | None:
    """Name, size and time of a file, None where it is not: a file's place in a key."""
    try:
        found = path.stat()
    except OSError:
        return None
    return str(path), found.st_size, found.st_mtime_ns
