"""Prices that the user gives with `--price`, over the published ones."""

from __future__ import annotations

from collections.abc import Sequence

from unshot.prices import Prices, parse_prices


class Overrides:
    """Prices the user gave: by model (`""` for whichever API model is the baseline)."""

    def __init__(self, values: Sequence[Prices | str] = ()) -> None:
        self.by_model: dict[str, dict[str, float]] = {}
        self.where: dict[str, str] = {}
        for value in values:
            given = parse_prices(value) if isinstance(value, str) else value
            for model, row in given.by_model.items():
                self.by_model.setdefault(model, {}).update(row)
                self.where[model] = given.source

    def of(self, model: str, *, baseline: bool) -> tuple[dict[str, float], str]:
        """The prices given for `model` and where they came from; empty if none were."""
        if model in self.by_model:
            return self.by_model[model], self.where[model]
        if baseline and "" in self.by_model:
            return self.by_model[""], self.where[""]
        return {}, ""
