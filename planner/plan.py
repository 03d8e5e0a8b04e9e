"""What a plan is: everything that a report shows."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from planner.options import Option
from planner.prices import ApiPrice
from planner.triage import Economics, Triage
from planner.uncertainty import Uncertainty
from planner.usage import Usage
from unshot.case import Case


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
    price: ApiPrice | None

    def option(self, key: str) -> Option:
        """The option called `key`."""
        return next(o for o in self.options if o.key == key)
