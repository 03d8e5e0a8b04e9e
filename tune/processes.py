"""One process or several: who this one is, how gradients and answers come together, who writes.

`torchrun` and `accelerate launch` set the same environment variables, so that both start the same code. Plain data
parallelism is torch's DistributedDataParallel; with FSDP (torch's `fully_shard`) each process holds a share of every
tensor. Each step's packs are dealt out over the processes, so that a step holds the same rows however many there are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from unshot.errors import OutsideError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's `rank` of `size`, its `local` number on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    fsdp: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def join(*, fsdp: bool = False) -> World:
    """Join the other processes of the launcher; `World()` where there is none.

    `fsdp` is also taken from accelerate's `ACCELERATE_USE_FSDP`. Safe to call twice.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    import torch

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise OutsideError(
                f"process {local} of this machine has no GPU ({torch.cuda.device_count()} there); start one "
                "process for each GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    sharded = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return World(rank, size, local, sharded)


def leave(world: World) -> None:
    """End the process group, so that no process waits for another one that is gone."""
    if world.size > 1:
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def share(value: T, world: World) -> T:
    """The first process's `value`, in every process (any picklable object of ours; nothing is read from a file)."""
    if world.size == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(part: Sequence[T], world: World) -> list[T]:
    """The lists of all processes put together again: item i of process r was item `r + i * size`."""
    if world.size == 1:
        return list(part)
    import torch

    parts: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(parts, list(part))
    whole: list[T] = []
    for i in range(max(len(p) for p in parts)):
        whole.extend(p[i] for p in parts if i < len(p))
    return whole


def total(values: Sequence[float], world: World) -> list[float]:
    """Sums over all processes, fp64."""
    if world.size == 1:
        return list(values)
    import torch

    numbers = torch.tensor(list(values), dtype=torch.float64)
    torch.distributed.all_reduce(numbers)
    return [float(v) for v in numbers]


def deal(items: Sequence[T], world: World) -> list[T | None]:
    """This process's items; None fills up, for every process must take part in as many passes as the others."""
    rounds = -(-len(items) // world.size)
    mine: list[T | None] = list(items[world.rank :: world.size])
    return mine + [None] * (rounds - len(mine))


def wrap(step: Any, net: Any, world: World, *, bf16: bool) -> Any:
    """`step` as a module whose gradients are averaged over the processes; `net` is the causal model inside.

    FSDP shards in place and returns `step` itself.
    """
    if world.size == 1:
        return step
    import torch

    if not world.fsdp:
        return torch.nn.parallel.DistributedDataParallel(step)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    layers = next(m for m in net.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    return step


def whole(tensor: Any) -> Any:
    """A sharded tensor's full value (every process must ask); others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: Any, target: Any) -> Any:
    """`value` cut the way `target` is."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
