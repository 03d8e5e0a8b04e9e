"""`unshot export verify` and `unshot export diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unshot.options import PATH, common

if TYPE_CHECKING:
    from unshot.console import Output


@click.command("verify")
@click.argument("artifact", type=PATH)
@common
def verify(artifact: Path, out: Output) -> None:
    """Check an artifact directory here: its hashes, and each file's answers against those its export recorded.

    Needs neither the run nor its base. Exit 1 where a file has changed or answers otherwise.
    """
    from rich.table import Table

    from export.verify import verify as verify_artifact
    from unshot.errors import GateError

    found = verify_artifact(artifact)
    table = Table(title=str(artifact), title_justify="left")
    for name in ("file", "equal answers", "KL", "verdict"):
        table.add_column(name, justify="left" if name in ("file", "verdict") else "right")
    for row in found:
        answers = f"{row.answers} of {row.prompts}" if row.prompts else "-"
        words = "; ".join([row.verdict, *row.failures])
        table.add_row(row.file, answers, f"{row.kl:.2g}" if row.prompts else "-", words)
    out.result({"artifact": str(artifact), "files": found}, table)
    wrong = [row for row in found if row.verdict == "differs"]
    if wrong:
        raise GateError(f"{artifact / wrong[0].file}: {'; '.join(wrong[0].failures[:3])}")


@click.command("diff")
@click.argument("one", metavar="A", type=PATH)
@click.argument("two", metavar="B", type=PATH)
@common
def diff(one: Path, two: Path, out: Output) -> None:
    """Compare two artifact directories, or two .gguf files: metadata, tensors, and answers to built-in prompts."""
    from rich.table import Table

    from export.verify import diff as compare

    found = compare(one, two)
    table = Table(title=f"{one} and {two}", title_justify="left")
    for name in ("file", "KL", "top-1", "equal answers", "what differs"):
        table.add_column(name, justify="left" if name in ("file", "what differs") else "right")
    for row in found:
        tensors = [f"{name} ({error:.2g})" for name, error in row.tensors[:3]]
        words = [*row.metadata[:3], *tensors] or [
            "files beside the numbers" if not row.same_bytes else "nothing"
        ]
        more = len(row.metadata[3:]) + len(row.tensors[3:])
        figures = ["-", "-"]
        if row.logits:
            figures = [f"{row.logits.kl:.2g}", f"{row.logits.top1_strict:.1%}"]
        answers = f"{row.answers} of {row.prompts}" if row.prompts else "-"
        table.add_row(row.target, *figures, answers, ", ".join(words) + (f" and {more} more" if more else ""))
    out.result({"one": str(one), "two": str(two), "files": found}, table)
