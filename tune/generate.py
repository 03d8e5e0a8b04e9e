"""Answers by real greedy generation, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from unshot.chat import Chat
from unshot.data import Message


def answers(
    model: Any,
    chat: Chat,
    prompts: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    batch_size: int = 48,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The greedy answer to each prompt, in order; left-padded batches of similar length.

    `progress` is called with the number of prompts just finished.
    """
    device = next(model.parameters()).device
    encoded = [chat.prompt_ids(messages) for messages in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts = [""] * len(encoded)
    pad = chat.tokenizer.pad_token_id if chat.tokenizer.pad_token_id is not None else chat.end
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(encoded[i]) for i in chosen)
            ids = torch.full((len(chosen), width), pad, dtype=torch.long)
            mask = torch.zeros((len(chosen), width), dtype=torch.long)
            for row, i in enumerate(chosen):
                ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
                mask[row, width - len(encoded[i]) :] = 1
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=chat.end,
                pad_token_id=pad,
            )
            for row, i in enumerate(chosen):
                reply = out[row, width:].tolist()
                if chat.end in reply:
                    reply = reply[: reply.index(chat.end)]
                texts[i] = chat.decode(reply).strip()
            if progress:
                progress(len(chosen))
    return texts
