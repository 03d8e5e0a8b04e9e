"""Where text goes: results on stdout, everything else (progress, logs, warnings) on stderr.

`rich` is imported on first use so that `unshot --help` stays fast.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress


class Output:
    """How one command talks: `json_mode` puts only JSON on stdout; verbosity is -1 (quiet), 0 or 1."""

    def __init__(self, *, json_mode: bool = False, verbosity: int = 0) -> None:
        self.json_mode = json_mode
        self.verbosity = verbosity
        self.result_printed = False  # whether a result is on stdout, which then stays the only thing there
        self._err: Console | None = None

    @property
    def err(self) -> Console:
        """The rich console on stderr."""
        if self._err is None:
            from rich.console import Console

            self._err = Console(stderr=True, highlight=False)
        return self._err

    def log(self, message: str) -> None:
        """A step worth knowing; hidden by -q."""
        if self.verbosity >= 0:
            self.err.print(message, markup=False, soft_wrap=True)

    def detail(self, message: str) -> None:
        """Shown only with -v."""
        if self.verbosity >= 1:
            self.err.print(message, markup=False, style="dim", soft_wrap=True)

    def warn(self, message: str) -> None:
        """A warning; shown even with -q."""
        self.err.print(f"warning: {message}", markup=False, style="yellow", soft_wrap=True)

    def result(self, payload: Any, *renderables: RenderableType) -> None:
        """The command's result: `payload` as JSON in JSON mode, else the rich renderables (or text) on stdout."""
        if self.json_mode:
            sys.stdout.write(dumps(payload) + "\n")
            sys.stdout.flush()
            self.result_printed = True
            return
        from rich.console import Console

        # Into a file or a pipe, tables get the width that they need rather than the 80 columns rich assumes.
        piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        out = Console(highlight=False, width=140 if piped else None)
        for item in renderables:
            out.print(item)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A rich progress display on stderr (silent with -q, plain when stderr is not a terminal)."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.err, disable=self.verbosity < 0) as progress:
            yield progress


def dumps(payload: Any) -> str:
    """JSON text that any parser takes: NaN and infinity become null, tuples lists, paths strings."""
    return json.dumps(jsonable(payload), indent=2, ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """`value` with only JSON types in it (numpy scalars and arrays, dataclasses and records included)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    for names in ("__struct_fields__", "__dataclass_fields__"):
        if hasattr(value, names):
            return {k: jsonable(getattr(value, k)) for k in getattr(value, names)}
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)
