"""The options of every command: their types, --out and --overwrite, how rows are read, --json, -q and -v.

The flags that stand for keys of the case file are in `unshot.flags`. A bad value ends in one line and exit code 2.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from unshot.console import Output
from unshot.errors import InputError, nearest

Command = Callable[..., Any]
# Counts beyond this overflow something further in, and nobody means them.
MOST = 10**9
LARGEST = sys.float_info.max
# Bytes of a file's name on the file systems in use (NAME_MAX).
LONGEST_NAME = 255


class Number(click.ParamType):
    """A finite number within bounds; `whole` for integers."""

    def __init__(
        self,
        *,
        ge: float | None = None,
        gt: float | None = None,
        le: float | None = None,
        lt: float | None = None,
        whole: bool = False,
        key: str = "",
    ) -> None:
        self.whole, self.key = whole, key
        self.name = "integer" if whole else "float"
        most = MOST if whole and le is None and lt is None else le
        self.bounds = [
            (sign, bound, holds)
            for sign, bound, holds in (
                (">", gt, float.__gt__),
                (">=", ge, float.__ge__),
                ("<", lt, float.__lt__),
                ("<=", most, float.__le__),
            )
            if bound is not None and bound != LARGEST
        ]

    def words(self) -> str:
        """What is accepted."""
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in self.bounds)
        return f"expected a {'whole ' if self.whole else ''}number {bounds}".rstrip()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        try:
            number = int(value) if self.whole else float(value)
            if not math.isfinite(number) or not all(
                holds(float(number), float(bound)) for _, bound, holds in self.bounds
            ):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            found = "NaN" if str(value).strip().lower() == "nan" else str(value)[:60]
            found += " (not finite)" if "inf" in found.lower() else ""
            name = "it" if param is None else param.opts[0]
            key = f" (`{self.key}`)" if self.key else ""
            raise click.UsageError(f"{name}{key} is {found}; {self.words()}", ctx) from None
        return number

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "INTEGER" if self.whole else "NUMBER"


SHARE = Number(ge=0, le=1)
# Above 0 and below 1: an error rate, a power, a threshold.
INNER_SHARE = Number(gt=0, lt=1)
POSITIVE = Number(gt=0)
NOT_NEGATIVE = Number(ge=0)
# A duration in seconds: at least 50 ms, at most a year.
SECONDS = Number(ge=0.05, le=366 * 86400)
SEED = Number(ge=0, le=2**32 - 1, whole=True)
PORT = Number(ge=1, le=65535, whole=True)


def whole(least: int = 0, most: int = MOST) -> Number:
    """A whole number of at least `least`."""
    return Number(ge=least, le=most, whole=True)


class Text(click.ParamType):
    """A text that is not empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.strip() or "\0" in text:
            self.fail("expected a text, found an empty one", param, ctx)
        return text


class PathName(click.ParamType):
    """A path; whether something is there is for whoever opens it to say."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        if not value.strip() or "\0" in value:
            self.fail("expected a path, found an empty text", param, ctx)
        try:
            if any(len(part) > LONGEST_NAME for part in os.fsencode(value).split(b"/")):
                self.fail(f"a file's name has at most {LONGEST_NAME} bytes", param, ctx)
            path = Path(value).expanduser()
            mode = path.stat().st_mode
        except (UnicodeError, RuntimeError):
            self.fail("expected a path, found a text that names none", param, ctx)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                self.fail(f"{value[:60]}: cannot be opened ({error.strerror})", param, ctx)
            return path  # it may be about to be made
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            self.fail(f"{value[:60]}: is a pipe or a device; give a file or a directory", param, ctx)
        return path


class TextOrFile(click.ParamType):
    """A text, or the name of a file that holds it (`unshot.case_file.text_or_file` tells which)."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from unshot.case_file import text_or_file

        try:
            return text_or_file(value)
        except InputError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TEXT|FILE"


class Names(click.ParamType):
    """Names in a list, comma-separated; of `known` ones where there are such."""

    name = "names"

    def __init__(self, known: Callable[[], Sequence[str]] = tuple) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        found = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
        found = [name.lower() for name in found] if self.known() else found
        if not all(found):
            self.fail(f"expected names, comma-separated, found {str(value)[:60]!r}", param, ctx)
        known = self.known()
        for name in found:
            if known and name not in known:
                self.fail(
                    f"unknown {name!r}; accepted: {', '.join(known)} ({nearest(name, known)})", param, ctx
                )
        return found

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{','.join(self.known()) or 'NAME,...'}]"


class Price(click.ParamType):
    """Token prices in dollars per million tokens, as `unshot.prices` reads them."""

    name = "price"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from unshot.prices import parse_prices

        try:
            return parse_prices(value) if isinstance(value, str) else value
        except InputError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "[MODEL:]input=IN,output=OUT[,cached=CACHED]|FILE"


class EmbedderName(click.ParamType):
    """An embedder by its name (an older one too), a model directory, or off."""

    name = "embedder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from unshot.engines.embedder import embedder_name

        return embedder_name(TEXT.convert(value, param, ctx))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NAME|DIR|off"


class Factor(click.ParamType):
    """`5-10` as the case's claim."""

    name = "low-high"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        low, _, high = str(value).partition("-")
        try:
            values = float(low), float(high or low)
            if not 0 < values[0] <= values[1] < math.inf:
                raise ValueError
        except ValueError:
            self.fail(
                f"expected LOW-HIGH with 0 < LOW <= HIGH, as 5-10, found {str(value)[:60]!r}", param, ctx
            )
        return {"low": values[0], "high": values[1]}

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "LOW-HIGH"


TEXT, PATH, TEXT_OR_FILE, PRICE, EMBEDDER = Text(), PathName(), TextOrFile(), Price(), EmbedderName()


class Option(click.Option):
    """An option whose older names go on working without standing in the help."""

    def __init__(self, *args: Any, older: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.older = tuple(older)
        self.opts = [*self.opts, *older]

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        every, self.opts = self.opts, [name for name in self.opts if name not in self.older]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = every


def output() -> Output:
    """The running command's `Output`."""
    return click.get_current_context().find_root().ensure_object(Output)


def _set_output(_: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        name, setting = {
            "json_mode": ("json_mode", True), "quiet": ("verbosity", -1), "verbose": ("verbosity", 1),
        }[parameter.name or ""]  # fmt: skip
        setattr(output(), name, setting)


def common(function: Command) -> Command:
    """Add --json, -q and -v to a command and hand it an `Output` as its `out` argument."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, out=output(), **kwargs)

    command: Command = wrapper
    for names, text in (
        (("-v", "--verbose"), "More detail on stderr, tracebacks of internal errors."),
        (("-q", "--quiet"), "No progress or logs; warnings only."),
        (("--json", "json_mode"), "Machine-readable result on stdout, nothing else there."),
    ):
        command = click.option(
            *names, is_flag=True, is_eager=True, expose_value=False, callback=_set_output, help=text
        )(command)
    return command


def out_options(
    text: str = "Directory to write.", what: str = "directory", *, required: bool = True
) -> Callable[[Command], Command]:
    """Add --out DIR, which the command gets as `final`, and --overwrite."""

    def decorate(function: Command) -> Command:
        function = click.option("--overwrite", is_flag=True, help=f"Replace the {what} where it exists.")(
            function
        )
        return click.option("--out", "final", type=PATH, required=required, help=text)(function)

    return decorate


def row_options(function: Command) -> Command:
    """Add the options that say how rows are read; the command gets them as one `RowOptions` named `rows_as`.

    Below `case_flags` they stand over what `[rows]` of the case file says.
    """

    @click.option(
        "--input-column",
        multiple=True,
        metavar="COL",
        help="Column or field of the input; several are joined.",
    )
    @click.option(
        "--input-template", type=TEXT_OR_FILE, help="Text or file with {{column}} slots that makes the input."
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
        from unshot.data.rows import Columns, RowOptions

        rows_as = RowOptions(Columns(input_column, output_column, input_template, system_column), keep_system)
        if "case" in kwargs:
            kwargs["case"].take_rows(rows_as)
            rows_as = kwargs["case"].rows_as()
        return function(*args, rows_as=rows_as, **kwargs)

    return wrapper
