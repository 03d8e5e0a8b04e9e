"""What an API charges: token prices from genai-prices, the rules round them from the catalog, the user's over both.

All prices are US dollars per million tokens. A price carries its source and date, so that every report can say what it
rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from planner import price_data
from planner.overrides import Overrides
from planner.price_data import Family, Found
from unshot.catalog.tables import table
from unshot.errors import InputError
from unshot.prices import RULE_KEYS

MTOK = 1e6


class CacheRule(Struct, frozen=True):
    """When a prompt prefix is cached. Times in seconds.

    `assumed`: no rule of the model's family is published, this one stands in; `doubt`: what no page that was read
    confirms.
    """

    minimum: int = 1024
    step: int = 1
    ttl: float = 300.0
    ttl_long: float | None = None
    automatic: bool = True
    source: str = ""
    date: str = ""
    assumed: bool = False
    doubt: str = ""

    def cacheable(self, prefix: int) -> int:
        """Tokens of a static prefix that a hit reads from the cache: 0 below the minimum, else whole steps."""
        return prefix // self.step * self.step if prefix >= self.minimum else 0

    def describe(self) -> str:
        """The rule in one line."""
        return f"from {self.minimum:,} tokens on, in steps of {self.step}, gone after {self.ttl / 60:g} min without use"


class Latency(Struct, frozen=True):
    """A provider's typical median TTFT and TPOT in milliseconds; real ones lie within `factor` both ways."""

    ttft_ms: float
    tpot_ms: float
    factor: float
    source: str


class Batch(Struct, frozen=True):
    """Batch mode of a provider: share off every token price, and where that is published."""

    discount: float
    source: str


class ApiPrice(Struct, frozen=True):
    """Prices of one API model in $ per million tokens; None where the provider does not offer it.

    `write` and `write_long` are the full price of a token written to the cache (not the surcharge alone).
    `training` is set for fine-tuned models. `id` is the model's name in the price data.
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
    id: str = ""
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
        dated = self.date or "the price itself is not dated"
        return f"{self.model}: {', '.join(parts)} per million tokens; {self.source}, {dated}"


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
    samples: Sequence[tuple[float, float]] = (),
    overrides: Overrides | None = None,
    baseline: bool = True,
    when: datetime | None = None,
) -> ApiPrice:
    """The price of an API model for requests of `input_tokens` (tiers apply), at `when` (default now).

    With `samples`, (input, output tokens) of requests, each is priced at its own tier and the mean is given.

    `provider/model` names the provider where several sell a model. Raises `InputError` for unknown models, with the
    nearest names; a model that only the user's prices know is fine when they hold `input` and `output`.
    """
    given, where = (overrides or Overrides()).of(model, baseline=baseline)
    when = when or datetime.now(UTC)
    try:
        found = price_data.look_up(model, when)
        price = _makers_cache(
            _published(found, model, samples or [(input_tokens, 1.0)]), found, input_tokens, when
        )
    except InputError:
        own = _tuned_here(model)
        if own is None and not ("input" in given and "output" in given):
            raise
        price = own or ApiPrice(
            model, "custom", 0.0, 0.0, None, None, None, None, None, None, None, None, "no published price", "",
            id=price_data.plain_id(model),
        )  # fmt: skip
    if not given:
        return with_rule(price, {})
    _check_used(model, given, price)
    _check_units(model, given, price)
    changes: dict[str, float] = {k: v for k, v in given.items() if k not in ("training", *RULE_KEYS)}
    if "input" in given:
        # A negotiated input price carries the published discounts unless those are given too.
        scale = given["input"] / price.input if price.input else 1.0
        for key in ("cached", "write", "write_long", "batch_input", "batch_cached"):
            old = getattr(price, key)
            if key not in given and old is not None:
                changes[key] = old * scale
    if "output" in given and "batch_output" not in given and price.batch_output is not None and price.output:
        changes["batch_output"] = price.batch_output * given["output"] / price.output
    base = f"{price.source}, {price.date or 'not dated'}" if price.input else "no published price"
    changed = replace(price, **changes, source=f"{where} (over {base})", date=when.date().isoformat())
    return with_rule(changed, given)


def _tuned_here(model: str) -> ApiPrice | None:
    """The catalog's price of a fine-tuned model by OpenAI's name (`ft:gpt-4.1-2025-04-14:org::id`); None for others."""
    base = price_data.undated(price_data.plain_id(model))
    facts = table("api")["finetune"].get(base) if model.lower().startswith("ft:") else None
    if facts is None:
        return None
    one, provider = msgspec.convert(facts, FineTunePrice), table("api")["provider"]["openai"]
    return ApiPrice(
        model, "openai", one.input, one.output, one.cached, None, None, None, None, None, None, _latency(provider),
        one.source, one.date, id=base,
    )  # fmt: skip


def _check_used(model: str, given: dict[str, float], price: ApiPrice) -> None:
    """Refuse prices that would change nothing, or that contradict each other."""
    if "training" in given:
        raise InputError(
            f"--price {model}: training is a price of the tuned model: give it as ft-{model}:training=.."
        )
    rule = [key for key in (*RULE_KEYS, "write", "write_long") if key in given]
    if rule and "cached" not in given and price.cached is None:
        raise InputError(f"--price {model}: {', '.join(rule)} without a cached price; give cached=.. too")
    into, cached = given.get("input", price.input), given.get("cached")
    if cached is not None and cached > into:
        raise InputError(
            f"--price {model}: cached={cached:g} is above the input price of {into:g}; was it input=..?"
        )
    if ("batch_output" in given) != ("batch_input" in given) and price.batch_input is None:
        raise InputError(f"--price {model}: a batch price needs both batch_input=.. and batch_output=..")


# A price this many times above the published one is not a negotiated one; without a published one, $ per million tokens
# between which prices lie.
FAR, RANGE = 20.0, (1e-3, 1e3)
UNITS = (
    (1e6, "dollars per token"),
    (1e3, "dollars per 1,000 tokens"),
    (1e-2, "cents"),
    (1e-3, "dollars per billion tokens"),
)


def _check_units(model: str, given: dict[str, float], price: ApiPrice) -> None:
    """Refuse prices in another unit, with what was probably meant."""
    for key in (k for k in ("input", "output", "cached") if given.get(k)):
        value = given[key]
        published = getattr(price, key) or (price.input if key == "cached" else 0.0)
        low, high = (published / FAR / 2, published * FAR) if published else RANGE
        if low <= value <= high:
            continue
        # Of the units that make it plausible, the one that comes nearest to what is published.
        aim = published or 1.0
        factor, unit = min(UNITS, key=lambda u: abs(math.log(value * u[0] / aim)))
        if not low <= value * factor <= high:
            continue
        raise InputError(
            f"--price {model}: {key}={value:g} looks like {unit}; prices are dollars per million tokens"
            f"{f' (published: {published:g})' if published else ''}: did you mean {key}={value * factor:g}?"
        )


def _tiered(tiers: price_data.Tiers, key: str, samples: Sequence[tuple[float, float]]) -> float | None:
    """A price over requests of several sizes: the mean by the tokens that it is paid for."""
    if tiers is None:
        return None
    paid = [o if key.endswith("output") else n if key.endswith("input") else 1.0 for n, o in samples]
    each = [price_data.tier(tiers, n) or 0.0 for n, _ in samples]
    if len(set(each)) == 1 or not sum(paid):
        return each[0]
    return sum(p * w for p, w in zip(each, paid, strict=True)) / sum(paid)


def _above(found: Found, model: str, samples: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """What is said where some requests reach a dearer tier."""
    starts = [start for start, _ in (found.standard["input"] or [])[1:]]
    over = sum(n > starts[0] for n, _ in samples) / len(samples) if starts else 0.0
    if not 0 < over < 1:
        return ()
    return (
        f"{model}: {over:.1%} of the requests are above {starts[0]:,.0f} tokens, where it costs more; each is priced "
        "at its own size",
    )


def _published(found: Found, model: str, samples: Sequence[tuple[float, float]]) -> ApiPrice:
    values = {key: _tiered(found.standard[key], key, samples) for key in price_data.STANDARD}
    into, out = values["input"], values["output"]
    if into is None or out is None:
        raise InputError(f"{model}: genai-prices has no token price for it; pass --price input=..,output=..")
    facts = table("api")["provider"].get(found.provider, {})
    batch = {key: _tiered(found.batch[key], key, samples) for key in price_data.BATCH}
    batch_source = f"{found.source}, batch rate"
    if batch["batch_input"] == into:
        off = facts.get("batch_discount")
        batch_source = f"{facts.get('batch_source', '')}, {facts.get('batch_date', '')}"
        batch = {
            "batch_input": None if off is None else into * (1.0 - off),
            # Where no batch rate for cached input is published, none is granted.
            "batch_cached": None,
            "batch_output": None if off is None else out * (1.0 - off),
        }
    return ApiPrice(
        model=model,
        provider=found.provider,
        input=into,
        output=out,
        cached=values["cached"],
        write=values["write"],
        write_long=values["write_long"],
        batch_input=batch["batch_input"],
        batch_cached=batch["batch_cached"],
        batch_output=batch["batch_output"],
        rule=None,
        latency=_latency(facts),
        source=found.source,
        date=found.date,
        batch_source=batch_source,
        context=found.context,
        id=found.id,
        notes=_above(found, model, samples),
    )


def _makers_cache(price: ApiPrice, found: Found, tokens: float, when: datetime) -> ApiPrice:
    """The price with its maker's share for cached input, where the price data has none for who resells the model."""
    family = price_data.family_of(found.id)
    if price.cached is not None or family is None or family.minimum is None:
        return price
    maker = price_data.makers(found, when)
    share = (
        {k: price_data.tier(maker.standard[k], tokens) for k in ("input", "cached", "write")} if maker else {}
    )
    into, cached, write = (share.get(k) for k in ("input", "cached", "write"))
    if maker is None or not into or cached is None:
        return price
    told = (
        f"{price.model}: the price data has no cached price at {found.provider}; {maker.provider}'s share of the input "
        f"price is taken ({cached / into:.3g}): --price {price.model}:cached=.. sets it"
    )
    return replace(
        price,
        cached=price.input * cached / into,
        write=price.input * write / into if write else None,
        notes=(*price.notes, told),
    )


def with_rule(price: ApiPrice, given: dict[str, float]) -> ApiPrice:
    """The price with its family's caching rule; the default rule where a cached price is known and no rule is.

    `given` may hold `cache_min`, `cache_step`, `cache_ttl` (seconds) and `write_factor`, which win.
    """
    if price.cached is None:
        return price
    family = price_data.family_of(price.id or price.model)
    rule = _family_rule(family, price_data.plain_id(price.id or price.model)) if family else None
    if rule is None:
        facts = table("api")["default"]
        rule = CacheRule(
            facts["minimum"], facts["step"], facts["ttl_s"], source=facts["source"], date=facts["date"],
            assumed="cache_min" not in given,
        )  # fmt: skip
        factor = facts["write_factor"]
    else:
        assert family is not None
        factor = family.write_factor
        if price.write_long is None and family.write_factor_long is not None:
            price = replace(price, write_long=price.input * family.write_factor_long)
    own = {"cache_min": "minimum", "cache_step": "step", "cache_ttl": "ttl"}
    changes = {field: type(getattr(rule, field))(given[key]) for key, field in own.items() if key in given}
    if changes:
        rule = replace(rule, **changes, source="your figures", date=date.today().isoformat())
    if "write_factor" in given:
        price = replace(price, write=price.input * given["write_factor"], write_long=None)
    elif price.write is None and factor != 1.0:
        price = replace(price, write=price.input * factor)
    if price.write == price.input:
        price = replace(price, write=None)
    return replace(price, rule=rule)


def _family_rule(family: Family, name: str) -> CacheRule | None:
    if family.minimum is None:
        return None
    return CacheRule(
        minimum=int(price_data.longest(name, family.minima) or family.minimum),
        step=family.step,
        ttl=price_data.longest(name, family.ttls) or family.ttl_s,
        ttl_long=family.ttl_long_s,
        automatic=family.automatic,
        source=family.source,
        date=family.date,
        doubt=family.doubt(name),
    )


class ProviderFacts(Struct, frozen=True):
    """One `[provider.X]` of api.toml."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    latency_factor: float = 2.5
    latency_source: str = ""


def _latency(facts: object) -> Latency | None:
    known = msgspec.convert(facts, ProviderFacts)
    if known.ttft_ms is None or known.tpot_ms is None:
        return None
    return Latency(known.ttft_ms, known.tpot_ms, known.latency_factor, known.latency_source)


class FineTunePrice(Struct, frozen=True):
    """Prices of a fine-tuned version of an API model, $ per million tokens."""

    input: float
    output: float
    training: float
    source: str
    date: str
    cached: float | None = None


def fine_tuned(price: ApiPrice, overrides: Overrides | None = None) -> ApiPrice | None:
    """The price of a fine-tuned version of an API model; None where the provider tunes none that is known."""
    name = price.model.rsplit("/", 1)[-1]
    given, where = (overrides or Overrides()).of(f"ft-{name}", baseline=False)
    unused = sorted(set(given) - set(FineTunePrice.__struct_fields__))
    if unused:
        raise InputError(
            f"--price ft-{name}: {', '.join(unused)} is not counted; give training, input, cached, output"
        )
    facts = table("api")["finetune"].get(price.id) or table("api")["finetune"].get(name) or {}
    changed = {"source": where, "date": date.today().isoformat()} if given else {}
    try:
        found = msgspec.convert({**facts, **given, **changed}, FineTunePrice)
    except msgspec.ValidationError:
        if given:
            missing = sorted({"training", "input", "output"} - set(facts) - set(given))
            raise InputError(
                f"--price ft-{name}: no fine-tuning price is known; give {', '.join(missing)} too"
            ) from None
        return None
    half = price.batch_input is not None
    return replace(
        price,
        model=f"{price.model}, fine-tuned",
        input=found.input,
        output=found.output,
        cached=found.cached,
        write=None,
        write_long=None,
        batch_input=found.input / 2 if half else None,
        batch_output=found.output / 2 if half else None,
        batch_cached=None,
        training=found.training,
        source=found.source,
        date=found.date,
    )


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
