"""What every command line shares: --json, -q, -v, and how errors become one line and an exit code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from unshot.console import Output

Command = Callable[..., Any]


def common(function: Command) -> Command:
    """Add --json, -q and -v to a command and hand it an `Output` as its `out` argument."""

    @click.option(
        "--json", "json_mode", is_flag=True, help="Machine-readable result on stdout, nothing else there."
    )
    @click.option("-q", "--quiet", is_flag=True, help="No progress or logs; warnings only.")
    @click.option(
        "-v", "--verbose", is_flag=True, help="More detail on stderr, tracebacks of internal errors."
    )
    @functools.wraps(function)
    def wrapper(*args: Any, json_mode: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        out = click.get_current_context().find_root().ensure_object(Output)
        out.json_mode, out.verbosity = json_mode, 1 if verbose else -1 if quiet else 0
        return function(*args, out=out, **kwargs)

    return wrapper


def case_option(function: Command) -> Command:
    """Add --case FILE (default: ./unshot.toml where it exists)."""
    return click.option(
        "--case",
        "case_path",
        type=click.Path(path_type=Path),
        default=None,
        help="Case file; default ./unshot.toml where there is one.",
    )(function)
