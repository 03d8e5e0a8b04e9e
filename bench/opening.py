"""From a spec on the command line to a system that can be measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bench.remote import open_remote
from bench.systems import Measured, System
from unshot.console import Output
from unshot.data.prompts import Prompt
from unshot.engines import open_engine
from unshot.engines.http import read_key
from unshot.errors import InputError
from unshot.secret import remember_in


@dataclass(frozen=True)
class Server:
    """How to talk to servers; `models` are the model names to ask for, by side."""

    models: dict[str, str] | None = None
    api: str = "chat"
    key_env: str | None = None
    timeout: float = 120.0
    tokenizer: str | None = None
    extra: dict[str, Any] | None = None


def request_extra(text: str | None) -> dict[str, Any]:
    """`--request-extra`: a JSON object for every request's body. Raises `InputError`."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        # Not shown: it may hold a key.
        raise InputError("--request-extra is not a JSON object; give e.g. '{\"repeat_penalty\": 1.0}'")
    remember_in(value)
    return value


def open_system(
    side: str,
    spec: str,
    prompt: Prompt,
    *,
    max_tokens: int,
    threads: int | None,
    concurrency: int,
    server: Server,
    out: Output,
) -> Measured:
    """Open `http(s)://...`, `serve:gguf:PATH`, or an engine. Raises `InputError` or `OutsideError`."""
    model = (server.models or {}).get(side, "default")
    if spec.startswith(("http://", "https://")):
        return open_remote(
            side,
            spec,
            prompt,
            model=model,
            max_tokens=max_tokens,
            kind=server.api,
            key=read_key(server.key_env),
            concurrency=concurrency,
            timeout=server.timeout,
            tokenizer=server.tokenizer,
            extra=server.extra,
        )
    if spec.startswith("serve:"):
        from bench.serve import open_served

        return open_served(
            side,
            spec.removeprefix("serve:"),
            prompt,
            max_tokens=max_tokens,
            threads=threads,
            concurrency=concurrency,
            timeout=server.timeout,
            out=out,
        )
    if concurrency > 1:
        raise InputError(
            f"--concurrency {concurrency}: {spec} runs in this process, one request at a time; "
            "use serve:gguf:PATH or a server's URL"
        )
    return System(side, open_engine(spec, threads=threads), prompt, max_tokens)
