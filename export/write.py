"""Write one artifact of each kind: what can be written, how much room it takes, and the writing itself."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from export import genai, gguf_file, gguf_lora, imatrix, onnx_graph, parity, reference
from export.engines import require
from export.kquants import quantise, takes_imatrix
from export.merge import Merged
from export.safetensors_dir import set_ends, set_template, write_merged
from export.source import Model
from export.streamed import streamed
from export.targets import QUANTISED, STREAMED, WITH_IMATRIX, Target
from unshot.errors import InputError, OutsideError

# Room left on the disk beyond what is written, bytes.
SPARE = 64 * 1024 * 1024


def refuse(targets: Sequence[Target], model: Model, merged: Merged, with_imatrix: bool) -> None:
    """Refuse before any work what cannot be written, or not be run here."""
    for target in targets:
        require(target.engine)
        if target.precision in WITH_IMATRIX and not with_imatrix:
            raise InputError(f"{target} is no use without an importance matrix; add --imatrix")
        refuse_unsupported(target, merged)
    if with_imatrix:
        if not any(t.precision in QUANTISED for t in targets):
            raise InputError(
                f"--imatrix is for llama.cpp's quantiser; give --to gguf:{QUANTISED[3]} or another it writes"
            )
        takes_imatrix()
        imatrix.training_ids(model, 1)


def refuse_unsupported(target: Target, merged: Any) -> None:
    """Refuse an architecture before any work."""
    if target.kind == "lora":
        gguf_lora.refuse(merged.adapter if merged.adapter.config else None)
    if target.kind in genai.PROVIDERS:
        genai.supported(merged.config, target.kind)
    elif target.kind == "onnx":
        onnx_graph.supported(str(merged.config.get("model_type")))
    elif target.kind != "hf":
        precision = target.precision if target.precision in STREAMED else "f32"
        gguf_file.tensor_plan(merged, gguf_file.family_of(merged.config), merged.config, precision)


def room(folder: Path, targets: Sequence[Target], merged: Merged) -> None:
    """`OutsideError` where the disk has not enough room for what will be written."""
    count = parameters(merged)
    # ONNX is made from a merged copy in fp32 that lies beside it meanwhile.
    per = {
        "f32": 4.0,
        "fp32": 8.0,
        "f16": 2.0,
        "bf16": 2.0,
        "q8_0": 34 / 32,
        "fp16": 6.0,
        "int8": 6.0,
        "int4": 6.0,
    }
    # Quantised files are made from a streamed one that lies beside them meanwhile.
    shared = 4.0 if any(t.kind == "lora" or t.precision in QUANTISED for t in targets) else 0.0
    needed = int(count * (shared + sum(per.get(t.precision, 1.0) for t in targets))) + SPARE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutsideError(
            f"{folder}: {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB; free some space or choose "
            "another --out"
        )


def write(target: Target, model: Model, work: Path, scratch: Path, progress: Any) -> None:
    """Write one target under its final name inside the working directory."""
    merged = model.merged()
    path = work / target.name
    if target.kind == "gguf":
        streamed_as = target.precision if target.precision in STREAMED else middle(merged)
        plan = gguf_file.tensor_plan(merged, gguf_file.family_of(merged.config), merged.config, streamed_as)
        total = sum(gguf_file.nbytes(t.shape, t.kind) for t in plan)
        bar = progress.add_task(f"write {target}", total=total, note="")
        facts = gguf_file.Facts(
            model.name,
            model.base.name,
            model.base.license,
            model.chat.tokenizer.template.source,
            model.chat.end,
        )
        first = path if streamed_as == target.precision else scratch / f"model-{streamed_as}.gguf"
        if not first.exists():  # several quantisations share one source
            gguf_file.write_gguf(
                first, merged, model.base.path, streamed_as, facts, lambda n: progress.advance(bar, n)
            )
        if first != path:
            progress.update(bar, completed=total, note="quantising")
            matrix = work / imatrix.FILE
            quantise(first, path, target.precision, matrix if matrix.is_file() else None)
            progress.update(bar, note="")
        return
    if target.kind == "hf":
        bar = progress.add_task(
            f"write {target}", total=parameters(merged) * (4 if target.precision == "f32" else 2), note=""
        )
        write_merged(
            path, model.base.path, merged, target.precision, progress=lambda n: progress.advance(bar, n)
        )
        set_ends(path, ends(model))
        set_template(path, model.chat.tokenizer.template)
        return
    bar = progress.add_task(f"write {target}", total=1, note="")
    if target.kind == "lora":
        facts = gguf_file.Facts(model.name, model.base.name, model.base.license, None, model.chat.end)
        gguf_lora.write_lora(path, merged, target.precision, facts)
        lower = scratch / f"base-{middle(merged)}.gguf"
        if not lower.exists():
            bare = Merged(model.base.weight_files(), model.base.config())
            template = replace(facts, template=model.chat.tokenizer.template.source)
            gguf_file.write_gguf(lower, bare, model.base.path, middle(merged), template)
        progress.advance(bar)
        return
    if target.kind in genai.PROVIDERS:
        genai.write_genai(
            path, target.kind, target.precision, model.base.path, merged, scratch / "huggingface", ends(model)
        )
        set_template(path, model.chat.tokenizer.template)
        progress.advance(bar)
        return
    onnx_graph.write_onnx(path, model.base.path, merged, scratch / "huggingface", ends(model))
    set_template(path, model.chat.tokenizer.template)
    progress.advance(bar)


def write_importance(model: Model, path: Path, progress: Any, *, low_memory: bool) -> None:
    """Write the importance matrix of the training rows."""
    rows = imatrix.training_ids(model)
    bar = progress.add_task(
        "importance matrix", total=len(rows), note="one layer at a time" if low_memory else ""
    )
    net: Any = (
        streamed(model.base.path, model.base.weight_files(), model.adapter_path)
        if low_memory
        else reference.evaluated(model.base.path, model.adapter_path)
    )
    # A streamed model reads itself once a pass.
    size = len(rows) if low_memory else parity.BATCH
    squares = imatrix.collect(net, model.merged(), rows, lambda n: progress.advance(bar, n), size)
    imatrix.write_imatrix(path, squares, model.merged())


def lora_base(target: Target, scratch: Path) -> Path | None:
    """The GGUF of the bare base that an exported adapter is run on; None for other targets."""
    return next(scratch.glob("base-*.gguf")) if target.kind == "lora" else None


def ends(model: Model) -> list[int]:
    """The tokens that end an answer: the template's end of turn, and the tokenizer's eos where that is another."""
    eos = model.chat.tokenizer.eos
    return [model.chat.end] if eos is None or eos == model.chat.end else [model.chat.end, eos]


def middle(merged: Merged) -> str:
    """What llama.cpp's quantiser reads: f32 (the merge as it is), bf16 where that would take too much disk."""
    return "f32" if parameters(merged) < 2_000_000_000 else "bf16"


def parameters(merged: Merged) -> int:
    """Number of weights."""
    return sum(math.prod(merged.shape(name)) for name in merged.names())


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    )
