"""Model directories of ONNX Runtime GenAI (`genai_config.json`): fused attention, 4- and 8-bit weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from unshot.contracts.engine import EngineFacts
from unshot.data.files import read_object
from unshot.data.rows import Message
from unshot.engines.base import Engine, ModelFacts, directory_facts, one_or_more
from unshot.errors import InputError, OutsideError
from unshot.text.chat import Tokenizer, load_tokenizer

CONTEXT_STEP = 1024
CONFIG = "genai_config.json"


class GenaiEngine(Engine):
    """A GenAI model with its own tokenizer and template engine, batch 1, greedy; keys and values stay in one buffer."""

    kind = "genai"

    def __init__(self, target: str, *, threads: int | None = None) -> None:
        super().__init__(target, threads=threads)
        self.path = Path(target).expanduser()
        if not (self.path / CONFIG).is_file():
            raise InputError(
                f"{self.path}: no {CONFIG} there; give a directory that `unshot export --to genai:int4` wrote"
            )
        try:
            self._config = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))["model"]
            settings = og.Config(str(self.path))
            options = {"session_options": {"intra_op_num_threads": self.threads, "log_severity_level": 4}}
            settings.overlay(json.dumps({"model": {"decoder": options}}))
            self._model: Any = og.Model(settings)
            self._tokenizer: Any = og.Tokenizer(self._model)
        except Exception as error:  # GenAI raises RuntimeError and its own kinds for damaged directories
            raise InputError(f"{self.path}: ONNX Runtime GenAI cannot load it ({str(error)[:160]})") from None
        self.vocabulary = int(self._config["vocab_size"])
        self._special = self._special_ids()
        self._generator: Any = None
        self.context_size = 0
        self._room = int(self._config.get("context_length") or 0)

    def _special_ids(self) -> frozenset[int]:
        data = read_object(self.path / "tokenizer.json")
        return frozenset(t["id"] for t in data.get("added_tokens", []) if t.get("special"))

    def facts(self) -> EngineFacts:
        return EngineFacts(
            engine="onnxruntime-genai",
            library=f"onnxruntime-genai {og.__version__}",
            model=f"{self._config.get('type')} {self.path.name}",
            bytes=sum(p.stat().st_size for p in self.path.glob("*.onnx*")),
            threads=self.threads,
            device=str(self._model.device_type).lower(),
        )

    def model_facts(self) -> ModelFacts:
        ends = sorted(self.stop_ids)
        found = directory_facts(self.path, vocabulary=self.vocabulary)
        return replace(found, eos=ends[0] if ends else None, end=ends)

    def tokenize(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)] if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        plain = [i for i in ids if i not in self._special]
        return str(self._tokenizer.decode(np.array(plain, dtype=np.int32))) if plain else ""

    @cached_property
    def _chat(self) -> Tokenizer:
        return load_tokenizer(self.path)

    def render(self, messages: Sequence[Message]) -> str:
        return self._chat.template.render(messages)

    @cached_property
    def stop_ids(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset(one_or_more(self._config.get("eos_token_id")))

    def _make_room(self, tokens: int) -> None:
        if self._generator is not None and tokens <= self.context_size:
            return
        super()._make_room(tokens)
        size = -(-tokens // CONTEXT_STEP) * CONTEXT_STEP
        self.context_size = min(size, self._room) if self._room else size
        self._start()

    def _start(self) -> None:
        """A generator with an empty cache of `context_size` positions."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=self.context_size, do_sample=False, batch_size=1)
        self._generator = og.Generator(self._model, params)
        self._ids = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self._make_room(len(ids))
        self.reset()
        self._run(ids)
        table = np.asarray(self._generator.get_output("logits"), dtype=np.float32)[0]
        self.reset()
        return table

    def _rewind(self, keep: int) -> int:
        if keep:
            self._generator.rewind_to(keep)
            self._ids = self._ids[:keep]
        else:
            self.reset()
        return keep

    def _run(self, ids: Sequence[int]) -> int:
        try:
            self._generator.append_tokens(np.array([ids], dtype=np.int32))
            self._ids.extend(ids)
            return int(np.asarray(self._generator.get_logits())[0, -1].argmax())
        except Exception as error:
            self.reset()
            raise OutsideError(f"{self.path}: ONNX Runtime GenAI failed ({str(error)[:160]})") from None

    def reset(self) -> None:
        if self._generator is not None and self._ids:
            self._start()

    def close(self) -> None:
        self._generator = self._tokenizer = self._model = None
