"""`unshot export`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unshot.catalog.formats import help_text, parse_targets
from unshot.flags import case_flags
from unshot.options import PATH, common, out_options, whole

if TYPE_CHECKING:
    from rich.console import RenderableType

    from export.run import Result
    from unshot.case import Case
    from unshot.console import Output

# The command behind `unshot export SOURCE`: a name that no directory has.
WRITE = "(write)"
SUBCOMMANDS = {
    "search": (
        "export.search_command:search",
        "Measure the quantisations and pick the smallest that is good enough.",
    ),
    "verify": ("export.verify_command:verify", "Check an artifact's hashes and answers on this machine."),
    "diff": ("export.verify_command:diff", "Compare two artifacts, or two GGUF files."),
}


class ExportGroup(click.Group):
    """`unshot export SOURCE ...` writes; a name in `SUBCOMMANDS` in the first place is that command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {*SUBCOMMANDS, *ctx.help_option_names}
        return super().parse_args(ctx, args if args and args[0] in known else [WRITE, *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == WRITE:
            return write
        module, attribute = SUBCOMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] SOURCE")
        for usage in ("search [OPTIONS] RUN", "verify ARTIFACT", "diff A B"):
            formatter.write_usage(ctx.command_path, usage, prefix="       ")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write.format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write.format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])


class WriteContext(click.Context):
    """A context that calls itself what the user typed."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent else super().command_path


class WriteCommand(click.Command):
    """The command without a name of its own."""

    context_class = WriteContext


@click.command(WRITE, cls=WriteCommand)
@click.argument("source")
@case_flags("--to", help={"--to": help_text()})
@out_options("Artifact directory to write.", "artifact directory")
@click.option("--base", help="Base model of the run or adapter; default: the one it was trained on.")
@click.option(
    "--data",
    type=PATH,
    help="Rows to check on; default: the run's test split, else built-in prompts.",
)
@click.option("--allow-drift", is_flag=True, help="Keep an artifact that fails the parity gate.")
@click.option("--check-rows", type=whole(1), default=32, show_default=True, help="Test rows the gate runs.")
@click.option(
    "--low-memory",
    is_flag=True,
    help="Check against the tuned model one layer at a time; by itself where it must.",
)
@click.option(
    "--imatrix", "with_imatrix", is_flag=True, help="Weigh llama.cpp's quantisation by the training rows."
)
@click.option(
    "--device-profile",
    "device",
    help="Refuse what does not fit: ram=8GiB, gpu=rtx-4090, or a preset such as laptop-16gib.",
)
@click.option(
    "--context",
    type=whole(1),
    help="Tokens the device is to hold; default: the model's, at most 4096.",
)
@click.option(
    "--llama-cpp",
    type=PATH,
    help="llama.cpp checkout whose converter writes GGUF of other families; default: its wheel.",
)
@common
def write(
    source: str,
    final: Path,
    base: str | None,
    data: Path | None,
    overwrite: bool,
    allow_drift: bool,
    check_rows: int,
    low_memory: bool,
    with_imatrix: bool,
    device: str | None,
    context: int | None,
    llama_cpp: Path | None,
    case: Case,
    out: Output,
) -> None:
    """Merge SOURCE (a run of `unshot tune`, an adapter of another trainer, or a model) and write GGUF and ONNX files.

    Each file is run in its own engine on the run's test rows and must equal the model that was evaluated; one that
    does not is not kept.
    """
    from export.device import parse_device
    from export.run import Settings, export_run

    result = export_run(
        source,
        parse_targets(case.export.to),
        final,
        out,
        Settings(
            base=base,
            data=data,
            case=case,
            overwrite=overwrite,
            allow_drift=allow_drift,
            check_rows=check_rows,
            low_memory=low_memory,
            with_imatrix=with_imatrix,
            device=parse_device(device) if device else None,
            context=context,
            llama_cpp=llama_cpp,
        ),
    )
    out.result(result, *summary(result, final))


def summary(result: Result, final: Path) -> list[RenderableType]:
    """The artifacts and their parity figures as a rich table."""
    from rich.table import Table

    table = Table(title=f"{result.source} on {result.base}", title_justify="left")
    for name in ("file", "MB", "KL", "top-1", "cosine", "perplexity", "greedy", "parity"):
        table.add_column(name, justify="left" if name in ("file", "parity") else "right")
    for report in result.parity:
        logits, greedy = report.figures.logits, report.figures.greedy
        figures = ["-"] * 4
        if logits:
            ratio = "-" if logits.perplexity is None else f"{logits.perplexity:.4f}"
            figures = [f"{logits.kl:.2g}", f"{logits.top1_strict:.2%}", f"{logits.cosine:.5f}", ratio]
        table.add_row(
            result.files[report.target],
            f"{result.bytes[report.target] / 1e6:.0f}",
            *figures,
            f"{greedy.equal:.1%}" if greedy else "-",
            report.verdict,
        )
    return [table, f"written to {final}"]


@click.group(cls=ExportGroup)
def export() -> None:
    """Merge and write; see `write`."""
