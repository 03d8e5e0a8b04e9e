"""Greedy answers of many equal prompts at once, on torch and on ONNX Runtime: how many requests a second one GPU takes.

`unshot bench` measures its engines one request at a time; a server batches. Here the batch is the axis: prefill of
`batch` prompts, then decode steps for all, as a static batch. Where the prefix cache is on, the shared beginning is
computed before the clock starts and copied to every row, as a server with a shared prefix would have it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

# Doubling the batch must bring so much, else the device is saturated.
WORTH = 0.05


class Torch:
    """A Hugging Face directory: the checkpoint's precision on CUDA, float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: Any = "auto" if self.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).to(self.device).eval()
        self.name = f"torch {torch.__version__}"

    def seconds(self, prompt: list[int], batch: int, shared: int, tokens: int) -> float:
        """Time from the first prompt token that is not cached to the last answer token of the batch."""
        from transformers import DynamicCache

        torch, cache = self.torch, DynamicCache()
        with torch.inference_mode():
            if shared:
                ids = torch.tensor([prompt[:shared]], device=self.device)
                self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache.batch_repeat_interleave(batch)
            ids = torch.tensor([prompt[shared:]] * batch, device=self.device)
            self._wait()
            began = time.perf_counter()
            for _ in range(tokens):
                out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids = out.logits[:, -1:].argmax(-1)
            self._wait()
            return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def close(self) -> None:
        """Free the device's memory for the next engine."""
        self.model = None
        if self.device == "cuda":
            self.torch.cuda.empty_cache()


class Onnx:
    """A decoder graph as `unshot export --to onnx:fp32` writes it; keys and values stay on the device."""

    def __init__(self, folder: Path) -> None:
        from unshot.engines.onnx import OnnxEngine

        self.engine = OnnxEngine(str(folder))
        self.device = self.engine.device
        self.name = str(self.engine.facts()["library"])

    def seconds(self, prompt: list[int], batch: int, shared: int, tokens: int) -> float:
        """As `Torch.seconds`."""
        engine = self.engine
        past = [engine._value(_rows(v.numpy(), batch)) for v in engine._empty]
        if shared:
            _, one = self._forward(np.array([prompt[:shared]]), 0, engine._empty)
            past = [engine._value(_rows(v.numpy(), batch)) for v in one]
        ids, before = np.array([prompt[shared:]] * batch), shared
        began = time.perf_counter()
        for _ in range(tokens):
            logits, past = self._forward(ids, before, past)
            before += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
        return time.perf_counter() - began

    def _forward(self, ids: np.ndarray, before: int, past: list[Any]) -> tuple[np.ndarray, list[Any]]:
        engine = self.engine
        batch, length = ids.shape
        binding = engine._session.io_binding()
        feeds = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((batch, before + length), dtype=np.int64),
            "position_ids": np.tile(np.arange(before, before + length, dtype=np.int64), (batch, 1)),
        }
        for name, value in feeds.items():
            if name in engine._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in zip(engine._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in engine._present:
            binding.bind_output(name, engine.device)
        engine._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        return outputs[0].numpy(), list(outputs[1:])

    def close(self) -> None:
        """Free the device's memory for the next engine."""
        self.engine.close()


def _rows(values: np.ndarray, batch: int) -> np.ndarray:
    return np.ascontiguousarray(np.repeat(values[:1], batch, axis=0))


def to_saturation(
    system: Torch | Onnx, prompt: list[int], shared: int, tokens: int, most: int
) -> list[tuple[int, float]]:
    """`(batch, requests a second)` for 1, 2, 4, ... until doubling brings nothing, memory ends or `most` is reached."""
    system.seconds(prompt, 1, shared, 2)
    points: list[tuple[int, float]] = []
    batch = 1
    while batch <= most:
        try:
            rate = batch / min(system.seconds(prompt, batch, shared, tokens) for _ in range(2))
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # CUDA's and ONNX Runtime's out-of-memory are RuntimeErrors
            print(f"  batch {batch}: {str(error).splitlines()[0][:100]}")
            break
        points.append((batch, rate))
        if len(points) > 2 and rate < (1 + WORTH) * points[-3][1]:
            break
        batch *= 2
    return points
