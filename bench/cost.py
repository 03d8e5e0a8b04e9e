"""What an hour of each side's machines or its tokens cost, and from that what requests cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.records import RequestRecord, machine_seconds
from bench.sides import CACHE_ON
from unshot.contracts.figures import Cost
from unshot.contracts.plan import PlanFile
from unshot.contracts.report import SideName, SidePrice, SystemFacts
from unshot.errors import InputError
from unshot.prices import TokenPrice


@dataclass(frozen=True)
class PriceOptions:
    """What the command line says of one side's price."""

    per_hour: float | None = None
    flag: str = "--price-per-hour"
    machines: int = 1
    tokens: TokenPrice | None = None


def side_price(
    side: SideName, options: PriceOptions, plan: Path | None, facts: SystemFacts, *, local: bool, cores: int
) -> SidePrice:
    """The price to count with: token price, price per hour, the plan's, the list price of what runs here, or none.

    A server at a URL runs on a machine that nobody named: without a price it has none. Raises `InputError` for a price
    that is not positive or a plan without one.
    """
    if options.tokens is not None:
        return SidePrice(tokens=options.tokens, source=options.tokens.source)
    if options.per_hour is not None:
        if not 0 < options.per_hour < math.inf:
            raise InputError(f"{options.flag} is {options.per_hour:g}; it must be above 0 (dollars per hour)")
        return SidePrice(per_hour=options.per_hour, machines=options.machines, source=options.flag)
    if plan is not None:
        return _plan_price(plan, options.machines)
    if not local:
        return SidePrice(
            source=f"no price: give --{side}-price-per-hour or --{side}-price for a server at a URL"
        )
    if facts.device != "cpu":
        return SidePrice(source=f"no price: give --{side}-price-per-hour for {facts.device}")
    from unshot.catalog import gpu

    cpu = gpu("cpu")
    assert cpu.price is not None
    return SidePrice(
        per_hour=cpu.price / cpu.cores * cores,
        machines=options.machines,
        source=f"{cores} of the {cpu.cores} cores of {cpu.price_source}, {cpu.price_date}",
    )


def _plan_price(plan: Path, machines: int) -> SidePrice:
    loaded = PlanFile.read(plan)
    if loaded.prices.machine is None or loaded.price_per_hour is None or not loaded.price_per_hour > 0:
        raise InputError(f"{plan}: the plan holds no price per hour; pass --price-per-hour")
    source = f"plan {plan.name}: {loaded.prices.machine.title}"
    return SidePrice(per_hour=loaded.price_per_hour, machines=machines, source=source)


def plan_token_price(plan: Path) -> TokenPrice | None:
    """The price of the API that the plan has as baseline; None if it has none."""
    api = PlanFile.read(plan).prices.api
    if api is None:
        return None
    million = (api.input_per_token * 1e6, api.output_per_token * 1e6, api.cached_input_per_token * 1e6)
    return TokenPrice(*million, f"plan: {api.model}")


def busy_seconds(records: Sequence[RequestRecord]) -> dict[int, float]:
    """Machine seconds of each answered request, by its number: the time shared by what was under way at once.

    What failed requests took is spread over the answered ones, since the machine was paid for meanwhile. `records`
    are one side's in one mode.
    """
    found: dict[int, float] = {}
    blocks: dict[int, list[RequestRecord]] = {}
    for record in records:
        blocks.setdefault(record.block, []).append(record)
    for group in blocks.values():
        for record, seconds in zip(group, machine_seconds(group), strict=True):
            if record.ok:
                found[record.request] = seconds
    answered, everything = sum(found.values()), sum(sum(machine_seconds(g)) for g in blocks.values())
    scale = everything / answered if answered else 1.0
    return {request: seconds * scale for request, seconds in found.items()}


def dollars(
    price: SidePrice, good: Sequence[RequestRecord], busy: dict[int, float]
) -> tuple[list[float] | None, str | None]:
    """`(dollars per answered request, why there are none)`."""
    if price.tokens is not None:
        known = [
            price.tokens.of(r.prompt_tokens, r.output_tokens, r.cached_tokens)
            for r in good
            if r.prompt_tokens is not None and r.output_tokens is not None
        ]
        if len(known) < len(good):
            return None, (
                f"the {good[0].side}'s tokens are not known for {len(good) - len(known)} of {len(good)} requests: its "
                "server reports no usage; give --tokenizer"
            )
        told = any(r.cached_tokens is not None for r in good) or good[0].mode != CACHE_ON
        if price.tokens.cached not in (None, price.tokens.input) and not told:
            return None, (
                f"the {good[0].side}'s cached tokens are not known, since its server reports none: with a price for "
                "cached input its cost is not known; leave that price out to count all input in full"
            )
        return known, None
    if price.per_hour is None:
        return None, price.source
    rate = price.per_hour * price.machines / 3600
    return [rate * busy[r.request] for r in good], None


def costs(each: Sequence[float] | None, correct_share: float | None, seconds: float | None) -> Cost:
    """Dollars per 1,000 requests and per 1,000 correct answers from dollars per request.

    `correct_share` is the share of right answers; the second figure is None where none is right or none was scored.
    """
    thousand = sum(each) / len(each) * 1000 if each else None
    right = thousand / correct_share if thousand is not None and correct_share else None
    return Cost(thousand, right, seconds)
