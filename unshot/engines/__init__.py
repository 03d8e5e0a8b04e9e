"""One way to run a model, whatever runs it: `gguf:PATH`, `onnx:PATH`, `genai:PATH` or
`torch:PATH_OR_NAME`.

Every engine tokenizes, renders the model's own chat template, gives logits, and decodes greedily with the time of
each token, with or without reuse of the prompt prefix that the request before left in the KV cache.
"""

from __future__ import annotations

from unshot.engines.base import Engine, Generation, open_engine, parse_spec

__all__ = ["Engine", "Generation", "open_engine", "parse_spec"]
