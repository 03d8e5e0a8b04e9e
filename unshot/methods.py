"""The tuning methods: one entry a method, from which the flag, the case file's values and the docs are made.

A method is added here and as one function `(model, settings) -> model` whose parameters that training changes require
gradients. Nothing heavy is imported until a run starts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unshot.errors import OutsideError

LLAMA = "5e-5 x (2000 / hidden)^0.781"


@dataclass(frozen=True)
class Method:
    """One way to tune.

    `trains` says what it changes ({rank}, {where}, {virtual_tokens} and {hidden} are filled in) and `reason` when it is
    the right one. `rate` is the learning rate, or (None) `rate_factor` times what full tuning takes. `low_rank`: rank,
    alpha, layers and init apply. `whole`: the run holds a whole model, the base is gone after training. `four_bit`: the
    base is quantised to NF4. `virtual`: trained vectors stand before each row, which no exported file can hold.
    `prefer` is a phase after the best epoch, `(job, net, pairs) -> None`, for rows with a rejected answer.
    """

    name: str
    trains: str
    reason: str
    implementation: str  # module:function
    cuda: bool = False
    package: str | None = None
    install: str = ""
    rate: float | None = None
    rate_factor: float = 10.0
    low_rank: bool = False
    whole: bool = False
    four_bit: bool = False
    virtual: bool = False
    shards: bool = True
    prefer: str | None = None  # module:function

    def prepare(self) -> Callable[[Any, Any], Any]:
        """The function that makes the method's parameters trainable."""
        return _function(self.implementation)

    def phase(self) -> Callable[..., Any]:
        """The function of the preference phase."""
        if self.prefer is None:
            raise ValueError(f"{self.name} has no preference phase")
        return _function(self.prefer)

    def needs(self) -> str:
        """What it needs beside torch, transformers and peft."""
        return " and ".join(
            part
            for part in (
                "CUDA" if self.cuda else "",
                f"{self.package} ({self.install})" if self.package else "",
            )
            if part
        )

    def check(self, device: str) -> None:
        """`OutsideError` where the method cannot run on this machine; asked before any work."""
        if self.cuda and device == "cpu":
            raise OutsideError(
                f"{self.name} needs an NVIDIA GPU ({self.needs()}), and torch sees none; use --method lora"
            )
        if self.package and importlib.util.find_spec(self.package) is None:
            raise OutsideError(f"{self.name} needs {self.package}; run `{self.install}`")


def _function(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


_TRL: dict[str, Any] = {
    "package": "trl",
    "install": "pip install 'unshot[prefer]'",
    "low_rank": True,
    "shards": False,
}
_LOW_RANK = "rank {rank} on every linear layer of {where}"
METHODS = {
    method.name: method
    for method in (
        Method(
            "lora",
            _LOW_RANK,
            "LoRA on all layers, not on attention alone, learns like full fine-tuning while its capacity holds the "
            "data (Thinking Machines Lab 2025-09)",
            "tune.model:low_rank",
            low_rank=True,
        ),
        Method(
            "qlora",
            _LOW_RANK + ", over a base in NF4",
            "a quarter of the memory for the base, whose rounding the adapter corrects (Dettmers et al. 2023, arXiv "
            "2305.14314)",
            "tune.model:low_rank",
            cuda=True,
            package="bitsandbytes",
            install="pip install 'unshot[qlora]'",
            low_rank=True,
            four_bit=True,
            shards=False,
        ),
        Method(
            "dora",
            _LOW_RANK + ", with each column's length trained apart",
            "nearer to full tuning at small ranks, for a slower step (Liu et al. 2024, arXiv 2402.09353)",
            "tune.model:low_rank",
            low_rank=True,
        ),
        Method(
            "full",
            "every weight, in fp32",
            "needs some 16 bytes a weight, so choose lora or qlora for large models",
            "tune.model:every_weight",
            rate_factor=1.0,
            whole=True,
        ),
        Method(
            "prompt",
            "{virtual_tokens} vectors of {hidden} before each row",
            "the weights stay, so it learns least and cannot be merged on export",
            "tune.model:soft_prompt",
            rate=3e-2,
            virtual=True,
            shards=False,
        ),
        Method(
            "dpo",
            _LOW_RANK + ", then the right answers over the rejected ones",
            "for rows whose wrong answer is known too, as with users' corrections: DPO against the tuned model "
            "(Rafailov et al. 2023, arXiv 2305.18290), by TRL",
            "tune.model:low_rank",
            prefer="tune.preference:dpo",
            **_TRL,
        ),
        Method(
            "kto",
            _LOW_RANK + ", then each answer as a good or a bad one",
            "for rows whose wrong answer is known too: KTO takes noisier judgements than DPO (Ethayarajh et al. 2024, "
            "arXiv 2402.01306), by TRL",
            "tune.model:low_rank",
            prefer="tune.preference:kto",
            **_TRL,
        ),
    )
}
