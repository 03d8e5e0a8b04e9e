"""The tools below `unshot bench`: load, sweep, compare, golden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.metrics.thresholds import SLOWER
from unshot.options import NOT_NEGATIVE, PATH, SECONDS, SEED, TEXT_OR_FILE, common, whole

if TYPE_CHECKING:
    from unshot.console import Output

OUT = click.option("--out", "final", type=PATH, required=True, help="Report directory to write.")


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The server and what is sent to it."""
    for option in reversed(
        (
            click.argument("url"),
            click.option("--model", default="default", help="Model name to ask for."),
            click.option("--api", type=click.Choice(["chat", "completions"]), default="chat"),
            click.option("--api-key-env", help="Environment variable that holds the API key."),
            click.option("--data", type=PATH, help="Rows to send, taken in turn."),
            click.option("--prompt", type=PATH, help="Few-shot examples before each row."),
            click.option("--system", type=TEXT_OR_FILE, help="System prompt: a text or a file."),
            click.option(
                "--prompt-words", default="64", help="Without --data: words a prompt, N or LOW-HIGH."
            ),
            click.option(
                "--max-tokens", default="64", show_default=True, help="Longest answer, N or LOW-HIGH tokens."
            ),
            click.option("--cache", type=click.Choice(["on", "off"]), default="on", show_default=True),
            click.option(
                "--timeout", type=SECONDS, default=120.0, help="Seconds until a request is given up."
            ),
            click.option("--tokenizer", help="Model directory whose tokenizer counts the answers."),
            click.option("--request-extra", metavar="JSON", help="More fields for every request's body."),
            click.option("--slo", help="Goodput: e.g. ttft=200,tpot=50,e2e=2000 (milliseconds)."),
            click.option("--seed", type=SEED, default=0),
            click.option("--overwrite", is_flag=True, help="Replace the report directory where it exists."),
            OUT,
        )
    ):
        function = option(function)
    return function


@click.command()
@target_options
@click.option(
    "--load",
    default="closed:1",
    show_default=True,
    help="closed:N, constant:RATE, poisson:RATE, gamma:RATE:CV or trace:FILE.",
)
@click.option("--requests", type=whole(1), default=100, show_default=True)
@click.option("--warm-up", type=whole(0), default=4, show_default=True, help="Requests before measuring.")
@click.option("--processes", type=whole(1), default=1, show_default=True, help="Client processes.")
@click.option("--ray", type=whole(0), default=0, help="So many clients on Ray instead, for several machines.")
@click.option("--ray-address", help="The Ray cluster, e.g. ray://HOST:10001; default: one on this machine.")
@click.option(
    "--format", "formats", type=click.Choice(["mlperf"]), multiple=True, help="Also write logs of this form."
)
@common
def load(out: Output, **options: Any) -> None:
    """Drive the server at URL (http://HOST:PORT/v1) with one load and report its figures.

    Latencies count from the scheduled time. Exit code 1 where the client itself was the bottleneck, 3 where nothing
    was answered.
    """
    from bench.single import load_run
    from bench.single_page import load_summary
    from unshot.errors import GateError, InputError, OutsideError

    if options["ray"] and options["processes"] > 1:
        raise InputError("--ray and --processes exclude each other; each Ray worker is a client of its own")
    if options["ray_address"] and not options["ray"]:
        raise InputError("--ray-address needs --ray N, the number of clients")
    if options["ray"] and options["formats"]:
        raise InputError("--format needs every request; with --ray the report holds a sample of them")
    report = load_run(options, out)
    out.result({"out": str(options["final"]), **report}, *load_summary(report))
    if report["failure"]:
        raise OutsideError(f"{options['url']}: {report['failure']}; see {options['final']}/report.html")
    if not report["client"]["valid"]:
        raise GateError(f"invalid run: {'; '.join(report['client']['reasons'])}")


@click.command()
@target_options
@click.option(
    "--concurrencies",
    default="auto",
    show_default=True,
    help="Closed loop steps, e.g. 1,2,4,8; auto: doubles until more brings no throughput.",
)
@click.option("--most", type=whole(1), default=256, show_default=True, help="The highest step of auto.")
@click.option("--requests", type=whole(1), default=50, show_default=True, help="Requests a step, at least.")
@common
def sweep(out: Output, **options: Any) -> None:
    """Raise the load on the server at URL step by step and find the knee of throughput against latency."""
    from bench.single import sweep_run
    from bench.single_page import sweep_summary
    from unshot.errors import OutsideError

    report = sweep_run(options, out)
    out.result({"out": str(options["final"]), **report}, *sweep_summary(report))
    if report["failure"]:
        raise OutsideError(f"{options['url']}: {report['failure']}; see {options['final']}/report.html")


@click.command()
@click.argument("old", type=PATH)
@click.argument("new", type=PATH)
@click.option("--side", type=click.Choice(["baseline", "candidate"]), default="candidate", show_default=True)
@click.option(
    "--threshold",
    type=NOT_NEGATIVE,
    default=SLOWER.value,
    show_default=True,
    help="Slower by more than this share.",
)
@click.option("--junit", type=PATH, help="Also write JUnit XML.")
@click.option("--markdown", type=PATH, help="Also write Markdown.")
@common
def compare(
    old: Path, new: Path, side: str, threshold: float, junit: Path | None, markdown: Path | None, out: Output
) -> None:
    """Compare two report directories: exit code 1 where NEW is slower, dearer or worse than OLD."""
    from bench.history import compare_reports, compare_summary, to_junit, to_markdown
    from unshot.data.files import write_text
    from unshot.errors import GateError

    result = compare_reports(old, new, side=side, threshold=threshold)
    if junit:
        write_text(junit, to_junit(result))
    if markdown:
        write_text(markdown, to_markdown(result))
    out.result(result, *compare_summary(result))
    worse = [row["name"] for row in result["rows"] if row["verdict"] == "regression"]
    if worse:
        raise GateError(f"{new} is worse than {old}: {', '.join(worse)}")


@click.command(hidden=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=whole(0, 65535), default=0, help="0: any free port, printed on stdout.")
@click.option("--ttft-ms", type=NOT_NEGATIVE, default=20.0, show_default=True)
@click.option("--itl-ms", type=NOT_NEGATIVE, default=5.0, show_default=True)
@click.option("--tokens", type=whole(1), default=20, show_default=True)
@click.option("--per-chunk", type=whole(1), default=1, show_default=True, help="Tokens a chunk.")
@click.option("--fault", help="Scripted failure; see docs/bench.md.")
@click.option(
    "--every", type=whole(1), default=1, show_default=True, help="The fault hits each so-many-th request."
)
@click.option("--stall-ms", type=NOT_NEGATIVE, default=1000.0, show_default=True)
@click.option("--retry-after", type=whole(0), default=1, show_default=True)
@common
def golden(host: str, port: int, out: Output, **script: Any) -> None:
    """Serve scripted answers on a real socket until Ctrl-C."""
    import asyncio
    import gc
    from contextlib import suppress

    from bench.golden import Golden, Script

    server = Golden(Script(**script))
    gc.disable()  # nothing here makes cycles, and a collection would delay every stream
    with suppress(KeyboardInterrupt):
        asyncio.run(server.serve(host, port, lambda p: print(f"http://{host}:{p}/v1", flush=True)))
