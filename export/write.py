"""Write one artifact of each kind: what can be written, how much room it takes, and the writing itself."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export import converter, genai, gguf_file, gguf_lora, imatrix, onnx_graph, peft_adapter, w4a16
from export.boundaries import boundaries, check_rows_fit
from export.converter import Converter
from export.expected import BATCH, answer_tokens
from export.kquants import quantise, takes_imatrix
from export.merge import Merged
from export.safetensors_dir import copy_tokenizer, merged_config, older_config, set_ends, write_merged
from export.source import Model
from export.vocab import NotStreamed
from unshot.catalog.formats import QUANTISED, STREAMED, WITH_IMATRIX, Target
from unshot.engines import ENGINES
from unshot.errors import InputError, OutsideError
from unshot.text.template import set_template

# Room left on the disk beyond what is written, bytes.
SPARE = 64 * 1024 * 1024
# Bytes a weight takes in each precision while it is written: ONNX is made from a merged fp32 copy that lies beside it.
BYTES = {
    "f32": 4.0, "fp32": 8.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "fp16": 6.0, "int8": 6.0, "int4": 6.0,
    "fp8": 2.0, "w4a16": 7.0,
}  # fmt: skip


@dataclass
class Job:
    """One export under way: artifacts go to `work`, what only serves them to `scratch`.

    `converter` is llama.cpp's own where the streamed GGUF is not for this model, else None.
    """

    model: Model
    merged: Merged
    work: Path
    scratch: Path
    progress: Any
    converter: Converter | None = None

    def path(self, target: Target) -> Path:
        """Where an artifact lies."""
        return self.work / target.name

    def facts(self) -> gguf_file.Facts:
        """What a GGUF's metadata says beside the numbers."""
        model = self.model
        return gguf_file.Facts(
            model.name, model.base.name, model.base.license, model.chat.tokenizer.template.source, model.chat.end,
            tuple(model.ends),
        )  # fmt: skip


def refuse(
    targets: Sequence[Target], model: Model, merged: Merged, with_imatrix: bool, checkout: Path | None = None
) -> Converter | None:
    """Refuse before any work what cannot be written, or not be run here; the converter, where one is needed."""
    needed: Converter | None = None
    for target in targets:
        ENGINES[target.engine].require()
        if target.precision in WITH_IMATRIX and not with_imatrix:
            raise InputError(f"{target} is no use without an importance matrix; add --imatrix")
        if target.engine == "gguf":
            refuse_boundaries(model)
        if target.precision == "w4a16":
            w4a16.refuse(merged)
            imatrix.training_ids(model, 1)
        try:
            function(target.format.refuse)(target, merged, model.tokenizer)
        except NotStreamed as error:
            needed = needed or converter.find(str(error), merged.config, checkout)
    if with_imatrix:
        if not any(t.precision in QUANTISED for t in targets):
            raise InputError(
                f"--imatrix is for llama.cpp's quantiser; give --to gguf:{QUANTISED[3]} or another it writes"
            )
        if needed:
            raise InputError("--imatrix is for the streamed families; leave it out here")
        takes_imatrix()
        imatrix.training_ids(model, 1)
    return needed


def refuse_boundaries(model: Model) -> None:
    """`InputError` where llama.cpp never computes this model, or not for rows as long as the run's."""
    found = boundaries(model.config)
    if found:
        rows = [len(model.chat.prompt_ids(m)) for m in model.requests()]
        check_rows_fit(found, max(rows) + answer_tokens(model))


def function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def full_of(target: Target, merged: Merged) -> Target | None:
    """The full-precision file that a coarser target is made from and held against; None for one that is full itself."""
    precision = target.format.full
    if precision is None or target.precision == precision:
        return None
    if target.kind == "gguf":
        precision = middle(merged)
    return None if target.precision == precision else Target(target.kind, precision)


def room(folder: Path, targets: Sequence[Target], merged: Merged) -> None:
    """`OutsideError` where the disk has not enough room for what will be written."""
    count = parameters(merged)
    # Coarser files are made from and compared with a full-precision one that lies beside them meanwhile.
    kinds = {full_of(t, merged) for t in targets} - {None, *targets}
    shared = sum(BYTES[t.precision] for t in kinds if t and not t.format.on_base)
    shared += 4.0 if any(t.kind == "lora" for t in targets) else 0.0  # the base that it is run on
    needed = (
        int(count * (shared + sum(BYTES.get(t.precision, 1.0) for t in targets if not t.format.on_base)))
        + SPARE
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutsideError(
            f"{folder}: {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB; free some space or choose "
            "another --out"
        )


def write(target: Target, job: Job) -> str:
    """Write one target under its final name inside the working directory; by what, for the manifest."""
    found: str = function(target.format.write)(target, job, job.path(target))
    return found


def write_gguf(target: Target, job: Job, path: Path) -> str:
    """A GGUF file: streamed, or quantised from a streamed one, or from what llama.cpp's own converter wrote."""
    full = full_of(target, job.merged) or target
    if job.converter is None and target.precision in STREAMED:
        _stream(target.precision, job, path)
        return "streamed by this tool"
    if full == target:
        assert job.converter is not None
        _convert(target.precision, job, path)
        return made_by(job)
    source = full_path(full, job)
    bar = job.progress.add_task(f"write {target}", total=1, note="quantising")
    matrix = job.work / imatrix.FILE
    quantise(source, path, target.precision, matrix if matrix.is_file() else None)
    job.progress.update(bar, completed=1, note="")
    return f"llama.cpp's quantiser, from {full} {made_by(job)}"


def made_by(job: Job) -> str:
    """What writes the full-precision GGUF."""
    return f"by {job.converter.name}" if job.converter else "streamed by this tool"


def full_path(full: Target, job: Job) -> Path:
    """The full-precision file, written where it is not there yet: an artifact of this export, or a scratch file."""
    path = job.path(full)
    if path.exists():
        return path
    if full.kind != "gguf":
        path = job.scratch / full.name
        if not path.exists():
            function(full.format.write)(full, job, path)
        return path
    path = job.scratch / full.name
    if path.exists():
        return path
    if job.converter is None:
        _stream(full.precision, job, path)
        return path
    _convert(full.precision, job, path)
    return path


def _convert(precision: str, job: Job, path: Path) -> None:
    assert job.converter is not None
    bar = job.progress.add_task(f"convert to {path.name}", total=1, note="llama.cpp's converter")
    template = job.model.chat.tokenizer.template.source
    job.converter.convert(merged_copy(job), path, precision, template, job.model.ends)
    job.progress.update(bar, completed=1, note="")


def _stream(precision: str, job: Job, path: Path) -> None:
    plan = gguf_file.tensor_plan(
        job.merged, gguf_file.family_of(job.merged.config), job.merged.config, precision
    )
    total = sum(gguf_file.nbytes(t.shape, t.kind) for t in plan)
    bar = job.progress.add_task(f"write {path.name}", total=total, note="")
    gguf_file.write_gguf(
        path, job.merged, job.model.tokenizer, precision, job.facts(), lambda n: job.progress.advance(bar, n)
    )


def merged_copy(job: Job) -> Path:
    """The merged model as a Hugging Face directory in fp32, shared by the writers that start from one."""
    folder = job.scratch / "huggingface"
    if not (folder / "config.json").is_file():
        write_merged(folder, job.model.base.path, job.merged, tokenizer=job.model.tokenizer)
        set_ends(folder, job.model.ends)
        older_config(folder)
    return folder


def write_hf(target: Target, job: Job, path: Path) -> str:
    """A Hugging Face directory."""
    if target.precision == "w4a16":
        return _write_four_bits(target, job, path)
    total = parameters(job.merged) * (4 if target.precision == "f32" else 2)
    bar = job.progress.add_task(f"write {target}", total=total, note="")
    write_merged(
        path, job.model.base.path, job.merged, target.precision, tokenizer=job.model.tokenizer,
        progress=lambda n: job.progress.advance(bar, n),
    )  # fmt: skip
    set_ends(path, job.model.ends)
    set_template(path, job.model.chat.tokenizer.template)
    return "streamed by this tool"


def _write_four_bits(target: Target, job: Job, path: Path) -> str:
    bar = job.progress.add_task(f"write {target}", total=1, note="llm-compressor")
    rows = imatrix.training_ids(job.model)
    config = merged_config(job.model.base.path, job.merged, target.precision)
    w4a16.write(path, job.model.tokenizer, merged_copy(job), rows, job.model.ends, config)
    set_template(path, job.model.chat.tokenizer.template)
    job.progress.advance(bar)
    return "llm-compressor (GPTQ on training rows)"


def write_lora(target: Target, job: Job, path: Path) -> str:
    """The adapter alone, and beside the scratch files the bare base that it is checked on."""
    bar = job.progress.add_task(f"write {target}", total=1, note="")
    facts = job.facts()
    gguf_lora.write_lora(path, job.merged, target.precision, replace(facts, template=None))
    lower = job.scratch / f"base-{middle(job.merged)}.gguf"
    if not lower.exists():
        gguf_file.write_gguf(lower, job.model.bare(), job.model.tokenizer, middle(job.merged), facts)
    job.progress.advance(bar)
    return "streamed by this tool"


def write_peft(target: Target, job: Job, path: Path) -> str:
    """The adapter alone in peft's form, with the tokenizer and the chat template that it was tuned with."""
    bar = job.progress.add_task(f"write {target}", total=1, note="")
    assert job.model.adapter is not None
    peft_adapter.write_adapter(path, job.model.adapter, target.precision, job.model.base.name)
    copy_tokenizer(job.model.tokenizer, path)
    set_ends(path, job.model.ends)
    set_template(path, job.model.chat.tokenizer.template)
    job.progress.advance(bar)
    return "streamed by this tool"


def write_genai(target: Target, job: Job, path: Path) -> str:
    """A GenAI directory."""
    bar = job.progress.add_task(f"write {target}", total=1, note="")
    genai.write_genai(path, target, job.model.tokenizer, merged_copy(job), job.model.ends)
    set_template(path, job.model.chat.tokenizer.template)
    job.progress.advance(bar)
    return target.format.made_by


def write_onnx(target: Target, job: Job, path: Path) -> str:
    """optimum's graph."""
    bar = job.progress.add_task(f"write {target}", total=1, note="")
    onnx_graph.write_onnx(path, job.model.tokenizer, merged_copy(job), job.model.ends)
    set_template(path, job.model.chat.tokenizer.template)
    job.progress.advance(bar)
    return target.format.made_by


def write_importance(job: Job, path: Path, *, low_memory: bool) -> None:
    """Write the importance matrix of the training rows."""
    rows = imatrix.training_ids(job.model)
    bar = job.progress.add_task(
        "importance matrix", total=len(rows), note="one layer at a time" if low_memory else ""
    )
    net = job.model.reference(streams=low_memory)
    # A streamed model reads itself once a pass.
    size = len(rows) if low_memory else BATCH
    squares = imatrix.collect(net, job.merged, rows, lambda n: job.progress.advance(bar, n), size)
    imatrix.write_imatrix(path, squares, job.merged)


def lora_base(target: Target, job: Job) -> Path | None:
    """What an exported adapter is run on (the bare base, as GGUF for llama.cpp); None for other targets."""
    if not target.format.on_base:
        return None
    return next(job.scratch.glob("base-*.gguf")) if target.engine == "gguf" else job.model.base.path


def middle(merged: Merged) -> str:
    """The full precision of a GGUF: f32 (the merge as it is), bf16 where that would take too much disk."""
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
