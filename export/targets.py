"""What can be written: `--to` texts such as `gguf:q8_0`, `onnx:fp32` or `genai:int4`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unshot.errors import InputError, nearest

# Written here, tensor by tensor.
STREAMED = ("f32", "f16", "bf16", "q8_0")
# By llama.cpp's quantiser, from a streamed file.
QUANTISED = (
    "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "iq4_nl", "q3_k_m", "q2_k", "iq3_xxs", "iq2_xs",
)  # fmt: skip
# Too coarse to be rounded blindly: llama.cpp refuses them without an importance matrix, or they are no use.
WITH_IMATRIX = ("iq3_xxs", "iq2_xs")
KINDS: dict[str, tuple[str, ...]] = {
    "gguf": (*STREAMED, *QUANTISED),
    # optimum's standard graph
    "onnx": ("fp32",),
    # ONNX Runtime GenAI's model builder
    "genai": ("fp32", "int8", "int4"),
    "genai-cuda": ("fp16", "int4"),
    # The merged model as Hugging Face safetensors
    "hf": ("bf16", "f16", "f32"),
    # The adapter alone, for a GGUF of its base.
    "lora": ("f16", "f32"),
}
DEFAULT = {"gguf": "q8_0", "onnx": "fp32", "genai": "int4", "genai-cuda": "int4", "hf": "bf16", "lora": "f16"}
ALIASES = {"fp32": "f32", "fp16": "f16", "float32": "f32", "float16": "f16"}


@dataclass(frozen=True)
class Target:
    """One artifact: its kind, its precision, and the name it gets in the output directory."""

    kind: str
    precision: str

    @property
    def name(self) -> str:
        """File or folder name in the output directory."""
        if self.kind not in ("gguf", "lora"):
            return f"{self.kind}-{self.precision}"
        return f"{'model' if self.kind == 'gguf' else 'adapter'}-{self.precision}.gguf"

    @property
    def engine(self) -> str:
        """The engine that runs it: gguf (llama.cpp), onnx (onnxruntime) genai (onnxruntime-genai) or torch."""
        return {"lora": "gguf", "genai-cuda": "genai", "hf": "torch"}.get(self.kind, self.kind)

    def __str__(self) -> str:
        return f"{self.kind}:{self.precision}"


def known() -> list[str]:
    """Every accepted `--to` text."""
    return [f"{kind}:{precision}" for kind, precisions in KINDS.items() for precision in precisions]


def parse_targets(texts: Sequence[str]) -> list[Target]:
    """Targets in the order given, duplicates dropped; `InputError` names the nearest known ones."""
    targets: list[Target] = []
    for text in texts:
        kind, _, precision = text.strip().lower().partition(":")
        precision = precision or DEFAULT.get(kind, "")
        accepted = KINDS.get(kind, ())
        if precision not in accepted and ALIASES.get(precision) in accepted:
            precision = ALIASES[precision]
        if precision not in accepted:
            raise InputError(f"unknown format '{text}': {nearest(text, known())}")
        target = Target(kind, precision)
        if target not in targets:
            targets.append(target)
    if not targets:
        raise InputError(f"no format; give --to, e.g. --to gguf:q8_0 (known: {', '.join(known())})")
    return targets
