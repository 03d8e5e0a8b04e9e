"""The model that was evaluated, in torch and fp32: what every exported file is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.merge import EMBEDDING, HEAD, Merged
from unshot.errors import OutsideError


class Reference:
    """A causal language model with the calls that engines have too."""

    def __init__(self, net: Any) -> None:
        self.net = net.eval()
        self.inner = net.get_base_model() if hasattr(net, "get_base_model") else net
        self.body, self.head = self.inner.model, self.inner.get_output_embeddings()
        self.softcap = getattr(self.inner.config, "final_logit_softcapping", None)

    def logits(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        """fp32 logits of each sequence from its start position on, shape `(len(ids) - start, vocab)` each."""
        import torch

        width = max(len(ids) for ids in sequences)
        # Padding on the right is never looked at by a causal model.
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences])
        found = []
        with torch.inference_mode():
            hidden = self.body(input_ids=padded, use_cache=False).last_hidden_state
            for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
                values = self.head(hidden[row, start : len(ids)])
                if self.softcap:
                    values = torch.tanh(values / self.softcap) * self.softcap
                found.append(values.float().numpy())
        return found

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, end: int) -> list[list[int]]:
        """The greedy answer's token ids to each prompt, without the end token."""
        import torch

        width = max(len(ids) for ids in prompts)
        padded = torch.tensor([[*[end] * (width - len(ids)), *ids] for ids in prompts])
        mask = torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in prompts])
        with torch.inference_mode():
            out = self.net.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
                eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
        answers = [row[width:].tolist() for row in out]
        return [a[: a.index(end)] if end in a else a for a in answers]


def transformers_quietly() -> Any:
    """The transformers module with its logs and bars off; `OutsideError` where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise OutsideError(
            f"the check against the tuned model needs transformers ({error}); pip install 'unshot[export]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def evaluated(base: Path, adapter: Path | None) -> Reference:
    """The base with its adapter beside it, unmerged, as `unshot tune` scored it."""
    import torch

    net = transformers_quietly().AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, use_safetensors=True
    )
    if adapter is not None:
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(adapter))
    return Reference(net)


def merged(base: Path, tensors: Merged) -> Reference:
    """The same architecture with the merged tensors in it."""
    import torch

    transformers = transformers_quietly()
    config = transformers.AutoConfig.from_pretrained(str(base))
    config.tie_word_embeddings = tensors.tied and not tensors.untied
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensors.rows(name) for name in tensors.names()}
    if config.tie_word_embeddings and HEAD not in state and EMBEDDING in state:
        state[HEAD] = state[EMBEDDING]
    net.load_state_dict(state, strict=True, assign=True)
    net.tie_weights()
    return Reference(net)
