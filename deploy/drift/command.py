"""`unshot deploy drift`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.options import log_options
from unshot.engines.embedder import ACCEPTED, HASHED
from unshot.flags import case_flags
from unshot.metrics.thresholds import DRIFT_ALARMS
from unshot.options import EMBEDDER, INNER_SHARE, PATH, common, out_options, whole

if TYPE_CHECKING:
    from deploy.drift.season import Season
    from unshot.case import Case
    from unshot.console import Output


@click.command()
@log_options
@click.option(
    "--reference",
    type=PATH,
    help="What the model was made for: a run of `unshot tune`, or a data file. Default: the log's first requests.",
)
@click.option("--window", type=whole(40), default=100, show_default=True, help="Requests in the live window.")
@click.option("--every", type=whole(1), default=25, show_default=True, help="Requests between looks.")
@click.option(
    "--settle",
    type=whole(40),
    default=200,
    show_default=True,
    help="First requests of a version, with which its answers are compared.",
)
@click.option(
    "--season",
    type=click.Choice(["none", "day", "week"]),
    default="none",
    show_default=True,
    help="Compare like hours with like: with the first whole day or week of the log.",
)
@click.option(
    "--alpha",
    type=INNER_SHARE,
    default=DRIFT_ALARMS.value,
    show_default=True,
    help="Rate of false alarms over --looks looks.",
)
@click.option("--looks", type=whole(1), default=100, show_default=True, help="Looks that share --alpha.")
@click.option(
    "--arm", type=click.Choice(["baseline", "candidate"]), help="Whose answers; default: the candidate's."
)
@click.option(
    "--embedder", type=EMBEDDER, default=HASHED, show_default=True, help=f"Vectors of inputs: {ACCEPTED}."
)
@click.option("--state", type=PATH, help="Record of looks; default LOGDIR/drift.json.")
@click.option("--restart", is_flag=True, help="Forget earlier looks: a new error budget.")
@out_options("Directory for report.html and drift.json.", required=False)
@case_flags()
@common
def drift(
    folder: Path,
    reference: Path | None,
    window: int,
    every: int,
    settle: int,
    season: Season,
    alpha: float,
    looks: int,
    arm: str | None,
    embedder: str,
    task_path: Path | None,
    since: float | None,
    until: float | None,
    state: Path | None,
    restart: bool,
    final: Path | None,
    overwrite: bool,
    case: Case,
    out: Output,
) -> None:
    """Compare live traffic with what the model was made for, and name the slices where the model is worse.

    Takes the looks that have become due since the last call. Exit code 1: drift was found.
    """
    from contextlib import nullcontext

    from deploy.answers import find_task
    from deploy.drift.looks import Schedule
    from deploy.drift.page import headline, html, tables
    from deploy.drift.run import DRIFT, drift_run
    from unshot.console import dumps
    from unshot.contracts.manifest import Manifest, describe_file, staged
    from unshot.data.files import write_text
    from unshot.errors import GateError

    # The output first: a look is taken once, and what it found would be gone with a report that cannot be written.
    with staged(final, overwrite=overwrite) if final is not None else nullcontext() as work:
        report = drift_run(
            folder,
            out,
            schedule=Schedule(window, every, settle, alpha, looks, season),
            reference=reference,
            arm=arm,
            embedder=embedder,
            state=state,
            restart=restart,
            since=since,
            until=until,
            task=find_task(case, task_path),
        )
        if work is not None:
            manifest = Manifest("deploy-drift", config={**report["schedule"].plain(), "embedder": embedder})
            manifest.inputs = [describe_file(p) for p in sorted(folder.glob("*.jsonl"))]
            write_text(work / "drift.json", dumps(report) + "\n")
            write_text(work / "report.html", html(report))
            manifest.verdict = report["verdict"]
            manifest.result = {"found": report["found"], "since": report["since"]}
            manifest.finish(work)
    shown = tables(report)
    if final is not None:
        shown.append(f"written to {final}")
    out.result(report, *shown)
    if report["verdict"] == DRIFT:
        raise GateError(headline(report))
