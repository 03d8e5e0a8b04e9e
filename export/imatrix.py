"""The importance matrix: how large each input of each matrix is on the training rows, in llama.cpp's own file format.

A quantiser that knows it spends its bits on the columns that carry the most. `importance[c] = mean over tokens of
x[c]^2`, x the input of the matrix, is what llama.cpp's `imatrix` tool collects (ggml-org/llama.cpp PR 4861); here it is
taken from the evaluated model in torch (fp32, adapter beside the base), whose inputs are the merged model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from export.expected import BATCH
from export.families import family_of
from export.merge import EMBEDDING, HEAD, Merged
from export.reference import Reference
from export.source import Model
from unshot.data.rows import read_examples
from unshot.errors import InputError
from unshot.text.gguf import read

# Enough for every column of a matrix to be seen many times; a pass over it costs as much as prefilling a long prompt.
TOKENS = 16384
FILE = "imatrix.gguf"

Squares = dict[str, tuple[np.ndarray, int]]


def training_ids(model: Model, limit: int = TOKENS) -> list[list[int]]:
    """Prompt and answer ids of the run's training rows, evenly spread over the split, up to `limit` tokens in all."""
    if model.run is None:
        raise InputError(
            "--imatrix and hf:w4a16 are computed from a run's training rows, and a bare base model has none; "
            "give a run of `unshot tune`"
        )
    rows = read_examples(model.run / "splits" / "train.jsonl")
    found: list[list[int]] = []
    tokens = 0
    for at in np.random.default_rng(0).permutation(len(rows)):
        row = rows[int(at)]
        ids = model.chat.encode(model.prompt.request(row), row.answer or "").ids
        if found and tokens + len(ids) > limit:
            break
        found.append(ids)
        tokens += len(ids)
    return found


def collect(
    net: Reference,
    merged: Merged,
    sequences: Sequence[Sequence[int]],
    tick: Callable[[int], None] | None = None,
    batch: int = BATCH,
) -> Squares:
    """Sum of squared inputs and number of tokens for every matrix of the model, by Hugging Face tensor name.

    Padding is left out.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    mask: torch.Tensor | None = None

    def add(name: str, values: torch.Tensor) -> None:
        seen = values[mask].double() if mask is not None else values.double()
        squares = seen.square().sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] = counts.get(name, 0) + len(seen)

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs: add(name, inputs[0])

    handles = []
    for path, module in net.inner.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is net.head or ".lora_" in path:
            continue
        name = f"{path.replace('.base_layer', '').replace('.modules_to_save.default', '')}.weight"
        if name in merged and ".original_module" not in path:
            handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        order = sorted(sequences, key=len)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            width = max(len(ids) for ids in chosen)
            padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in chosen])
            mask = torch.tensor([[n < len(ids) for n in range(width)] for ids in chosen])
            with torch.inference_mode():
                add(HEAD, net.hidden(padded))
            if tick:
                tick(len(chosen))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (values.float().numpy(), counts[name]) for name, values in sums.items()}


def write_imatrix(path: Path, squares: Squares, merged: Merged) -> None:
    """Write llama.cpp's GGUF form of an importance matrix: `NAME.in_sum2` and `NAME.counts` a tensor."""
    import gguf

    family = family_of(merged.config)
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.arch)
    names = gguf.get_tensor_name_map(arch, merged.config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)  # the file holds no model
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, ["splits/train.jsonl"])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, 1)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, max(count for _, count in squares.values()))
    for source, (values, count) in sorted(squares.items()):
        # llama.cpp multiplies a tied head by the embedding, under the embedding's name.
        tied = source == HEAD and merged.tied and not merged.untied
        name = names.get_name(EMBEDDING if tied else source, try_suffixes=(".weight",))
        if name is None:
            continue
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32)[None, :])
        writer.add_tensor(f"{name}.counts", np.array([[count]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Mean squares by GGUF tensor name, fp32, as llama.cpp's quantiser takes them."""
    found = {name: tensor.values().ravel() for name, tensor in read(path).tensors.items()}
    return {
        name.removesuffix(".in_sum2"): values / found[name.replace(".in_sum2", ".counts")][0]
        for name, values in found.items()
        if name.endswith(".in_sum2")
    }
