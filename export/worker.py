"""One exported file in the engine that `unshot bench` runs, in a process of its own: a C++ abort must not end the tool.

Reads one JSON request a line on stdin and writes one JSON reply a line on what was stdout (the engines' own chatter
goes to stderr). Logits travel in a .npy file that the request names. Started by `export.engines`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from unshot.data.rows import Message
from unshot.engines import open_engine


class Worker:
    """The requests that the gate makes, on one open engine."""

    def __init__(
        self, kind: str, path: str, threads: int, context: int, exact: bool, adapter: str | None
    ) -> None:
        self.engine = open_engine(
            f"{kind}:{path}", threads=threads, adapter=Path(adapter) if adapter else None, context=context
        )
        if exact and kind == "gguf":
            self.engine.exact_cache = True  # type: ignore[attr-defined]
        self.ids: list[int] = []

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; special tokens in it count, none are added."""
        return [self.engine.tokenize(text) for text in texts]

    def render(self, conversations: list[list[Message]]) -> list[str]:
        """Each conversation by the file's own template."""
        return [self.engine.render(messages) for messages in conversations]

    def served(self, conversations: list[list[Message]]) -> list[list[int]]:
        """The ids that a server of this engine makes of each conversation."""
        return [self.engine.served_ids(messages) for messages in conversations]

    def logits(self, ids: list[int], start: int) -> np.ndarray:
        """fp32 logits of positions `start:`; the next `generate` goes on from these ids."""
        self.ids = ids
        return self.engine.logits(ids)[start:]

    def generate(self, prompt: int, tokens: int, stop: list[int]) -> list[int]:
        """The greedy answer to the first `prompt` tokens of the sequence that `logits` was asked for last."""
        answer = self.engine.generate(self.ids[:prompt], max_tokens=tokens, stop_ids=stop)
        return answer.ids[:-1] if answer.finish == "stop" else answer.ids


def main() -> None:
    """Serve requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kind, path, context, threads, exact, *adapter = sys.argv[1:]

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        worker = Worker(kind, path, int(threads), int(context), exact == "exact", next(iter(adapter), None))
        facts = asdict(worker.engine.model_facts())
    except Exception as error:  # whatever the engine raises becomes the reason in the parent
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ok": facts})
    for line in sys.stdin:
        request = json.loads(line)
        name, target = request.pop("do"), request.pop("into", None)
        try:
            value = getattr(worker, name)(**request)
            if target:
                np.save(target, value)
                value = None
            reply({"ok": value})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
