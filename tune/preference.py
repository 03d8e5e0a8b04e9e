"""Preference tuning by TRL: after the best epoch, rows with a rejected answer are learnt as better against worse.

The right answers come first, by the usual loss, so that the reference of the preference loss is a model that knows the
task under its short prompt. What the preference phase made is kept only where validation is no worse for it. TRL gets
the token ids that the run trains on, not texts, so that its own template and end token have no say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune.batches import pack
from tune.loss import pack_loss
from tune.score import score_rows
from unshot.console import Output
from unshot.data.example import Example
from unshot.errors import InputError
from unshot.methods import METHODS
from unshot.text.chat import Chat, Encoded

if TYPE_CHECKING:
    from tune.job import Job
    from tune.train import Trainer

# The column of a row that holds an answer which was given and is wrong.
REJECTED = "rejected"
# TRL's own 1e-6 for full tuning, times 10 as LoRA takes it; its beta; epochs over the pairs.
RATE, BETA, EPOCHS, BATCH = 1e-5, 0.1, 3, 8


@dataclass(frozen=True)
class Pair:
    """One prompt with a better and a worse answer, token ids, each answer with its end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Preference:
    """What the phase did: its pairs, the validation score before and after it, whether it was kept.

    `before` and `after` are also given for the share of the pairs whose better answer is the likelier one.
    """

    method: str
    pairs: int
    score_before: float
    score_after: float
    preferred_before: float
    preferred_after: float
    kept: bool


def rejected_of(row: Example) -> str | None:
    """The row's rejected answer: a text, a message, or messages whose last it is; None where there is none."""
    value = row.extra.get(REJECTED)
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    return value.strip() if isinstance(value, str) and value.strip() else None


def check_rows(rows: Sequence[Example], method: str) -> None:
    """`InputError` where a preference method has nothing to prefer; asked before any work."""
    if not any(rejected_of(row) for row in rows):
        raise InputError(
            f"--method {method} needs rows with a rejected answer beside the right one, in a column `{REJECTED}` (as "
            "`unshot deploy retrain` writes them; TRL's files with --output-column chosen); else use --method lora"
        )


def make_pairs(rows: Sequence[Example], encoded: Sequence[Encoded], chat: Chat) -> list[Pair]:
    """The pairs of encoded rows; a rejected answer that equals the right one makes none."""
    found = []
    for row, item in zip(rows, encoded, strict=True):
        text = rejected_of(row)
        if text is None or text == (row.answer or "").strip():
            continue
        prompt, chosen = item.ids[: item.prompt_length], item.ids[item.prompt_length :]
        found.append(Pair(prompt, chosen, [*chat.tokenizer.ids(text), chat.end]))
    return found


def prefer(job: Job, net: Any, trainer: Trainer, out: Output) -> Preference:
    """Run the method's preference phase on the best epoch's model, and keep it where validation is no worse."""
    method = METHODS[job.case.tune.method]
    rows = job.extras.train
    pairs = make_pairs(rows, job.train_rows[: len(rows)], job.chat)
    if not pairs:
        raise InputError(f"no training row has a `{REJECTED}` answer that differs from the right one")
    validation = job.cleaned.parts.validation

    def figures() -> tuple[float, float]:
        score = float(score_rows(job, net, validation, job.validation_rows)["score"])
        return score, sum(margin(net, pair, job.device, bf16=job.bf16) > 0 for pair in pairs) / len(pairs)

    score_before, before = figures()
    out.log(f"{method.name} on {len(pairs)} pairs of a right and a rejected answer")
    with _own_forwards(net):
        method.phase()(job, net, pairs)
    score_after, after = figures()
    kept = score_after >= score_before
    if not kept:
        trainer.load_best()
        out.warn(
            f"{method.name} made validation worse ({score_before:.3f} to {score_after:.3f}) and was taken back; the "
            "run is the one before it"
        )
    return Preference(method.name, len(pairs), score_before, score_after, before, after, kept)


def margin(net: Any, pair: Pair, device: str, *, bf16: bool = False) -> float:
    """By how much the better answer is likelier, nats."""
    import torch

    net.eval()
    with torch.no_grad():
        better, worse = (
            float(
                pack_loss(net, pack([Encoded([*pair.prompt, *answer], len(pair.prompt))]), device, bf16=bf16)
            )
            for answer in (pair.chosen, pair.rejected)
        )
    return worse - better


def dpo(job: Job, net: Any, pairs: Sequence[Pair]) -> None:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) against the model as it comes."""
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    _train(job, net, rows, DPOTrainer, DPOConfig)


def kto(job: Job, net: Any, pairs: Sequence[Pair]) -> None:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306): each answer by itself is good or bad."""
    from trl import KTOConfig, KTOTrainer

    rows = []
    for p in pairs:
        rows += [
            {"prompt_ids": p.prompt, "completion_ids": p.chosen, "label": True},
            {"prompt_ids": p.prompt, "completion_ids": p.rejected, "label": False},
        ]
    # Its KL term takes each prompt with another row's answer, drawn within a batch of fixed order.
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for row, other in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            row["KL_completion_ids"] = other["completion_ids"]
    _train(job, net, rows, KTOTrainer, KTOConfig)


def _train(job: Job, net: Any, rows: list[dict[str, Any]], trainer: Any, config: Any) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback

    class Prepared(trainer):  # type: ignore[misc]
        """A trainer that takes token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(str(job.source.path))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        settings = config(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            learning_rate=RATE,
            beta=BETA,
            max_length=None,
            bf16=job.bf16,
            use_cpu=job.device == "cpu",
            gradient_checkpointing=bool(job.case.tune.gradient_checkpointing),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=job.config.seed,
        )
        trainer = Prepared(
            model=net, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)  # it writes to stdout, where --json does
        trainer.train()
    if "ref" in net.peft_config:  # TRL's copy of the adapter, its reference
        net.delete_adapter("ref")


@contextmanager
def _own_forwards(net: Any) -> Iterator[None]:
    """Within, TRL may put forwards of its own into the modules; afterwards those from before are back."""
    before = {id(m): m.__dict__.get("forward") for m in net.modules()}
    yield
    for module in net.modules():
        module.__dict__.pop("forward", None)
        if (old := before.get(id(module))) is not None:
            module.__dict__["forward"] = old
