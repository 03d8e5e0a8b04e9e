"""Prices that the user gives: `--price` texts and price files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unshot.data.rows import read_text
from unshot.errors import InputError

KEYS = ("input", "cached", "output", "write", "write_long", "batch_input", "batch_output", "batch_cached")


class Overrides:
    """Prices the user gave: by model (`""` for whichever API model is the baseline)."""

    def __init__(self, values: Sequence[str] = ()) -> None:
        self.by_model: dict[str, dict[str, float]] = {}
        self.where: dict[str, str] = {}
        for value in values:
            self._read(value)

    def _read(self, value: str) -> None:
        path = Path(value)
        if "=" not in value or path.is_file():
            for model, prices in _price_file(path).items():
                self._add(model, prices, str(path))
            return
        model, separator, rest = value.rpartition(":")
        pairs = {}
        for part in (rest if separator else value).split(","):
            key, _, number = part.partition("=")
            pairs[key.strip()] = number.strip()
        self._add(model, pairs, f"--price {value}")

    def _add(self, model: str, prices: Mapping[str, Any], where: str) -> None:
        row = self.by_model.setdefault(model, {})
        for key, number in prices.items():
            if key not in (*KEYS, "training"):
                raise InputError(
                    f"{where}: unknown price `{key}`; accepted: {', '.join((*KEYS, 'training'))}"
                )
            try:
                price = float(number)
            except (TypeError, ValueError):
                price = math.nan
            if not (math.isfinite(price) and price >= 0):
                raise InputError(
                    f"{where}: `{key}` is {number!r}; it must be dollars per million tokens, 0 or more"
                )
            row[key] = price
        self.where[model] = "your price" if where.startswith("--price") else f"your file {where}"

    def of(self, model: str, *, baseline: bool) -> tuple[dict[str, float], str]:
        """The prices given for `model` and where they came from; empty where none were."""
        if model in self.by_model:
            return self.by_model[model], self.where[model]
        if baseline and "" in self.by_model:
            return self.by_model[""], self.where[""]
        return {}, ""


def _price_file(path: Path) -> dict[str, dict[str, Any]]:
    import tomllib

    text = read_text(path)
    try:
        loaded = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON or TOML ({error})") from None
    if not isinstance(loaded, dict) or not all(isinstance(v, dict) for v in loaded.values()):
        raise InputError(f'{path}: expected prices by model, e.g. ["gpt-4o"] input = 2.5 output = 10')
    return loaded
