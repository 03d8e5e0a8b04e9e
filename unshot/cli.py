"""The command line. Commands live in their rooms and are imported only when they are run or listed."""

from __future__ import annotations

import importlib

import click

from unshot import __version__

# name -> (module:attribute, one line for `unshot --help`); the line stands here so that help imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("unshot.init:init", "Write a commented case file."),
    "plan": (
        "planner.command:plan",
        "Cost, latency and break-even of the long prompt against a tuned model.",
    ),
    "data": ("tune.data.command:data", "Check a data set, and split it."),
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
    "demo": ("unshot.demo.command:demo", "Run the whole way on the embedded model and task."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from unshot.errors import nearest

            raise click.UsageError(f"no command '{args[0]}': {nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="unshot")
def cli() -> None:
    """Move a long few-shot prompt into the weights of a small model, and prove with numbers whether that paid.

    Exit codes: 0 done, 1 the answer is no (claim not met, gate failed), 2 bad input or usage,
    3 something outside failed (network, disk, out of memory).
    """
