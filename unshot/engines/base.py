"""What an engine is: tokenizer, template, logits, and greedy decoding with the time of each token."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from unshot.contracts.engine import EngineFacts
from unshot.data.files import optional_object
from unshot.data.rows import Message
from unshot.engines.timing import tpot, ttft
from unshot.errors import InputError
from unshot.machine import usable_cores
from unshot.text.chat import Chat
from unshot.text.template import load_template


@dataclass
class Generation:
    """One greedy answer. Times are seconds on `time.perf_counter()`'s clock.

    `token_times` holds when each id of `ids` was known, the stop token's included (`ids` keeps it, `text` does
    not). `cached` prompt tokens came out of the KV cache, the others were computed.
    """

    prompt_tokens: int
    cached: int
    ids: list[int]
    text: str
    start: float
    token_times: list[float]
    finish: str

    @property
    def ttft(self) -> float:
        """Seconds from start to the first token; NaN where none came."""
        return ttft(self.token_times, self.start)

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; NaN below two tokens."""
        return tpot(self.token_times, len(self.ids))

    @property
    def e2e(self) -> float:
        """Seconds from start to the last token; NaN where none came."""
        return self.token_times[-1] - self.start if self.token_times else math.nan


@dataclass(frozen=True)
class ModelFacts:
    """What a model file says about its own text: what a parity check compares with the model it was made from."""

    eos: int | None
    bos: int | None
    vocabulary: int | None
    end: list[int]
    template: str | None
    # Whether the file tells a server to put the start-of-text token before a prompt; None where none reads that.
    add_bos: bool | None = None


class Engine(ABC):
    """A loaded model. Not safe for use by several threads at once."""

    kind: str = ""

    def __init__(self, target: str, *, threads: int | None = None) -> None:
        self.target = target
        self.threads = threads or usable_cores()
        # The ids whose keys and values are in the cache, in order.
        self._ids: list[int] = []
        # Positions that the model holds; 0 where nothing says so.
        self._room = 0

    @property
    def spec(self) -> str:
        """`kind:target`, as `open_engine` takes it."""
        return f"{self.kind}:{self.target}"

    @abstractmethod
    def facts(self) -> EngineFacts:
        """What a report says about the engine: library, version, precision, threads, files."""

    @abstractmethod
    def model_facts(self) -> ModelFacts:
        """Special tokens and chat template as the model's own files have them."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it count as such, none are added."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""

    @abstractmethod
    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text up to where the assistant starts to answer, by the model's own chat template."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits at every position, float32, shape `(len(ids), vocabulary)`.

        The KV cache holds `ids` afterwards where the engine can keep them, else nothing.
        """

    @property
    @abstractmethod
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the KV cache."""

    @abstractmethod
    def close(self) -> None:
        """Free the model. The engine is not used after that."""

    @abstractmethod
    def _rewind(self, keep: int) -> int:
        """Cut the cache back to its first `keep` positions, fewer than it holds; how many there are then.

        0 where the model keeps a state that cannot be cut back, as convolutions and state spaces do.
        """

    def _prefill(self, ids: Sequence[int]) -> int:
        """Run a prompt's `ids` behind what the cache holds, return the greedy next id."""
        return self._run(ids)

    @abstractmethod
    def _run(self, ids: Sequence[int]) -> int:
        """Run `ids` behind what the cache holds, return the greedy next id."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered prompt."""
        return self.tokenize(self.render(messages))

    def served_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that a server of this engine makes of a conversation: its own template and start-of-text rule."""
        return self.prompt_ids(messages)

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: Collection[int] | None = None,
        prefix_cache: bool = True,
    ) -> Generation:
        """Decode greedily until a stop id or `max_tokens`.

        `prefix_cache` reuses the longest prefix shared with what the cache holds (at least the last prompt token
        is always computed); without it the cache is emptied first. `stop_ids` default to the model's own.
        """
        if not ids:
            raise InputError("an empty prompt cannot be run; give at least one token")
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
        stops = self.stop_ids if stop_ids is None else frozenset(stop_ids)
        start = time.perf_counter()
        self._make_room(len(ids) + max_tokens)
        if prefix_cache:
            keep = min(common_prefix(self._ids, ids), len(ids) - 1)
        else:
            self.reset()
            keep = 0
        if keep < len(self._ids):
            keep = self._rewind(keep)
        token = self._prefill(ids[keep:])
        out, times = [token], [time.perf_counter()]
        while token not in stops and len(out) < max_tokens:
            token = self._run([token])
            out.append(token)
            times.append(time.perf_counter())
        stopped = token in stops
        text = self.detokenize(out[:-1] if stopped else out)
        return Generation(len(ids), keep, out, text, start, times, "stop" if stopped else "length")

    def _make_room(self, tokens: int) -> None:
        """Make sure that `tokens` positions fit; `InputError` where the model cannot hold them."""
        if self._room and tokens > self._room:
            raise InputError(
                f"{self.target}: the request needs {tokens} tokens, the model holds {self._room}; "
                "shorten the prompt or --max-tokens"
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DirectoryEngine(Engine):
    """An engine whose tokenizer and template are those of a Hugging Face directory, in `_chat`."""

    _chat: Chat

    def tokenize(self, text: str) -> list[int]:
        return self._chat.tokenizer.ids(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._chat.decode(ids)

    def render(self, messages: Sequence[Message]) -> str:
        return self._chat.render(messages)

    @abstractmethod
    def _own_ends(self) -> object:
        """The configuration's `eos_token_id`: one, several or None."""

    @cached_property
    def stop_ids(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset([self._chat.end, *one_or_more(self._own_ends())])


def one_or_more(ids: Any) -> list[int]:
    """`eos_token_id` as a list: configurations hold one id, several, or none."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    if not size:
        return 0
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if len(differ) else size


def directory_facts(folder: Path, *, vocabulary: int | None) -> ModelFacts:
    """Special tokens and template of a Hugging Face directory (the template may stand in two places)."""
    path = folder / "generation_config.json"
    config = optional_object(path)
    ends = one_or_more(config.get("eos_token_id"))
    try:
        template = load_template(folder).source
    except InputError:  # no template there
        template = None
    return ModelFacts(ends[0] if ends else None, config.get("bos_token_id"), vocabulary, ends, template)
