"""Answers by real greedy generation, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tune.loss import core, soft_prompt
from tune.processes import World, deal, gather
from unshot.chat import Chat
from unshot.data import Message

BATCH = 48  # prompts answered together


def answers(
    model: Any,
    chat: Chat,
    prompts: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    batch_size: int = BATCH,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
) -> list[str]:
    """The greedy answer to each prompt, in order; left-padded batches of similar length, shared by the processes.

    `progress` is called with the number of prompts just finished.
    """
    world = world or World()
    mine = deal(prompts, world)
    encoded = [chat.prompt_ids(prompts[0] if messages is None else messages) for messages in mine]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts = [""] * len(encoded)
    model.eval()
    with torch.no_grad() if world.fsdp else torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            replies = _greedy(model, chat, [encoded[i] for i in chosen], max_tokens, synced=world.fsdp)
            for i, reply in zip(chosen, replies, strict=True):
                if chat.end in reply:
                    reply = reply[: reply.index(chat.end)]
                texts[i] = chat.decode(reply).strip()
            if progress:
                progress(len(chosen))
    return gather([t for t, m in zip(texts, mine, strict=True) if m is not None], world)


def _greedy(
    model: Any, chat: Chat, prompts: Sequence[Sequence[int]], max_tokens: int, *, synced: bool
) -> list[list[int]]:
    """New token ids for each prompt of a batch; a soft prompt's vectors stand between padding and prompt."""
    device = next(model.parameters()).device
    pad = chat.tokenizer.pad_token_id if chat.tokenizer.pad_token_id is not None else chat.end
    soft = soft_prompt(model)
    virtual = 0 if soft is None else soft.shape[0]
    width = virtual + max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) - virtual :] = 1
    given: dict[str, Any] = {"input_ids": ids.to(device)}
    if soft is not None:
        vectors = core(model).get_input_embeddings()(ids.to(device))
        for row, prompt in enumerate(prompts):
            start = width - len(prompt) - virtual
            vectors[row, start : start + virtual] = soft.to(vectors.dtype)
        given = {"inputs_embeds": vectors}
    out = core(model).generate(
        **given,
        attention_mask=mask.to(device),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=chat.end,
        pad_token_id=pad,
        synced_gpus=synced,
    )
    found: list[list[int]] = out[:, width if soft is None else 0 :].tolist()
    return found
