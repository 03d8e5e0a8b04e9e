"""Peak memory of a run before it starts: one step simulated on fake tensors, its allocations counted.

torch's FakeTensorMode runs the very model, adapter, loss and optimiser on tensors that have shapes and devices but no
memory. What each operator would allocate, and when it would be freed, is therefore known for any architecture and
method, without a formula per layer kind. Two depths are simulated and the rest follows on a straight line.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tune.base import Shape
from tune.batches import Pack
from tune.loss import core, pack_loss
from tune.model import checkpoint_layers, prepare_model, uses_bf16, weight_dtype
from unshot.case import TuneSettings
from unshot.errors import InputError
from unshot.machine import free_memory
from unshot.methods import METHODS
from unshot.models import Source

GB = 1e9
# What a process on a GPU holds beside its tensors: CUDA context, cuBLAS workspace; seen on several cards, not ours.
CUDA_CONTEXT = 0.6e9
# How many times its live memory a process on a CPU may hold where glibc keeps freed blocks (see `lean_malloc`).
KEPT = 1.8


@dataclass(frozen=True)
class Estimate:
    """Bytes of the terms at the peak of training, and of answering; `peak` is the larger of the two."""

    weights: int
    trained: int  # trained parameters, where they are not the weights themselves
    gradients: int
    adam: int
    activations: int
    answering: int
    tokens: int
    checkpointing: bool
    simulated: bool = True

    @property
    def training(self) -> int:
        """Peak of a training step."""
        return self.weights + self.trained + self.gradients + self.adam + self.activations

    @property
    def peak(self) -> int:
        """Peak of the whole run."""
        return max(self.training, self.answering)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "training": self.training, "peak": self.peak}

    def lines(self) -> list[tuple[str, float, str]]:
        """`(term, GB, how it comes about)` for a table."""
        kept = "layer inputs kept, the rest computed again" if self.checkpointing else "what backward needs"
        how = kept if self.simulated else "an upper bound by formula: this family's steps cannot be simulated"
        return [
            ("weights", self.weights / GB, "parameters of the base x bytes of their precision"),
            ("trained parameters", self.trained / GB, "x 4 bytes, where they are not the weights themselves"),
            ("gradients", self.gradients / GB, "trained parameters x 4 bytes"),
            ("Adam's moments", self.adam / GB, "trained parameters x 2 x 4 bytes"),
            ("activations", self.activations / GB, f"a pack of {self.tokens} tokens, {how}; workspace"),
            ("peak of training", self.training / GB, "the sum"),
            (
                "peak of answering",
                self.answering / GB,
                "weights, cache of keys and values, one batch's prefill",
            ),
        ]


class Live(TorchDispatchMode):
    """Counts the bytes of live storages made under it: `now` and the highest `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.add, out)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Load:
    """What a run asks of memory: its largest pack (tokens, and those that carry loss), packs a step, answering."""

    tokens: int
    targets: int
    packs: int
    prompt: int  # longest prompt and answer, tokens
    batch: int  # prompts answered together


def estimate(
    source: Source, shape: Shape, settings: TuneSettings, load: Load, device: str, *, checkpointing: bool
) -> Estimate:
    """Peak memory of a run on `device`, bytes.

    A family whose steps cannot be simulated (routing that depends on the data) gets the bound of a formula instead,
    and the estimate says so.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source.path))
    whole = skeleton(config, settings, device, config.num_hidden_layers)
    parameters = {id(p): p for p in whole.parameters()}.values()
    moving = sum(p.numel() for p in parameters if p.requires_grad)
    full = METHODS[settings.method].whole
    weights = sum(p.nbytes for p in parameters) - (0 if full else 4 * moving)
    if METHODS[settings.method].four_bit:
        weights -= four_bit_saving(whole)
    trained_layers, simulated = settings.layers or config.num_hidden_layers, True
    try:
        passes = line(lambda n: step_bytes(config, settings, load, device, n, checkpointing), trained_layers)
        answers = line(lambda n: answer_bytes(config, settings, load, device, n), config.num_hidden_layers)
    except Exception:  # fake tensors fail in as many ways as there are families
        passes = answers = float(bound(shape, load))
        simulated = False
    kept = 0 if full else 4 * moving
    room = CUDA_CONTEXT if device != "cpu" else 0
    return Estimate(
        weights=weights,
        trained=kept,
        gradients=4 * moving,
        adam=8 * moving,
        activations=int(passes + room),
        answering=int(weights + kept + 8 * moving + answers + room),
        tokens=load.tokens,
        checkpointing=checkpointing,
        simulated=simulated,
    )


def free_bytes(device: str) -> int:
    """Memory of the device that can be had now, bytes."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return free_memory()


def lean_malloc() -> None:
    """Have glibc give tensors' memory back when they are freed.

    Before 2.38 glibc cannot use a freed aligned block again for one of the same size, so that a CPU's resident set
    grows to 1.7 times what is live (measured). Blocks from 256 KiB on then come from the system and return to it;
    that costs some 8% of the time.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(-3, 256 * 1024)  # M_MMAP_THRESHOLD


def surely_fits(source: Source, shape: Shape, load: Load, device: str) -> bool:
    """Whether a bound far above any method's needs is below what is free, so that nothing need be simulated."""
    weights = sum(f.stat().st_size for f in source.weight_files())
    return 10 * weights + bound(shape, load) < free_bytes(device)


def bound(shape: Shape, load: Load) -> int:
    """Bytes that activations of a step or a batch's answers never exceed, by a formula for a plain decoder."""
    width = 12 * shape.hidden + 6 * shape.intermediate * max(1, min(shape.experts, 8))
    tokens = max(load.tokens, load.batch * load.prompt)
    return 4 * (tokens * width * shape.layers + load.targets * 4 * shape.vocabulary)


def line(measure: Any, layers: int) -> float:
    """`measure(layers)`, from two shallow models where that is cheaper: every layer adds the same."""
    low, high = 4, 8
    if layers <= high:
        return float(measure(layers))
    first, second = measure(low), measure(high)
    return first + (second - first) / (high - low) * (layers - low)


def meta_model(source: Source, settings: TuneSettings, device: str) -> Any:
    """The whole model of a method without memory."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source.path))
    return core(skeleton(config, settings, device, config.num_hidden_layers))


def skeleton(config: Any, settings: TuneSettings, device: str, layers: int) -> Any:
    """The model of a method without memory (meta device), `layers` deep, all of them trained."""
    import copy

    from transformers import AutoModelForCausalLM

    short = copy.deepcopy(config)
    settings = settings.changed(init="lora")  # the same sizes, and no weights are needed
    short.num_hidden_layers = layers
    if types := vars(short).get("layer_types"):  # on transformers 5 some families only derive them
        short.layer_types = types[:layers]
    dtype = weight_dtype(settings.method, bf16=uses_bf16(settings, device))
    with torch.device("meta"):
        try:
            net = AutoModelForCausalLM.from_config(short, dtype=dtype)
        except Exception as error:  # models fail in as many ways as there are families
            raise InputError(
                f"{Path(config.name_or_path) / 'config.json'}: transformers makes no model of it "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from None
        top = None if settings.layers is None or settings.layers > layers else settings.layers
        return prepare_model(net, settings.changed(layers=top))


def four_bit_saving(net: Any) -> int:
    """Bytes that NF4 saves against bf16: 4.127 bits a weight of the linear layers (with quantised block scales)."""
    head = core(net).get_output_embeddings()
    linear = sum(
        m.weight.numel()
        for n, m in core(net).named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head and "lora_" not in n
    )
    return int(linear * (2 - 4.127 / 8))


def materialise(net: Any, device: str) -> None:
    """Put fake tensors of `device` in the places of the meta ones, tied ones once."""
    made: dict[int, Any] = {}
    for module in net.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in made:
                    fresh = torch.empty(value.shape, dtype=value.dtype, device=device)
                    if isinstance(value, torch.nn.Parameter):
                        fresh = torch.nn.Parameter(fresh, requires_grad=value.requires_grad)
                    made[id(value)] = fresh
                table[name] = made[id(value)]


def step_bytes(
    config: Any, settings: TuneSettings, load: Load, device: str, layers: int, checkpointing: bool
) -> int:
    """Peak of a step beyond weights, gradients and moments, for a model `layers` deep with all of them trained."""
    net = skeleton(config, settings.changed(layers=None), device, layers)
    if checkpointing:
        checkpoint_layers(net)
    places = np.linspace(0, load.tokens - 2, load.targets).astype(np.int64)
    pack = Pack(
        ids=np.zeros(load.tokens, dtype=np.int64),
        positions=np.arange(load.tokens, dtype=np.int64),
        predict=places,
        targets=np.zeros(load.targets, dtype=np.int64),
    )
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        materialise(net, device)
        moving = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving)
        net.train()
        for step in range(2):  # the first makes Adam's moments
            live.peak = live.now
            for _ in range(min(2, load.packs)):
                pack_loss(net, pack, device, bf16=uses_bf16(settings, device)).backward()
            if step:
                break
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        top = live.peak
        static = sum({id(p): p.nbytes for p in net.parameters()}.values())
    return top - static - 12 * sum(p.numel() for p in moving)


def answer_bytes(config: Any, settings: TuneSettings, load: Load, device: str, layers: int) -> int:
    """Peak of answering one batch beyond the weights: the cache, the prefill's workspace, the logits."""
    net = core(skeleton(config, settings.changed(layers=None), device, layers))
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, torch.no_grad():
        materialise(net, device)
        net.eval()
        before = live.now
        live.peak = before
        net(
            input_ids=torch.zeros((load.batch, load.prompt), dtype=torch.long, device=device),
            attention_mask=torch.ones(
                (load.batch, 1, load.prompt, load.prompt), dtype=torch.bool, device=device
            ),
            use_cache=True,
            logits_to_keep=1,
        )
        return live.peak - before
