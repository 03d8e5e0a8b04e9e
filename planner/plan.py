"""What a plan is: the settings it was made with and everything that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from planner import prices
from planner.options import Option
from planner.tokens import Paths
from planner.triage import Economics, Triage
from planner.uncertainty import Uncertainty
from planner.usage import Usage
from unshot.case import Case


class Settings(Struct, frozen=True):
    """What the command line adds to the case: tokenizers, prices, seeds."""

    paths: Paths = field(default_factory=lambda: Paths({}))
    approximate: bool = False
    prices: prices.Overrides = field(default_factory=prices.Overrides)
    gpu_prices: Mapping[str, float] = field(default_factory=dict)
    calibration: Path | None = None
    draws: int = 1000
    seed: int = 0


class Comparison(Struct, frozen=True):
    """One option against the cheapest way to keep the prompt."""

    break_even: float | None
    payback_months: float | None


class Plan(Struct, frozen=True):
    """Everything a report shows. `keep` and `tuned` are the two options the verdict weighs."""

    case: Case
    rate: float
    options: tuple[Option, ...]
    keep: Option | None
    tuned: Option | None
    comparisons: dict[str, Comparison]
    uncertainty: Uncertainty
    triage: Triage
    economics: Economics | None
    usages: dict[str, Usage]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    machine: dict[str, Any] | None
    price: prices.ApiPrice | None

    def option(self, key: str) -> Option:
        """The option called `key`."""
        return next(o for o in self.options if o.key == key)
