"""The options of `unshot tune` about what is mixed in, compared and measured beside the task's own score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unshot.options import Command

NAMES = ("mix", "mix_share", "augment_format", "embedder", "strict")


def assess_options(function: Command) -> Command:
    """Add --mix, --mix-share, --augment-format, --embedder, --gates and --strict."""
    for option in reversed(
        [
            click.option(
                "--mix",
                type=click.Path(path_type=Path),
                help="General rows to train on too, against forgetting.",
            ),
            click.option("--mix-share", type=float, help="Their share of the training rows; default 0.1."),
            click.option(
                "--augment-format",
                is_flag=True,
                default=None,
                help="Vary the form of half the training prompts.",
            ),
            click.option(
                "--embedder", help="Compare meaning across the split: a directory, all-minilm-l6-v2, or off."
            ),
            click.option(
                "--gates/--no-gates", default=None, help="Measure forgetting and robustness; default: yes."
            ),
            click.option("--strict", is_flag=True, default=None, help="Exit code 1 where a gate fails."),
        ]
    ):
        function = option(function)
    return function


def assess_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """Take these options out of a command's flags, as keys of the case's [tune]."""
    gates = flags.pop("gates")
    return {name: flags.pop(name) for name in NAMES} | {"forgetting": gates, "robustness": gates}
