"""What genai-prices says of API models: prices with their tiers, families, versions, and when a model ends.

A looked-up price is kept for its day: to load the package's data is half of a cold start.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from unshot.cache import cached, package_state, stat_of
from unshot.catalog.tables import FOLDER, table
from unshot.errors import InputError, OutsideError, nearest

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo

# A price as [from tokens, $ per million] for each tier; None where it is not sold.
Tiers = list[tuple[float, float]] | None
# Prices by our names, and the package's.
STANDARD = {
    "input": "input", "output": "output", "cached": "cache_read", "write": "cache_write",
    "write_long": "cache_write_1h",
}  # fmt: skip
BATCH = {"batch_input": "input", "batch_cached": "cache_read", "batch_output": "output"}
# Providers whose models are offered as a baseline.
OFFERED = ("openai", "anthropic", "google", "mistral", "deepseek", "azure", "x-ai", "cohere")
# Models of the same family that do not answer texts with texts.
_OTHER_KIND = re.compile(
    r"gpt-oss|audio|image|realtime|tts|transcribe|embed|search|codex|live|ocr|moderation|vision|robotics|omni|computer|"
    r"research|whisper|voxtral|voice|cyber|rosalind|instruct|banana|saba|free|multi-agent|build|code|preview-tts|-ft-"
)


class Found(Struct, frozen=True):
    """One model of the price data at one time. `date` is the price's own, empty where it has none."""

    source: str
    provider: str
    id: str
    context: int | None
    date: str
    by_hour: bool
    standard: dict[str, Tiers]
    batch: dict[str, Tiers]
    deprecated: bool = False


class Retirement(Struct, frozen=True):
    """When models end, and what follows them. `new_jobs`: last day on which they can be tuned."""

    models: list[str]
    providers: list[str]
    date: str
    successor: str
    source: str
    read: str
    fine_tunes: bool = False
    routed: bool = False
    new_jobs: str | None = None

    def gone(self) -> str:
        """What is said of a model that has been shut down."""
        then = "requests go on at its successor's prices" if self.routed else "plan with a living model"
        return f"shut down on {self.date} ({self.source}, read {self.read}); {then}: its successor is {self.successor}"


class Family(Struct, frozen=True):
    """Caching rules of one family of models (see `api.toml`); `minimum` None where none is published."""

    name: str
    match: list[str]
    minimum: int | None = None
    minima: dict[str, int] = {}
    step: int = 1
    ttl_s: float = 300.0
    ttls: dict[str, float] = {}
    ttl_long_s: float | None = None
    automatic: bool = True
    write_factor: float = 1.0
    write_factor_long: float | None = None
    reasons: list[str] = []
    source: str = ""
    date: str = ""
    unconfirmed: str = ""
    unconfirmed_for: dict[str, str] = {}

    def doubt(self, name: str) -> str:
        """What of the rule no page that was read confirms, for a model by its own name; empty if nothing."""
        keys = [key for key in self.unconfirmed_for if name.startswith(key)]
        return "; ".join(filter(None, [self.unconfirmed, *(self.unconfirmed_for[k] for k in keys)]))


class Sibling(Struct, frozen=True):
    """A cheaper model of the same provider and family; dollars per million tokens."""

    id: str
    input: float
    output: float


def look_up(model: str, when: datetime) -> Found:
    """The entry of a model, `provider/model` or a plain or dated name. Raises `InputError` with the nearest names."""
    now = when.astimezone(UTC)
    state = package_state("genai_prices")

    def entry() -> object:
        return msgspec.to_builtins(_look_up(model, now))

    found = cached("price", (state, model, f"{now:%Y-%m-%d}"), entry)
    if found is not None and found["by_hour"]:
        found = cached("price", (state, model, f"{now:%Y-%m-%d}", now.hour, now.minute // 30), entry)
    if found is None:
        end = ended(model)
        if end is not None:
            raise InputError(f"{model}: {end.gone()}")
        raise InputError(
            f"unknown API model '{model}': {nearest(model.rpartition('/')[2], _model_names())} Or give its price: "
            f"--price {model}:input=2.5,output=10"
        )
    return msgspec.convert(found, Found)


def known(model: str) -> bool:
    """Whether the price data holds `model`."""
    try:
        look_up(model, datetime.now(UTC))
    except InputError:
        return False
    return True


def plain_id(model: str) -> str:
    """A model's own name, without who sells it: `claude-sonnet-4-5` of `regional.anthropic.claude-sonnet-4-5-v1:0`."""
    name = model.lower().rsplit("/", 1)[-1].removeprefix("ft:")
    for family in families():
        for start in family.match:
            at = re.search(rf"(?:^|[.])({re.escape(start)})", name)
            if at:
                return name[at.start(1) :]
    return name


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family of the catalog."""
    return tuple(msgspec.convert({"name": k, **row}, Family) for k, row in table("api")["family"].items())


def family_of(model: str) -> Family | None:
    """The family of a model by its own name, whoever resells it; None where the catalog knows none."""
    name = plain_id(model)
    return next((f for f in families() if name.startswith(tuple(f.match))), None)


def longest(name: str, table: Mapping[str, float]) -> float | None:
    """The value of the longest key that `name` begins with."""
    keys = [key for key in table if name.startswith(key)]
    return table[max(keys, key=len)] if keys else None


def reasons(model: str) -> bool:
    """Whether a model thinks before it answers by default, and bills what it thinks as output."""
    family = family_of(model)
    return bool(family and family.reasons and plain_id(model).startswith(tuple(family.reasons)))


@functools.cache
def _retirements() -> tuple[Retirement, ...]:
    return tuple(msgspec.convert(row, Retirement) for row in table("api")["retirement"])


def retirement(found: Found, asked: str = "") -> Retirement | None:
    """When a model of the price data ends at its provider, where announced; `asked` is the user's name for it."""
    own = plain_id(asked or found.id)
    rows = (_ends(name, found.provider) for name in (own, found.id, undated(own)))
    return next((row for row in rows if row is not None), None)


def _ends(name: str, provider: str) -> Retirement | None:
    return next((r for r in _retirements() if provider in r.providers and name in r.models), None)


def maker_retirement(found: Found) -> Retirement | None:
    """When a model that someone else sells ends at its maker: a reseller's own days are not known here."""
    names = {undated(plain_id(found.id)), plain_id(found.id)}
    if "opus" in found.id or "sonnet" in found.id:  # claude-sonnet-4 is claude-sonnet-4-0 at its maker
        names |= {f"{name}-0" for name in names}
    rows = (r for r in _retirements() if names & set(r.models) and found.provider not in r.providers)
    return next(rows, None)


def makers(found: Found, when: datetime) -> Found | None:
    """The same model at a provider that has a cached price for it; None where none is found."""
    name = undated(plain_id(found.id)).replace(".", "-" if "claude" in found.id else ".")
    swapped = re.sub(r"^claude-(\d[\d.-]*)-(opus|sonnet|haiku)$", r"claude-\2-\1", name)
    for provider in OFFERED:
        for own in (name, swapped):
            try:
                other = look_up(f"{provider}/{own}", when)
            except InputError:
                continue
            if other.provider != found.provider and other.standard["cached"] is not None:
                return other
    return None


def ended(model: str) -> Retirement | None:
    """The retirement of a name that the price data lacks, if its day has passed."""
    name, today = undated(plain_id(model)), f"{datetime.now(UTC):%Y-%m-%d}"
    return next((r for r in _retirements() if name in r.models and r.date <= today), None)


def undated(name: str) -> str:
    """A model's name without its day, its version at a reseller and what a fine-tune adds."""
    name = name.split(":")[0].split("@")[0]
    return re.sub(r"-(20\d\d-?\d\d-?\d\d|\d{4})?(-v\d+)?$", "", name)


def siblings(of: Found, when: datetime, *, most: int = 3) -> list[Sibling]:
    """Cheaper models of the same provider and family that no end is announced for, the newest first, at most `most`.

    Left out are models that cost more than four fifths of it (input and output in equal parts), that a newer one
    undercuts, and those that do not answer texts with texts.
    """
    rules = stat_of(FOLDER / "api.toml")
    key = (package_state("genai_prices"), rules, of.provider, of.id, f"{when:%Y-%m-%d}", most)
    rows = cached("siblings", key, lambda: [msgspec.to_builtins(s) for s in _siblings(of, when, most)])
    return [msgspec.convert(row, Sibling) for row in rows]


def _siblings(of: Found, when: datetime, most: int) -> list[Sibling]:
    family = family_of(of.id)
    base = _at(of.standard["input"], 0) + _at(of.standard["output"], 0)
    found: list[tuple[float, float, Sibling]] = []
    for provider in _snapshot().providers:
        if provider.id != of.provider:
            continue
        for info in provider.models:
            if (
                info.id == of.id
                or family is None
                or family_of(info.id) != family
                or info.deprecated
                or _OTHER_KIND.search(info.id)
                or any(undated(plain_id(info.id)) in r.models or info.id in r.models for r in _retirements())
            ):
                continue
            price = info.get_prices(when)
            into, out = _tiers(price, "input"), _tiers(price, "output")
            if into is None or out is None or _at(into, 0) + _at(out, 0) > 0.8 * base:
                continue
            one = Sibling(info.id, _at(into, 0), _at(out, 0))
            found.append((version(info.id), one.input + one.output, one))
    kept = [(v, cost, s) for v, cost, s in found if not any(w > v and other <= cost for w, other, _ in found)]
    kept.sort(key=lambda row: (-row[0], row[1]))
    return [sibling for _, _, sibling in kept[:most]]


def version(id_: str) -> float:
    """A model's generation from its name: 5.6 of `gpt-5.6-luna`, 4.5 of `claude-haiku-4-5`; 0 where it has none."""
    at = re.search(r"(\d{1,2})(?:[.-](\d{1,2}))?(?!\d)", plain_id(id_))
    return float(f"{at[1]}.{at[2] or 0}") if at else 0.0


# How model names are written where they are used, and what the price data calls their provider: Amazon Bedrock's (one
# region, across regions, global), Google's resource names, OpenAI's fine-tuned models.
_WRITTEN = (
    (re.compile(r"^(?:(?:bedrock|aws)/)?((?:\w+\.)?anthropic\..*)$"), "aws"),
    (re.compile(r"^(?:models|publishers/google/models)/(.*)$"), "google"),
    (re.compile(r"^(ft:.*)$"), "openai"),
)


def _look_up(model: str, when: datetime) -> Found | None:
    provider_id, _, name = model.lower().rpartition("/")
    for form, at in _WRITTEN:
        if written := form.match(model.lower()):
            provider_id, name = at, written[1].split("/")[-1]
    try:
        provider, info = _snapshot().find_provider_model(name, None, provider_id or None, None)
    except LookupError:
        # An id of the price data itself, as siblings have it.
        own = [(p, m) for p in _snapshot().providers if p.id == provider_id for m in p.models if m.id == name]
        if not own:
            return None
        provider, info = own[0]
    plain = info.get_prices(when)
    batch = info.get_prices(when, {"processing": "batch"}) if info.price_variants else plain
    return Found(
        source=f"genai-prices {metadata.version('genai-prices')}",
        provider=provider.id,
        id=info.id,
        context=info.context_window,
        date=_price_date(info, when),
        by_hour=any(hasattr(item.constraint, "start_time") for item in _conditions(info)),
        standard={key: _tiers(plain, name) for key, name in STANDARD.items()},
        batch={key: _tiers(batch, name) for key, name in BATCH.items()},
        deprecated=bool(info.deprecated),
    )


def _price_date(info: ModelInfo, when: datetime) -> str:
    """The price's own date: the newest "verified on" or start that is not in the future; empty where there is none."""
    dates = re.findall(r"verified on (20\d\d-\d\d-\d\d)", info.price_comments or "")
    starts = (getattr(item.constraint, "start_date", None) for item in _conditions(info))
    dates += [start.isoformat() for start in starts if isinstance(start, date)]
    return max((d for d in dates if d <= f"{when:%Y-%m-%d}"), default="")


def _tiers(price: Any, name: str) -> Tiers:
    value = getattr(price, f"{name}_mtok", None)
    if value is None:
        return None
    if hasattr(value, "tiers"):
        return [(0.0, float(value.base)), *((float(t.start), float(t.price)) for t in value.tiers)]
    return [(0.0, float(value))]


def tier(tiers: Tiers, tokens: float) -> float | None:
    """A price at a request size: the highest tier whose start is below it applies to all tokens."""
    return None if tiers is None else _at(tiers, tokens)


def _at(tiers: Tiers, tokens: float) -> float:
    assert tiers is not None
    chosen = tiers[0][1]
    for start, price in tiers[1:]:
        if tokens > start:
            chosen = price
    return chosen


@functools.cache
def _snapshot() -> DataSnapshot:
    try:
        from genai_prices.data_snapshot import get_snapshot

        return get_snapshot()
    except ImportError as error:
        raise OutsideError(f"API prices need the package genai-prices ({error})") from None


def _conditions(info: ModelInfo) -> list[Any]:
    """The prices of a model that hold from a date on, at some hours, or for some kind of request."""
    return [*(info.prices if isinstance(info.prices, list) else ()), *(info.price_variants or ())]


def _model_names() -> list[str]:
    return sorted({m.id for p in _snapshot().providers if p.id in OFFERED for m in p.models})
