"""`unshot export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unshot.options import case_option, common

if TYPE_CHECKING:
    from unshot.console import Output


@click.command()
@click.argument("source")
@click.option(
    "--to",
    "texts",
    multiple=True,
    help="Format and precision, repeatable: gguf:q8_0 (default), gguf:f16, onnx:fp32.",
)
@click.option(
    "--out", "final", type=click.Path(path_type=Path), required=True, help="Artifact directory to write."
)
@click.option("--base", help="Where the run's base model lies now; default: where it was.")
@click.option("--overwrite", is_flag=True, help="Replace the artifact directory where it exists.")
@click.option("--allow-drift", is_flag=True, help="Keep an artifact that fails the parity gate.")
@click.option(
    "--check-rows", type=click.IntRange(min=1), default=32, show_default=True, help="Test rows the gate runs."
)
@click.option(
    "--low-memory",
    is_flag=True,
    help="Check against the tuned model one layer at a time; by itself where it must.",
)
@case_option
@common
def export(
    source: str,
    texts: tuple[str, ...],
    final: Path,
    base: str | None,
    overwrite: bool,
    allow_drift: bool,
    check_rows: int,
    low_memory: bool,
    case_path: Path | None,
    out: Output,
) -> None:
    """Merge SOURCE (a run of `unshot tune`, or a base model) and write GGUF and ONNX files.

    Each file is run in its own engine on the run's test rows and must equal the model that was evaluated; one that
    does not is not kept.
    """
    from export.run import export_run
    from export.targets import parse_targets
    from unshot.case import load_case

    case = load_case(case_path, export={"to": list(texts) or None})
    result = export_run(
        source,
        parse_targets(case.export.to),
        final,
        out,
        base=base,
        overwrite=overwrite,
        allow_drift=allow_drift,
        check_rows=check_rows,
        low_memory=low_memory,
    )
    out.result(result, *summary(result, final))


def summary(result: dict[str, Any], final: Path) -> list[Any]:
    """The artifacts and their parity figures as a rich table."""
    from rich.table import Table

    table = Table(title=f"{result['source']} on {result['base']}", title_justify="left")
    for name in ("file", "MB", "KL", "top-1", "cosine", "perplexity", "greedy", "parity"):
        table.add_column(name, justify="left" if name in ("file", "parity") else "right")
    for report in result["parity"]:
        logits = report["figures"].get("logits") or {}
        greedy = report["figures"].get("greedy", {}).get("equal")

        def cell(key: str, form: str, values: dict[str, Any] = logits) -> str:
            return format(values[key], form) if values.get(key) is not None else "-"

        table.add_row(
            result["files"][report["target"]],
            f"{result['bytes'][report['target']] / 1e6:.0f}",
            cell("kl", ".2g"),
            cell("top1_strict", ".2%"),
            cell("cosine", ".5f"),
            cell("perplexity", ".4f"),
            "-" if greedy is None else f"{greedy:.1%}",
            "equal" if report["passed"] else "drifts",
        )
    return [table, f"written to {final}"]
