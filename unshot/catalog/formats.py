"""The formats that `unshot export --to KIND:PRECISION` writes: one entry a kind, read by help, case file and docs.

A format is added here, with a writer and a check in `export/`. Functions are named, not imported: the case file and
the help need no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unshot.errors import InputError, nearest

# Written tensor by tensor, in one pass.
STREAMED = ("f32", "f16", "bf16", "q8_0")
# By llama.cpp's quantiser, from a streamed file.
QUANTISED = (
    "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "iq4_nl", "q3_k_m", "q2_k", "iq3_xxs", "iq2_xs",
)  # fmt: skip
# Too coarse to be rounded blindly: llama.cpp refuses them without an importance matrix, or they are no use.
WITH_IMATRIX = ("iq3_xxs", "iq2_xs")
ALIASES = {"fp32": "f32", "fp16": "f16", "float32": "f32", "float16": "f16"}


@dataclass(frozen=True)
class Format:
    """One kind of artifact.

    `engine` is a key of `unshot.engines.ENGINES`; `refuse(target, merged)` and `write(job, target, path)` are
    `module:function`; `file` is its name in the output directory; `full` is the precision of the full-precision file
    that a coarser one is made from and compared with, None where there is none; `on_base`: the adapter alone, which is
    run on its base.
    """

    kind: str
    precisions: tuple[str, ...]
    default: str
    engine: str
    refuse: str
    write: str
    file: str
    made_by: str
    full: str | None = None
    on_base: bool = False

    @property
    def targets(self) -> list[str]:
        """Every accepted `--to` text of the kind."""
        return [f"{self.kind}:{precision}" for precision in self.precisions]


FORMATS = {
    one.kind: one
    for one in (
        Format(
            "gguf", (*STREAMED, *QUANTISED), "q8_0", "gguf", "export.gguf_file:refuse", "export.write:write_gguf",
            "model-{precision}.gguf",
            "this tool in one pass (f32, f16, bf16, q8_0) and llama.cpp's quantiser; llama.cpp's own converter for "
            "families outside the streamed ones",
            full="f32",
        ),
        Format(
            "onnx", ("fp32",), "fp32", "onnx", "export.onnx_graph:refuse", "export.write:write_onnx",
            "onnx-{precision}",
            "optimum: the standard decoder graph with KV cache",
        ),
        Format(
            "genai", ("fp32", "int8", "int4"), "int4", "genai", "export.genai:refuse", "export.write:write_genai",
            "genai-{precision}", "ONNX Runtime GenAI's model builder, for CPU", full="fp32",
        ),
        Format(
            "genai-cuda", ("fp16", "int4"), "int4", "genai", "export.genai:refuse", "export.write:write_genai",
            "genai-cuda-{precision}", "ONNX Runtime GenAI's model builder, for CUDA", full="fp16",
        ),
        Format(
            "hf", ("bf16", "f16", "f32", "fp8", "w4a16"), "bf16", "torch", "export.safetensors_dir:refuse",
            "export.write:write_hf",
            "hf-{precision}",
            "this tool: merged safetensors in shards, for vLLM and transformers; fp8 in compressed-tensors' form, "
            "w4a16 by llm-compressor",
        ),
        Format(
            "lora", ("f16", "f32"), "f16", "gguf", "export.gguf_lora:refuse_target", "export.write:write_lora",
            "adapter-{precision}.gguf", "this tool: the adapter alone, for a GGUF of its base",
            full="f32", on_base=True,
        ),
        Format(
            "peft", ("bf16", "f16", "f32"), "bf16", "torch", "export.peft_adapter:refuse", "export.write:write_peft",
            "adapter-{precision}", "this tool: the adapter alone in peft's form, for `vllm serve --enable-lora`",
            full="f32", on_base=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One artifact: its kind and its precision."""

    kind: str
    precision: str

    @property
    def format(self) -> Format:
        """The kind's entry."""
        return FORMATS[self.kind]

    @property
    def name(self) -> str:
        """File or folder name in the output directory."""
        return self.format.file.format(precision=self.precision)

    @property
    def engine(self) -> str:
        """The engine that runs it."""
        return self.format.engine

    def __str__(self) -> str:
        return f"{self.kind}:{self.precision}"


def known() -> list[str]:
    """Every accepted `--to` text."""
    return [text for one in FORMATS.values() for text in one.targets]


def parse_target(text: str) -> Target:
    """The target of a `--to` text; `InputError` names the nearest known ones."""
    kind, _, precision = text.strip().lower().partition(":")
    entry = FORMATS.get(kind)
    precision = precision or (entry.default if entry else "")
    accepted = entry.precisions if entry else ()
    if precision not in accepted and ALIASES.get(precision) in accepted:
        precision = ALIASES[precision]
    if precision not in accepted:
        raise InputError(f"unknown format '{text}': {nearest(text, known())}")
    return Target(kind, precision)


def parse_targets(texts: Sequence[str]) -> list[Target]:
    """Targets in the order given, duplicates dropped; `InputError` names the nearest known ones."""
    targets = list(dict.fromkeys(parse_target(text) for text in texts))
    if not targets:
        raise InputError(f"no format; give --to, e.g. --to gguf:q8_0 (known: {', '.join(known())})")
    return targets


def help_text() -> str:
    """What `--to` accepts, one phrase a kind."""
    kinds = "; ".join(f"{one.kind}: {', '.join(one.precisions)}" for one in FORMATS.values())
    return (
        f"Format and precision KIND:PRECISION, repeatable; default gguf:{FORMATS['gguf'].default}. {kinds}."
    )
