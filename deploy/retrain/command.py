"""`unshot deploy retrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from deploy.options import BY, store_options
from unshot.metrics.thresholds import MARGIN
from unshot.options import PATH, SHARE, common, whole

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output


@click.command()
@click.argument("folder", metavar="LOGDIR", type=PATH, required=False)
@click.option(
    "--champion", metavar="VERSION|RUN", default="champion", show_default=True, help="What is to be beaten."
)
@click.option("--data", type=PATH, help="The rows that the champion was tuned on.")
@click.option("--out", "final", type=PATH, help="Directory for stages and proposal.")
@click.option("--base", help="Where the base model lies now; default: where the champion was tuned.")
@click.option(
    "--margin",
    type=SHARE,
    help=f"How much worse the new score may be; default: the case's, or {MARGIN.value:g}.",
)
@click.option(
    "--target", type=SHARE, help="Nothing is done where the champion meets it; default: the case's target."
)
@click.option(
    "--min-rows",
    "least",
    type=whole(0),
    default=10,
    show_default=True,
    help="Fewer new rows: nothing is done.",
)
@BY
@click.option(
    "--per-user",
    type=whole(1),
    default=10,
    show_default=True,
    help="Inputs whose answer one user may change; reviewers are not limited.",
)
@click.option("--force", is_flag=True, help="Retrain although the target is met or new rows are few.")
@click.option(
    "--check-rows",
    type=whole(1),
    default=32,
    show_default=True,
    help="Rows of the export's parity gate.",
)
@click.option(
    "--requests",
    type=whole(2),
    help="Timed requests of the bench; default: those of the case file.",
)
@click.option(
    "--case",
    "case_path",
    type=PATH,
    help="Case file to tune, export and compare by; default: what the champion was tuned by, not ./unshot.toml.",
)
@click.option(
    "--schedule", "kind", type=click.Choice(["cron", "github", "airflow"]), help="Only print a schedule."
)
@click.option(
    "--every",
    type=click.Choice(["weekly", "monthly", "quarterly"]),
    default="quarterly",
    show_default=True,
    help="How often, for --schedule.",
)
@store_options
@common
def retrain(
    folder: Path | None,
    champion: str,
    data: Path | None,
    final: Path | None,
    case_path: Path | None,
    kind: str | None,
    every: str,
    store: Path,
    tracking: str | None,
    out: Output,
    **settings: Any,
) -> None:
    """Tune on the log's corrections, compare with the champion, and propose. Promotes nothing.

    Runs `data check`, `tune`, `eval`, `export` and `bench`; the same command after an interruption goes on. Exit code
    0: proposed, or nothing to do. 1: the champion stays.
    """
    from unshot.errors import InputError

    if kind is not None:
        from deploy.retrain.schedule import schedule

        text = schedule(
            kind,
            every,
            _arguments(folder, champion, data, case_path, store, {**settings, "tracking": tracking}),
        )
        out.result({"kind": kind, "every": every, "text": text}, text.rstrip("\n"))
        return
    for name, value in (("LOGDIR", folder), ("--data", data), ("--out", final)):
        if value is None:
            raise InputError(f"{name} is missing; see `unshot deploy retrain --help`")
    assert folder is not None and data is not None and final is not None

    from deploy.retrain.champion import find_champion
    from deploy.retrain.page import tables
    from deploy.retrain.run import KEEP, NOTHING, Settings, retrain_run
    from unshot.case_file import load_case
    from unshot.errors import GateError

    settings = completed(settings, load_case(case_path, out=out) if case_path is not None else None)
    beaten = find_champion(champion, store, tracking)
    report = retrain_run(folder, beaten, data, final, Settings(case=case_path, **settings), out)
    shown = tables(report)
    if report["verdict"] != NOTHING:
        write_proposal(final, report)
        shown.append(f"written to {final}")
    out.result({"out": str(final), **report}, *shown)
    if report["verdict"] == KEEP:
        raise GateError(f"{report['verdict']}: {report['reason']}")


def completed(given: dict[str, Any], case: Case | None) -> dict[str, Any]:
    """What the command line says, over the case, over the defaults of a case file."""
    from unshot.case import Case

    case = case or Case()
    known = {"target": case.task.target, "margin": case.bench.margin, "requests": case.bench.requests}
    return {**given, **{name: value for name, value in known.items() if given[name] is None}}


def write_proposal(final: Path, report: dict[str, Any]) -> None:
    """proposal.json, proposal.md and report.html beside the stages' directories."""
    import json

    from deploy.retrain.page import html, markdown
    from unshot.console import dumps
    from unshot.data.files import write_text

    changes = json.loads((final / "data" / "changes.json").read_text(encoding="utf-8"))
    write_text(final / "proposal.json", dumps(report) + "\n")
    write_text(final / "proposal.md", markdown(report, changes))
    write_text(final / "report.html", html(report, changes))


def _arguments(
    folder: Path | None,
    champion: str,
    data: Path | None,
    case_path: Path | None,
    store: Path,
    settings: dict[str, Any],
) -> list[str]:
    """The command line to schedule, with what was given and placeholders for what was not."""
    found = [str(folder or "log"), "--champion", champion, "--data", str(data or "data.jsonl")]
    found += ["--store", str(store)]
    if case_path is not None:
        found += ["--case", str(case_path)]
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        said = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for value in settings[name] if isinstance(settings.get(name), tuple) else [settings.get(name)]:
            if said and value is not None:
                found += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return found
