"""The catalog's TOML files as plain data."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@functools.cache
def table(name: str) -> dict[str, Any]:
    """`unshot/catalog/<name>.toml`: tables, numbers and texts (dates are texts), not to be changed by the caller."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
