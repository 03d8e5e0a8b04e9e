"""`unshot deploy ab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unshot.metrics.thresholds import AB_ERROR, AB_POWER
from unshot.options import case_option, common

if TYPE_CHECKING:
    from unshot.console import Output


@click.command()
@click.argument("folder", metavar="LOGDIR", type=click.Path(path_type=Path))
@click.option("--margin", type=float, help="How much worse the candidate's share right may be; default 0.02.")
@click.option("--effect", type=float, help="Difference the sample size is planned for; default: the margin.")
@click.option(
    "--alpha",
    type=float,
    default=AB_ERROR.value,
    show_default=True,
    help="Error rate over all looks together.",
)
@click.option(
    "--power", type=float, default=AB_POWER.value, show_default=True, help="Power at the planned sample size."
)
@click.option(
    "--design",
    type=click.Choice(["auto", "split", "pairs"]),
    default="auto",
    show_default=True,
    help="Compare the arms that units were drawn into, or shadowed pairs; auto: pairs where nothing is split.",
)
@click.option(
    "--task", "task_path", type=click.Path(path_type=Path), help="task.json (or its run) that reads answers."
)
@click.option("--by", multiple=True, help="Only feedback of this source, repeatable: user, reviewer, judge.")
@click.option("--since", help="Only requests from this time on (ISO 8601 or seconds).")
@click.option("--until", help="Only requests before this time.")
@click.option(
    "--out", "final", type=click.Path(path_type=Path), help="Directory for report.html and ab.json."
)
@click.option("--overwrite", is_flag=True, help="Replace the directory where it exists.")
@case_option
@common
def ab(
    folder: Path,
    margin: float | None,
    effect: float | None,
    alpha: float,
    power: float,
    design: str,
    task_path: Path | None,
    by: tuple[str, ...],
    since: str | None,
    until: str | None,
    final: Path | None,
    overwrite: bool,
    case_path: Path | None,
    out: Output,
) -> None:
    """Compare the arms of a request log: quality, failures, latency and cost.

    May be run as often as you like: the error rate holds over all looks together. Exit code 0: the candidate is better,
    or not worse within the margin. 1: the baseline is better, or it cannot be told yet ("keep going").
    """
    from deploy.ab.page import html, tables
    from deploy.ab.run import BETTER, NOT_WORSE, ab_run
    from deploy.answers import find_task
    from deploy.times import moment
    from unshot.case import load_case
    from unshot.console import dumps
    from unshot.contracts.manifest import Manifest, describe_file, staged, write_text
    from unshot.errors import GateError, InputError

    for name, value in (("--alpha", alpha), ("--power", power)):
        if not 0 < value < 1:
            raise InputError(f"{name} is {value:g}; it must be between 0 and 1")
    if effect is not None and not 0 < effect < 1:
        raise InputError(f"--effect is {effect:g}; it must be between 0 and 1")
    case = load_case(case_path, bench={"margin": margin})
    if case.bench.margin == 0 and effect is None:
        raise InputError("--margin 0 leaves nothing to plan for; give --effect, e.g. --effect 0.05")
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
        since=moment(since, "--since"),
        until=moment(until, "--until"),
    )
    shown = tables(report)
    if final is not None:
        manifest = Manifest("deploy-ab", config=report["plan"])
        manifest.inputs = [describe_file(p) for p in sorted(folder.glob("*.jsonl"))]
        with staged(final, overwrite=overwrite) as work:
            write_text(work / "ab.json", dumps(report) + "\n")
            write_text(work / "report.html", html(report, analysed))
            manifest.result = {k: report[k] for k in ("verdict", "reason", "decided_at", "sample")}
            manifest.finish(work)
        shown.append(f"written to {final}")
    out.result(report, *shown)
    if report["verdict"] not in (BETTER, NOT_WORSE):
        raise GateError(f"{report['verdict']}: {report['reason']}")
