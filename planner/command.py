"""`unshot plan`."""

from __future__ import annotations

import gc
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.options import case_option, common

if TYPE_CHECKING:
    from unshot.console import Output

# Subcommands live in modules of their own and are imported when used.
SUBCOMMANDS = {
    "validate": (
        "planner.validate_command:validate_command",
        "Forecast published measurements and show the errors.",
    )
}


class PlanGroup(click.Group):
    """A group that also works with flags alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        module, attribute = SUBCOMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


@click.group(cls=PlanGroup, invoke_without_command=True)
@click.option(
    "--prompt",
    type=click.Path(path_type=Path),
    help="The long prompt: few-shot examples (JSONL, JSON, CSV), a text with a {{slot}}, or a folder of prompts.",
)
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Sample of real inputs, with answers where there are."
)
@click.option("--rate", type=float, help="Mean requests per second.")
@click.option("--peak-factor", type=float, help="Busiest hour over the mean.")
@click.option(
    "--arrival-cv", type=float, help="Spread of the gaps between requests: 1 is Poisson, more is bursty."
)
@click.option("--output-tokens", type=float, help="Answer length where the inputs hold no answers.")
@click.option("--offline", is_flag=True, default=None, help="Answers may wait a day: batch prices apply.")
@click.option("--baseline", help="What runs today: an API model by name.")
@click.option("--baseline-model", help="What runs today: an open model by name.")
@click.option("--cheaper-api", help="Cheaper API model to compare with; default: by the catalog.")
@click.option("--model", help="Small model the prompt would move into.")
@click.option("--gpu", multiple=True, help="GPU (or cpu) to serve it on; may be given several times.")
@click.option("--precision", help="fp16, fp8, int8, int4 or a GGUF format.")
@click.option("--system", help="System prompt that goes with the examples: text or a file.")
@click.option("--instruction", help="The tuned model's short system prompt: text or a file.")
@click.option("--slo-ttft", type=float, help="Time to first token, milliseconds at the percentile.")
@click.option("--slo-tpot", type=float, help="Time per output token, milliseconds at the percentile.")
@click.option("--slo-e2e", type=float, help="End to end, milliseconds at the percentile.")
@click.option(
    "--fails",
    help="What fails today, comma-separated: facts, tools, format, jargon, reasoning, latency, cost.",
)
@click.option("--current", type=float, help="What the prompt reaches today on the metric, 0 to 1.")
@click.option("--target", type=float, help="What is good enough on the metric, 0 to 1.")
@click.option("--examples-at-hand", type=int, help="Labelled examples that could be had.")
@click.option("--min-replicas", type=int, help="Replicas kept up for availability.")
@click.option(
    "--price",
    "price_values",
    multiple=True,
    help="API price, $ per million tokens: [MODEL:]input=2.5,cached=1.25,output=10, or a TOML or JSON file.",
)
@click.option("--gpu-price", "gpu_price_values", multiple=True, help="$ per hour: 2.10, or GPU=2.10.")
@click.option("--tokenizer", multiple=True, help="PATH or MODEL=PATH of a tokenizer that is not at hand.")
@click.option(
    "--approximate", is_flag=True, help="Count with another tokenizer where one is missing, error stated."
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="report.json of `unshot bench` to fit efficiencies to.",
)
@click.option("--seed", type=int, default=0, help="Seed of the uncertainty analysis.")
@click.option(
    "--out", "final", type=click.Path(path_type=Path), help="Directory to write plan.json and report.html to."
)
@click.option("--overwrite", is_flag=True, help="Replace the directory where it exists.")
@case_option
@common
@click.pass_context
def plan(ctx: click.Context, out: Output, **flags: Any) -> None:
    """Forecast cost, latency and break-even of the long prompt against a tuned model.

    Works on flags alone, or on a case file with flags over it. Prompt caching is always in the table.
    """
    if ctx.invoked_subcommand is not None:
        return
    # numpy's matrix products are of a few dozen numbers here; a second BLAS thread only spins beside them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A short process frees nothing that is worth looking for: the collector costs a tenth of a cold start.
    collecting = gc.isenabled()
    gc.disable()
    try:
        from planner.run import plan_run

        plan_run(out, **flags)
    finally:
        if collecting:
            gc.enable()
