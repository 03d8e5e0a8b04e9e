"""`unshot bench`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from unshot.engines.registry import spec_forms
from unshot.options import PATH, POSITIVE, PRICE, SECONDS, Option, case_flags, common, row_options, whole

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output
    from unshot.data.rows import RowOptions
    from unshot.prices import Prices

SPEC = f"{spec_forms()}, http://HOST:PORT/v1 or serve:gguf:PATH"


class BenchGroup(click.Group):
    """`unshot bench` itself measures; its tools are commands below it, imported when used."""

    TOOLS: ClassVar[dict[str, str]] = {
        "load": "Drive one server with a load and report its figures.",
        "sweep": "Raise the load on one server from idle to saturation and find the knee.",
        "compare": "Flag regressions between two reports.",
        "golden": "A server with scripted delays, to check any load generator.",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.TOOLS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.TOOLS:
            return None
        command: click.Command = getattr(importlib.import_module("bench.tools"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Tools"):
            formatter.write_dl([(k, v) for k, v in self.TOOLS.items() if k != "golden"])


@click.group(cls=BenchGroup, invoke_without_command=True, subcommand_metavar="", no_args_is_help=True)
@click.option("--baseline", metavar="SPEC", help=f"What runs today: {SPEC}.")
@click.option("--candidate", metavar="SPEC", help="What should replace it, same forms.")
@click.option(
    "--data",
    type=PATH,
    help="Labelled rows both sides answer; default: the test split of the candidate's run.",
)
@click.option("--out", "final", type=PATH, help="Report directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace the report directory where it exists.")
@case_flags(
    "--prompt", "--system", "--instruction", "--labels", "--answer-field", "--metric", "--judge", "--judge-model",
    "--judge-key-env", "--requests", "--concurrency", "--margin", "--claim",
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
@click.option("--price-per-hour", type=POSITIVE, help="Dollars per hour of the machine under test.")
@click.option(
    "--cold-requests", type=whole(2), default=8, show_default=True, help="Timed requests per side without it."
)
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
@click.option("--baseline-model", default="default", help="Servers: the baseline's model name.")
@click.option("--candidate-model", default="default", help="Servers: the candidate's model name.")
@click.option("--api", type=click.Choice(["chat", "completions"]), default="chat", help="Servers: which API.")
@click.option("--api-key-env", help="Servers: environment variable that holds the API key.")
@click.option("--timeout", type=SECONDS, default=120.0, help="Servers: seconds until a request is given up.")
@click.option("--tokenizer", help="Servers: model directory whose tokenizer counts the answers.")
@click.option("--request-extra", metavar="JSON", help="Servers: more fields for every request's body.")
@click.option(
    "--baseline-price",
    cls=Option,
    older=("--baseline-token-price",),
    type=PRICE,
    help="$ per million tokens, for an API baseline.",
)
@click.option(
    "--candidate-price",
    cls=Option,
    older=("--candidate-token-price",),
    type=PRICE,
    help="Same, for an API candidate.",
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
    price_per_hour: float | None,
    cold_requests: int,
    cache: str,
    rows: int | None,
    block: int,
    warm_up: int,
    max_tokens: int | None,
    threads: int | None,
    baseline_model: str,
    candidate_model: str,
    api: str,
    api_key_env: str | None,
    timeout: float,
    tokenizer: str | None,
    request_extra: str | None,
    baseline_price: Prices | None,
    candidate_price: Prices | None,
    junit: Path | None,
    markdown: Path | None,
    case: Case,
    out: Output,
) -> None:
    """Measure two systems on the same rows and check the claim "5-10x faster and cheaper".

    Both answer every row (quality), in interleaved blocks, with the prefix cache on and off. Exit code 0 where the
    claim is met, 1 where it is not met or the run cannot tell; the report is written either way.
    """
    if ctx.invoked_subcommand is not None:
        return
    from bench.artifacts import artifact_manifest, held_out
    from bench.cost import plan_token_price
    from bench.measure import CACHE_OFF, CACHE_ON, MODES
    from bench.opening import Server
    from bench.opening import request_extra as parse_extra
    from bench.pull_request import junit_report, markdown_report
    from bench.run import Job, bench_run
    from bench.summary import summary
    from unshot.contracts.task import read_task
    from unshot.data.files import write_text
    from unshot.data.prompts import load_prompt
    from unshot.errors import GateError, InputError

    if baseline is None or candidate is None or final is None:
        missing = {"--baseline": baseline, "--candidate": candidate, "--out": final}
        raise InputError(
            f"missing {', '.join(k for k, v in missing.items() if v is None)}; see `unshot bench --help`"
        )
    artifact_manifest(baseline)
    unseen = held_out(artifact_manifest(candidate))
    if data is None and unseen is not None:
        data, task_path = unseen.data, task_path or unseen.task
        out.log(f"rows: the test split of the candidate's run, {data}")
    elif data is None and case.task.data is not None:
        data = case.task.data
        out.warn(f"{data}: the candidate may have been tuned on these rows; --data gives others")
    if data is None:
        raise InputError("no data; give --data, or `data` under [task] in the case file")
    if case.task.instruction is None and task_path is not None:
        case.task.instruction = read_task(task_path).instruction
    prices = {
        side: given.of(model)
        for side, given, model in (
            ("baseline", baseline_price, baseline_model),
            ("candidate", candidate_price, candidate_model),
        )
        if given is not None
    }
    if plan and baseline.startswith("http") and "baseline" not in prices:
        planned = plan_token_price(plan)
        prices.update({"baseline": planned} if planned else {})
    job = Job(
        baseline=baseline,
        candidate=candidate,
        data=data,
        final=final,
        rows_as=rows_as,
        baseline_prompt=load_prompt(case.task.examples, system=case.task.system),
        candidate_prompt=case.short_prompt(),
        task_path=task_path,
        plan=plan,
        price_per_hour=price_per_hour,
        cold_requests=cold_requests,
        block=block,
        warm_up=warm_up,
        rows=rows,
        max_tokens=max_tokens,
        threads=threads,
        concurrency=case.bench.concurrency,
        server=Server(
            {"baseline": baseline_model, "candidate": candidate_model},
            api,
            api_key_env,
            timeout,
            tokenizer,
            parse_extra(request_extra),
        ),
        token_prices=prices,
        modes={"both": MODES, "on": (CACHE_ON,), "off": (CACHE_OFF,)}[cache],
        inputs=[p for p in (case.task.examples, task_path) if p is not None],
    )
    report = bench_run(job, case, out, overwrite=overwrite)
    if junit:
        write_text(junit, junit_report(report))
    if markdown:
        write_text(markdown, markdown_report(report))
    out.result({"out": str(final), **report}, *summary(report, final))
    if report["verdict"] != "met":
        low, high = report["claim"]["low"], report["claim"]["high"]
        raise GateError(
            f"claim {low:g}-{high:g}x {report['verdict']}: {report['reason']}; see {final}/report.html"
        )
