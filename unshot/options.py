"""The options of every command: their types, the flags that stand for keys of the case file, --json, -q and -v.

A flag that stands for a key takes its type, its bounds and its help from the case's records, so that it means the same
and takes the same forms on every command. A bad value ends in one line and exit code 2.
"""

from __future__ import annotations

import functools
import math
import os
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
            return Path(value).expanduser()
        except (UnicodeError, RuntimeError):
            self.fail("expected a path, found a text that names none", param, ctx)


class TextOrFile(click.ParamType):
    """A text, or the name of a file that holds it (`unshot.case.text_or_file` tells which)."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from unshot.case import text_or_file

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


# A flag and the key of the case file that it stands for, on every command that has it.
FLAGS = {
    "--prompt": "task.examples",
    "--inputs": "task.inputs",
    "--system": "task.system",
    "--instruction": "task.instruction",
    "--labels": "task.labels",
    "--answer-field": "task.answer_field",
    "--metric": "task.metric",
    "--judge": "task.judge",
    "--judge-model": "task.judge_model",
    "--judge-key-env": "task.judge_key_env",
    "--target": "task.target",
    "--current": "task.current",
    "--fails": "task.fails",
    "--examples-at-hand": "task.examples_at_hand",
    "--rate": "traffic.rate",
    "--peak-factor": "traffic.peak_factor",
    "--arrival-cv": "traffic.arrival_cv",
    "--output-tokens": "traffic.output_tokens",
    "--reasoning-tokens": "traffic.reasoning_tokens",
    "--offline": "traffic.offline",
    "--slo-ttft": "traffic.slo.ttft_ms",
    "--slo-tpot": "traffic.slo.tpot_ms",
    "--slo-e2e": "traffic.slo.e2e_ms",
    "--engine": "candidate.engine",
    "--kv-cache": "candidate.kv_cache",
    "--tensor-parallel": "candidate.tensor_parallel",
    "--max-sequences": "candidate.max_sequences",
    "--chunk": "candidate.chunk",
    "--min-replicas": "plan.min_replicas",
    "--cheaper-api": "plan.cheaper_api",
    "--method": "tune.method",
    "--teacher": "tune.teacher",
    "--rank": "tune.rank",
    "--layers": "tune.layers",
    "--virtual-tokens": "tune.virtual_tokens",
    "--learning-rate": "tune.learning_rate",
    "--epochs": "tune.epochs",
    "--patience": "tune.patience",
    "--max-length": "tune.max_length",
    "--init": "tune.init",
    "--loss-on": "tune.loss_on",
    "--chat-template": "tune.chat_template",
    "--gradient-checkpointing": "tune.gradient_checkpointing",
    "--mix": "tune.mix",
    "--mix-share": "tune.mix_share",
    "--augment-format": "tune.augment_format",
    "--embedder": "tune.embedder",
    "--strict": "tune.strict",
    "--to": "export.to",
    "--requests": "bench.requests",
    "--concurrency": "bench.concurrency",
    "--margin": "bench.margin",
    "--claim": "bench.claim",
}
# Names that a flag had on some command before; they go on working there.
OLDER = {"--prompt": ("--baseline-prompt",), "--system": ("--baseline-system",)}
# Keys of one yes or no that have a flag for the no as well.
BOTH_WAYS = ("tune.gradient_checkpointing",)


def case_flags(*names: str, help: dict[str, str] | None = None, **keys: str) -> Callable[[Command], Command]:
    """Add flags that stand for keys of the case file, and --case; the command gets the loaded case as `case`.

    `names` are flags of `FLAGS`; `keys` are flags of this command alone, with their key (`gpu="candidate.gpu"`);
    `help` says more than the case's records about a flag.
    """
    wanted = {name: FLAGS[name] for name in names}
    wanted |= {f"--{name.replace('_', '-')}": key for name, key in keys.items()}
    more = help or {}

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(*args: Any, case_path: Path | None, **kwargs: Any) -> Any:
            from unshot.case import load_case

            if (
                click.get_current_context().invoked_subcommand is not None
            ):  # a group: its command reads its own
                return None
            given = {key: kwargs.pop(_dest(key)) for key in wanted.values()}
            given = {key: list(v) or None if isinstance(v, tuple) else v for key, v in given.items()}
            return function(*args, case=load_case(case_path, given, output()), **kwargs)

        command = case_option(wrapper)
        for name, key in reversed(wanted.items()):
            command = _case_flag(name, key, more.get(name))(command)
        return command

    return decorate


def _dest(key: str) -> str:
    return f"case__{key.replace('.', '__')}"


def _case_flag(name: str, key: str, text: str | None) -> Callable[[Command], Command]:
    from unshot.case import keys

    if key == "bench.claim":
        return click.option(name, _dest(key), type=Factor(), help="Claimed factor, e.g. 5-10.")
    known = keys()[key]
    settings = option_settings(known)
    shown = text or known.text
    if known.default not in (None, [], "", False, True) and not settings.get("multiple"):
        shown += (
            f" [default: {known.default:g}]"
            if isinstance(known.default, float)
            else f" [default: {known.default}]"
        )
    declaration = f"{name}/--no-{name[2:]}" if key in BOTH_WAYS else name
    return click.option(
        declaration, _dest(key), cls=Option, older=OLDER.get(name, ()), default=None, help=shown, **settings
    )


def option_settings(key: Any) -> dict[str, Any]:
    """The click settings of a flag for a key of the case file."""
    from msgspec import inspect

    kind = key.inner
    if isinstance(kind, inspect.ListType):
        return (
            {"type": Names(key.accepted)}
            if key.name.startswith("task.")
            else {"type": TEXT, "multiple": True}
        )
    if key.accepted():
        return {"type": click.Choice(key.accepted())}
    if isinstance(kind, inspect.BoolType):
        return {"is_flag": True}
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        bounds = {name: getattr(kind, name) for name in ("ge", "gt", "le", "lt")}
        return {"type": Number(whole=isinstance(kind, inspect.IntType), key=key.name, **bounds)}
    if isinstance(kind, inspect.CustomType):
        return {"type": PATH}
    if key.name == "tune.embedder":
        return {"type": EMBEDDER}
    return {"type": TEXT_OR_FILE if key.text_or_file else TEXT}


def split_options(function: Command) -> Command:
    """Add the options that split rows; below `case_flags` they stand over `[split]` of the case file, where they go."""

    @click.option(
        "--group-by",
        cls=Option,
        older=("--group",),
        metavar="COL",
        help="Split with the rows of each value of this column together.",
    )
    @click.option(
        "--time", metavar="COL", help="Split by time: train on the oldest rows, test on the newest."
    )
    @click.option("--shares", help="Train/validation/test of the split; default: 80/10/10.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, case: Any, group_by: str | None, time: str | None, shares: str | None, **kwargs: Any
    ) -> Any:
        given = {"group_by": group_by, "time": time, "shares": shares}
        given |= {name: kwargs.pop(name, None) for name in ("validation", "test")}
        for name, value in given.items():
            if value is not None:
                setattr(case.split, name, value)
        return function(*args, case=case, **kwargs)

    return wrapper


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


def case_option(function: Command) -> Command:
    """Add --case FILE (default: ./unshot.toml if it is there)."""
    return click.option(
        "--case",
        "case_path",
        type=PATH,
        default=None,
        help="Case file; default ./unshot.toml if it is there.",
    )(function)


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
            rows_as = kwargs["case"].rows_as(rows_as)
        return function(*args, rows_as=rows_as, **kwargs)

    return wrapper
