"""The inference engines that a spec `KIND:TARGET` can name: one entry an engine, read by help, checks and docs.

An engine is added here and in its own module. Nothing heavy is imported until one is opened.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unshot.errors import InputError, OutsideError, nearest

if TYPE_CHECKING:
    from unshot.engines.base import Engine


@dataclass(frozen=True)
class EngineKind:
    """One engine: how its spec is written, which class runs it, and the package that class needs."""

    name: str
    target: str
    runs: str
    implementation: str  # module:class
    package: str
    distribution: str

    @property
    def form(self) -> str:
        """`gguf:PATH`."""
        return f"{self.name}:{self.target}"

    def require(self) -> None:
        """Raise `OutsideError` where the engine's package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            raise OutsideError(
                f"{self.form} needs {self.distribution}, which is missing; pip install 'unshot[bench,export]'"
            )


ENGINES = {
    kind.name: kind
    for kind in (
        EngineKind(
            "gguf", "PATH", "llama.cpp in this process, through its C interface",
            "unshot.engines.llama_cpp:GgufEngine", "llama_cpp", "llama-cpp-python",
        ),
        EngineKind(
            "onnx", "PATH", "ONNX Runtime in this process; a decoder graph with past keys and values, or its directory",
            "unshot.engines.onnx:OnnxEngine", "onnxruntime", "onnxruntime",
        ),
        EngineKind(
            "genai", "PATH", "ONNX Runtime GenAI in this process; a directory with `genai_config.json`",
            "unshot.engines.genai:GenaiEngine", "onnxruntime_genai", "onnxruntime-genai",
        ),
        EngineKind(
            "torch", "PATH_OR_NAME", "PyTorch and transformers in this process",
            "unshot.engines.transformers:TorchEngine", "transformers", "transformers",
        ),
    )
}  # fmt: skip


def spec_forms() -> str:
    """Every engine's form, for help texts: `gguf:PATH, onnx:PATH, ...`."""
    return ", ".join(kind.form for kind in ENGINES.values())


def parse_spec(spec: str) -> tuple[str, str]:
    """`gguf:PATH` as `("gguf", "PATH")`. Raises `InputError` for an unknown kind or an empty target."""
    kind, colon, target = spec.partition(":")
    if not colon:
        raise InputError(
            f"`{spec}` is no system; give KIND:PATH, e.g. gguf:model.gguf (kinds: {', '.join(ENGINES)})"
        )
    if kind not in ENGINES:
        raise InputError(f"unknown kind of system `{kind}` in `{spec}`; {nearest(kind, ENGINES)}")
    if not target:
        raise InputError(f"`{spec}` names no model; give {kind}:PATH")
    return kind, target


def open_engine(
    spec: str, *, threads: int | None = None, adapter: Path | None = None, context: int | None = None
) -> Engine:
    """Load the model that `spec` names.

    `threads` defaults to the usable cores; `adapter` is a LoRA adapter to apply (a file for GGUF, a directory for
    torch); `context` is the number of tokens that llama.cpp is started with, as a server is, where it must not grow
    with the requests. Raises `InputError` for a bad spec or file, `OutsideError` where the engine's library is missing.
    """
    kind, target = parse_spec(spec)
    entry = ENGINES[kind]
    module, _, name = entry.implementation.partition(":")
    options: dict[str, Path | int] = {} if adapter is None else {"adapter": adapter}
    if context is not None and kind == "gguf":
        options["context"] = context
    if adapter is not None and kind not in ("gguf", "torch"):
        raise InputError(f"{spec}: {kind} takes no adapter; merge it first")
    try:
        engine: Engine = getattr(importlib.import_module(module), name)(target, threads=threads, **options)
    except ImportError as error:
        raise OutsideError(
            f"{spec}: the engine's library is missing ({error}); pip install 'unshot[bench,export]'"
        ) from None
    return engine
