"""Adapters trained elsewhere, brought into peft's own form: peft and TRL, unsloth, axolotl, LLaMA-Factory,
torchtune, mlx-lm.

Key names are matched to the base's modules by their tail (`layers.3.self_attn.q_proj`), whatever stands before it
(`_orig_mod`, `language_model`, `module`, nothing). What comes out is a directory that peft itself can read, which is
what the gate's reference runs.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.adapter import CONFIG, PREFIX, WEIGHTS, LoraSettings, read_config
from export.tensors import Shards
from unshot.data.files import read_object
from unshot.errors import InputError
from unshot.models import Source

MLX = "adapters.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_0.pt", "adapters.npz")
# Names of copies that were quantised before training: the adapter belongs on the model they were made from.
QUANTISED = re.compile(
    r"(?i)(\b|[-_])(bnb|nf4|int4|awq|gptq|gguf|fp4|[248][-_]?bits?)(\b|[-_])|unsloth.*4bit|mlx-community"
)
TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
# torchtune keeps q and k of these with rotary pairs side by side, as Meta published them.
TORCHTUNE_PAIRS = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class Foreign:
    """An adapter in peft's form; `folder` lives as long as `keep` does. `notes` say what was done to it."""

    folder: Path
    keep: Any
    notes: tuple[str, ...]


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    names = (CONFIG, WEIGHTS, MLX, *PICKLED)
    return path.is_dir() and not (path / "config.json").is_file() and any((path / n).is_file() for n in names)


def named_base(folder: Path) -> str:
    """The base that the adapter's own configuration names; `InputError` where that is none to merge into."""
    raw = _raw_config(folder)
    name = raw.get("base_model_name_or_path") or raw.get("model")
    if not name:
        raise InputError(f"{folder / CONFIG}: names no base model; give it with --base")
    if QUANTISED.search(str(name)):
        raise InputError(
            f"{folder}: trained on {name}, a quantised copy; give the full-precision model it was made from with --base"
        )
    return str(name)


def bring_in(folder: Path, base: Source) -> Foreign:
    """The adapter of a directory in peft's form, its keys named as `base`'s modules are.

    Raises `InputError` for pickled weights, kinds that are no LoRA, and keys that fit no module of the base.
    """
    _refuse_pickles(folder)
    raw = _raw_config(folder)
    mlx = (folder / MLX).is_file() and not (folder / WEIGHTS).is_file()
    if mlx:
        tensors, config, notes = _from_mlx(folder, raw)
    else:
        config = read_config(folder / CONFIG)
        shards = Shards([folder / WEIGHTS])
        tensors, notes = {name: shards[name].read() for name in shards}, []
        if any(".lora_a." in name or name.endswith(".lora_a") for name in tensors):
            tensors = _from_torchtune(tensors, base, folder)
            notes.append("torchtune's own key names brought into Hugging Face's")
    modules = _modules(base)
    renamed: dict[str, Any] = {}
    touched: set[str] = set()
    adapters: set[str] = set()
    for key, value in tensors.items():
        module, rest = _split(key)
        found = _resolve(module, modules, folder)
        if ".lora_" in rest:
            touched.add(found)
            rest, name = _plain(rest)
            adapters.add(name)
        full = f"{PREFIX}{found}{rest}"
        if full in renamed or len(adapters) > 1:
            raise InputError(
                f"{folder}: holds `{full}` twice ({key} is the second), or more than one adapter "
                f"({', '.join(sorted(adapters))}); save one adapter alone"
            )
        renamed[full] = value
    if not mlx and not notes and renamed.keys() == tensors.keys():
        return Foreign(folder, None, ())
    if not notes:
        notes.append("key names brought into peft's form")
    return _write(renamed, config, sorted(touched), notes)


def _refuse_pickles(folder: Path) -> None:
    safe = any((folder / name).is_file() for name in (WEIGHTS, MLX))
    pickled = next((folder / name for name in PICKLED if (folder / name).is_file()), None)
    if safe or pickled is None:
        return
    if pickled.suffix == ".npz":
        raise InputError(f"{pickled}: an old mlx-lm file; convert it with `python -c \"import mlx.core as mx; "
                         f"mx.save_safetensors('{folder / MLX}', mx.load('{pickled}'))\"`")  # fmt: skip
    load = f"torch.load('{pickled}', weights_only=True).items()"
    raise InputError(
        f'{pickled}: pickled weights are not loaded; convert them with `python -c "import torch; from '
        f"safetensors.torch import save_file; save_file({{k: v.contiguous() for k, v in {load}}}, "
        f"'{folder / WEIGHTS}')\"`"
    )


def _raw_config(folder: Path) -> Any:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: no {CONFIG} there; give the whole adapter directory as it was saved")
    return read_object(path)


def _from_mlx(folder: Path, raw: Any) -> tuple[dict[str, Any], LoraSettings, list[str]]:
    """mlx-lm's pairs: `lora_a` (in, rank) and `lora_b` (rank, out), one scale for all; `m` is DoRA's magnitude."""
    kind = raw.get("fine_tune_type", "lora")
    settings = raw.get("lora_parameters") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{folder / CONFIG}: lora_parameters must be an object with rank and scale")
    if kind not in ("lora", "dora") or not settings:
        raise InputError(
            f"{folder / CONFIG}: mlx-lm's fine_tune_type is {kind}; fuse it (`mlx_lm.fuse`) and export that directory"
        )
    rank, scale = settings.get("rank"), settings.get("scale", 20.0)
    if not isinstance(rank, int) or rank < 1 or not isinstance(scale, int | float):
        raise InputError(
            f"{folder / CONFIG}: lora_parameters has rank {rank!r} and scale {scale!r}; give both numbers"
        )
    shards = Shards([folder / MLX])
    tensors: dict[str, Any] = {}
    for name in shards:
        value = shards[name].read()
        module, _, part = name.rpartition(".")
        embedding = module.endswith("embed_tokens")
        if part in ("lora_a", "lora_b"):
            if value.ndim != 2:
                raise InputError(f"{folder / MLX}: `{name}` is LoRA on experts, which is not merged here; "
                                 "fuse it (`mlx_lm.fuse`) and export that directory")  # fmt: skip
            half = part[-1].upper()
            tail = f"lora_embedding_{half}" if embedding else f"lora_{half}.weight"
            tensors[f"{module}.{tail}"] = value.T.contiguous()
        elif part == "m":
            tensors[f"{module}.lora_magnitude_vector"] = value
        else:
            raise InputError(f"{folder / MLX}: `{name}` is no LoRA pair of mlx-lm; fuse it (`mlx_lm.fuse`)")
    config: LoraSettings = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank}
    if kind == "dora":
        config["use_dora"] = True  # type: ignore[typeddict-unknown-key]
    return tensors, config, [f"mlx-lm's pairs transposed, scale {scale:g}"]


def _from_torchtune(tensors: dict[str, Any], base: Source, folder: Path) -> dict[str, Any]:
    """torchtune's own names and rotary layout as Hugging Face's."""
    config = base.config()
    name = (config.get("architectures") or ["(none)"])[0]
    if name not in TORCHTUNE_PAIRS:
        raise InputError(
            f"{folder}: torchtune's own key names for {name} are not read; save with torchtune's Hugging Face "
            f"checkpointer, whose {WEIGHTS} has peft's names"
        )
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    found = {}
    for key, value in tensors.items():
        plain = key.replace(".lora_a.", ".lora_A.").replace(".lora_b.", ".lora_B.")
        for theirs, ours in TORCHTUNE.items():
            plain = plain.replace(f".{theirs}.", f".{ours}.")
        plain = re.sub(r"^output\.", "lm_head.", plain)
        if ".lora_B." in plain and re.search(r"\.[qk]_proj\.", plain):
            value = value.reshape(-1, width // 2, 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        found[plain] = value.contiguous()
    return found


def _modules(base: Source) -> dict[str, list[str]]:
    """Module names of the base in transformers, by their tail."""
    from accelerate import init_empty_weights

    from export.reference import auto_config, transformers_quietly

    with init_empty_weights():
        net = transformers_quietly().AutoModelForCausalLM.from_config(auto_config(base.path))
    found: dict[str, list[str]] = {}
    for name, _ in net.named_modules():
        if name and "vision" not in name:
            found.setdefault(tail(name), []).append(name)
    return found


def tail(name: str) -> str:
    """The part of a module's name that is the same whatever holds the model: from its list of layers on."""
    numbered = re.search(r"(?:^|\.)((?:layers|h|blocks)\.\d+(?:\..+)?)$", name)
    return numbered[1] if numbered else name.rpartition(".")[2]


def _split(key: str) -> tuple[str, str]:
    """Module and the rest of an adapter's key: `...q_proj` and `.lora_A.weight`."""
    plain = (
        key.replace("_orig_mod.", "")
        .replace("_fsdp_wrapped_module.", "")
        .replace("_checkpoint_wrapped_module.", "")
    )
    found = re.match(
        r"(.*?)(\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|token_adapter|modules_to_save|base_layer)\b.*"
        r"|\.(?:weight|bias))$",
        plain,
    )
    return (found[1], found[2]) if found else (plain, "")


def _plain(rest: str) -> tuple[str, str]:
    """The part of a LoRA key behind its module as peft saves it, and the adapter's name that stood in it."""
    before, part, more = re.fullmatch(r"((?:\.base_layer)*)\.(lora_[A-Za-z_]+)((?:\.\w+)*)", rest).groups()  # type: ignore[union-attr]
    words = more.split(".")[1:]
    last = words.pop() if words and words[-1] in ("weight", "bias") else "weight"
    whole = part in ("lora_A", "lora_B")
    name = ".".join(words) or "default"
    return f"{before}.{part}" + (f".{last}" if whole else ""), name


def _resolve(module: str, modules: dict[str, list[str]], folder: Path) -> str:
    if "vision" in module:
        raise InputError(
            f"{folder}: `{module}` adapts the vision part, which is not exported; only text layers can be"
        )
    found = modules.get(tail(module), [])
    if len(found) == 1:
        return found[0]
    exact = [name for name in found if module.endswith(name)]
    if len(exact) == 1:
        return exact[0]
    raise InputError(
        f"{folder}: the adapter changes `{module}`, which the base does not have; it was trained on another base, or "
        "its key names are of a kind that is not known here"
    )


def _write(tensors: dict[str, Any], config: LoraSettings, touched: list[str], notes: list[str]) -> Foreign:
    from safetensors.torch import save_file

    keep = tempfile.TemporaryDirectory(prefix="unshot-adapter-")
    folder = Path(keep.name)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    plain = {
        k: v
        for k, v in config.items()
        if k not in ("layers_to_transform", "layers_pattern", "exclude_modules")
    }
    holders = {name.rpartition(".")[0] for name in config.get("target_parameters") or []}
    modules = [t for t in touched if not any(f".{t}".endswith(f".{h}") for h in holders)]
    plain |= {"target_modules": modules, "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2), encoding="utf-8")
    return Foreign(folder, keep, tuple(notes))
