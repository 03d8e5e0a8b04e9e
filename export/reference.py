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

    def logits(self, ids: Sequence[int], start: int = 0) -> np.ndarray:
        """fp32 logits of positions `start:`, shape `(len(ids) - start, vocab)`."""
        import torch

        with torch.inference_mode():
            found = self.net(input_ids=torch.tensor([list(ids)]), logits_to_keep=len(ids) - start).logits
        values: np.ndarray = found[0].float().numpy()
        return values

    def generate(self, ids: Sequence[int], tokens: int, stop: Sequence[int]) -> list[int]:
        """The greedy answer's token ids, without the stop token."""
        import torch

        answer: list[int] = []
        with torch.inference_mode():
            out = self.net(input_ids=torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
            while len(answer) < tokens:
                best = int(out.logits[0, -1].argmax())
                if best in stop:
                    break
                answer.append(best)
                if len(answer) < tokens:
                    out = self.net(
                        input_ids=torch.tensor([[best]]), past_key_values=out.past_key_values, use_cache=True
                    )
        return answer


def _transformers() -> Any:
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

    net = _transformers().AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, use_safetensors=True
    )
    if adapter is not None:
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(adapter))
    return Reference(net)


def merged(base: Path, tensors: Merged) -> Reference:
    """The same architecture with the merged tensors in it."""
    import torch

    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(str(base))
    config.tie_word_embeddings = tensors.tied and not tensors.untied
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensors.rows(name) for name in tensors.names()}
    if config.tie_word_embeddings and HEAD not in state and EMBEDDING in state:
        state[HEAD] = state[EMBEDDING]
    net.load_state_dict(state, strict=True, assign=True)
    net.tie_weights()
    return Reference(net)
