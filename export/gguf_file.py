"""GGUF in one pass: each tensor is merged, reordered, quantised and written before the next one is read."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.engines import cores
from export.families import Config, Family, extra_tensors, family_of, head_dim
from export.merge import HEAD, Merged
from export.vocab import NotStreamed, add_vocabulary, read_vocabulary
from unshot.catalog.formats import STREAMED, Target
from unshot.errors import InputError, OutsideError

BLOCK = 32  # values per q8_0 block: an fp16 scale and 32 int8
ALIGNMENT = 32


@dataclass(frozen=True)
class Facts:
    """What the metadata says about the model beside its numbers."""

    name: str
    base: str
    license: str | None
    template: str | None
    end_of_turn: int | None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Planned:
    """One tensor to write: GGUF name and type, and the Hugging Face name it comes from (None for constants)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str | None
    constant: tuple[float, ...] = ()


def tensor_plan(model: Merged, family: Family, config: Config, precision: str) -> list[Planned]:
    """Every tensor of the file, in order; `InputError` for one that the family does not know."""
    import gguf

    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.arch)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    plan = []
    for source in model.names():
        if source.endswith("rotary_emb.inv_freq"):
            continue
        if source == HEAD and not family.head:
            raise InputError(
                f"the model has a head of its own (`{HEAD}`, tuned or untied), which llama.cpp's {family.arch} does "
                "not read: it always uses the embedding; use --to hf:bf16 or onnx:fp32"
            )
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise NotStreamed(f"tensor `{source}` has no place in llama.cpp's {family.arch}")
        part = name.removesuffix(".bias").rpartition(".")[2]
        if source.endswith(".bias") and part not in family.biases:
            raise InputError(
                f"the model has a bias `{source}`, which llama.cpp's {family.arch} does not read; use --to hf:bf16 or "
                "onnx:fp32"
            )
        shape = model.shape(source)
        plan.append(Planned(name, storage(name, shape, precision), shape, source))
    for name, values in extra_tensors(config).items():
        plan.append(Planned(name, "f32", (len(values),), None, tuple(values)))
    return plan


def storage(name: str, shape: tuple[int, ...], precision: str) -> str:
    """The type a tensor is kept in: vectors and norms in f32, rows that no q8_0 block fits in f16."""
    if len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return "f32"
    if precision == "q8_0" and shape[-1] % BLOCK:
        return "f16"
    return precision


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in a storage type."""
    count = int(np.prod(shape, dtype=np.int64))
    return count // BLOCK * 34 if kind == "q8_0" else count * {"f32": 4, "f16": 2, "bf16": 2}[kind]


def encode(values: Any, kind: str, name: str = "") -> np.ndarray:
    """fp32 torch rows as the bytes ggml reads, uint8. `InputError` for NaN, and where fp16 overflows."""
    import torch

    values = values.contiguous()
    if not values.isfinite().all():
        raise InputError(
            f"tensor `{name}` holds NaN or infinity, in the base's weights or after the merge; the file is damaged, or "
            "the run diverged"
        )
    if kind == "f32":
        return values.numpy().view(np.uint8)
    if kind == "bf16":
        return values.to(torch.bfloat16).view(torch.uint8).numpy()
    if kind == "f16":
        half = values.to(torch.float16)
        if not half.isfinite().all():
            top = float(values.abs().max())
            raise InputError(
                f"tensor `{name}` reaches {top:.3g}, beyond fp16's 65504; export bf16, f32 or q8_0 instead"
            )
        return half.view(torch.uint8).numpy()
    return quantize_q8_0(values)


def quantize_q8_0(values: Any) -> np.ndarray:
    """ggml's `quantize_row_q8_0_ref`, bit for bit: scale `max|x| / 127` in fp16, then round half away from zero."""
    import torch

    blocks = values.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    scaled = blocks * inverse
    size = scaled.abs()
    whole = size.floor()
    whole += (2 * (size - whole)).floor_()
    numbers = whole.copysign_(scaled).to(torch.int8)
    out = torch.empty((blocks.shape[0], 34), dtype=torch.uint8)
    out[:, :2] = scale.to(torch.float16).view(torch.uint8)
    out[:, 2:] = numbers.view(torch.uint8)
    return out.numpy()


def to_pairs(values: Any, width: int) -> Any:
    """Rows of whole heads from Hugging Face's rotary halves to llama.cpp's pairs."""
    heads = values.shape[0] // width
    return values.reshape(heads, 2, width // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def piece(
    model: Merged, tensor: Planned, family: Family, config: Config, start: int, stop: int | None
) -> np.ndarray:
    """Rows `start:stop` of a tensor, merged and as llama.cpp wants them, as bytes."""
    import torch

    if tensor.source is None:
        return encode(torch.tensor(tensor.constant, dtype=torch.float32), tensor.kind)
    values = model.rows(tensor.source, start, stop)
    if _rotary(tensor, family):
        values = to_pairs(values, head_dim(config))
    if family.norm_shift and tensor.source.endswith("norm.weight"):
        values = values + family.norm_shift
    return encode(values, tensor.kind, tensor.name)


def _rotary(tensor: Planned, family: Family) -> bool:
    source = tensor.source or ""
    return family.rotary_pairs and ".self_attn." in source and (".q_proj." in source or ".k_proj." in source)


def jobs(
    model: Merged, plan: list[Planned], family: Family, config: Config
) -> Iterator[tuple[Planned, int, int | None]]:
    """Every piece of every tensor, in file order."""
    for tensor in plan:
        if tensor.source is None:
            yield tensor, 0, None
            continue
        for start, stop in model.ranges(tensor.source, head_dim(config) if _rotary(tensor, family) else 1):
            yield tensor, start, stop


def encoded(
    model: Merged, plan: list[Planned], family: Family, config: Config, threads: int
) -> Iterator[tuple[Planned, np.ndarray]]:
    """The pieces' bytes in order, made by `threads` threads a few pieces ahead of the writer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the pieces run side by side; more threads in each would only wait for each other
    try:
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[tuple[Planned, Future[np.ndarray]]] = deque()
            for tensor, start, stop in jobs(model, plan, family, config):
                waiting.append((tensor, pool.submit(piece, model, tensor, family, config, start, stop)))
                if len(waiting) > 2 * threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
    finally:
        torch.set_num_threads(before)


def refuse(target: Target, merged: Merged, tokenizer: Path) -> None:
    """`InputError` before any work for what cannot be written, `NotStreamed` for what only the converter may write."""
    precision = target.precision if target.precision in STREAMED else "f32"
    config = merged.config
    family = family_of(config)
    tensor_plan(merged, family, config, precision)
    family.parameters(gguf_writer(family.arch), config)
    read_vocabulary(tokenizer, config["vocab_size"])


def gguf_writer(arch: str) -> Any:
    """A writer that has no file yet; `OutsideError` without the package."""
    try:
        import gguf
    except ImportError as error:
        raise OutsideError(
            f"writing GGUF needs the package gguf ({error}); pip install 'unshot[export]'"
        ) from None
    return gguf.GGUFWriter(None, arch)


def write_gguf(
    path: Path,
    model: Merged,
    folder: Path,
    precision: str,
    facts: Facts,
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> None:
    """Write the merged model as one GGUF file; `folder` holds the base's tokenizer.

    `progress` is called with the bytes just written. Raises `InputError` for an unsupported architecture,
    tokenizer or tensor, before anything is written.
    """
    import gguf

    config = model.config
    family = family_of(config)
    plan = tensor_plan(model, family, config, precision)
    vocabulary = read_vocabulary(folder, config["vocab_size"])
    writer = gguf_writer(family.arch)
    _general(writer, facts, plan, safe_name(facts.name, vocabulary.tokens, family.arch))
    family.parameters(writer, config)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    end = (facts.end_of_turn,) if facts.end_of_turn is not None else ()
    add_vocabulary(writer, vocabulary, folder, facts.template, (*end, *facts.ends))
    kinds = {k.name.lower(): k for k in gguf.GGMLQuantizationType}
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            nbytes(tensor.shape, tensor.kind),
            raw_dtype=kinds[tensor.kind],
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as handle:
        _pad(handle)
        current = None
        for tensor, data in encoded(model, plan, family, config, threads or cores()):
            if current is not None and tensor is not current:
                _pad(handle)
            current = tensor
            handle.write(data.data)
            if progress:
                progress(data.nbytes)
        _pad(handle)


def _pad(handle: Any) -> None:
    handle.write(b"\0" * (-handle.tell() % ALIGNMENT))


# llama.cpp's LLAMA_FTYPE numbers
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def safe_name(name: str, tokens: list[str], arch: str) -> str:
    """`general.name` such that llama.cpp applies its Phi-3 token rules to Phi-3 tokenizers and to no other.

    It looks for "phi-3" or "phi3" in the name, and fails to load the file where the tokens it then wants are missing.
    """
    named = any(mark in name.lower() for mark in ("phi-3", "phi3"))
    has = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(tokens)
    if arch == "phi3" and has:
        return name if named else f"Phi-3 {name}"
    return re.sub(r"(?i)phi-?3", "phi 3", name) if named else name


def _general(writer: Any, facts: Facts, plan: list[Planned], name: str) -> None:
    import gguf

    total = sum(int(np.prod(t.shape, dtype=np.int64)) for t in plan if t.source)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(total, total, 0, 0))
    if facts.license:
        writer.add_license(facts.license.lower())
    if facts.base != facts.name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, facts.base)
