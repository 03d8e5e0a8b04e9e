"""A peft adapter (LoRA, rsLoRA, DoRA, embeddings, token rows, modules_to_save) as changes to named base tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from export.tensors import Shards
from unshot.data.files import read_object
from unshot.errors import InputError

PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Options of a peft config that change the merge and that this reader does not know; each must be unset.
UNREAD = (
    "layer_replication", "alora_invocation_tokens", "megatron_config", "corda_config", "use_qalora", "arrow_config",
    "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "lora_ga_config",
)  # fmt: skip
# Options that the merge reads, or that do not change it; one that is not known at all is named.
KNOWN = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "trainable_token_indices", "loftq_config", "eva_config", "use_dora", "qalora_group_size", "runtime_config",
    "lora_bias", "target_parameters", "target_modules", "exclude_modules", "ensure_weight_tying",
}  # fmt: skip
# Initialisations that also change the base's weights, so that the adapter alone is not the change; and those that do
# not.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "lora-ga")
PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
MERGE_ELSEWHERE = "merge it with peft (`merge_and_unload`, `save_pretrained`) and export that directory"


class LoraSettings(TypedDict, total=False):
    """The keys of `adapter_config.json` that a merge needs."""

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    init_lora_weights: bool | str
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    target_parameters: list[str] | None
    modules_to_save: list[str] | None
    base_model_name_or_path: str | None


@dataclass
class Delta:
    """`weight += scale * B @ A` for one base tensor; with `magnitude` the rows are then rescaled (DoRA).

    Shapes: A `(rank, in)`, B `(out, rank)`; of a stack of experts A `(experts, rank, in)`, B `(experts, out, rank)`.
    """

    scale: float
    a: Any = None
    b: Any = None
    magnitude: Any = None
    embedding: bool = False
    transposed: bool = False  # fan_in_fan_out: the base weight is stored (in, out), or (experts, in, out)


@dataclass
class Adapter:
    """Everything an adapter changes.

    `deltas` are low-rank changes; `replaced` whole tensors put in place of the base's; `rows` single rows `(indices,
    values)` of an embedding; `added` vectors added to a bias (lora_bias).
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Any]] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    config: LoraSettings = field(default_factory=LoraSettings)

    @property
    def changed(self) -> set[str]:
        """Names of the base tensors that differ after the merge."""
        return {*self.deltas, *self.replaced, *self.rows, *self.added}


def read_config(path: Path) -> LoraSettings:
    """A checked `adapter_config.json`; `InputError` for a kind or an option that cannot be merged."""
    config = cast(LoraSettings, read_object(path))
    kind = str(config.get("peft_type") or "")
    if kind != "LORA":
        raise InputError(
            f"{path}: peft_type is {kind or 'missing'}; export merges LORA adapters (DoRA included)"
        )
    for key in UNREAD:
        if config.get(key):
            raise InputError(f"{path}: `{key}` is set; export cannot merge that, {MERGE_ELSEWHERE}")
    unknown = sorted(key for key, value in config.items() if key not in (*KNOWN, *UNREAD) and value)
    if unknown:
        raise InputError(
            f"{path}: `{unknown[0]}` is set, and export does not know what it does; remove it if it changes nothing, "
            f"else {MERGE_ELSEWHERE}"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise InputError(
            f"{path}: initialised by {start}, which changed the base's weights too, so that the adapter does not fit "
            "the base as published; convert it to plain LoRA with peft (`save_pretrained(..., "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER)`) and export that"
        )
    if start not in PLAIN_STARTS:
        raise InputError(f"{path}: init_lora_weights is {start}, which is not known here; {MERGE_ELSEWHERE}")
    _check_numbers(config, path)
    return config


def _check_numbers(config: LoraSettings, path: Path) -> None:
    """`InputError` for a rank or an alpha, or a pattern of them, that is none."""
    ranks: dict[str, Any] = {
        "r": config.get("r"),
        **_numbers(config.get("rank_pattern"), "rank_pattern", path),
    }
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{path}: `{name}` is {value!r}; a LoRA adapter has a whole number of ranks")
    alphas = {"lora_alpha": config.get("lora_alpha", 8)}
    alphas |= _numbers(config.get("alpha_pattern"), "alpha_pattern", path)
    for name, value in alphas.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{path}: `{name}` is {value!r}; it must be a number")


def _numbers(patterns: Any, key: str, path: Path) -> dict[str, Any]:
    """The values of a pattern by what they are called in a message."""
    if not isinstance(patterns or {}, dict):
        raise InputError(f"{path}: `{key}` must map names of modules to numbers")
    for pattern in patterns or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"{path}: `{key}` has `{pattern}`, which is no regular expression ({error})"
            ) from None
    return {f"{key}: {name}": value for name, value in (patterns or {}).items()}


def load_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors`; `InputError` for anything not understood.

    Pairs of `target_parameters` have no names of the base's tensors yet (`export.experts` gives them).
    """
    config = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; the adapter's weights must be safetensors")
    tensors = Shards([weights])
    adapter = Adapter(config=config)
    for name in tensors:
        value = tensors[name].read().float()
        if not value.isfinite().all():
            raise InputError(f"{weights}: `{name}` holds NaN or infinity; the run diverged, tune again")
        _place(adapter, name.removeprefix(PREFIX), value, weights)
    for name, delta in adapter.deltas.items():
        if delta.a is None or delta.b is None:
            raise InputError(f"{weights}: `{name}` has only half of its LoRA pair; the file is damaged")
    if not adapter.changed:
        raise InputError(f"{weights}: the file holds no tensors; there is nothing to merge")
    return adapter


def _place(adapter: Adapter, name: str, value: Any, path: Path) -> None:
    for part in PARTS:
        head, found, tail = name.partition(f".{part}")
        if not found or tail.removeprefix(".default") not in ("", ".weight", ".bias"):
            continue
        if tail.endswith(".bias"):  # lora_bias: B's own bias, scaled as its product is
            adapter.added[f"{head}.bias"] = value * scaling(adapter.config, head)
            return
        embedding = part.startswith("lora_embedding")
        delta = adapter.deltas.get(f"{head}.weight")
        if delta is None:
            delta = Delta(
                scale=scaling(adapter.config, head),
                transposed=bool(adapter.config.get("fan_in_fan_out")) and not embedding,
            )
            adapter.deltas[f"{head}.weight"] = delta
        if part.endswith("_A"):
            delta.a, delta.embedding = value, embedding
        elif part.endswith("_B"):
            delta.b = value
        else:
            delta.magnitude = value
        return
    if ".token_adapter." in name:
        _place_rows(adapter, name, value, path)
        return
    if "lora_" in name:
        raise InputError(f"{path}: `{name}` is of a LoRA kind that export cannot merge; {MERGE_ELSEWHERE}")
    # What is left are whole tensors: modules_to_save and trained biases.
    adapter.replaced[re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)] = value


def _place_rows(adapter: Adapter, name: str, value: Any, path: Path) -> None:
    """Rows trained alone (`trainable_token_indices`): new values of these rows of an embedding."""
    module = name.partition(".token_adapter.")[0]
    given = adapter.config.get("trainable_token_indices") or []
    if isinstance(given, dict):
        indices = next((v for k, v in given.items() if module == k or module.endswith(f".{k}")), [])
    else:
        indices = given
    if len(indices) != len(value):
        raise InputError(
            f"{path}: `{name}` has {len(value)} rows, `trainable_token_indices` names {len(indices)}; the adapter is "
            "damaged"
        )
    adapter.rows[f"{module}.weight"] = (list(indices), value)


def scaling(config: LoraSettings, module: str) -> float:
    """peft's scale of a module: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with the per-module patterns."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The first pattern that names the module or its tail (as peft's `get_pattern_key`)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def resize(net: Any, vocabulary: int) -> None:
    """Give a transformers model `vocabulary` tokens, as it had when its adapter was trained."""
    net.resize_token_embeddings(vocabulary, mean_resizing=False)
