"""The token counts that a server gives, wherever and under whatever name it has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A decoded JSON value.
Json = Any
# Names of the count of cached prompt tokens: OpenAI's `prompt_tokens_details.cached_tokens`, DeepSeek's
# `prompt_cache_hit_tokens`, Anthropic's `cache_read_input_tokens` and their likes; not what was written to the cache.
CACHED = re.compile(r"(?<!un)cached|cache_(read|hit)")
# A count above is none.
MOST = 10**9
THOUGHT = ("completion_tokens_details.reasoning_tokens", "output_tokens_details.reasoning_tokens",
           "reasoning_tokens")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Counts:
    """What one chunk counts; None of what it does not have. `output` has the tokens of `reasoning` in it."""

    prompt: int | None
    output: int | None
    cached: int | None
    reasoning: int | None


def counts_of(chunk: Mapping[str, Json]) -> Counts:
    """The counts of a chunk. Raises `TypeError` or `LookupError` for choices that are none."""
    choices = chunk.get("choices") or [{}]
    groq = chunk.get("x_groq")
    places = [
        chunk.get("usage"),
        choices[-1].get("usage"),
        groq.get("usage") if isinstance(groq, dict) else None,
    ]
    usage = next((u for u in places if isinstance(u, dict)), {})
    # llama.cpp's own counts: of the prompt, those taken from its cache and those computed.
    timings = chunk.get("timings")
    own: Mapping[str, Json] = timings if isinstance(timings, dict) else {}
    cached, computed = count(own, "cache_n"), count(own, "prompt_n")
    prompt = count(usage, "prompt_tokens", "input_tokens")
    if prompt is None and cached is not None and computed is not None:
        prompt = cached + computed
    output = count(usage, "completion_tokens", "output_tokens")
    output = count(own, "predicted_n") if output is None else output
    found = _cached(usage)
    thought = count(usage, *THOUGHT)
    prompt, output, thought = _completed(usage, prompt, output, found, thought)
    cached = found if found is not None else cached
    return Counts(prompt, output, cached, thought)


def _cached(usage: Mapping[str, Json]) -> int | None:
    """Prompt tokens from the cache; a proxy may leave one of several names for them at zero."""
    places = [usage, *(v for k, v in usage.items() if isinstance(v, dict) and "token" in k)]
    counts = [count(place, k) for place in places for k in place if CACHED.search(k)]
    return max((c for c in counts if c is not None), default=None)


def _completed(
    usage: Mapping[str, Json], prompt: int | None, output: int | None, cached: int | None, thought: int | None
) -> tuple[int | None, int | None, int | None]:
    """`(prompt, output, reasoning)` with what a server counts apart: in the total only, or beside its input tokens.

    xAI's and Gemini's thoughts are in `total_tokens` and not in `completion_tokens`; a total that holds the cached
    tokens besides has a prompt without them, as Anthropic's `input_tokens` always is.
    """
    if prompt is None or output is None:
        return prompt, output, thought
    if "prompt_tokens" not in usage:
        apart = (
            count(usage, name) or 0 for name in ("cache_read_input_tokens", "cache_creation_input_tokens")
        )
        return prompt + sum(apart), output, thought
    more = (count(usage, "total_tokens") or 0) - prompt - output
    if more > 0 and more == cached:
        return prompt + more, output, thought
    if more > 0 and thought in (None, more):
        return prompt, output + more, more
    return prompt, output, thought


def count(counts: Mapping[str, Json], *paths: str) -> int | None:
    """The first whole number of 0 or more at one of the paths (`outer.inner`)."""
    for path in paths:
        value: Json = counts
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
            return value
    return None
