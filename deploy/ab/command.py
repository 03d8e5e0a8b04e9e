"""`unshot deploy ab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.options import BY, log_options
from unshot.flags import case_flags
from unshot.metrics.thresholds import AB_ERROR, AB_POWER
from unshot.options import INNER_SHARE, common, out_options

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output


@click.command()
@log_options
@case_flags(
    "--metric", "--judge", "--judge-model", "--judge-key-env", "--margin",
    help={"--margin": "How much worse the candidate's score may be."},
)  # fmt: skip
@click.option(
    "--effect", type=INNER_SHARE, help="Difference the sample size is planned for; default: the margin."
)
@click.option(
    "--alpha",
    type=INNER_SHARE,
    default=AB_ERROR.value,
    show_default=True,
    help="Error rate over all looks together.",
)
@click.option(
    "--power",
    type=INNER_SHARE,
    default=AB_POWER.value,
    show_default=True,
    help="Power at the planned sample size.",
)
@click.option(
    "--design",
    type=click.Choice(["auto", "split", "pairs"]),
    default="auto",
    show_default=True,
    help="Compare the arms that units were drawn into, or shadowed pairs; auto: pairs where nothing is split.",
)
@BY
@out_options("Directory for report.html and ab.json.", required=False)
@common
def ab(
    folder: Path,
    effect: float | None,
    alpha: float,
    power: float,
    design: str,
    task_path: Path | None,
    by: tuple[str, ...],
    since: float | None,
    until: float | None,
    final: Path | None,
    overwrite: bool,
    case: Case,
    out: Output,
) -> None:
    """Compare the arms of a request log: quality, failures, latency and cost.

    May be run as often as you like: the error rate holds over all looks together. Exit code 0: the candidate is better,
    or not worse within the margin. 1: the baseline is better, or it cannot be told yet ("keep going").
    """
    from contextlib import nullcontext

    from deploy.ab.page import html, tables
    from deploy.ab.run import BETTER, NOT_WORSE, ab_run
    from deploy.answers import find_task
    from unshot.console import dumps
    from unshot.contracts.manifest import Manifest, describe_file, staged
    from unshot.data.files import write_text
    from unshot.errors import GateError, InputError

    if case.bench.margin == 0 and effect is None:
        raise InputError("--margin 0 leaves nothing to plan for; give --effect, e.g. --effect 0.05")
    # The output first: a look that nobody could see would fix the plan all the same.
    with staged(final, overwrite=overwrite) if final is not None else nullcontext() as work:
        report, analysed = ab_run(
            folder,
            out,
            margin=case.bench.margin,
            effect=effect,
            alpha=alpha,
            power=power,
            how=design,
            task=find_task(case, task_path),
            by=by,
            since=since,
            until=until,
        )
        if work is not None:
            manifest = Manifest("deploy-ab", config=report["plan"].plain())
            manifest.inputs = [describe_file(p) for p in sorted(folder.glob("*.jsonl"))]
            write_text(work / "ab.json", dumps(report) + "\n")
            write_text(work / "report.html", html(report, analysed))
            manifest.result = {"decided_at": report["decided_at"], "sample": report["sample"]}
            manifest.verdict, manifest.reason = report["verdict"], report["reason"]
            manifest.finish(work)
    shown = tables(report)
    if final is not None:
        shown.append(f"written to {final}")
    out.result(report, *shown)
    if report["verdict"] not in (BETTER, NOT_WORSE):
        raise GateError(f"{report['verdict']}: {report['reason']}")
