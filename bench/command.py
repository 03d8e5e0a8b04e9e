"""`unshot bench`."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.tools import server_flags
from unshot.engines.registry import spec_forms
from unshot.engines.server import serve_forms
from unshot.flags import case_flags
from unshot.lazy import LazyGroup
from unshot.metrics.thresholds import ERROR_RATE
from unshot.options import PATH, POSITIVE, PRICE, SHARE, Option, common, out_options, row_options, whole

if TYPE_CHECKING:
    from bench.traffic import ServerOptions
    from unshot.case import Case
    from unshot.console import Output
    from unshot.data.rows import RowOptions
    from unshot.prices import Prices

SPEC = f"{spec_forms()}, http://HOST:PORT/v1, {serve_forms()}"


# A tool without a line is not listed.
TOOLS = {
    "load": ("bench.tools:load", "Drive one server with a load and report its figures."),
    "sweep": ("bench.tools:sweep", "Raise the load on one server from idle to saturation and find the knee."),
    "compare": ("bench.tools:compare", "Flag regressions between two reports."),
    "golden": ("bench.tools:golden", ""),
}


@dataclass(frozen=True)
class SideFlags:
    """The flags that each side has of its own."""

    model: str
    key_env: str | None
    per_hour: float | None
    # Which flag the price per hour is from.
    flag: str
    machines: int
    price: Prices | None


def side_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Model, key and price of each side; the command gets them as `sides`, by name."""

    @functools.wraps(function)
    def wrapper(*args: Any, price_per_hour: float | None, **kwargs: Any) -> Any:
        sides = {}
        for side in ("baseline", "candidate"):
            own = kwargs.pop(f"{side}_price_per_hour")
            sides[side] = SideFlags(
                kwargs.pop(f"{side}_model"),
                kwargs.pop(f"{side}_key_env"),
                price_per_hour if own is None else own,
                "--price-per-hour" if own is None else f"--{side}-price-per-hour",
                kwargs.pop(f"{side}_machines"),
                kwargs.pop(f"{side}_price"),
            )
        return function(*args, sides=sides, **kwargs)

    command: Callable[..., Any] = wrapper
    for side in ("candidate", "baseline"):
        for option in reversed(
            (
                click.option(f"--{side}-model", default="default", help=f"Servers: the {side}'s model name."),
                click.option(f"--{side}-key-env", help=f"Servers: the variable of the {side}'s own key."),
                click.option(
                    f"--{side}-price",
                    cls=Option,
                    older=(f"--{side}-token-price",),
                    type=PRICE,
                    help=f"$ per million tokens, for an API {side}.",
                ),
                click.option(
                    f"--{side}-price-per-hour",
                    type=POSITIVE,
                    help=f"Dollars per hour of the {side}'s machine.",
                ),
                click.option(
                    f"--{side}-machines",
                    type=whole(1),
                    default=1,
                    show_default=True,
                    help=f"Machines that serve the {side}.",
                ),
            )
        ):
            command = option(command)
    return click.option(
        "--price-per-hour", type=POSITIVE, help="Dollars per hour of a machine, for both sides."
    )(command)


@click.group(
    cls=LazyGroup, table=TOOLS, invoke_without_command=True, subcommand_metavar="", no_args_is_help=True
)
@click.option("--baseline", metavar="SPEC", help=f"What runs today: {SPEC}.")
@click.option("--candidate", metavar="SPEC", help="What should replace it, same forms.")
@click.option(
    "--data",
    type=PATH,
    help="Labelled rows both sides answer; default: the test split of the candidate's run.",
)
@out_options("Report directory to write.", "report directory", required=False)
@case_flags(
    "--prompt", "--system", "--instruction", "--labels", "--answer-field", "--metric", "--judge", "--judge-model",
    "--judge-key-env", "--requests", "--cold-requests", "--concurrency", "--margin", "--claim",
    seed="bench.seed",
    help={
        "--prompt": "The baseline's few-shot examples.",
        "--system": "The baseline's system prompt: a text or a file.",
        "--instruction": "The candidate's short system prompt: a text or a file.",
    },
)  # fmt: skip
@row_options
@click.option("--task", "task_path", type=PATH, help="task.json of the tuned run.")
@click.option("--plan", type=PATH, help="Directory of `unshot plan`, for the price.")
@click.option(
    "--cache",
    type=click.Choice(["both", "on", "off"]),
    default="both",
    show_default=True,
    help="Which prefix cache modes to run.",
)
@click.option("--rows", type=whole(2), help="At most so many rows of the data, drawn by seed.")
@click.option(
    "--block", type=whole(1), default=4, show_default=True, help="Requests per interleaved A/B block."
)
@click.option(
    "--warm-up", type=whole(1), default=2, show_default=True, help="Requests per side before measuring."
)
@click.option("--max-tokens", type=whole(1), help="Longest answer, tokens; default from the task, else 64.")
@click.option("--threads", type=whole(1), help="CPU threads per engine; default: the usable cores.")
@side_flags
@server_flags
@click.option("--server-args", metavar="ARGS", help="serve: more arguments for the servers that are started.")
@click.option(
    "--repeat",
    is_flag=True,
    help="Ask the same rows again as they are; default: what is asked again begins anew.",
)
@click.option(
    "--max-error-rate",
    type=SHARE,
    default=ERROR_RATE.value,
    show_default=True,
    help="Share of requests that may fail.",
)
@click.option("--junit", type=PATH, help="Also write the verdicts as JUnit XML.")
@click.option("--markdown", type=PATH, help="Also write the report as Markdown.")
@common
@click.pass_context
def bench(
    ctx: click.Context,
    baseline: str | None,
    candidate: str | None,
    data: Path | None,
    final: Path | None,
    overwrite: bool,
    rows_as: RowOptions,
    task_path: Path | None,
    plan: Path | None,
    cache: str,
    rows: int | None,
    block: int,
    warm_up: int,
    max_tokens: int | None,
    threads: int | None,
    sides: dict[str, SideFlags],
    server: ServerOptions,
    server_args: str | None,
    repeat: bool,
    max_error_rate: float,
    junit: Path | None,
    markdown: Path | None,
    case: Case,
    out: Output,
) -> None:
    """Measure two systems on the same rows and check the claim "5-10x faster and cheaper".

    Both answer every row (quality), in interleaved blocks, with the prefix cache on and off. Exit code 0 if the claim
    is met, 1 if it is not met or the run cannot tell; the report is written either way.
    """
    if ctx.invoked_subcommand is not None:
        return
    from bench.cost import PriceOptions, plan_token_price
    from bench.job import Job, rows_and_task
    from bench.pull_request import junit_report, markdown_report
    from bench.run import bench_run
    from bench.sides import CACHE_OFF, CACHE_ON, MODES
    from bench.summary import summary
    from bench.traffic import UNNAMED
    from unshot.data.files import write_text
    from unshot.errors import GateError, InputError

    if baseline is None or candidate is None or final is None:
        missing = {"--baseline": baseline, "--candidate": candidate, "--out": final}
        raise InputError(
            f"missing {', '.join(k for k, v in missing.items() if v is None)}; see `unshot bench --help`"
        )
    asked = rows_and_task(baseline, candidate, data, task_path, case, out)
    prices, servers = {}, {}
    for side, given in sides.items():
        own = given.flag.startswith(f"--{side}")
        if given.price is not None and (own or given.machines > 1):
            other = given.flag if own else f"--{side}-machines"
            raise InputError(
                f"--{side}-price is a price per token, and {other} goes with one per hour; give one of the two"
            )
        named = None if given.model == UNNAMED else given.model
        tokens = given.price.of(named) if given.price is not None else None
        if tokens is None and plan and side == "baseline" and baseline.startswith("http"):
            tokens = plan_token_price(plan) if given.per_hour is None else None
        prices[side] = PriceOptions(given.per_hour, given.flag, given.machines, tokens)
        servers[side] = replace(server, model=given.model)
        if given.key_env:
            servers[side] = replace(servers[side], key_env=given.key_env, key_flag=f"--{side}-key-env")
    arguments = shlex.split(server_args or "")
    job = Job(
        baseline=baseline,
        candidate=candidate,
        data=asked.data,
        final=final,
        rows_as=asked.rows_as,
        prompts={
            "baseline": case.long_prompt(),
            "candidate": case.short_prompt(),
        },
        task=asked.task,
        task_path=asked.task_path,
        plan=plan,
        block=block,
        warm_up=warm_up,
        rows=rows,
        max_tokens=max_tokens,
        threads=threads,
        concurrency=case.bench.concurrency,
        repeat=repeat,
        max_error_rate=max_error_rate,
        servers=servers,  # type: ignore[arg-type]
        server_args={"baseline": arguments, "candidate": arguments},
        prices=prices,  # type: ignore[arg-type]
        modes={"both": MODES, "on": (CACHE_ON,), "off": (CACHE_OFF,)}[cache],
        inputs=[p for p in (case.task.examples, asked.task_path) if p is not None],
    )
    report = bench_run(job, case, out, overwrite=overwrite)
    if junit:
        write_text(junit, junit_report(report))
    if markdown:
        write_text(markdown, markdown_report(report))
    out.result({"out": str(final), **report.plain()}, *summary(report, final))
    if report.verdict != "met":
        raise GateError(
            f"claim {report.claim.low:g}-{report.claim.high:g}x {report.verdict}: {report.reason}; see "
            f"{final}/report.html"
        )
