"""The adapter alone as a GGUF LoRA: one base file in the server, many adapters beside it.

llama.cpp adds `alpha / rank * B A` to each named tensor, with one alpha for the file; a module whose scale is another
one (rsLoRA, patterns) has the difference multiplied into its B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.adapter import Adapter
from export.families import Config, Family, family_of, head_dim
from export.gguf_file import ALIGNMENT, Facts, encode, nbytes, to_pairs
from export.gguf_file import refuse as refuse_file
from export.merge import Merged
from export.vocab import NotStreamed
from unshot.catalog.formats import Target
from unshot.errors import InputError


def refuse_target(target: Target, merged: Merged, tokenizer: Path) -> None:
    """`InputError` where there is no adapter, or one that a GGUF LoRA cannot hold."""
    refuse(merged.adapter if merged.adapter.config else None)
    try:
        refuse_file(Target("gguf", "f32"), Merged(merged.paths, merged.config), tokenizer)
    except NotStreamed as error:  # llama.cpp's converter is asked for whole models alone
        raise InputError(
            f"{error}; an adapter alone is written for those only, use gguf:... instead"
        ) from None


def refuse(adapter: Adapter | None, instead: str = "gguf:...") -> Adapter:
    """The adapter, or `InputError` (with what to use `instead`) where it is more than low-rank changes of layers."""
    if adapter is None:
        raise InputError(
            "an adapter alone is asked for, and a bare or fully tuned model has none; give a run of `unshot tune` with "
            "--method lora"
        )
    more = sorted({*adapter.replaced, *adapter.rows, *adapter.added})
    if more:
        raise InputError(
            f"the adapter also changes `{more[0]}` otherwise than by a LoRA pair, which an adapter alone cannot "
            f"here; use {instead}"
        )
    for name, delta in adapter.deltas.items():
        if delta.magnitude is not None or delta.embedding or delta.transposed or delta.a.ndim != 2:
            raise InputError(
                f"`{name}` is not plain LoRA (DoRA, embedding, transposed or experts); use {instead} instead"
            )
    return adapter


def write_lora(path: Path, model: Merged, precision: str, facts: Facts) -> None:
    """Write `adapter.lora` tensors for every changed layer, B's rows reordered as the base's are."""
    import gguf

    adapter = refuse(model.adapter)
    family = family_of(model.config)
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.arch)
    names = gguf.get_tensor_name_map(arch, model.config["num_hidden_layers"])
    alpha = float(adapter.config.get("lora_alpha", 8))
    writer = gguf.GGUFWriter(None, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(facts.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, facts.base)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    data: list[np.ndarray] = []
    kinds = {k.name.lower(): k for k in gguf.GGMLQuantizationType}
    for source, delta in adapter.deltas.items():
        name = names.get_name(source, try_suffixes=(".weight",))
        if name is None:
            raise InputError(f"tensor `{source}` has no place in llama.cpp's {family.arch}")
        scale = delta.scale / (alpha / delta.a.shape[0])
        for half, values in (("a", delta.a), ("b", _rows(source, delta.b, family, model.config) * scale)):
            shape = tuple(values.shape)
            writer.add_tensor_info(
                f"{name}.lora_{half}",
                shape,
                np.dtype(np.float32),
                nbytes(shape, precision),
                raw_dtype=kinds[precision],
            )
            data.append(encode(values, precision, f"{name}.lora_{half}"))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as handle:
        for piece in data:
            handle.write(b"\0" * (-handle.tell() % ALIGNMENT))
            handle.write(piece.data)
        handle.write(b"\0" * (-handle.tell() % ALIGNMENT))


def _rows(source: str, b: Any, family: Family, config: Config) -> Any:
    rotary = family.rotary_pairs and (".q_proj." in source or ".k_proj." in source)
    return to_pairs(b, head_dim(config)) if rotary else b
