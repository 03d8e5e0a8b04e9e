"""Faults to plant in a streamed GGUF: each changes one thing that a writer could get wrong, small where that is harder.

`plant(patch)` of a fault changes what is written through pytest's `MonkeyPatch`; `model` is the family it lives in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from export import families, gguf_file, vocab

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """One fault, the family (tests.tiny_models) and further settings of the model and the adapter that it needs."""

    plant: Callable[[Patch], None]
    model: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)


def weights(pattern: str, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Change the values of tensors by their GGUF names."""

    def plant(patch: Patch) -> None:
        usual = gguf_file.encode

        def changed(values: Any, kind: str, name: str = "") -> Any:
            return usual(change(values.clone()) if re.fullmatch(pattern, name) else values, kind, name)

        patch.setattr(gguf_file, "encode", changed)

    return plant


def key(ending: str, change: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Change a metadata value; None leaves the key out."""

    def plant(patch: Patch) -> None:
        import gguf

        usual = gguf.GGUFWriter.add_key_value

        def changed(self: Any, name: str, value: Any, *more: Any, **named: Any) -> None:
            if name.endswith(ending):
                value = change(value)
            if value is not None:
                usual(self, name, value, *more, **named)

        patch.setattr(gguf.GGUFWriter, "add_key_value", changed)

    return plant


def swapped(one: str, other: str) -> Callable[[Patch], None]:
    """Write each of two tensors of one shape under the other's name."""

    def plant(patch: Patch) -> None:
        usual = gguf_file.Merged.rows

        def rows(self: Any, name: str, *more: Any) -> Any:
            for a, b in ((one, other), (other, one)):
                if a in name:
                    return usual(self, name.replace(a, b), *more)
            return usual(self, name, *more)

        patch.setattr(gguf_file.Merged, "rows", rows)

    return plant


def without_change(module: str) -> Callable[[Patch], None]:
    """Leave the adapter out of one tensor."""

    def plant(patch: Patch) -> None:
        usual = gguf_file.Merged.rows

        def rows(self: Any, name: str, *more: Any) -> Any:
            return self.base[name].read(*more).float() if module in name else usual(self, name, *more)

        patch.setattr(gguf_file.Merged, "rows", rows)

    return plant


def _two_rows(values: Any) -> Any:
    values[[-3, -4]] = values[[-4, -3]]
    return values


def _heads(values: Any) -> Any:
    half = len(values) // 2
    return values.roll(half, 0)


def _end_of_turn(patch: Patch) -> None:
    usual = gguf_file.add_vocabulary

    def changed(writer: Any, vocabulary: Any, folder: Any, template: Any, ends: Any = ()) -> None:
        usual(writer, vocabulary, folder, template, (*ends, 300))

    patch.setattr(gguf_file, "add_vocabulary", changed)


def _vocabulary(change: Callable[[Any], None]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        usual = gguf_file.read_vocabulary

        def changed(*given: Any) -> vocab.Vocabulary:
            found = usual(*given)
            change(found)
            return found

        patch.setattr(gguf_file, "read_vocabulary", changed)

    return plant


def _swap(name: str, one: int, other: int) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        values = getattr(found, name)
        values[one], values[other] = values[other], values[one]

    return change


def _no_factors(patch: Patch) -> None:
    patch.setattr(gguf_file, "extra_tensors", lambda config: {})


def _no_shift(patch: Patch) -> None:
    usual = families.FAMILIES["Gemma2ForCausalLM"]
    plain = families.Family(usual.arch, usual.parameters, norm_shift=0.0, head=False)
    patch.setitem(families.FAMILIES, "Gemma2ForCausalLM", plain)


def _no_head(patch: Patch) -> None:
    usual = gguf_file.Merged.names
    patch.setattr(gguf_file.Merged, "names", lambda self: (n for n in usual(self) if n != self.head))


LINEAR: dict[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
YARN: dict[str, Any] = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
}
HEAD: dict[str, Any] = {
    "config": {"tie_word_embeddings": True},
    "adapter": {"target_modules": ["q_proj", "lm_head"]},
}
FAULTS: dict[str, Fault] = {
    "rotary base off by a hundredth": Fault(key("rope.freq_base", lambda v: v * 1.01)),
    "Llama 3's rotary factors left out": Fault(_no_factors, "llama3"),
    "linear rotary factor left out": Fault(key("rope.scaling.factor", lambda v: 1.0), "qwen2", LINEAR),
    "YaRN's type left out": Fault(key("rope.scaling.type", lambda v: None), "llama", YARN),
    "YaRN's original length doubled": Fault(key("original_context_length", lambda v: 2 * v), "llama", YARN),
    "bias of v dropped": Fault(weights(r"blk\.1\.attn_v\.bias", lambda v: 0 * v), "qwen2"),
    "bias of k dropped": Fault(weights(r"blk\.0\.attn_k\.bias", lambda v: 0 * v), "qwen2"),
    "gate and up swapped": Fault(swapped("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")),
    "k and v swapped": Fault(swapped("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"), "mistral"),
    "q and k of equal heads swapped": Fault(
        swapped("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"), "llama", {"num_key_value_heads": 4}
    ),
    "output transposed": Fault(weights(r"blk\.1\.attn_output\.weight", lambda v: v.T.contiguous())),
    "norm of q missing": Fault(weights(r"blk\.0\.attn_q_norm\.weight", lambda v: 0 * v + 1), "qwen3"),
    "norm after attention missing": Fault(weights(r"blk\.0\.post_attention_norm.*", lambda v: 0 * v + 1), "gemma2"),
    "norms without Gemma's one": Fault(_no_shift, "gemma2"),
    "epsilon ten times as large": Fault(key("layer_norm_rms_epsilon", lambda v: 10 * v)),
    "an ordinary token ends an answer": Fault(_end_of_turn),
    "another start-of-text token": Fault(key("tokenizer.ggml.bos_token_id", lambda v: 3)),
    "another end-of-text token": Fault(key("tokenizer.ggml.eos_token_id", lambda v: 3)),
    "two rare rows of the embedding swapped": Fault(weights(r"token_embd\.weight", _two_rows)),
    "two rare rows of the head swapped": Fault(weights(r"output\.weight", _two_rows)),
    "two rare tokens swapped": Fault(_vocabulary(_swap("tokens", -3, -4))),
    "two late merges swapped": Fault(_vocabulary(_swap("merges", -1, -2))),
    "another chat template": Fault(key("tokenizer.chat_template", lambda v: v.replace("user", "human") + " ")),
    "change dropped in one module": Fault(without_change("layers.1.self_attn.v_proj")),
    "tuned head of a tied model dropped": Fault(_no_head, "gemma3", **HEAD),
    "heads of k and v in another order": Fault(weights(r"blk\.0\.attn_[kv]\.weight", _heads)),
    "heads of v in another order": Fault(weights(r"blk\.1\.attn_v\.weight", _heads)),
    "final soft cap of 50 for 30": Fault(key("final_logit_softcapping", lambda v: 50.0), "gemma2"),
    "soft cap on attention left out": Fault(key("attn_logit_softcapping", lambda v: 1e6), "gemma2"),
    "window left out": Fault(key("attention.sliding_window", lambda v: None), "gemma3"),
    "window one wider": Fault(key("attention.sliding_window", lambda v: v + 1), "gemma2"),
    "context length doubled": Fault(key("context_length", lambda v: 2 * v)),
    "a space before the text": Fault(key("add_space_prefix", lambda v: not v), "mistral"),
}  # fmt: skip
