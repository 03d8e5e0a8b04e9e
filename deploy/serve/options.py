"""What the command line of `unshot deploy serve` says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unshot.prices import Prices


@dataclass(frozen=True)
class ArmOptions:
    """What the command line says of one arm."""

    spec: str | None = None
    prompt: str = "long"
    model: str | None = None
    key_env: str | None = None
    price: Prices | None = None
    hour: float | None = None


@dataclass(frozen=True)
class ServeOptions:
    """The command line of `unshot deploy serve`; `split` in percent, times in seconds."""

    baseline: ArmOptions
    candidate: ArmOptions
    record: bool = False
    split: float = 100.0
    shadow: bool = False
    timeout: float = 60.0
    candidate_timeout: float | None = None
    cooldown: float = 5.0
    host: str = "127.0.0.1"
    port: int = 8080
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    key_env: str | None = None
    reviewer_key_env: str | None = None
    log_dir: Path | None = None
    log_texts: bool = False
    phone_region: str = "US"
    logprobs: bool = False
    unknown_parameters: str = "refuse"
    max_tokens: int | None = None
    max_body: int = 1 << 20
    read_timeout: float = 10.0
    concurrency: int = 64
    workers: int = 1
    rate_limit: float | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    threads: int | None = None
    slots: int = 1
    context: int = 8192
    keep_warm: float = 300.0
