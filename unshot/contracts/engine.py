"""What a report says of the engine that ran a model."""

from __future__ import annotations

from msgspec import field

from unshot.contracts.record import Record

# A model's architecture in `config.json` form.
ModelConfig = dict[str, int | float | str | bool]


class EngineFacts(Record, kw_only=True):
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
    # The command line of a server that was started for the run.
    command: list[str] = field(default_factory=list)
