"""What a plan is: everything that a report shows."""

from __future__ import annotations

from msgspec import Struct

from planner.options import Option
from planner.prices import ApiPrice
from planner.uncertainty import Uncertainty
from planner.usage import Usage
from planner.verdict import Economics
from unshot.case import Case, Slo
from unshot.contracts.plan import MachinePrice, Verdict


class Comparison(Struct, frozen=True):
    """One option against the cheapest way to keep the prompt."""

    break_even: float | None
    payback_months: float | None


class Plan(Struct, frozen=True):
    """Everything a report shows. `keep` and `tuned` are the two options the verdict weighs."""

    case: Case
    rate: float
    slo: Slo
    slo_source: str
    options: tuple[Option, ...]
    keep: Option | None
    tuned: Option | None
    comparisons: dict[str, Comparison]
    uncertainty: Uncertainty
    verdict: Verdict
    economics: Economics | None
    usages: dict[str, Usage]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    machine: MachinePrice | None
    price: ApiPrice | None

    def option(self, key: str) -> Option:
        """The option called `key`."""
        return next(o for o in self.options if o.key == key)
