"""What the command line adds to a case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field

from planner.overrides import Overrides
from unshot.text.tokenizers import Paths


class Settings(Struct, frozen=True):
    """Tokenizers, prices, seeds."""

    paths: Paths = field(default_factory=lambda: Paths({}))
    approximate: bool = False
    prices: Overrides = field(default_factory=Overrides)
    gpu_prices: Mapping[str, float] = field(default_factory=dict)
    calibration: Path | None = None
    draws: int = 1000
    seed: int = 0
