"""The model that was evaluated, in transformers' own forward pass and fp32: what every exported file is
measured against.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.adapter import resize
from export.families import Config, check_numbers
from export.tensors import Shards
from unshot.errors import InputError, OutsideError
from unshot.models import attention_of

# Bytes of fp32 logits that one batch may take.
LOGIT_BYTES = 2**30


class Reference:
    """A causal language model with the calls that engines have too.

    `streams`: its weights are read from the disk layer by layer in every pass, so that it cannot generate in
    any sensible time.
    """

    def __init__(self, net: Any, *, streams: bool = False) -> None:
        self.net = net.eval()
        self.streams = streams
        self.inner = net.get_base_model() if hasattr(net, "get_base_model") else net
        # A greedy answer is the likeliest tokens: what generation_config.json suppresses, forces or penalises is not
        # in any exported file.
        for part in (self.net, self.inner):
            if getattr(part, "generation_config", None) is not None:
                part.generation_config = type(part.generation_config)()
        self.head = self.inner.get_output_embeddings()
        self.last_only = "logits_to_keep" in inspect.signature(self.inner.forward).parameters

    def logits(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        """fp32 logits of each sequence from its start position on, shape `(len(ids) - start, vocab)` each."""
        found: list[np.ndarray] = []
        for begin, end in self._batches(sequences, starts):
            found += self._batch(sequences[begin:end], starts[begin:end])
        return found

    def _batches(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Neighbouring sequences whose logits together take no more than `LOGIT_BYTES`."""
        vocabulary = int(self.head.weight.shape[0]) if self.head is not None else 2**17
        begin = 0
        while begin < len(sequences):
            end = begin + 1
            while end < len(sequences):
                part = sequences[begin : end + 1]
                width = max(map(len, part))
                kept = width - min(starts[begin : end + 1]) if self.last_only else width
                if 4 * vocabulary * kept * len(part) > LOGIT_BYTES:
                    break
                end += 1
            yield begin, end
            begin = end

    def _batch(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        import torch

        width = max(len(ids) for ids in sequences)
        # Padding on the right is never looked at by a causal model.
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences])
        skipped = min(starts) if self.last_only else 0
        keep = {"logits_to_keep": width - skipped} if self.last_only else {}
        with torch.inference_mode():
            table = self.net(input_ids=padded, use_cache=False, **keep).logits
        return [
            table[row, start - skipped : len(ids) - skipped].float().numpy()
            for row, (ids, start) in enumerate(zip(sequences, starts, strict=True))
        ]

    def hidden(self, padded: Any) -> Any:
        """The last hidden state of a padded batch, shape `(rows, tokens, width)`: the head's input."""
        return self.inner.base_model(input_ids=padded, use_cache=False).last_hidden_state

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, end: int) -> list[list[int]]:
        """The greedy answer's token ids to each prompt, without the end token."""
        import torch

        width = max(len(ids) for ids in prompts)
        padded = torch.tensor([[*[end] * (width - len(ids)), *ids] for ids in prompts])
        mask = torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in prompts])
        with torch.inference_mode():
            out = self.net.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, num_beams=1,
                repetition_penalty=1.0, eos_token_id=end, pad_token_id=end,
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


def auto_config(base: Path) -> Any:
    """transformers' configuration of a model directory, without what a quantised upload left in it."""
    transformers = transformers_quietly()
    try:
        config = transformers.AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a model type it does not know
        raise InputError(
            f"{base / 'config.json'}: transformers {transformers.__version__} cannot read it "
            f"({' '.join(str(error).split())[:160]})"
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights are floats, which `Shards` has checked
    return config


def evaluated(
    base: Path,
    adapter: Path | None,
    *,
    files: Sequence[Path] = (),
    vocabulary: int | None = None,
    streams: bool = False,
) -> Reference:
    """The base with its adapter beside it, unmerged, as `unshot tune` scored it.

    `vocabulary` is the number of tokens where the adapter was trained on a resized one.
    `streams`: only one layer's weights, of `files`, are in memory at a time (accelerate's hooks).
    """
    import torch

    transformers = transformers_quietly()
    config = auto_config(base)
    attention = attention_of(config.to_dict())
    if streams:
        return Reference(_streamed(transformers, config, files, adapter, vocabulary), streams=True)
    try:
        net, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(base), config=config, dtype=torch.float32, use_safetensors=True, attn_implementation=attention,
            output_loading_info=True,
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many kinds for weights that are not the configuration's
        raise InputError(
            f"{base}: transformers {transformers.__version__} cannot load it, so that nothing can be compared with it "
            f"({type(error).__name__}: {' '.join(str(error).split())[:240]})"
        ) from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"{base}: its files lack `{missing[0]}` ({len(missing)} tensors of the model are missing), which "
            "transformers would fill with random numbers; copy or download it again"
        )
    if vocabulary:
        resize(net, vocabulary)
    if adapter is not None:
        net = _with_adapter(net, adapter)
    return Reference(net)


def _with_adapter(net: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(net, str(adapter))
    except MemoryError:
        raise
    except Exception as error:  # peft raises many kinds for an adapter that does not fit
        raise InputError(
            f"{adapter}: peft cannot load it on this base ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:240]})"
        ) from None


class Weights(Mapping[str, Any]):
    """The fp32 tensors of a model with its adapter, by the names of its parameters; base tensors are read
    anew.
    """

    def __init__(self, net: Any, base: Shards, adapter: Shards | None) -> None:
        self.base, self.adapter = base, adapter
        inner = net.get_base_model() if hasattr(net, "get_base_model") else net
        prefix = next(name for name, module in net.named_modules() if module is inner)
        self.prefix = f"{prefix}." if prefix else ""
        self.names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
        embedding = inner.get_input_embeddings()
        self.embedding = next(n for n, m in inner.named_modules() if m is embedding)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Any:
        import torch

        if self.adapter is not None and (".lora_" in name or ".modules_to_save." in name):
            plain = name.replace(".default", "").replace(".modules_to_save", "")
            found = plain if plain in self.adapter else plain.removesuffix(".weight")
            return self.adapter[found].read().float()
        full = name.removeprefix(self.prefix).replace(".base_layer.", ".").replace(".original_module.", ".")
        own = self.base.find(full)
        if own is None and full.endswith(".weight") and "head" in full:  # a tied head is its embedding
            own = self.base.find(f"{self.embedding.replace('.base_layer', '')}.weight")
        if own is None:
            raise InputError(
                f"the base has no tensor `{full}`, which transformers wants; leave --low-memory out"
            )
        value: torch.Tensor = self.base[own].read().float()
        return value


def _streamed(
    transformers: Any, config: Any, files: Sequence[Path], adapter: Path | None, vocabulary: int | None
) -> Any:
    """The model without its weights, which accelerate's hooks read layer by layer in every pass."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    if vocabulary:
        raise InputError(
            "an adapter with a resized vocabulary needs its base in memory; leave --low-memory out"
        )
    with init_empty_weights(include_buffers=False):
        net = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention_of(config.to_dict())
        )
    layers = list(getattr(net, "_no_split_modules", None) or [])
    saved = None
    if adapter is not None:
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
        saved = Shards([adapter / "adapter_model.safetensors"])
    weights = Weights(net, Shards(files), saved)
    # A layer's modules read each other's weights (DoRA), so all of a layer come and go together.
    together = [*layers, "Linear", "Embedding", "ModulesToSaveWrapper"]
    attach_align_device_hook(
        net, execution_device=torch.device("cpu"), offload=True, weights_map=weights,
        preload_module_classes=together,
    )  # fmt: skip
    return net


def class_defaults(model_type: str) -> Config:
    """The defaults of transformers' configuration class; empty where it knows none."""
    try:
        found: Config = transformers_quietly().AutoConfig.for_model(model_type).to_dict()
    except (ValueError, TypeError, KeyError):  # an unknown type, or a class that does without defaults
        return {}
    return found


def effective_config(base: Path, raw: Config) -> Config:
    """A `config.json` with the defaults of its class filled in: what is missing there is not off, but the default.

    Of a model that takes images too it is that of its text part, under the whole's architecture.
    """
    check_numbers(raw, base / "config.json", class_defaults(str(raw.get("model_type"))))
    found = auto_config(base)
    whole = found.to_dict()
    config = {**whole, **raw}
    length = getattr(found, "max_position_embeddings", None)  # GPT-2 and others have it under another name
    if length is not None:
        config.setdefault("max_position_embeddings", length)
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    own = {"architectures": config.get("architectures"), "model_type": config.get("model_type")}
    if "tie_word_embeddings" in config:
        own["tie_word_embeddings"] = config["tie_word_embeddings"]
    return {**config, **whole["text_config"], **text, **own}
