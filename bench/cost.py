"""What an hour of the machine costs, and from that and the measured throughput what requests cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.data.rows import read_text
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


def read_plan(plan: Path) -> dict[str, Any]:
    """`plan.json` of a plan directory (or the file itself)."""
    path = plan / "plan.json" if plan.is_dir() else plan
    try:
        loaded = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: not a plan; give the directory that `unshot plan --out` wrote")
    return loaded


def _plan_price(plan: Path) -> Price:
    loaded = read_plan(plan)
    value = loaded.get("price_per_hour")
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{plan}: the plan holds no price per hour; pass --price-per-hour")
    machine = (loaded.get("prices") or {}).get("machine") or {}
    name = machine.get("title") or machine.get("name") or "the planned machine"
    return Price(float(value), f"plan {plan.name}: {name}")


def plan_token_price(plan: Path) -> TokenPrice | None:
    """The price of the API that the plan has as baseline; None where it has none."""
    api = (read_plan(plan).get("prices") or {}).get("api")
    if not isinstance(api, dict):
        return None
    million = {k: float(api[f"{k}_per_token"]) * 1e6 for k in ("input", "output", "cached_input")}
    return TokenPrice(
        million["input"], million["output"], million["cached_input"], f"plan: {api.get('model')}"
    )


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
