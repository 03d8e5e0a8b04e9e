"""Answers by real greedy generation, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tune.attention import next_token, rows_apart, separable
from tune.loss import core, only, soft_prompt, wanted
from tune.packing import prove
from tune.processes import World, deal, gather
from unshot.data.rows import Message
from unshot.text.chat import Chat

BATCH = 48  # prompts answered together
READ = 2048  # tokens of packed prompts read together


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
    """The greedy answer to each prompt, in order; batches of similar length, shared by the processes.

    `progress` is called with the number of prompts just finished.
    """
    world = world or World()
    # FSDP's processes must stay in step: a run has tried its model before it is cut.
    alone = False if world.fsdp else prove(core(model), next(model.parameters()).device.type) is not None
    # Where rows are not blind to each other in a pack, padding is not trusted either.
    batch_size = 1 if alone else batch_size
    mine = deal(prompts, world)
    encoded = [chat.prompt_ids(prompts[0] if messages is None else messages) for messages in mine]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    texts = [""] * len(encoded)
    model.eval()
    with torch.no_grad() if world.fsdp else torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [encoded[i] for i in chosen]
            # FSDP gathers weights in step, which `_greedy` keeps where one process has more to say.
            if not world.fsdp and not alone and _own_way(model, max(len(ids) for ids in batch) + max_tokens):
                replies = _without_padding(core(model), batch, max_tokens, chat.end)
            else:
                replies = _greedy(model, chat, batch, max_tokens, synced=world.fsdp)
            for i, reply in zip(chosen, replies, strict=True):
                if chat.end in reply:
                    reply = reply[: reply.index(chat.end)]
                texts[i] = chat.decode(reply).strip()
            if progress:
                progress(len(chosen))
    return gather([t for t, m in zip(texts, mine, strict=True) if m is not None], world)


def _own_way(model: Any, longest: int) -> bool:
    """Whether `_without_padding` can answer: on a CPU, where every padded token costs a real one's time."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return on_cpu and soft_prompt(model) is None and separable(core(model), longest)


def _without_padding(
    net: Any, prompts: Sequence[Sequence[int]], max_tokens: int, end: int
) -> list[list[int]]:
    """New token ids for each prompt; prompts are read packed, and a row that has ended is left out of later steps."""
    cache, tokens = _read(net, prompts)
    lengths = torch.tensor([len(ids) for ids in prompts])
    width = int(lengths.max())
    seen = torch.arange(width) >= width - lengths[:, None]
    rows, going = torch.arange(len(prompts)), torch.ones(len(prompts), dtype=torch.bool)
    replies: list[list[int]] = [[] for _ in prompts]
    for step in range(max_tokens):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            replies[row].append(token)
        going &= tokens != end
        if step + 1 == max_tokens or not going.any():
            break
        # Leaving rows out copies keys and values: worth it for a good part of them.
        if going.sum() <= 0.75 * len(rows):
            kept = going.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, tokens, seen, going = rows[kept], tokens[kept], seen[kept], going[kept]
        seen = torch.cat([seen, seen.new_ones(len(rows), 1)], dim=1)
        with next_token(net, seen):
            tokens = net(
                input_ids=tokens[:, None],
                position_ids=(lengths[rows] + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1].argmax(-1)  # fmt: skip
    return replies


def _read(net: Any, prompts: Sequence[Sequence[int]]) -> tuple[Any, torch.Tensor]:
    """Prefill: the prompts' cache, keys and values at the right edge, and each prompt's first new token, (prompts,)."""
    from transformers import DynamicCache

    width = max(len(ids) for ids in prompts)
    layers: list[list[torch.Tensor]] = []  # per layer: keys and values, (prompts, heads, width, size)
    first = []
    for start, stop in _groups(prompts):
        some = prompts[start:stop]
        positions = np.concatenate([np.arange(len(ids)) for ids in some])
        ends = np.cumsum([len(ids) for ids in some])
        places, read = torch.from_numpy(ends - 1), DynamicCache()
        with rows_apart(net, positions):
            logits = net(
                input_ids=torch.tensor([[token for ids in some for token in ids]]),
                position_ids=torch.from_numpy(positions)[None],
                past_key_values=read,
                use_cache=True,
                **only(net, places),
            ).logits[0]
            logits = wanted(logits, places)
        first.append(logits.argmax(-1))
        for number, layer in enumerate(read.layers):
            pair = (layer.keys, layer.values)
            if number == len(layers):
                layers.append([t.new_zeros(len(prompts), t.shape[1], width, t.shape[3]) for t in pair])
            for into, found in zip(layers[number], pair, strict=True):
                for row, (ids, last) in enumerate(zip(some, ends, strict=True), start):
                    into[row, :, width - len(ids) :] = found[0, :, last - len(ids) : last]
    cache = DynamicCache()
    while layers:
        cache.update(*layers.pop(0), len(cache.layers))
    return cache, torch.cat(first)


def _groups(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Neighbouring prompts that are read together, as (first, last + 1)."""
    groups, start, tokens = [], 0, 0
    for row, ids in enumerate(prompts):
        if row > start and tokens + len(ids) > READ:
            groups.append((start, row))
            start, tokens = row, 0
        tokens += len(ids)
    return [*groups, (start, len(prompts))]


def _greedy(
    model: Any, chat: Chat, prompts: Sequence[Sequence[int]], max_tokens: int, *, synced: bool
) -> list[list[int]]:
    """New token ids for each prompt of a batch; a soft prompt's vectors stand between padding and prompt."""
    device = next(model.parameters()).device
    pad = chat.end if chat.tokenizer.pad is None else chat.tokenizer.pad
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
