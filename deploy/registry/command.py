"""`unshot deploy registry add|list|show`, `unshot deploy promote`, `unshot deploy rollback`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.options import WAIVE, store_options
from unshot.options import PATH, common

if TYPE_CHECKING:
    from unshot.console import Output
    from unshot.contracts.registry import Event, State, Version

# Seconds within which a second rollback is taken for the same one.
SAME_ROLLBACK = 5.0


@click.group()
def registry() -> None:
    """Versions of artifacts: where they came from, what proved them, which one is served."""


@registry.command()
@click.argument("artifact", type=PATH)
@click.option("--run", type=PATH, help="Run it was exported from; default: as exported.")
@click.option("--bench", type=PATH, help="Bench report on it.")
@click.option("--by", help="Who adds it; default: the login name.")
@click.option("--note", default="", help="One line for the history.")
@click.option("--link", is_flag=True, help="Hard-link the files in place of copying them (one disk).")
@store_options
@common
def add(
    artifact: Path,
    run: Path | None,
    bench: Path | None,
    by: str | None,
    note: str,
    link: bool,
    store: Path,
    tracking: str | None,
    out: Output,
) -> None:
    """Take ARTIFACT (a directory of `unshot export`) in as the next version.

    An artifact that is already there keeps its number; its gates and scores are read again.
    """
    from deploy.registry.locate import open_registry

    found = open_registry(store, tracking=tracking, must_exist=False)
    version, new = found.add(artifact, run=run, bench=bench, by=by, note=note, link=link)
    payload = {"version": version.name, "new": new, **described(version, found.state())}
    head = f"{version.name} {'added' if new else 'was there; its gates were read again'}"
    out.result(payload, head, gate_table(version))


@registry.command()
@click.option("--by", help="Who makes it; default: the login name.")
@store_options
@common
def init(by: str | None, store: Path, tracking: str | None, out: Output) -> None:
    """Make an empty registry, for a split between two servers that no version of it runs."""
    from deploy.registry.locate import open_registry
    from deploy.registry.store import user

    found = open_registry(store, tracking=tracking, must_exist=False)
    new = found.create(by=by or user())
    out.result({"registry": found.place, "new": new}, f"{found.place} {'made' if new else 'was there'}")


@registry.command("list")
@store_options
@common
def list_(store: Path, tracking: str | None, out: Output) -> None:
    """All versions, newest first, with their gates and aliases."""
    from rich.table import Table

    from deploy.registry.locate import open_registry

    found = open_registry(store, tracking=tracking)
    state = found.state()
    table = Table(title=f"{len(state.versions)} versions in {found.place}", title_justify="left")
    for name in (
        "version",
        "alias",
        "added",
        "by",
        "base",
        "MB",
        "parity",
        "quality",
        "forgetting",
        "review",
    ):
        table.add_column(name, justify="right" if name == "MB" else "left")
    newest = sorted(state.versions.values(), key=lambda v: -v.number)
    for version in newest:
        verdicts = version.verdicts()
        waived = {w.gate for w in version.waivers}
        cells = [
            "waived" if g in waived else word(verdicts.get(g, (None, ""))[0])
            for g in ("parity", "quality", "forgetting", "review")
        ]
        table.add_row(
            version.name,
            ", ".join(state.names(version.number)),
            version.added[:16],
            version.by,
            version.base or "-",
            f"{sum(version.files.values()) / 1e6:.0f}",
            *cells,
        )
    payload = {
        "aliases": {alias: f"v{n}" for alias, n in state.aliases.items()},
        "split": state.split,
        "versions": [described(v, state) for v in newest],
    }
    out.result(payload, table)


@registry.command()
@click.argument("version")
@store_options
@common
def show(version: str, store: Path, tracking: str | None, out: Output) -> None:
    """One VERSION (v3, champion, challenger): gates, scores, lineage, and every change it was part of."""
    from deploy.registry.locate import open_registry

    state = open_registry(store, tracking=tracking).state()
    found = state.find(version)
    events = [e for e in state.history if found.name in (e.subject, e.before, e.after)]
    lines = [f"{e.at[:19]} {e.by}: {sentence(e)}" for e in events]
    facts = [f"files: {', '.join(found.files)}", f"added from {found.source}"]
    facts += [f"{stage}: {origin.path}" for stage, origin in found.lineage.items()]
    payload = {**described(found, state), "history": [e.plain() for e in events]}
    out.result(payload, gate_table(found), *facts, *lines)


@click.command()
@click.argument("version")
@click.option(
    "--as",
    "alias",
    type=click.Choice(["champion", "challenger"]),
    default="champion",
    show_default=True,
    help="The champion answers users; a challenger needs the parity gate alone.",
)
@WAIVE
@click.option("--by", help="Who promotes; default: the login name. --waive needs it.")
@click.option("--why", default="", help="One line for the history.")
@store_options
@common
def promote(
    version: str,
    alias: Any,
    waive: tuple[str, ...],
    by: str | None,
    why: str,
    store: Path,
    tracking: str | None,
    out: Output,
) -> None:
    """Make VERSION the champion where its gates allow it: parity, quality, forgetting, human review.

    A running gateway follows without dropping a request. Exit code 1 where a gate does not hold.
    """
    from deploy.registry.evidence import parse_waivers
    from deploy.registry.locate import open_registry
    from deploy.registry.store import user

    found = open_registry(store, tracking=tracking)
    waivers = parse_waivers(waive, by)
    number = found.state().find(version).number
    found.refresh(number, by or user())
    event = found.move(alias, number, by=by or user(), why=why, waivers=waivers)
    out.result(event, sentence(event))


@click.command()
@click.option(
    "--from",
    "taken_back",
    metavar="VERSION",
    help="The champion to take back; refused if it is another by now.",
)
@click.option("--by", help="Who rolls back; default: the login name.")
@click.option("--why", default="", help="One line for the history.")
@store_options
@common
def rollback(
    taken_back: str | None, by: str | None, why: str, store: Path, tracking: str | None, out: Output
) -> None:
    """Put the champion before this one back; a running gateway follows.

    Before the first promotion there was none: then every answer is the baseline's again. A second rollback within a few
    seconds is taken for the same one by somebody else, unless --from names the version that it takes back.
    """
    from deploy.registry.locate import open_registry
    from deploy.registry.store import user

    start = time.perf_counter()
    found = open_registry(store, tracking=tracking)
    state = found.state()
    number = state.find(taken_back).number if taken_back else None
    if number is None:
        refuse_second(state)
    event = found.rollback(by=by or user(), why=why, champion=number)
    out.result(
        {**event.plain(), "seconds": round(time.perf_counter() - start, 4)},
        sentence(event),
    )


def refuse_second(state: State) -> None:
    """Raise `InputError` where a rollback was made just now: two people who see the same fault go back one version."""
    from unshot.errors import InputError

    last = next((e for e in reversed(state.history) if e.action in ("promote", "rollback")), None)
    if last is None or last.action != "rollback":
        return
    ago = (datetime.now(UTC) - datetime.fromisoformat(last.at)).total_seconds()
    if 0 <= ago < SAME_ROLLBACK:
        raise InputError(
            f"{last.by} rolled back {ago:.1f} s ago ({last.before or 'none'} -> {last.after or 'none'}); nothing was "
            f"changed, to go back once more: --from {last.after or 'VERSION'}"
        )


def described(version: Version, state: State) -> dict[str, Any]:
    """A version as --json gives it."""
    verdicts = {name: {"passed": p, "detail": d} for name, (p, d) in version.verdicts().items()}
    return {
        **version.plain(),
        "name": version.name,
        "aliases": state.names(version.number),
        "verdicts": verdicts,
    }


def word(passed: bool | None) -> str:
    return {True: "passed", False: "FAILED", None: "-"}[passed]


def gate_table(version: Version) -> Any:
    """The gates of a version as a rich table."""
    from rich.table import Table

    from deploy.registry.evidence import NEEDED

    table = Table(title=f"{version.name}: gates", title_justify="left")
    for name in ("gate", "", "detail"):
        table.add_column(name)
    verdicts = version.verdicts()
    waived = {w.gate: w for w in version.waivers}
    for name in dict.fromkeys([*NEEDED["champion"], *verdicts]):
        passed, detail = verdicts.get(name, (None, "nobody looked"))
        waiver = waived.get(name)
        if waiver is not None and passed is not True:
            table.add_row(name, "waived", f"{waiver.by}: {waiver.reason} ({detail})")
        else:
            table.add_row(name, word(passed), detail)
    return table


def sentence(event: Event) -> str:
    """An event in words."""
    why = f" ({event.why})" if event.why else ""
    if event.action == "add":
        return f"added {event.subject} from {event.after}{why}"
    if event.action == "gates":
        return f"{event.subject}: {event.why}"
    return f"{event.action}: {event.subject} {event.before or 'none'} -> {event.after or 'none'}{why}"
