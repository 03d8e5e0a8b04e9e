"""The command line. Commands live in their rooms and are imported only when they are run or listed."""

from __future__ import annotations

import click

from unshot import __version__
from unshot.lazy import LazyGroup

# name -> (module:attribute, one line for `unshot --help`); the line stands here so that help imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("unshot.init:init", "Write a commented case file."),
    "plan": (
        "planner.command:plan",
        "Cost, latency and break-even of the long prompt against a tuned model.",
    ),
    "data": ("tune.data.command:data", "Check a data set, split it, have inputs labelled."),
    "tune": ("tune.command:tune", "Fine-tune a base model and evaluate it on held-out data."),
    "eval": (
        "tune.evaluate.command:evaluate",
        "Score a run on held-out rows, or two runs against each other.",
    ),
    "export": (
        "export.command:export",
        "Merge and write GGUF and ONNX files, proven equal to the tuned model.",
    ),
    "bench": ("bench.command:bench", "Measure two systems on one task and check the claim."),
    "deploy": (
        "deploy.command:deploy",
        "Registry, gateway, A/B test, drift, retraining and rollback.",
    ),
    "run": ("unshot.pipeline:run", "Run all stages on a case, up to the first gate that fails."),
    "demo": ("unshot.demo.command:demo", "Run the whole way on the embedded model and task."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="unshot")
def cli() -> None:
    """Move a long few-shot prompt into the weights of a small model, and prove with numbers whether that paid.

    Exit codes: 0 done, 1 the answer is no (claim not met, gate failed), 2 bad input or usage,
    3 something outside failed (network, disk, out of memory).
    """
