"""The model that is trained: base, method, precision; and the tuned model opened again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tune.base import check_weights
from unshot.case import TuneSettings
from unshot.data.files import optional_object
from unshot.errors import InputError, OutsideError
from unshot.methods import METHODS
from unshot.models import Source, attention_of
from unshot.text.chat import Chat
from unshot.text.template import set_template

# Families whose state-space layers multiply by these weights in kernels of their own, past an adapter (peft refuses).
STATE_SPACE = {"falcon_h1", "mamba", "mamba2", "falcon_mamba"}
NO_ADAPTER = {"out_proj", "conv1d"}
ADAPTER, MODEL = "adapter", "model"  # what a run holds: a peft adapter, or for `full` the whole model


def load_base(source: Source, device: str, *, bf16: bool, method: str = "lora") -> Any:
    """The base model, attention by sdpa.

    In bf16 or fp32; fp32 for `full`, whose weights Adam steps change by less than bf16 resolves; NF4 for `qlora`
    (Dettmers et al. 2023, arXiv 2305.14314).
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": weight_dtype(method, bf16=bf16)}
    if METHODS[method].four_bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        options["device_map"] = {"": device}
    try:
        check_weights(source)
        if attention := attention_of(source.config()):
            options["attn_implementation"] = attention
        model = AutoModelForCausalLM.from_pretrained(str(source.path), use_safetensors=True, **options)
    except InputError:
        raise
    except Exception as error:  # damaged weights raise many kinds
        raise InputError(
            f"{source.path}: the model cannot be loaded ({type(error).__name__}: {error})"
        ) from None
    return model if METHODS[method].four_bit else model.to(device)


def weight_dtype(method: str, *, bf16: bool) -> Any:
    """The precision of a base's weights in training, a torch dtype: fp32 where all of them are trained."""
    import torch

    return torch.bfloat16 if bf16 and not METHODS[method].whole else torch.float32


def uses_bf16(settings: TuneSettings, device: str) -> bool:
    """Whether products are in bf16: as asked, else where it is faster: on a GPU, a CPU with AVX512-BF16 or AMX."""
    if settings.dtype == "auto":
        return device != "cpu" or cpu_has_bf16()
    return settings.dtype == "bf16"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without it bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def check_settings(settings: TuneSettings) -> None:
    """Refuse settings that do not go with the method; asked before any work."""
    method = METHODS[settings.method]
    able = ", ".join(name for name, known in METHODS.items() if known.low_rank)
    for key, given in (("layers", settings.layers is not None), ("init", settings.init != "lora")):
        if given and not method.low_rank:
            raise InputError(f"`tune.{key}` goes with {able}, not with {settings.method}")
    if settings.init == "pissa" and settings.method != "lora":
        raise InputError(
            f"`tune.init` pissa takes the base's weights apart and goes with lora, not with {settings.method}"
        )


def default_alpha(settings: TuneSettings) -> float:
    """Alpha as its source fixes it, whatever the rank.

    lora: 32, scaled by 1/rank (Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025-09). rslora: 8,
    scaled by 1/sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732), which is the same at rank 16. pissa: the rank, a
    scale of 1 (Meng et al. 2024, arXiv 2404.02948).
    """
    return {"lora": 32.0, "rslora": 8.0, "pissa": float(settings.rank)}[settings.init]


def prepare_model(model: Any, settings: TuneSettings) -> Any:
    """Make the method's parameters trainable, and only those; seeds torch first.

    `full` trains the model itself; the others return it in a peft wrapper.
    """
    import torch

    torch.manual_seed(settings.seed)
    return METHODS[settings.method].prepare()(model, settings)


def every_weight(model: Any, settings: TuneSettings) -> Any:
    """The model itself, all of it trained."""
    return model.requires_grad_(True)


def low_rank(model: Any, settings: TuneSettings) -> Any:
    """A fresh LoRA adapter (fp32) on every linear layer but the head.

    `settings.layers` keeps it to the top of the model, so that no gradient runs through what lies below.
    """
    from peft import LoraConfig, get_peft_model

    total = model.config.num_hidden_layers
    if settings.layers is not None and settings.layers > total:
        raise InputError(f"`tune.layers` is {settings.layers}; the model has {total} layers")
    top = None if settings.layers in (None, total) else list(range(total - settings.layers, total))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or default_alpha(settings),
        lora_dropout=settings.dropout,
        use_rslora=settings.init == "rslora",
        init_lora_weights="pissa_niter_16" if settings.init == "pissa" else True,
        use_dora=settings.method == "dora",
        target_modules=linear_names(model) if top or model.config.model_type in STATE_SPACE else "all-linear",
        layers_to_transform=top,
        task_type="CAUSAL_LM",
    )
    net = get_peft_model(model, config)
    if (
        settings.init == "pissa"
    ):  # what was taken out of the base, to be taken out of the adapter when it is written
        net.unshot_start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    return net


def soft_prompt(model: Any, settings: TuneSettings) -> Any:
    """`virtual_tokens` trained vectors before each row, begun from vectors of the vocabulary.

    Lester et al. 2021 (arXiv 2104.08691): starting from vocabulary beats random vectors. Rows of the embedding are
    drawn here rather than by peft, which would draw them from the global random state.
    """
    import torch
    from peft import PromptTuningConfig, get_peft_model

    net = get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=settings.virtual_tokens, task_type="CAUSAL_LM")
    )
    vocabulary = model.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randint(0, vocabulary.shape[0], (settings.virtual_tokens,), generator=draw)
    with torch.no_grad():
        weight = net.prompt_encoder[net.active_adapter].embedding.weight
        weight.copy_(vocabulary[chosen.to(vocabulary.device)])
    return net.to(vocabulary.device)


def checkpoint_layers(net: Any) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more work."""
    inner = net.get_base_model() if hasattr(net, "get_base_model") else net
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of all linear layers (GPT-2's Conv1D too) but the head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {
        n.rsplit(".", 1)[-1]
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D) and m is not head
    }
    return sorted(found - (NO_ADAPTER if model.config.model_type in STATE_SPACE else set()))


def untouched(net: Any) -> str | None:
    """What an adapter on all layers leaves as it is: experts held as one tensor, layers that take no adapter."""
    import torch

    head = net.get_output_embeddings()
    bare = {
        n.rsplit(".", 1)[-1]
        for n, m in net.named_modules()
        if isinstance(m, torch.nn.Linear)
        and m is not head
        and "lora_" not in n
        and not n.endswith("base_layer")
    }
    if bare:
        return f"the linear layers {', '.join(sorted(bare))} take no adapter in this family; they stay as they are"
    weights = {n: p for n, p in net.named_parameters() if "lora_" not in n}
    total = sum(p.numel() for p in weights.values())
    held = {n: p.numel() for n, p in weights.items() if p.ndim >= 3 and not p.requires_grad}
    share = sum(held.values()) / max(1, total)
    if share < 0.01:
        return None
    names = sorted({n.rsplit(".", 1)[-1] for n in held})
    return (
        f"{share:.0%} of the weights are tensors of experts ({', '.join(names)}), which an adapter does not "
        "reach; they stay as they are"
    )


def round_weights(net: Any, source: Source, *, bf16: bool) -> Any:
    """Fully tuned fp32 weights rounded to the base's precision, so that what is scored is what is kept."""
    import torch

    dtype = stored_dtype(source)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.to(dtype))
    return net.to(torch.bfloat16 if bf16 else torch.float32)


def stored_dtype(source: Source) -> Any:
    """The precision that the base's configuration names; fp32 where it names none."""
    import torch

    config = source.config()
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def save_tuned(net: Any, folder: Path, source: Source, method: str, chat: Chat) -> None:
    """Write `adapter/`, or for `full` `model/`: a model directory like the base's, its other files copied."""
    if METHODS[method].whole:
        net.to(stored_dtype(source)).save_pretrained(folder / MODEL)
        for path in source.path.iterdir():
            kept = path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != "manifest.json"
            if path.is_file() and kept and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / MODEL / path.name)
        _write_end(folder / MODEL, chat)
        set_template(folder / MODEL, chat.tokenizer.template)
        return
    net.save_pretrained(folder / ADAPTER)
    if hasattr(net, "unshot_start"):
        _subtract_start(net, folder / ADAPTER)
    (folder / ADAPTER / "README.md").unlink(missing_ok=True)
    # Name the base by its name, not by a path of this machine.
    path = folder / ADAPTER / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_end(folder: Path, chat: Chat) -> None:
    """Have a model directory stop where the tuned model ends its turn, before what the base stopped at."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config = optional_object(path)
        old = config.get("eos_token_id")
        others = [i for i in (old if isinstance(old, list) else [old]) if i is not None and i != chat.end]
        config["eos_token_id"] = [chat.end, *others] if others else chat.end
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _subtract_start(net: Any, folder: Path) -> None:
    """Write a PiSSA adapter as plain LoRA of twice the rank on the untouched base.

    Training began at W = R + s B0 A0, so the change of W is s (B A - B0 A0) = s [B, -B0] [A; A0].
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, first in net.unshot_start.items():
        key = name.replace(".default.", ".")
        start = first.to(tensors[key])
        parts, dim = ([tensors[key], start], 0) if "lora_A" in key else ([tensors[key], -start], 1)
        tensors[key] = torch.cat(parts, dim=dim).contiguous()
    save_file(tensors, path)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def has_tuned(run: Path) -> bool:
    """Whether a run directory holds a tuned model."""
    return (run / ADAPTER).is_dir() or (run / MODEL).is_dir()


def load_tuned(run: Path, base: Source, device: str, *, bf16: bool, method: str = "lora") -> Any:
    """The tuned model of a run directory, ready to answer; `base` is only read where the run holds an adapter.

    A `qlora` run's base is quantised again where that can be done, else it is loaded whole.
    """
    if (run / MODEL).is_dir():
        return load_base(Source(base.name, run / MODEL), device, bf16=bf16)
    from peft import PeftModel

    nf4 = METHODS[method].four_bit and device != "cpu" and find_spec("bitsandbytes") is not None
    return PeftModel.from_pretrained(
        load_base(base, device, bf16=bf16, method=method if nf4 else "lora"), str(run / ADAPTER)
    )


def pick_device() -> str:
    """`cuda` where torch sees a GPU, else `cpu`."""
    try:
        import torch
    except ImportError as error:
        raise OutsideError(f"tuning needs torch ({error}); run `pip install 'unshot[tune]'`") from None
    return "cuda" if torch.cuda.is_available() else "cpu"


# What is left of the way down after a share of it, by `tune.schedule`.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


def rate_factor(
    step: int, total: int, schedule: str = "cosine", *, warmup: float = 0.06, floor: float = 0.1
) -> float:
    """Learning-rate factor of a step in [0, total): linear warm-up, then by `SCHEDULES` down to `floor`."""
    start = max(1, round(warmup * total))
    if step < start:
        return (step + 1) / start
    return floor + (1 - floor) * SCHEDULES[schedule]((step - start) / max(1, total - start))
