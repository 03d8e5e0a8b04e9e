"""Hugging Face directories on PyTorch, with transformers' own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from unshot.contracts.engine import EngineFacts
from unshot.engines.base import DirectoryEngine, ModelFacts, directory_facts
from unshot.errors import InputError
from unshot.models import attention_of, resolve
from unshot.text.chat import Chat, load_tokenizer

# Layers whose cache can be cut back to any length (`layer_types`, without `_attention`).
ATTENTION = {"full", "sliding", "chunked"}


class TorchEngine(DirectoryEngine):
    """A causal language model on CPU (float32) or CUDA (the checkpoint's precision), batch 1, greedy.

    `adapter` is the directory of a peft adapter to run it with, whose tokenizer and end tokens are taken.
    """

    kind = "torch"

    def __init__(self, target: str, *, threads: int | None = None, adapter: Path | None = None) -> None:
        super().__init__(target, threads=threads)
        source = resolve(target)
        self._folder = adapter or source.path
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        self.dtype: Any = torch.float32 if self.device.type == "cpu" else "auto"
        transformers.utils.logging.disable_progress_bar()
        own = attention_of(source.config())
        attention = {"attn_implementation": own} if own else {}
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.path), dtype=self.dtype, use_safetensors=True, **attention
        )
        if adapter is not None:
            from peft import PeftModel

            ends = transformers.GenerationConfig.from_pretrained(str(adapter))
            self._model = PeftModel.from_pretrained(self._model, str(adapter))
            self._model.generation_config = ends
        self._model = self._model.to(self.device).eval()
        self._chat = Chat(load_tokenizer(self._folder))
        text = self._model.config.get_text_config()
        self.vocabulary = int(text.vocab_size)
        self._room = int(getattr(text, "max_position_embeddings", 0) or 0)
        kinds = {str(kind).removesuffix("_attention") for kind in getattr(text, "layer_types", None) or ()}
        self._stateful = bool(kinds - ATTENTION) or bool(getattr(self._model, "_is_stateful", False))
        self._cache: Any = None
        self.reset()

    def facts(self) -> EngineFacts:
        weights = list(self._model.parameters())
        on_gpu = self.device.type == "cuda"
        return EngineFacts(
            engine="torch",
            library=f"torch {torch.__version__}, transformers {transformers.__version__}",
            model=f"{type(self._model).__name__} {str(weights[0].dtype).removeprefix('torch.')}",
            parameters=sum(p.numel() for p in weights),
            bytes=sum(p.numel() * p.element_size() for p in weights),
            threads=None if on_gpu else self.threads,
            device=torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
        )

    def model_facts(self) -> ModelFacts:
        ends = sorted(self.stop_ids)
        found = directory_facts(self._folder, vocabulary=self.vocabulary)
        return replace(found, eos=ends[0] if ends else None, end=ends)

    def _own_ends(self) -> object:
        return self._model.generation_config.eos_token_id

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.reset()
        with torch.inference_mode():
            out = self._model(torch.tensor([list(ids)], device=self.device), use_cache=False)
        table: np.ndarray = out.logits[0].float().cpu().numpy()
        return table

    def _rewind(self, keep: int) -> int:
        if not keep or self._stateful:
            self.reset()
            return 0
        # A negative count is what both transformers 4 and 5 take: how many tokens to drop.
        self._cache.crop(keep - len(self._ids))
        self._ids = self._ids[:keep]
        return keep

    def _run(self, ids: Sequence[int]) -> int:
        with torch.inference_mode():
            out = self._model(
                torch.tensor([list(ids)], device=self.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            raise InputError(
                f"{self.target}: {type(self._model).__name__} keeps its state otherwise than transformers' caches do; "
                "run a GGUF file of it, or a server"
            )
        self._ids.extend(ids)
        # .item() waits for the device, so that the time read after it is the token's.
        return int(out.logits[0, -1].argmax().item())

    def reset(self) -> None:
        # A state beside attention needs the model's own kind of cache.
        self._cache = None if self._stateful else transformers.DynamicCache()
        self._ids = []

    def close(self) -> None:
        self._model = None
        self.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
