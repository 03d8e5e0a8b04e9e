"""The evaluated model where it does not fit in memory: one layer's weights at a time, fp32, the adapter unmerged.

All rows go through a layer before the next one is read, so a pass reads the base once. Such a model cannot generate
(each token would read it all again); it judges the engine's own greedy answers instead: at each position of an answer
its most likely token must be the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.merge import EMBEDDING, HEAD
from export.reference import transformers_quietly
from export.tensors import Shards


class Streamed:
    """The calls of `export.reference.Reference`, less `generate`."""

    def __init__(self, net: Any, base: Shards) -> None:
        self.net = net.eval()
        self.base = base
        self.inner = net.get_base_model() if hasattr(net, "get_base_model") else net
        self.body, self.head = self.inner.model, self.inner.get_output_embeddings()
        self.softcap = getattr(self.inner.config, "final_logit_softcapping", None)
        self.names = {id(module): name for name, module in self.inner.named_modules()}
        for module in (self.body.embed_tokens, *self.body.layers, self.body.norm):
            module.register_forward_pre_hook(lambda m, _: self.load(m))
            module.register_forward_hook(lambda m, *_: self.drop(m))

    def load(self, module: Any) -> None:
        """Give the module's empty parameters their values."""
        import torch

        prefix = self.names[id(module)]
        for name, value in list(module.named_parameters()):
            if value.device.type != "meta":
                continue
            full = f"{prefix}.{name}".replace(".base_layer.", ".").replace(".original_module.", ".")
            source = EMBEDDING if full == HEAD and HEAD not in self.base else full
            self._put(module, name, torch.nn.Parameter(self.base[source].read().float(), requires_grad=False))

    def drop(self, module: Any) -> None:
        """Empty the parameters that came from the base."""
        import torch

        for name, value in list(module.named_parameters()):
            if getattr(value, "from_base", False):
                self._put(
                    module, name, torch.nn.Parameter(value.to("meta"), requires_grad=False), loaded=False
                )

    @staticmethod
    def _put(module: Any, name: str, value: Any, *, loaded: bool = True) -> None:
        value.from_base = loaded
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner) if owner else module, leaf, value)

    def logits(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        """fp32 logits of each sequence from its start position on, shape `(len(ids) - start, vocab)` each."""
        import torch

        width = max(len(ids) for ids in sequences)
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences])
        found = []
        with torch.inference_mode():
            hidden = self.body(input_ids=padded, use_cache=False).last_hidden_state
            self.load(self.head)
            for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
                values = self.head(hidden[row, start : len(ids)])
                if self.softcap:
                    values = torch.tanh(values / self.softcap) * self.softcap
                found.append(values.float().numpy())
            self.drop(self.head)
        return found


def streamed(base: Path, files: list[Path], adapter: Path | None) -> Streamed:
    """Build the model without its weights; only the adapter is in memory."""
    import torch
    from accelerate import init_empty_weights

    transformers = transformers_quietly()
    config = transformers.AutoConfig.from_pretrained(str(base))
    with init_empty_weights(include_buffers=False):
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A tied head is read from the embedding when its turn comes; as one parameter it would be dropped too early.
    if net.get_output_embeddings().weight is net.get_input_embeddings().weight:
        net.get_output_embeddings().weight = torch.nn.Parameter(
            torch.empty_like(net.get_input_embeddings().weight, device="meta"), requires_grad=False
        )
    if adapter is not None:
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
        _fill(net, Shards([adapter / "adapter_model.safetensors"]))
    return Streamed(net, Shards(files))


def _fill(net: Any, saved: Shards) -> None:
    """Put the adapter's tensors in place: peft leaves them empty where the base is."""
    import torch

    for name, value in list(net.named_parameters()):
        if value.device.type != "meta" or not any(part in name for part in (".lora_", ".modules_to_save.")):
            continue
        plain = name.replace(".default", "").replace(".modules_to_save", "")
        found = plain if plain in saved else plain.removesuffix(".weight")
        owner, _, leaf = name.rpartition(".")
        setattr(
            net.get_submodule(owner),
            leaf,
            torch.nn.Parameter(saved[found].read().float(), requires_grad=False),
        )
