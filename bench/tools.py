"""The tools below `unshot bench`: load, sweep, compare, golden; and the flags that say how a server is spoken to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.metrics.thresholds import SLOWER
from unshot.options import NOT_NEGATIVE, PATH, SECONDS, SEED, TEXT_OR_FILE, Option, common, out_options, whole

if TYPE_CHECKING:
    from bench.target import LoadOptions
    from bench.traffic import ServerOptions
    from unshot.console import Output

Command = Callable[..., Any]


def server_flags(function: Command) -> Command:
    """The flags that say how a server is spoken to; the command gets them as one `ServerOptions` named `server`."""

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        api: str,
        key_env: str | None,
        timeout: float,
        tokenizer: str | None,
        request_extra: str | None,
        ignore_eos: bool,
        insecure: bool,
        ca: Path | None,
        proxy: str | None,
        **kwargs: Any,
    ) -> Any:
        if click.get_current_context().invoked_subcommand is not None:
            return None
        from bench.traffic import ServerOptions
        from bench.traffic import request_extra as parse_extra

        extra = parse_extra(request_extra)
        if ignore_eos:
            extra["ignore_eos"] = True
        server = ServerOptions(
            api=api, key_env=key_env, timeout=timeout, tokenizer=tokenizer, extra=extra,
            authorities=str(ca) if ca else None, verify=not insecure, proxy=proxy,
        )  # fmt: skip
        return function(*args, server=server, **kwargs)

    command: Command = wrapper
    for option in reversed(
        (
            click.option(
                "--api", type=click.Choice(["chat", "completions"]), default="chat", help="Which API."
            ),
            click.option(
                "--key-env",
                cls=Option,
                older=("--api-key-env",),
                help="Environment variable that holds the API key.",
            ),
            click.option(
                "--timeout", type=SECONDS, default=120.0, help="Seconds until a request is given up."
            ),
            click.option(
                "--tokenizer",
                help="Tokenizer that counts tokens: a model directory, a .gguf or a name. Default: that of the model "
                "that the server lists, where it is on this machine.",
            ),
            click.option("--request-extra", metavar="JSON", help="More fields for every request's body."),
            click.option(
                "--ignore-eos", is_flag=True, help="Ask for answers of full length (vLLM, SGLang, llama.cpp)."
            ),
            click.option("--insecure", is_flag=True, help="Do not check the server's TLS certificate."),
            click.option("--ca", type=PATH, help="Certificate authorities to trust instead of the system's."),
            click.option(
                "--proxy",
                metavar="URL|env",
                help="An HTTP proxy on the way to the server; env: that of HTTP_PROXY, HTTPS_PROXY, NO_PROXY. "
                "Default: none.",
            ),
        )
    ):
        command = option(command)
    return command


def target_options(function: Command) -> Command:
    """The server and what is sent to it; the command gets them as one `LoadOptions` named `target`."""

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        url: str,
        model: str,
        data: Path | None,
        prompt: Path | None,
        system: str | None,
        prompt_words: str,
        max_tokens: str,
        cache: str,
        repeat: int,
        slo: str | None,
        seed: int,
        server: ServerOptions,
        **kwargs: Any,
    ) -> Any:
        from dataclasses import replace

        from bench.target import LoadOptions, parse_slo

        target = LoadOptions(
            url, replace(server, model=model), data, prompt, system, prompt_words, max_tokens, cache, repeat,
            parse_slo(slo), seed,
        )  # fmt: skip
        return function(*args, target=target, **kwargs)

    command: Command = out_options("Report directory to write.", "report directory")(server_flags(wrapper))
    for option in reversed(
        (
            click.argument("url"),
            click.option("--model", default="default", help="Model name to ask for."),
            click.option("--data", type=PATH, help="Rows to send, taken in turn."),
            click.option("--prompt", type=PATH, help="Few-shot examples before each row."),
            click.option("--system", type=TEXT_OR_FILE, help="System prompt: a text or a file."),
            click.option(
                "--prompt-words", default="64", help="Without --data: words per prompt, N or LOW-HIGH."
            ),
            click.option(
                "--max-tokens", default="64", show_default=True, help="Longest answer, N or LOW-HIGH tokens."
            ),
            click.option("--cache", type=click.Choice(["on", "off"]), default="on", show_default=True),
            click.option(
                "--repeat",
                type=whole(0),
                default=0,
                metavar="N",
                help="Send N requests over and over, so that caches can help. Default: each request is sent once, in "
                "this and every other run.",
            ),
            click.option("--slo", help="Goodput: e.g. ttft=200,tpot=50,e2e=2000 (milliseconds)."),
            click.option("--seed", type=SEED, default=0, help="Seed of the schedule and the answer lengths."),
        )
    ):
        command = option(command)
    return command


@click.command()
@target_options
@click.option(
    "--load",
    default="closed:1",
    show_default=True,
    help="closed:N, constant:RATE, poisson:RATE, gamma:RATE:CV or trace:FILE.",
)
@click.option(
    "--requests", type=whole(1), help="Requests to measure; default without --duration: 100, or the trace's."
)
@click.option(
    "--duration",
    type=SECONDS,
    help="Measure for so many seconds; the figures are of the steady state, ramp-up and drain cut off.",
)
@click.option(
    "--turns",
    type=whole(1),
    default=1,
    show_default=True,
    help="Conversations of at most so many turns: of the rows, a replayed log, or random words. Each turn follows the "
    "answer to the one before.",
)
@click.option(
    "--think-time",
    metavar="SECONDS|LOW-HIGH",
    help="Before each later turn. Default: 0, or as the replayed log has it.",
)
@click.option("--warm-up", type=whole(0), default=4, show_default=True, help="Requests before measuring.")
@click.option("--processes", type=whole(1), default=1, show_default=True, help="Client processes.")
@click.option("--ray", type=whole(0), default=0, help="So many clients on Ray instead, for several machines.")
@click.option("--ray-address", help="The Ray cluster, e.g. ray://HOST:10001; default: one on this machine.")
@click.option(
    "--format", "formats", type=click.Choice(["mlperf"]), multiple=True, help="Also write logs of this form."
)
@common
def load(
    out: Output,
    target: LoadOptions,
    final: Path,
    load: str,
    requests: int | None,
    duration: float | None,
    turns: int,
    think_time: str | None,
    warm_up: int,
    processes: int,
    ray: int,
    ray_address: str | None,
    formats: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Drive the server at URL (http://HOST:PORT/v1) with one load and report its figures.

    Latencies count from the scheduled time. Exit code 1 if the client itself was the bottleneck, 3 if nothing was
    answered.
    """
    from dataclasses import replace

    from bench.single import LoadJob, load_run
    from bench.single_page import load_summary
    from unshot.errors import GateError, InputError, OutsideError

    if ray and processes > 1:
        raise InputError("--ray and --processes exclude each other; each Ray worker is a client of its own")
    if ray_address and not ray:
        raise InputError("--ray-address needs --ray N, the number of clients")
    if ray and formats:
        raise InputError("--format needs every request; with --ray the report holds a sample of them")
    if duration is not None and (ray or processes > 1):
        raise InputError("--duration needs one client; leave --ray and --processes out, or give --requests")
    if turns > 1 and (ray or processes > 1):
        raise InputError("--turns needs one client; leave --ray and --processes out")
    if turns > 1 and target.cache == "off":
        raise InputError("--turns: a turn repeats those before it, so there is no --cache off of it")
    if turns == 1 and think_time is not None:
        raise InputError("--think-time is the time between turns; give --turns N too")
    target = replace(target, turns=turns, think_time=think_time)
    job = LoadJob(
        target, final, load, requests, warm_up, duration, processes, ray, ray_address,
        formats, overwrite,
    )  # fmt: skip
    report = load_run(job, out)
    out.result({"out": str(final), **report.plain()}, *load_summary(report))
    if report.failure:
        raise OutsideError(f"{report.url}: {report.failure}; see {final}/report.html")
    if not report.client.valid:
        raise GateError(f"invalid run: {'; '.join(report.client.reasons)}")


@click.command()
@target_options
@click.option(
    "--concurrencies",
    default="auto",
    show_default=True,
    help="Closed loop steps, e.g. 1,2,4,8; auto: doubles until more brings no throughput.",
)
@click.option("--most", type=whole(1), default=256, show_default=True, help="The highest step of auto.")
@click.option(
    "--rates",
    metavar="auto|R1,R2,...",
    help="Poisson arrivals a second instead, to the greatest rate within --slo; auto: doubles, then closes in.",
)
@click.option("--requests", type=whole(1), default=50, show_default=True, help="Requests a step, at least.")
@common
def sweep(
    out: Output,
    target: LoadOptions,
    final: Path,
    concurrencies: str,
    most: int,
    rates: str | None,
    requests: int,
    overwrite: bool,
) -> None:
    """Raise the load on the server at URL step by step and find the knee of throughput against latency."""
    from bench.single import SweepJob, sweep_run
    from bench.single_page import sweep_summary
    from unshot.errors import OutsideError

    job = SweepJob(target, final, concurrencies, most, requests, rates, overwrite=overwrite)
    report = sweep_run(job, out)
    out.result({"out": str(final), **report.plain()}, *sweep_summary(report))
    if report.failure:
        raise OutsideError(f"{report.url}: {report.failure}; see {final}/report.html")


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
    """Compare two report directories: exit code 1 if NEW is slower, dearer, fails more or is worse than OLD."""
    from bench.compare import compare_reports
    from bench.compare_words import compare_summary, to_junit, to_markdown
    from unshot.data.files import write_text
    from unshot.errors import GateError

    result = compare_reports(old, new, side=side, threshold=threshold)
    if junit:
        write_text(junit, to_junit(result))
    if markdown:
        write_text(markdown, to_markdown(result))
    out.result(result, *compare_summary(result))
    if result.worse:
        raise GateError(f"{new} is worse than {old}: {', '.join(result.worse)}")
    if result.invalid:
        raise GateError(
            f"cannot tell: {' and '.join(result.invalid)} not valid, since the client was late; measure again"
        )


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
@click.option("--stop-token", default="uncounted", show_default=True, help="uncounted, counted or timed.")
@click.option("--reasoning", type=whole(0), default=0, show_default=True, help="Reasoning tokens first.")
@click.option("--tools", is_flag=True, help="Answer by a tool call.")
@click.option("--slots", type=whole(0), default=0, show_default=True, help="Requests at once; 0: all.")
@click.option("--cache", is_flag=True, help="Cache the beginnings of prompts.")
@click.option("--model", default="golden", show_default=True, help="The model that it says it serves.")
@click.option("--echo", is_flag=True, help="Answer with the prompt's last words.")
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
