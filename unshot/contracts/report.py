"""`report.json` of `unshot bench`: what was measured and judged, as planner, registry and `bench compare` read it.

Times are milliseconds where a name ends in `_ms`, else seconds; money is US dollars. A figure that could not be
measured is None, and `warnings` says why where that is not plain.
"""

from __future__ import annotations

from typing import Literal

from msgspec import field

from unshot.contracts.record import Record

Verdict = Literal["met", "not met", "inconclusive"]
GateVerdict = Literal["passed", "failed", "inconclusive"]
SideName = Literal["baseline", "candidate"]
# A model's architecture in `config.json` form.
ModelConfig = dict[str, int | float | str | bool]


class EngineFacts(Record, kw_only=True, omit_defaults=True):
    """What runs a model: engine, library with version, number format, size, threads and device."""

    engine: str
    library: str
    model: str
    precision: str | None = None
    config: ModelConfig | None = None
    parameters: int | None = None
    bytes: int | None = None
    threads: int | None = None
    device: str = "cpu"
    providers: list[str] = field(default_factory=list)
    # Version and flags of a server that was started for the run.
    flags: list[str] = field(default_factory=list)
