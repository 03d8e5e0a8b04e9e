"""The two systems under test: what runs them, and the request each makes out of a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.records import Record
from unshot.data.prompts import Prompt
from unshot.data.rows import Example
from unshot.engines import Engine

# Number of the request in the run, number of the row, the row.
Item = tuple[int, int, Example]
Progress = Callable[[Record], None]


class Measured(Protocol):
    """A system that the A/B run can measure."""

    side: str
    prompt: Prompt
    max_tokens: int

    @property
    def concurrency(self) -> int:
        """Requests at once."""

    @property
    def pid(self) -> int | None:
        """The process that runs it, where it is one of its own on this machine."""

    def reset(self) -> None:
        """Forget what can be forgotten of earlier requests."""

    def close(self) -> None:
        """Free everything."""

    def facts(self) -> dict[str, Any]:
        """What the report says about it."""

    def run_block(
        self, items: Sequence[Item], *, mode: str, block: int, clock: float, progress: Progress | None = None
    ) -> list[Record]:
        """Answer the items and time them; `clock` is the run's start on `time.perf_counter()`."""


@dataclass
class System:
    """An engine with the prompt that goes with it."""

    side: str
    engine: Engine
    prompt: Prompt
    max_tokens: int

    @property
    def concurrency(self) -> int:
        """Requests at once that this system can take."""
        return 1

    @property
    def pid(self) -> None:
        """It runs in this process."""

    def reset(self) -> None:
        """Forget the prefix cache."""
        self.engine.reset()

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def run_block(
        self, items: Sequence[Item], *, mode: str, block: int, clock: float, progress: Progress | None = None
    ) -> list[Record]:
        """Answer the items one after the other."""
        records = []
        for request, number, row in items:
            record = self.run(row, number, mode=mode, block=block, clock=clock)
            record.extra["request"] = request
            records.append(record)
            if progress:
                progress(record)
        return records

    def run(self, row: Example, number: int, *, mode: str, block: int, clock: float) -> Record:
        """Answer one row and time it, from the messages to the last token; `clock` is the run's start."""
        start = time.perf_counter()
        ids = self.engine.prompt_ids(self.prompt.request(row))
        answer = self.engine.generate(ids, max_tokens=self.max_tokens, prefix_cache=mode == "cache on")
        times = [t - start for t in answer.token_times]
        return Record(
            side=self.side,
            mode=mode,
            row=number,
            block=block,
            scheduled=start - clock,
            start=start - clock,
            token_times=times,
            e2e=times[-1],
            prompt_tokens=answer.prompt_tokens,
            output_tokens=len(answer.ids),
            cached_tokens=answer.cached,
            text=answer.text,
            finish=answer.finish,
        )

    def facts(self) -> dict[str, Any]:
        """What the report says about this side."""
        return {
            "spec": self.engine.spec,
            **self.engine.facts().plain(),
            "examples_in_prompt": len(self.prompt.examples),
            "system_prompt": bool(self.prompt.system),
        }
