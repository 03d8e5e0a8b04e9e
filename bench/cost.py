"""What an hour of the machine costs, and from that and the measured throughput what requests cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.contracts.plan import PlanFile
from unshot.errors import InputError
from unshot.prices import TokenPrice


@dataclass(frozen=True)
class Price:
    """Dollars per hour of the machine that runs one side, and where the figure is from."""

    per_hour: float
    source: str

    def of(self, seconds: float) -> float:
        """Dollars for `seconds` of the machine."""
        return self.per_hour * seconds / 3600


def machine_price(flag: float | None, plan: Path | None, cores: int) -> Price:
    """The price to count with: the flag, else the plan's, else the list price of as many CPU cores.

    Raises `InputError` for a price that is not positive or a plan without one.
    """
    if flag is not None:
        if not 0 < flag < float("inf"):
            raise InputError(f"--price-per-hour is {flag:g}; it must be above 0 (dollars per hour)")
        return Price(flag, "--price-per-hour")
    if plan is not None:
        return _plan_price(plan)
    from unshot.catalog import gpu

    cpu = gpu("cpu")
    assert cpu.price is not None
    return Price(
        cpu.price / cpu.cores * cores,
        f"{cores} of the {cpu.cores} cores of {cpu.price_source}, {cpu.price_date}",
    )


def _plan_price(plan: Path) -> Price:
    loaded = PlanFile.read(plan)
    if loaded.prices.machine is None or loaded.price_per_hour is None or not loaded.price_per_hour > 0:
        raise InputError(f"{plan}: the plan holds no price per hour; pass --price-per-hour")
    return Price(loaded.price_per_hour, f"plan {plan.name}: {loaded.prices.machine.title}")


def plan_token_price(plan: Path) -> TokenPrice | None:
    """The price of the API that the plan has as baseline; None if it has none."""
    api = PlanFile.read(plan).prices.api
    if api is None:
        return None
    million = (api.input_per_token * 1e6, api.output_per_token * 1e6, api.cached_input_per_token * 1e6)
    return TokenPrice(*million, f"plan: {api.model}")


def costs(dollars: Sequence[float], correct_share: float | None) -> dict[str, Any]:
    """Dollars per 1,000 requests and per 1,000 correct answers from dollars per request.

    `correct_share` is the share of right answers; the second figure is None where none is right or none was
    scored.
    """
    per_thousand = sum(dollars) / len(dollars) * 1000
    return {
        "per_1000_requests": per_thousand,
        "per_1000_correct": per_thousand / correct_share if correct_share else None,
    }
