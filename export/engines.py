"""The parent's side of `export.worker`: start an engine, ask it, and turn its death into a `GateError`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unshot import child
from unshot.data.rows import Message
from unshot.engines import ENGINES
from unshot.engines.base import ModelFacts
from unshot.errors import GateError
from unshot.machine import usable_cores


class Engine:
    """An exported file running in a process of its own; use as a context manager."""

    def __init__(
        self,
        kind: str,
        path: Path,
        *,
        context: int = 2048,
        threads: int | None = None,
        lora: Path | None = None,
        exact: bool = False,
    ) -> None:
        """`exact`: llama.cpp's cache in fp32, so that a full-precision file shows no rounding but its own."""
        ENGINES[kind].require()
        self.kind, self.path, self.lora = kind, path, lora
        self.context, self.threads = context, threads or cores()
        self.exact = exact
        self._folder = tempfile.TemporaryDirectory(prefix="unshot-parity-")
        self._log = Path(self._folder.name, "log").open("w+b")  # noqa: SIM115 (closed by __exit__)
        self.info = ModelFacts(None, None, None, [], None)

    def __enter__(self) -> Engine:
        self._process = subprocess.Popen(
            child.command(
                "export.worker",
                self.kind,
                str(self.path),
                str(self.context),
                str(self.threads),
                "exact" if self.exact else "served",
                *([str(self.lora)] if self.lora else []),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=child.environment(),
        )
        try:
            self.info = ModelFacts(**self._answer())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens parsed, none added."""
        found: list[list[int]] = self._ask(do="tokenize", texts=list(texts))
        return found

    def served(self, messages: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids that a server of this engine makes of each conversation."""
        found: list[list[int]] = self._ask(do="served", conversations=[list(m) for m in messages])
        return found

    def render(self, messages: Sequence[Sequence[Message]]) -> list[str]:
        """Each conversation rendered by the engine with the template in the file."""
        found: list[str] = self._ask(do="render", conversations=[list(m) for m in messages])
        return found

    def logits(self, ids: Sequence[int], start: int = 0) -> np.ndarray:
        """fp32 logits of positions `start:` of a sequence, shape `(len(ids) - start, vocab)`."""
        target = Path(self._folder.name, "logits.npy")
        self._ask(do="logits", ids=list(ids), start=start, into=str(target))
        values: np.ndarray = np.load(target)
        return values

    def generate(self, prompt: int, tokens: int, stop: Sequence[int]) -> list[int]:
        """The greedy answer to the first `prompt` tokens of the sequence last given to `logits`, without its end."""
        found: list[int] = self._ask(do="generate", prompt=prompt, tokens=tokens, stop=list(stop))
        return found

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise GateError(f"{self.path.name}: {self.kind} engine died (exit {code}): {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise GateError(
                f"{self.path.name}: {self.kind} engine: {reply['error'][:300]}; {self._last_words()}"
            )
        return reply["ok"]

    def _last_words(self) -> str:
        self._log.flush()
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "it said nothing"


def cores() -> int:
    """Usable CPU cores, or `OMP_NUM_THREADS` where that is fewer."""
    usable = usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable, int(wanted)) if wanted.isdecimal() and int(wanted) else usable
