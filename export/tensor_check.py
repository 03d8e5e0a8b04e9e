"""A coarser GGUF file against the full-precision one it was made from: the same metadata, the same tensors, less
precise.

What a file computes follows from its metadata and its tensors. The full-precision file is proven by its logits, so a
coarser one that has its metadata and its tensors within the rounding of their types is the same model; no average over
logits could tell a dropped low-rank change from four-bit noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unshot.contracts.parity import FileReport, WeightFigures
from unshot.text.gguf import Contents, Tensor, read

# Relative root-mean-square error of a tensor by ggml type; see WEIGHT_ERROR's reason in docs/export.md.
WEIGHT_ERROR = {
    "F32": 1e-6, "F16": 6e-4, "BF16": 4e-3, "Q8_0": 0.012, "Q6_K": 0.035, "Q5_K": 0.065, "Q5_0": 0.075, "Q5_1": 0.07,
    "Q4_K": 0.13, "Q4_0": 0.15, "Q4_1": 0.13, "IQ4_NL": 0.13, "IQ4_XS": 0.13, "Q3_K": 0.25, "Q2_K": 0.45,
    "IQ3_XXS": 0.4, "IQ3_S": 0.35, "IQ2_XS": 0.6, "IQ2_XXS": 0.7, "IQ2_S": 0.6, "F8_E4M3": 0.04,
    "W4A16": 0.25,  # GPTQ moves errors from column to column: more than the 0.11 of plain rounding
}  # fmt: skip
# Keys that say how the file was written, not what it computes.
ABOUT_THE_FILE = (
    "GGUF.", "general.file_type", "general.quantization_version", "quantize.", "general.size_label", "general.name",
)  # fmt: skip
ROWS_AT_A_TIME = 2**22  # values


def compare_weights(full: Path, path: Path, report: FileReport) -> None:
    """Append to `report` what of `path` is not the rounding of `full`; both are GGUF files."""
    one, two = read(full), read(path)
    wrong = different_metadata(one, two)
    if wrong:
        report.failures.append(f"metadata differs from {full.name}: {', '.join(wrong[:4])}")
    ours, theirs = one.tensors, two.tensors
    odd = sorted(ours.keys() ^ theirs.keys())
    odd += [n for n in ours.keys() & theirs.keys() if _dimensions(ours[n]) != _dimensions(theirs[n])]
    if odd:
        report.failures.append(f"tensors differ from {full.name}: {', '.join(odd[:4])}")
        return
    worst, error, share = "", 0.0, -1.0
    for name, tensor in theirs.items():
        kind = tensor.type_name
        bound = WEIGHT_ERROR.get(kind)
        if bound is None:
            report.failures.append(f"tensor `{name}` is of the type {kind}, whose rounding is not known here")
            continue
        found = relative_error(ours[name], tensor)
        if not np.isfinite(found) or found > bound:
            report.failures.append(
                f"tensor `{name}` is {found:.3g} from {full.name}'s (relative error), limit {bound:g} for {kind}"
            )
        if not found / bound <= share:
            worst, error, share = name, found, found / bound
    report.figures.weights = WeightFigures(len(theirs), worst, round(error, 6))
    del report.failures[8:]  # a file that is wrong throughout need not name every tensor


def _dimensions(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's shape without ones at the end, which llama.cpp's quantiser leaves out."""
    shape = tensor.shape
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def different_metadata(one: Contents, two: Contents) -> list[str]:
    """Keys whose raw bytes differ, or that only one of the files has."""
    a, b = one.raw, two.raw
    keys = [key for key in a.keys() | b.keys() if not key.startswith(ABOUT_THE_FILE)]
    return sorted(key for key in keys if a.get(key) != b.get(key))


def relative_error(full: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of the full tensor; 0 where both are all zero."""
    difference = size = 0.0
    for a, b in zip(_pieces(full), _pieces(other), strict=True):
        difference += float(np.square(a - b, dtype=np.float64).sum())
        size += float(np.square(a, dtype=np.float64).sum())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / size))


def _pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """A GGUF tensor's values, fp32, some rows at a time."""
    step = max(1, ROWS_AT_A_TIME // max(1, tensor.shape[0]))
    for begin in range(0, len(tensor.rows()), step):
        yield tensor.values(begin, begin + step)
