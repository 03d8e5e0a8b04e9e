"""An adapter's file held against its own configuration, as peft reads the two: on a model without weights.

peft loads what its configuration names and leaves the rest of the file out with a warning, and gives a pair that the
file lacks a start of its own. Neither is the adapter that was trained.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from export.adapter import CONFIG, WEIGHTS
from export.reference import auto_config, transformers_quietly
from export.tensors import Shards
from unshot.errors import InputError

# What a file must hold wholly or not at all, and which side of each is the rank.
SIDES = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


def weightless(folder: Path, base: Path) -> Any:
    """The base with its adapter in peft, without weights; `InputError` where peft cannot put one on the other."""
    from accelerate import init_empty_weights
    from peft import LoraConfig, PeftModel

    try:
        with init_empty_weights():
            net = transformers_quietly().AutoModelForCausalLM.from_config(auto_config(base))
            return PeftModel(net, LoraConfig.from_pretrained(str(folder)))
    except InputError:
        raise
    except Exception as error:  # peft raises many kinds for a configuration that fits no model
        words = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder / CONFIG}: peft cannot put it on this base ({type(error).__name__}: {words})"
        ) from None


def check(folder: Path, base: Path) -> list[str]:
    """What should be said about an adapter in peft's form; `InputError` where peft would not load it as it is."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(weightless(folder, base), save_embedding_layers=False)
    shards, path = Shards([folder / WEIGHTS]), folder / WEIGHTS
    config = f"{CONFIG} (target_modules, layers_to_transform)"
    for name in shards:
        if name not in wanted and (".lora_" in name or ".token_adapter." in name):
            raise InputError(
                f"{path}: holds `{name}`, which {config} leaves out, so that peft would not load it; mend the "
                "configuration"
            )
        side = next((n for part, n in SIDES.items() if f".{part}." in f"{name}."), None)
        if side is not None and name in wanted and shards.shape(name)[side] != wanted[name].shape[side]:
            raise InputError(
                f"{path}: `{name}` has rank {shards.shape(name)[side]}, {CONFIG} (r, rank_pattern) says "
                f"{wanted[name].shape[side]}; mend the configuration"
            )
    there: dict[str, set[bool]] = {}
    for name in wanted:
        if ".lora_" in name and not name.endswith(".bias"):
            module = re.sub(r"\.lora_.*", "", name)
            there.setdefault(module, set()).add(name in shards)
            if there[module] == {True, False}:
                raise InputError(
                    f"{path}: has only a part of `{module}`'s LoRA (`{name}`); the file is damaged"
                )
    absent = sorted(module for module, found in there.items() if found == {False})
    if not absent:
        return []
    return [
        f"{len(absent)} modules that {CONFIG} names have no pair in the file and stay as in the base: {absent[0]}"
    ]
