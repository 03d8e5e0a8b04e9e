"""Versions of exported artifacts: where they lie, what proved them, which one is served, and what was before."""

from __future__ import annotations

from deploy.registry.locate import open_registry
from deploy.registry.store import Registry
from unshot.contracts.registry import Event, State, Version

__all__ = ["Event", "Registry", "State", "Version", "open_registry"]
