"""Where text goes: results on stdout, everything else (progress, logs, warnings) on stderr.

`rich` is imported on first use so that `unshot --help` stays fast.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from unshot.secret import hide

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
            self._err = plain_console(stderr=True)
        return self._err

    def log(self, message: str) -> None:
        """A step worth knowing; hidden by -q."""
        if self.verbosity >= 0:
            self.err.print(message, soft_wrap=True)

    def detail(self, message: str) -> None:
        """Shown only with -v."""
        if self.verbosity >= 1:
            self.err.print(message, style="dim", soft_wrap=True)

    def warn(self, message: str) -> None:
        """A warning; shown even with -q."""
        self.err.print(f"warning: {message}", style="yellow", soft_wrap=True)

    def result(self, payload: Any, *renderables: RenderableType) -> None:
        """The command's result: `payload` as JSON in JSON mode, else the rich renderables (or text) on stdout."""
        if self.json_mode:
            sys.stdout.write(json_line(payload))
            sys.stdout.flush()
            self.result_printed = True
            return
        # Into a file or a pipe, tables get the width that they need rather than the 80 columns rich assumes.
        piped = not sys.stdout.isatty()
        out = plain_console(width=140 if piped and "COLUMNS" not in os.environ else None)
        for item in renderables:
            # A text may be a file's content, such as a crontab's line: it is not broken there.
            out.print(item, soft_wrap=piped and isinstance(item, str))

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


# What a terminal acts on: C0 and C1 controls but for tab and line feed, and marks that turn the direction of text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` for a terminal: without known secrets, controls shown as a replacement character."""
    return CONTROLS.sub("\ufffd", hide(text)).encode("utf-8", "replace").decode()


def json_line(payload: Any) -> str:
    """`payload` as JSON for stdout: without known secrets, what a terminal would act on escaped."""
    text = CONTROLS.sub(lambda m: f"\\u{ord(m[0]):04x}", hide(dumps(payload)))
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A rich console that takes text as text: no markup, no emoji codes, no escapes of anybody's but its own."""
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                plain = segment.text if segment.control else printable(segment.text)
                yield segment if plain == segment.text else Segment(plain, segment.style)

    return PlainConsole(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


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
