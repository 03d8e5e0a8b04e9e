"""Token prices as users write them, in the same forms on every command.

`[MODEL:]input=2.5,output=10,cached=1.25`, short `IN,OUT[,CACHED]` (or with colons), or a TOML or JSON file of prices by
model. All are US dollars per million tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from unshot.data.rows import read_text
from unshot.errors import InputError

KEYS = (
    "input", "cached", "output", "write", "write_long", "batch_input", "batch_output", "batch_cached", "training",
)  # fmt: skip
# The caching rule: shortest prefix and step in tokens, lifetime in seconds, price of a write over the input price.
RULE_KEYS = ("cache_min", "cache_step", "cache_ttl", "write_factor")
FORMS = (
    "[MODEL:]input=2.5,output=10[,cached=1.25], IN,OUT[,CACHED] (or IN:OUT[:CACHED]), "
    "or a TOML or JSON file of prices by model"
)


class TokenPrice(Struct, frozen=True):
    """Dollars per million tokens of an API: input, output, and input read from the prompt cache (None: no discount was
    given, so the input price is counted). `source` says where they are from."""

    input: float
    output: float
    cached: float | None
    source: str

    def of(self, prompt: int, output: int, cached: int | None) -> float:
        """Dollars of one request of `prompt` input tokens, `cached` of them read from the cache."""
        hit = min(cached or 0, prompt)
        rate = self.input if self.cached is None else self.cached
        return ((prompt - hit) * self.input + hit * rate + output * self.output) / 1e6


class Prices(Struct, frozen=True):
    """What one price option says: prices by model (`""` is the model at hand), and where they are from."""

    text: str
    source: str
    by_model: Mapping[str, Mapping[str, float]]

    def of(self, model: str | None = None) -> TokenPrice:
        """The price of one API that is called `model`. Raises `InputError` if it is not among these."""
        found = self.by_model.get("") or (self.by_model.get(model) if model else None)
        if found is None and model is None and len(self.by_model) == 1:
            found = next(iter(self.by_model.values()))
        if found is None:
            raise InputError(
                f"{self.source}: no price of {model or 'one model'}; it has {', '.join(self.by_model)}"
            )
        for key in ("input", "output"):
            if key not in found:
                raise InputError(f"{self.source}: no `{key}` price; give {FORMS}")
        unused = sorted(set(found) - {"input", "output", "cached"})
        if unused:
            raise InputError(
                f"{self.source}: {', '.join(unused)} is not counted here; give input, output and cached"
            )
        return TokenPrice(found["input"], found["output"], found.get("cached"), self.source)


def parse_prices(value: str) -> Prices:
    """Prices from what a user wrote (`FORMS`). Raises `InputError`."""
    path = Path(value)
    if path.is_file() or (path.suffix.lower() in (".toml", ".json") and "=" not in value):
        rows = {model: _checked(row, value) for model, row in _price_file(path).items()}
        return Prices(value, f"your file {value}", rows)
    if "=" not in value:
        numbers = re.split("[,:]", value)
        try:
            row = _checked(dict(zip(("input", "output", "cached"), numbers, strict=False)), value)
            if len(numbers) not in (2, 3):
                raise InputError("")
        except InputError:
            raise InputError(f"a price is `{value}`; give {FORMS}, in dollars per million tokens") from None
        return Prices(value, f"your price {value}", {"": row})
    model, separator, rest = value.rpartition(":")
    pairs: dict[str, str] = {}
    for part in (rest if separator else value).split(","):
        key, _, number = part.partition("=")
        if key.strip() in pairs:
            raise InputError(f"{value}: `{key.strip()}` stands there twice")
        pairs[key.strip()] = number.strip()
    return Prices(value, f"your price {value}", {model.strip(): _checked(pairs, value)})


def _checked(row: Mapping[str, Any], where: str) -> dict[str, float]:
    found = {}
    for key, number in row.items():
        if key not in (*KEYS, *RULE_KEYS):
            raise InputError(f"{where}: unknown price `{key}`; accepted: {', '.join((*KEYS, *RULE_KEYS))}")
        try:
            price = math.nan if isinstance(number, bool) else float(number)
        except (TypeError, ValueError):
            price = math.nan
        if not (math.isfinite(price) and price >= 0):
            raise InputError(
                f"{where}: `{key}` is {number!r}; it must be dollars per million tokens, 0 or more"
            )
        if key in ("cache_min", "cache_step") and price != int(price):
            raise InputError(f"{where}: `{key}` is {number!r}; it must be a whole number of tokens")
        if key == "cache_step" and price < 1:
            raise InputError(f"{where}: `cache_step` is {number!r}; it must be 1 token or more")
        found[key] = price
    return found


def _price_file(path: Path) -> dict[str, dict[str, Any]]:
    import tomllib

    text = read_text(path)
    try:
        loaded = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON or TOML ({error})") from None
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, dict) for v in loaded.values()):
        raise InputError(f'{path}: expected prices by model, e.g. ["gpt-4o"] input = 2.5 output = 10')
    return loaded
