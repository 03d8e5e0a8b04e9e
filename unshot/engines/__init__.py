"""One way to run a model, whatever runs it; `unshot.engines.registry` lists what can.

Every engine tokenizes, renders the model's own chat template, gives logits, and decodes greedily with the time of
each token, with or without reuse of the prompt prefix that the request before left in the KV cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unshot.engines.registry import ENGINES, EngineKind, open_engine, parse_spec, spec_forms

if TYPE_CHECKING:
    from unshot.engines.base import Engine, Generation

__all__ = [
    "ENGINES",
    "Engine",
    "EngineKind",
    "Generation",
    "open_engine",
    "parse_spec",
    "spec_forms",
]


def __getattr__(name: str) -> object:
    """`Engine` and `Generation`, whose module needs numpy, on first use: help texts must not load it."""
    if name in ("Engine", "Generation"):
        from unshot.engines import base

        return getattr(base, name)
    raise AttributeError(name)
