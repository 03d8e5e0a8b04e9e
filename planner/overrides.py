"""Prices that the user gives with `--price`, over the published ones."""

from __future__ import annotations

from collections.abc import Sequence

from unshot.errors import InputError, nearest
from unshot.prices import Prices, parse_prices


class Overrides:
    """Prices the user gave: by model (`""` for whichever API model is the baseline); `used` are those asked for."""

    def __init__(self, values: Sequence[Prices | str] = ()) -> None:
        self.by_model: dict[str, dict[str, float]] = {}
        self.where: dict[str, str] = {}
        self.used: set[str] = set()
        for value in values:
            given = parse_prices(value) if isinstance(value, str) else value
            for model, row in given.by_model.items():
                self.by_model.setdefault(model, {}).update(row)
                self.where[model] = given.source

    def of(self, model: str, *, baseline: bool) -> tuple[dict[str, float], str]:
        """The prices given for `model` and where they came from; empty if none were."""
        if model in self.by_model:
            self.used.add(model)
            return self.by_model[model], self.where[model]
        if baseline and "" in self.by_model:
            self.used.add("")
            return self.by_model[""], self.where[""]
        return {}, ""

    def check_used(self, models: Sequence[str]) -> None:
        """Refuse prices for models that are not in the plan, with a guess of which one was meant."""
        for name in self.by_model:
            if name not in self.used:
                what = (
                    f"for '{name}', which is not in this plan"
                    if name
                    else "for no model: no API is the baseline"
                )
                raise InputError(
                    f"--price {what}; {nearest(name.removeprefix('ft-'), dict.fromkeys(models))}"
                )
