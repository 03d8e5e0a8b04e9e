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


def row_options(function: Command) -> Command:
    """Add the options that say how rows are read; the command gets them as one `RowOptions` named `rows_as`."""

    @click.option(
        "--input-column",
        multiple=True,
        metavar="COL",
        help="Column or field of the input; several are joined.",
    )
    @click.option(
        "--input-template", metavar="TEXT", help="Text or file with {{column}} slots that makes the input."
    )
    @click.option("--output-column", metavar="COL", help="Column or field of the answer.")
    @click.option(
        "--system-column", metavar="COL", help="Column of a row's own system prompt; default: system."
    )
    @click.option("--keep-system", is_flag=True, help="Leave an old prompt that the rows hold where it is.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        input_column: tuple[str, ...],
        input_template: str | None,
        output_column: str | None,
        system_column: str | None,
        keep_system: bool,
        **kwargs: Any,
    ) -> Any:
        from unshot.data.rows import Columns, RowOptions, text_or_file

        columns = Columns(input_column, output_column, text_or_file(input_template), system_column)
        return function(*args, rows_as=RowOptions(columns, keep_system), **kwargs)

    return wrapper
