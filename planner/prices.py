"""What an API charges: token prices from genai-prices, the rules round them from the catalog, the user's over both.

All prices are US dollars per million tokens. A price carries its source and date, so that every report can say what it
rests on.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from planner.overrides import Overrides
from unshot.catalog.tables import table
from unshot.errors import InputError, OutsideError, nearest
from unshot.memo import Task, ahead, package_state, remember

MTOK = 1e6


class CacheRule(Struct, frozen=True):
    """When a prompt prefix is cached. Times in seconds; surcharges as shares of the input price."""

    minimum: int = 1024
    step: int = 1
    ttl: float = 300.0
    ttl_long: float | None = None
    automatic: bool = True
    source: str = ""
    date: str = ""

    def cacheable(self, prefix: int) -> int:
        """Tokens of a static prefix that a hit reads from the cache: 0 below the minimum, else whole steps."""
        return prefix // self.step * self.step if prefix >= self.minimum else 0


class Latency(Struct, frozen=True):
    """A provider's typical median TTFT and TPOT in milliseconds; real ones lie within `factor` both ways."""

    ttft_ms: float
    tpot_ms: float
    factor: float
    source: str


class ApiPrice(Struct, frozen=True):
    """Prices of one API model in $ per million tokens; None where the provider does not offer it.

    `write` and `write_long` are the full price of a token written to the cache (not the surcharge alone).
    `training` is set for fine-tuned models.
    """

    model: str
    provider: str
    input: float
    output: float
    cached: float | None
    write: float | None
    write_long: float | None
    batch_input: float | None
    batch_cached: float | None
    batch_output: float | None
    rule: CacheRule | None
    latency: Latency | None
    source: str
    date: str
    batch_source: str = ""
    training: float | None = None
    context: int | None = None
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the list of assumptions."""
        parts = [f"${self.input:g} input"]
        if self.cached is not None:
            parts.append(f"${self.cached:g} cached input")
        if self.write is not None and self.write != self.input:
            parts.append(f"${self.write:g} cache write")
        parts.append(f"${self.output:g} output")
        if self.training is not None:
            parts.append(f"${self.training:g} training")
        return f"{self.model}: {', '.join(parts)} per million tokens; {self.source}, {self.date}"


class RequestCost(Struct, frozen=True):
    """Dollars of one request by what they pay for; numbers or numpy arrays."""

    input: Any
    cached: Any
    write: Any
    output: Any

    @property
    def total(self) -> Any:
        """Dollars of one request."""
        return self.input + self.cached + self.write + self.output


def api_price(
    model: str,
    *,
    input_tokens: float = 0,
    overrides: Overrides | None = None,
    baseline: bool = True,
    when: datetime | None = None,
) -> ApiPrice:
    """The price of an API model for requests of `input_tokens` (tiers apply), at `when` (default now).

    `provider/model` names the provider where several sell a model. Raises `InputError` for unknown models, with the
    nearest names; a model that only the user's prices know is fine when they hold `input` and `output`.
    """
    given, where = (overrides or Overrides()).of(model, baseline=baseline)
    when = when or datetime.now(UTC)
    try:
        price = _published(model, input_tokens, when)
    except InputError:
        if not ("input" in given and "output" in given):
            raise
        price = _bare(model)
    if not given:
        return price
    changes: dict[str, Any] = {k: v for k, v in given.items() if k != "training"}
    today = when.date().isoformat()
    if "input" in given:
        # A negotiated input price carries the published discounts unless those are given too.
        scale = given["input"] / price.input if price.input else 1.0
        for key in ("cached", "write", "write_long", "batch_input", "batch_cached"):
            old = getattr(price, key)
            if key not in given and old is not None:
                changes[key] = old * scale
    if "output" in given and "batch_output" not in given and price.batch_output is not None and price.output:
        changes["batch_output"] = price.batch_output * given["output"] / price.output
    return replace(price, **changes, source=f"{where} (over {price.source})", date=today)


def _bare(model: str) -> ApiPrice:
    return ApiPrice(
        model, "custom", 0.0, 0.0, None, None, None, None, None, None, None, None, "no published price", "-"
    )


def _published(model: str, tokens: float, when: datetime) -> ApiPrice:
    now = when.astimezone(UTC)
    task = _task(model, now)
    found = remember(*task)
    if found is not None and found["by_hour"]:
        found = remember("price", (*task[1], now.hour, now.minute // 30), lambda: _lookup(model, now))
    if found is None:
        raise InputError(
            f"unknown API model '{model}': {nearest(model.rpartition('/')[2], _model_names())} Or give its price: "
            f"--price {model}:input=2.5,output=10"
        )
    values: dict[str, Any] = {key: _tier(found["standard"][key], tokens) for key in _STANDARD}
    if values["input"] is None or values["output"] is None:
        raise InputError(f"{model}: genai-prices has no token price for it; pass --price input=..,output=..")
    facts = table("api")["provider"].get(found["provider"], {})
    batch_values: dict[str, Any] = {key: _tier(found["batch"][key], tokens) for key in _BATCH}
    batch_source = f"{found['source']}, batch rate"
    if batch_values["batch_input"] == values["input"]:
        discount = facts.get("batch_discount")
        batch_source = f"{facts.get('batch_source', '')}, {facts.get('batch_date', '')}"
        off = None if discount is None else 1.0 - float(discount)
        batch_values = {
            "batch_input": None if off is None else values["input"] * off,
            # Where no batch rate for cached input is published, none is granted.
            "batch_cached": None,
            "batch_output": None if off is None else values["output"] * off,
        }
    return ApiPrice(
        model=model,
        provider=found["provider"],
        **values,
        **batch_values,
        rule=_rule(facts, found["id"]) if values["cached"] is not None else None,
        latency=_latency(facts),
        source=found["source"],
        date=found["date"],
        batch_source=batch_source,
        context=found["context"],
    )


def look_up_ahead(model: str) -> None:
    """Begin to look a model's price up in another process."""
    ahead([_task(model, datetime.now(UTC))])


def _task(model: str, now: datetime) -> Task:
    """What `remember` takes for the price of a model on a day, UTC."""
    return "price", (package_state("genai_prices"), model, f"{now:%Y-%m-%d}"), lambda: _lookup(model, now)


def _lookup(model: str, when: datetime) -> dict[str, Any] | None:
    """What genai-prices says of a model, with its tiers; None for a model it does not know."""
    from importlib import metadata  # a twentieth of a cold start, and only wanted here

    provider_id, _, name = model.rpartition("/")
    try:
        provider, info = _snapshot().find_provider_model(name.lower(), None, provider_id or None, None)
    except LookupError:
        return None
    plain = info.get_prices(when)
    batch = info.get_prices(when, {"processing": "batch"}) if info.price_variants else plain
    return {
        "source": f"genai-prices {metadata.version('genai-prices')}",
        "provider": provider.id,
        "id": info.id,
        "context": info.context_window,
        "date": _verified(info.price_comments) or _data_date(),
        "by_hour": any(hasattr(item.constraint, "start_time") for item in _conditions(info)),
        "standard": {key: _tiers(plain, name) for key, name in _STANDARD.items()},
        "batch": {key: _tiers(batch, name) for key, name in _BATCH.items()},
    }


_STANDARD = {
    "input": "input", "output": "output", "cached": "cache_read", "write": "cache_write",
    "write_long": "cache_write_1h",
}  # fmt: skip
_BATCH = {"batch_input": "input", "batch_cached": "cache_read", "batch_output": "output"}


def _tiers(price: Any, name: str) -> list[list[float]] | None:
    """A price as `[[from tokens, $ per million], ...]`; None where it is not sold."""
    value = getattr(price, f"{name}_mtok", None)
    if value is None:
        return None
    if hasattr(value, "tiers"):
        return [[0.0, float(value.base)], *([float(t.start), float(t.price)] for t in value.tiers)]
    return [[0.0, float(value)]]


def _tier(tiers: list[list[float]] | None, tokens: float) -> float | None:
    """A price at a request size: the highest tier whose start is below it applies to all tokens."""
    if tiers is None:
        return None
    chosen = tiers[0][1]
    for start, price in tiers[1:]:
        if tokens > start:
            chosen = price
    return chosen


def _rule(facts: Mapping[str, Any], model: str) -> CacheRule | None:
    if "cache_min" not in facts:
        return None
    special: Mapping[str, int] = facts.get("cache_min_models", {})
    minimum = next((v for k, v in special.items() if model.startswith(k)), facts["cache_min"])
    return CacheRule(
        minimum=int(minimum),
        step=int(facts["cache_step"]),
        ttl=float(facts["ttl_s"]),
        ttl_long=facts.get("ttl_long_s"),
        automatic=bool(facts["automatic"]),
        source=facts["cache_source"],
        date=facts["cache_date"],
    )


def _latency(facts: Mapping[str, Any]) -> Latency | None:
    if "ttft_ms" not in facts:
        return None
    return Latency(
        float(facts["ttft_ms"]),
        float(facts["tpot_ms"]),
        float(facts["latency_factor"]),
        facts["latency_source"],
    )


@functools.cache
def _snapshot() -> Any:
    try:
        from genai_prices.data_snapshot import get_snapshot

        return get_snapshot()
    except ImportError as error:
        raise OutsideError(f"API prices need the package genai-prices ({error})") from None


def _verified(comment: str | None) -> str | None:
    """The newest "verified on YYYY-MM-DD" in a model's price comment, not after today."""
    dates = re.findall(r"verified on (20\d\d-\d\d-\d\d)", comment or "")
    dates = [d for d in dates if d <= date.today().isoformat()]
    return max(dates) if dates else None


@functools.cache
def _data_date() -> str:
    """The newest dated price in the package that is not in the future: its data is at least as new."""
    newest = date(2000, 1, 1)
    today = date.today()
    for provider in _snapshot().providers:
        for model in provider.models:
            for item in _conditions(model):
                start = getattr(item.constraint, "start_date", None)
                if start is not None and newest < start <= today:
                    newest = start
    return newest.isoformat()


def _conditions(model: Any) -> list[Any]:
    """The prices of a model that hold from a date on, at some hours, or for some kind of request."""
    return [*(model.prices if isinstance(model.prices, list) else ()), *(model.price_variants or ())]


def _model_names() -> list[str]:
    wanted = ("openai", "anthropic", "google", "mistral", "deepseek", "azure", "x-ai", "cohere")
    return sorted({m.id for p in _snapshot().providers if p.id in wanted for m in p.models})


def known_api(model: str) -> bool:
    """Whether genai-prices has a price for `model`."""
    try:
        _published(model, 0, datetime.now(UTC))
    except InputError:
        return False
    return True


def sold_tuned(model: str) -> bool:
    """Whether the catalog has the price of a fine-tuned version of an API model."""
    return bool(_tuned_facts(model))


def _tuned_facts(model: str) -> dict[str, Any]:
    found: dict[str, Any] = table("api")["finetune"].get(model.rsplit("/", 1)[-1], {})
    return found


def fine_tuned(model: str, price: ApiPrice, overrides: Overrides | None = None) -> ApiPrice | None:
    """The price of a fine-tuned version of an API model; None where the provider tunes none that is known."""
    name = model.rsplit("/", 1)[-1]
    given, where = (overrides or Overrides()).of(f"ft-{name}", baseline=False)
    facts = {**_tuned_facts(model), **given}
    if not {"input", "output", "training"} <= facts.keys():
        return None
    half = price.batch_input is not None
    return replace(
        price,
        model=f"{model}, fine-tuned",
        input=facts["input"],
        output=facts["output"],
        cached=facts.get("cached"),
        write=None,
        write_long=None,
        batch_input=facts["input"] / 2 if half else None,
        batch_output=facts["output"] / 2 if half else None,
        batch_cached=None,
        training=facts["training"],
        source=where or facts["source"],
        date=facts.get("date", date.today().isoformat()),
    )


def cheaper(model: str) -> str | None:
    """The same provider's cheaper model that should be tried with the same prompt, where one is listed."""
    found: str | None = table("api")["cheaper"].get(model.rsplit("/", 1)[-1])
    return found


def hit_rate(rate: float, ttl: float) -> float:
    """Share of requests that find the prefix cached: Poisson arrivals at `rate` per second, entry alive `ttl` seconds
    after its last use. The entry is alive when the gap before a request is shorter than the ttl: 1 - exp(-rate ttl).
    """
    return -math.expm1(-rate * ttl)


def request_cost(
    price: ApiPrice,
    *,
    input_tokens: float,
    output_tokens: float,
    prefix: int = 0,
    hit: float = 0.0,
    batch: bool = False,
    long_ttl: bool = False,
) -> RequestCost:
    """Mean dollars of one request. `prefix` is the static part, `hit` the share of requests that find it cached.

    `prefix` 0 means that caching is not used. Without a cached price, or below the cache minimum, everything pays the
    input price. Where writing costs more, each miss writes. `input_tokens`, `output_tokens` and `hit` may be numpy
    arrays. Raises `InputError` for batch where the provider has none.
    """
    plain, cached, output = price.input, price.cached, price.output
    if batch:
        if price.batch_input is None or price.batch_output is None:
            raise InputError(f"{price.model}: no batch price is known; pass --price batch_input=..")
        plain, cached, output = price.batch_input, price.batch_cached, price.batch_output
    held = price.rule.cacheable(prefix) if price.rule and cached is not None else 0
    write = price.write_long if long_ttl else price.write
    write_price = plain if write is None else write * (plain / price.input if price.input else 1.0)
    if not held:
        return RequestCost(input_tokens * plain / MTOK, 0.0, 0.0, output_tokens * output / MTOK)
    assert cached is not None
    misses = (1 - hit) * held
    as_write = write is not None
    return RequestCost(
        input=((input_tokens - held) + (0.0 if as_write else misses)) * plain / MTOK,
        cached=hit * held * cached / MTOK,
        write=misses * write_price / MTOK if as_write else 0.0,
        output=output_tokens * output / MTOK,
    )
