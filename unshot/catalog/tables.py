"""The catalog's TOML files as plain data, kept between runs: reading TOML is a tenth of a cold `unshot plan`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from unshot.memo import remember, stat_of

FOLDER = Path(__file__).parent


@functools.cache
def table(name: str) -> dict[str, Any]:
    """`unshot/catalog/<name>.toml`: tables, numbers and texts (dates are texts), not to be changed by the caller."""
    path = FOLDER / f"{name}.toml"

    def read() -> dict[str, Any]:
        import tomllib

        return tomllib.loads(path.read_text(encoding="utf-8"))

    found: dict[str, Any] = remember("catalog", stat_of(path), read)
    return found
