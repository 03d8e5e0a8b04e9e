"""`unshot plan`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from unshot.flags import case_flags
from unshot.lazy import LazyGroup
from unshot.options import PATH, PRICE, SEED, TEXT, common

if TYPE_CHECKING:
    from unshot.console import Output

COMMANDS = {
    "validate": (
        "planner.validate_command:validate_command",
        "Forecast published measurements and show the errors.",
    )
}


@click.group(cls=LazyGroup, table=COMMANDS, invoke_without_command=True)
@case_flags(
    "--prompt", "--inputs", "--rate", "--peak-factor", "--arrival-cv", "--output-tokens",
    "--reasoning-tokens", "--offline", "--engine", "--kv-cache", "--tensor-parallel", "--max-sequences", "--chunk",
    "--speculative-tokens", "--acceptance", "--price-factor", "--cold-start-s", "--cheaper-api", "--system",
    "--instruction", "--slo-ttft", "--slo-tpot", "--slo-e2e", "--fails", "--current", "--target",
    "--examples-at-hand", "--min-replicas", "--chat-template",
    baseline="baseline.api", baseline_model="baseline.model", model="candidate.model", gpu="candidate.gpu",
    precision="candidate.precision",
    help={
        "--prompt": "The long prompt: few-shot examples (JSONL, JSON, CSV), a text with a {{slot}}, or a folder of "
        "prompts.",
        "--baseline": "What runs today: an API model by name.",
        "--baseline-model": "What runs today: an open model by name.",
        "--model": "Small model the prompt would move into: a name, a directory or a config.json.",
        "--gpu": "GPU (or cpu) to serve it on; may be given several times.",
    },
)  # fmt: skip
@click.option(
    "--price",
    "price_values",
    type=PRICE,
    multiple=True,
    help="API price, $ per million tokens; several for several models. cache_min, cache_step (tokens), cache_ttl "
    "(seconds) and write_factor set the caching rule.",
)
@click.option(
    "--gpu-price", "gpu_price_values", type=TEXT, multiple=True, help="$ per hour: 2.10, or GPU=2.10."
)
@click.option(
    "--tokenizer", type=TEXT, multiple=True, help="PATH or MODEL=PATH of a tokenizer that is not at hand."
)
@click.option(
    "--approximate", is_flag=True, help="Count with another tokenizer if one is missing, error stated."
)
@click.option("--calibrate", type=PATH, help="report.json of `unshot bench` to fit efficiencies to.")
@click.option("--seed", type=SEED, default=0, help="Seed of the uncertainty analysis.")
@click.option(
    "--out", "final", type=PATH, help="Directory to write plan.json, plan.csv, plan.xlsx and report.html to."
)
@click.option("--all", "everything", is_flag=True, help="Show every option, not only the six that matter.")
@click.option(
    "--interactive", is_flag=True, help="Ask for what the case does not say, and write the answers into it."
)
@click.option("--overwrite", is_flag=True, help="Replace the directory if it exists.")
@common
@click.pass_context
def plan(ctx: click.Context, out: Output, interactive: bool = False, **flags: Any) -> None:
    """Forecast cost, latency and break-even of the long prompt against a tuned model.

    Works on flags alone, or on a case file with flags over it. Prompt caching is always in the table.
    """
    if ctx.invoked_subcommand is not None:
        return
    # numpy's matrix products are of a few dozen numbers here; a second BLAS thread is of no use.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if interactive:
        from planner.interactive import ask
        from unshot.case_file import DEFAULT_FILE

        flags["case"] = ask(flags["case"], ctx.params.get("case_path") or DEFAULT_FILE)
    from planner.run import plan_run

    plan_run(out, **flags)
