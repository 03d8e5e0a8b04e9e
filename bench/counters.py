"""What a server counts itself, read from its /metrics before and after a load: cache hits, queue, batch, times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from unshot.contracts.figures import ServerCounters
from unshot.engines.address import Address, call

# A sample of Prometheus's text format: name, labels, value.
SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{.*\})? +(\S+)(?: +-?\d+)?$", re.MULTILINE)
Counters = Mapping[str, float]
# When the process behind the counters began, as Prometheus's clients have it.
STARTED = "process_start_time_seconds"
# A server may not have counted its last answers yet.
MISSED = 0.8


@dataclass(frozen=True)
class Names:
    """How one engine calls its counters; times are histograms in seconds, by the names' `_sum` and `_count`."""

    prompt: str
    output: str
    cached: str | None = None
    # Prompt tokens that `prompt` leaves out since they came from the cache.
    apart: bool = False
    ttft: tuple[str, ...] = ()
    tpot: tuple[str, ...] = ()
    queue: tuple[str, ...] = ()
    # Tokens (of all requests) in one step of the engine.
    step: str | None = None


ENGINES = {
    "vLLM": Names(
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prefix_cache_hits_total",
        ttft=("vllm:time_to_first_token_seconds",),
        tpot=("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        queue=("vllm:request_queue_time_seconds",), step="vllm:iteration_tokens_total",
    ),
    "SGLang": Names(
        "sglang:prompt_tokens_total", "sglang:generation_tokens_total", "sglang:cached_tokens_total",
        ttft=("sglang:time_to_first_token_seconds",),
        tpot=("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
        queue=("sglang:queue_time_seconds",),
    ),
    "llama.cpp": Names("llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total", apart=True),
}  # fmt: skip


def read_counters(address: Address) -> Counters:
    """The server's counters by name, labels added up; empty where it has none at /metrics beside its API."""
    beside = replace(address, path=address.path.removesuffix("/v1"))
    try:
        status, body = call(beside, "/metrics", timeout=2.0)
    except OSError:
        return {}
    found: dict[str, float] = {}
    for name, value in SAMPLE.findall(body.decode(errors="replace")) if status == 200 else ():
        try:
            found[name] = found.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return found


def counted(before: Counters, after: Counters, *, least: float = 0.0) -> ServerCounters | None:
    """What a server counted between two readings; None where it is none of the engines, or began anew meanwhile.

    Also None where the readings are of several servers behind one address: their processes began at other times, or
    fewer output tokens were counted than the `least` that were answered.
    """
    if before.get(STARTED) != after.get(STARTED):
        return None
    delta = {name: value - before.get(name, 0.0) for name, value in after.items()}
    engine = next(
        (e for e, names in ENGINES.items() if names.prompt in after and names.prompt in before), None
    )
    if engine is None or delta[ENGINES[engine].prompt] < 0:
        return None
    names = ENGINES[engine]
    if delta.get(names.output, 0.0) < MISSED * least:
        return None

    def mean(histograms: tuple[str, ...], scale: float = 1000.0) -> float | None:
        for name in histograms:
            count = delta.get(f"{name}_count", 0.0)
            if count > 0:
                return delta.get(f"{name}_sum", 0.0) / count * scale
        return None

    found = ServerCounters(
        engine=engine,
        prompt_tokens=delta[names.prompt],
        cached_tokens=delta.get(names.cached) if names.cached else None,
        output_tokens=delta.get(names.output, 0.0),
        ttft_ms=mean(names.ttft),
        tpot_ms=mean(names.tpot),
        queue_ms=mean(names.queue),
        tokens_a_step=mean((names.step,), 1.0) if names.step else None,
    )
    return found.changed(**_llama_cpp(before, after, delta)) if names.apart else found


def _llama_cpp(before: Counters, after: Counters, delta: Counters) -> dict[str, float | None]:
    """Its prompt tokens are those that it computed; busy slots are a mean over all of its steps since it began."""
    tokens = delta.get("llamacpp:tokens_predicted_total", 0.0)
    steps = delta.get("llamacpp:n_decode_total", 0.0)
    busy, number = "llamacpp:n_busy_slots_per_decode", "llamacpp:n_decode_total"
    slots = after.get(busy, 0.0) * after.get(number, 0.0) - before.get(busy, 0.0) * before.get(number, 0.0)
    return {
        "tpot_ms": delta.get("llamacpp:tokens_predicted_seconds_total", 0.0) / tokens * 1000
        if tokens
        else None,
        "requests_a_step": slots / steps if steps else None,
    }
