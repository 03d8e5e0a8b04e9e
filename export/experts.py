"""LoRA on parameters (peft's `target_parameters`: the weights of experts) as changes to named base tensors.

peft wraps the parameters of one module into each other and saves their pairs as `experts.lora_A` and
`experts.base_layer.lora_A`; which parameter each belongs to, and which of its sides is the input, follow from the
classes of the installed transformers. So peft itself is asked, on a model without weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from export.adapter import CONFIG, MERGE_ELSEWHERE, Adapter, Delta, load_adapter
from export.peft_check import weightless
from export.tensors import Shards
from unshot.errors import InputError
from unshot.models import Source

# How transformers 5 stacks the experts' matrices of a file, in this order along the rows (its conversion mapping).
STACKED = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}


@dataclass(frozen=True)
class Wrapped:
    """One parameter that peft wraps: its name, shape and scale, and the shapes of its pair.

    `swapped`: a stack of experts is `(experts, out, in)`, else `(experts, in, out)`.
    """

    tensor: str
    shape: tuple[int, ...]
    scale: float
    a: tuple[int, ...]
    b: tuple[int, ...]
    swapped: bool


def load_on(folder: Path, base: Source) -> Adapter:
    """The adapter of a directory as changes to a base's tensors, those of `target_parameters` too."""
    adapter = load_adapter(folder)
    if adapter.config.get("target_parameters"):
        _place(adapter, folder, base.path, Shards(base.weight_files()))
    return adapter


def _place(adapter: Adapter, folder: Path, base: Path, shards: Shards) -> None:
    """Give the pairs of `target_parameters` the base tensors that they change, in place.

    Raises `InputError` where the pairs do not fit, and where nothing says which side of an expert is its input.
    """
    path = folder / CONFIG
    wrapped = _wrapped(folder, base)
    stacks = [one for one in wrapped.values() if len(one.shape) == 3]
    if stacks and all(one.shape[1] == one.shape[2] for one in stacks):
        raise InputError(
            f"{path}: `{stacks[0].tensor}` has square experts, and nothing in the adapter says which side A belongs "
            f"to (that depends on the transformers it was trained with); {MERGE_ELSEWHERE} there"
        )
    for key, one in wrapped.items():
        delta = adapter.deltas.pop(f"{key}.weight", None)
        if delta is None or delta.a is None or delta.b is None:
            raise InputError(f"{path}: `target_parameters` names `{one.tensor}`, and no pair of it was saved")
        found = tuple(delta.a.shape), tuple(delta.b.shape)
        if found != (one.a, one.b):
            raise InputError(
                f"{path}: the pair of `{one.tensor}` has shapes {[*map(list, found)]}, this transformers wants "
                f"{[list(one.a), list(one.b)]}; it was trained on another base or with another generation of "
                f"transformers, so {MERGE_ELSEWHERE} there"
            )
        for name, part in _parts(one, replace(delta, scale=one.scale), shards, path):
            adapter.deltas[name] = part


def _wrapped(folder: Path, base: Path) -> dict[str, Wrapped]:
    """The wrapped parameters by the names that their pairs are saved under."""
    from peft.tuners.lora import ParamWrapper

    found = {}
    for name, module in weightless(folder, base).named_modules():
        if isinstance(module, ParamWrapper):
            key = name.removeprefix("base_model.model.")
            owner = re.sub(r"(\.base_layer)+$", "", key)
            found[key] = Wrapped(
                f"{owner}.{module.parameter_name}", tuple(module.get_param().shape), float(module.scaling["default"]),
                tuple(module.lora_A["default"].weight.shape), tuple(module.lora_B["default"].weight.shape),
                bool(module._did_swap_in_out_features),
            )  # fmt: skip
    return found


def _parts(one: Wrapped, delta: Delta, shards: Shards, path: Path) -> list[tuple[str, Delta]]:
    """The tensors of the base's files that hold a parameter, each with its part of the change."""
    own = shards.find(one.tensor)
    if len(one.shape) == 2:
        if own is None:
            raise _no_place(one, path)
        return [(own, replace(delta, transposed=False))]
    # peft's `ParamWrapper.get_delta_weight`: A (rank of all experts, in), B (out, rank by expert)
    experts = one.shape[0]
    a = delta.a.reshape(experts, -1, delta.a.shape[-1])
    b = delta.b.reshape(delta.b.shape[0], -1, experts).permute(2, 0, 1)
    if own is not None:
        return [(own, Delta(delta.scale, a, b, transposed=not one.swapped))]
    if not one.swapped:
        raise _no_place(one, path)
    return _split(one, Delta(delta.scale, a, b), shards, path)


def _split(one: Wrapped, delta: Delta, shards: Shards, path: Path) -> list[tuple[str, Delta]]:
    """A stack that the files hold as one matrix an expert (and gate and up apart)."""
    layer = re.search(r"(?:^|\.)layers\.\d+\.", one.tensor)
    kinds = STACKED.get(one.tensor.rpartition(".")[2], ())
    there: dict[tuple[str, str], str] = {}
    for name in shards if layer else ():
        matched = re.search(r"\.experts\.(\d+)\.(\w+)\.weight$", name)
        if matched and layer and f".{layer[0].lstrip('.')}" in f".{name}":
            there[matched[1], matched[2]] = name
    found: list[tuple[str, Delta]] = []
    for expert in range(one.shape[0]):
        row = 0
        for names in kinds:
            held = next((there[str(expert), n] for n in names if (str(expert), n) in there), None)
            if held is None:
                raise _no_place(one, path)
            rows = shards.shape(held)[0]
            found.append((held, Delta(delta.scale, delta.a[expert], delta.b[expert, row : row + rows])))
            row += rows
        if row != one.shape[1]:
            raise _no_place(one, path)
    return found


def _no_place(one: Wrapped, path: Path) -> InputError:
    return InputError(
        f"{path}: `target_parameters` changes `{one.tensor}`, which the base's files hold in a form that is not "
        f"known here; {MERGE_ELSEWHERE}"
    )
