"""`unshot deploy rollout`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.options import TASK, WAIVE, store_options
from unshot.flags import case_flags
from unshot.metrics.thresholds import MARGIN
from unshot.options import PATH, POSITIVE, SECONDS, SHARE, common, whole

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output


@click.command()
@click.argument("version")
@click.option("--log", "folder", type=PATH, required=True, help="The gateway's --log directory.")
@click.option(
    "--steps", default="1,10,50,100", show_default=True, help="The candidate's share at each step, percent."
)
@click.option("--hold", default="30m", show_default=True, help="How long a step is held: 90s, 30m, 2h, 1d.")
@click.option(
    "--margin",
    type=SHARE,
    default=MARGIN.value,
    show_default=True,
    help="How much more often the candidate may fail before it is taken back.",
)
@click.option(
    "--slower", type=POSITIVE, default=1.5, show_default=True, help="How many times as long it may take."
)
@click.option(
    "--least", type=whole(1), default=30, show_default=True, help="Answers that a step needs before the next."
)
@click.option(
    "--poll", type=SECONDS, default=10.0, show_default=True, help="Seconds between looks at the log."
)
@WAIVE
@click.option("--by", help="Who rolls it out; default: the login name. --waive needs it.")
@TASK
@store_options
@case_flags()
@common
def rollout(
    version: str,
    folder: Path,
    steps: str,
    hold: str,
    margin: float,
    slower: float,
    least: int,
    poll: float,
    waive: tuple[str, ...],
    by: str | None,
    task_path: Path | None,
    case: Case,
    store: Path,
    tracking: str | None,
    out: Output,
) -> None:
    """Bring VERSION to all users step by step; take it back where it is worse.

    Promotes it with the first step's share; while a step is held the log is looked at: feedback, failures and times of
    both arms, within each share. The same command goes on after it was killed. Exit code 0: it answers everybody. 1: it
    was taken back, or somebody ended the rollout.
    """
    import time

    from deploy.answers import find_task
    from deploy.registry.evidence import parse_waivers
    from deploy.registry.locate import open_registry
    from deploy.registry.store import user
    from deploy.rollout.run import Bounds, begin, parse_hold, parse_steps, rollout_run
    from unshot.errors import GateError, InputError

    shares, seconds = parse_steps(steps), parse_hold(hold)
    if not folder.is_dir():
        raise InputError(f"--log {folder}: no such directory; give the gateway's --log directory")
    found = open_registry(store, tracking=tracking)
    number = found.state().find(version).number
    task = find_task(case, task_path)
    under_way = begin(
        found, number, shares, seconds, by=by or user(), waivers=parse_waivers(waive, by), now=time.time()
    )
    out.log(f"v{number} at {under_way.steps[under_way.step]:g}%, held for {hold}")
    over = rollout_run(found, under_way, folder, Bounds(margin, slower, least), out, task=task, poll=poll)
    out.result(over.plain(), f"v{number}: {over.state}; {over.why}")
    if over.state != "done":
        raise GateError(f"v{number} {over.state}: {over.why}")
