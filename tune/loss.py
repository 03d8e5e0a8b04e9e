"""Loss on the answer's tokens of packed rows, for every method."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tune.attention import rows_apart
from tune.batches import Pack, SoftTargets, batches
from tune.processes import World, deal, total
from unshot.text.chat import Encoded

# Token id that stands where a soft prompt's vectors go.
VIRTUAL = -1


def core(net: Any) -> Any:
    """The causal language model inside a peft wrapper (LoRA layers are already in it), or the model itself."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def soft_prompt(net: Any) -> torch.nn.Parameter | None:
    """The trained vectors of prompt tuning, shape (virtual tokens, hidden); None for the other methods."""
    encoder = getattr(net, "prompt_encoder", None)
    if not encoder:
        return None
    weight: torch.nn.Parameter = encoder[net.active_adapter].embedding.weight
    return weight


def with_virtual(rows: Sequence[Encoded], count: int) -> list[Encoded]:
    """Rows with room for a soft prompt of `count` vectors before each."""
    return [
        replace(
            row,
            ids=[VIRTUAL] * count + row.ids,
            prompt_length=row.prompt_length + count,
            earlier=tuple((start + count, stop + count) for start, stop in row.earlier),
        )
        for row in rows
    ]


def embed(net: Any, ids: torch.Tensor, positions: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Input vectors of `ids`, the soft prompt's in the places of `VIRTUAL`; shape (..., hidden)."""
    values = core(net).get_input_embeddings()(ids.clamp(min=0))
    places = positions.clamp(0, soft.shape[0] - 1)
    return torch.where((ids == VIRTUAL)[..., None], soft[places].to(values.dtype), values)


def pack_loss(net: Any, pack: Pack, device: str, *, bf16: bool = False) -> torch.Tensor:
    """Summed loss over a pack's answer tokens (divide by their number for the mean).

    Cross-entropy of the tokens, or the divergence from the teacher's distributions where the pack has them.
    """
    logits = pack_logits(net, pack, device, bf16=bf16)
    if pack.soft is not None:
        return soft_divergence(logits, pack.soft, pack.reverse).sum()
    targets = torch.from_numpy(pack.targets).to(device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def soft_divergence(
    logits: torch.Tensor, soft: SoftTargets, reverse: np.ndarray | None = None
) -> torch.Tensor:
    """KL divergence in nats from a teacher's kept distributions to the logits' own, shape (tokens,).

    `logits` has shape (tokens, vocabulary). The tokens that were not kept are one bucket on both sides; a teacher
    that is certain of one token gives the cross-entropy of that token. Where `reverse` (tokens,) is true it is the
    divergence from the logits' own distribution to the teacher's.
    """
    ids = torch.from_numpy(soft.ids.astype(np.int64)).to(logits.device)
    teacher = torch.from_numpy(soft.logprobs).to(logits.device)
    kept = torch.isfinite(teacher)
    student = torch.log_softmax(logits, dim=-1).gather(1, ids)
    zero = torch.zeros((), device=logits.device)
    share = torch.where(kept, teacher.exp(), zero)
    among = torch.where(kept, share * (teacher - student), zero).sum(dim=1)
    rest = (1 - share.sum(dim=1)).clamp(min=0.0)
    tiny = torch.finfo(logits.dtype).eps
    student_rest = (1 - torch.where(kept, student.exp(), zero).sum(dim=1)).clamp(min=tiny)
    other = torch.where(rest > tiny, rest * (rest.clamp(min=tiny).log() - student_rest.log()), zero)
    forward = among + other
    if reverse is None:
        return forward
    own = torch.where(kept, student.exp(), zero)
    floor = torch.where(kept, teacher, zero)
    back = torch.where(kept, own * (student - floor), zero).sum(dim=1)
    back = back + student_rest * (student_rest.log() - rest.clamp(min=tiny).log())
    return torch.where(torch.from_numpy(reverse).to(logits.device), back, forward)


def pack_logits(net: Any, pack: Pack, device: str, *, bf16: bool = False) -> torch.Tensor:
    """Logits at a pack's answer tokens, fp32, shape (answer tokens, vocabulary).

    Rows are told apart by their restarting positions. With `bf16` products are taken in bfloat16, whatever the
    weights are in.
    """
    ids = torch.from_numpy(pack.ids)[None].to(device)
    positions = torch.from_numpy(pack.positions)[None].to(device)
    predict = torch.from_numpy(pack.predict).to(device)
    soft = soft_prompt(net)
    given = {"input_ids": ids} if soft is None else {"inputs_embeds": embed(net, ids, positions, soft)}
    # Several processes and soft prompts keep the mask, with which their exact resume is tested.
    alone = device == "cpu" and soft is None and not torch.distributed.is_initialized()
    apart = rows_apart(core(net), pack.positions) if alone else nullcontext()
    with apart, torch.autocast(device.split(":")[0], torch.bfloat16) if bf16 else nullcontext():
        logits = core(net)(**given, position_ids=positions, **only(net, predict), use_cache=False).logits[0]
    found: torch.Tensor = wanted(logits, predict).float()
    return found


def only(net: Any, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that limits the logits to `places`, for a family that has it."""
    known = "logits_to_keep" in inspect.signature(core(net).forward).parameters
    return {"logits_to_keep": places} if known else {}


def wanted(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The logits at `places`, shape (places, vocabulary): some families give those of every token all the same."""
    return logits if len(logits) == len(places) else logits[places]


class Step(torch.nn.Module):
    """`pack_loss` as a module, which is what torch's DistributedDataParallel wraps."""

    def __init__(self, net: Any, device: str, *, bf16: bool) -> None:
        super().__init__()
        self.net, self.device, self.bf16 = net, device, bf16

    def forward(self, pack: Pack) -> torch.Tensor:
        """Summed loss of a pack."""
        return pack_loss(self.net, pack, self.device, bf16=self.bf16)


def mean_loss(
    net: Any,
    rows: Sequence[Encoded],
    capacity: int,
    device: str,
    *,
    bf16: bool = False,
    world: World | None = None,
) -> float:
    """Mean answer-token loss over rows, without gradients; the processes share the work."""
    world = world or World()
    summed, count = 0.0, 0
    net.eval()
    with torch.no_grad():
        for packs in batches(rows, batch_rows=max(1, len(rows)), capacity=capacity, seed=0, epoch=0):
            for item in deal(packs, world):
                # A process without a pack of its own passes the first one, for FSDP gathers in step, uncounted.
                loss = float(pack_loss(net, item or packs[0], device, bf16=bf16))
                if item is not None:
                    summed += loss
                    count += len(item.targets)
    summed, count_all = total([summed, count], world)
    return summed / max(1.0, count_all)
