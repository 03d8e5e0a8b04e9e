"""`unshot deploy split`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.options import store_options
from unshot.options import Number, common

if TYPE_CHECKING:
    from unshot.console import Output


@click.command()
@click.argument("percent", type=Number(ge=0, le=100))
@click.option("--by", help="Who changes it; default: the login name.")
@click.option("--why", default="", help="One line for the history.")
@store_options
@common
def split(percent: float, by: str | None, why: str, store: Path, tracking: str | None, out: Output) -> None:
    """Send PERCENT of the users to the candidate; a running gateway on this registry follows within a second.

    A user stays in their arm; raising the share moves users into the candidate only, lowering it only out of it.
    """
    from deploy.registry.locate import open_registry
    from deploy.registry.store import user

    event = open_registry(store, tracking=tracking).set_split(percent, by=by or user(), why=why)
    out.result(event, f"split: {event.before or 'as the gateway was started'} -> {percent:g}% candidate")
