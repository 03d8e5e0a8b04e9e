"""Options that several commands of `unshot deploy` share: where the registry is, and which part of a log is read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from unshot.options import PATH, Command


class Moment(click.ParamType):
    """ISO 8601 (UTC where it names no zone) or seconds since 1970, as seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value)
        except ValueError:
            pass
        try:
            when = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"`{value}`; give ISO 8601, e.g. 2026-01-31T12:00, or seconds since 1970", param, ctx)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


TASK = click.option("--task", "task_path", type=PATH, help="task.json (or its run) that reads answers.")
# Whose feedback counts.
BY = click.option(
    "--by", multiple=True, help="Only feedback of this source, repeatable: user, reviewer, judge."
)
WAIVE = click.option(
    "--waive", multiple=True, metavar="GATE=REASON", help="Take a gate upon yourself; repeatable."
)


def log_options(function: Command) -> Command:
    """LOGDIR as `folder`, --task as `task_path`, and --since and --until in seconds since 1970."""
    for option in (
        click.option("--until", type=Moment(), help="Only requests before this time."),
        click.option("--since", type=Moment(), help="Only requests from this time on (ISO 8601 or seconds)."),
        TASK,
        click.argument("folder", metavar="LOGDIR", type=PATH),
    ):
        function = option(function)
    return function


def store_options(function: Command) -> Command:
    """Where the registry is: --store DIR, and --mlflow URI."""
    function = click.option(
        "--mlflow",
        "tracking",
        envvar="MLFLOW_TRACKING_URI",
        help="Keep the registry in MLflow at this tracking URI [env: MLFLOW_TRACKING_URI]; --store caches files.",
    )(function)
    return click.option(
        "--store",
        type=PATH,
        default=Path("unshot-registry"),
        show_default=True,
        help="Directory of the registry.",
    )(function)
