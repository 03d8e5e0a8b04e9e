"""`unshot tune` from data file to run directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.assess.card import card
from tune.assess.run import assess
from tune.contamination import Cleaned, separate
from tune.extras import Extras, add_extras
from tune.meaning import by_meaning
from tune.split import split
from unshot.case import Case, Tune
from unshot.chat import Chat, Encoded, load_tokenizer
from unshot.console import Output, dumps
from unshot.data import Example, Message, read_examples, write_jsonl
from unshot.errors import InputError
from unshot.manifest import Manifest, describe_file, staged, write_text
from unshot.models import Source, resolve
from unshot.task import Task, derive_task

if TYPE_CHECKING:
    from tune.model import Defaults
    from tune.train import Plan, Trainer

# Seconds between checkpoints within an epoch.
SAVE_SECONDS = float(os.environ.get("UNSHOT_SAVE_SECONDS", "30"))


def request(example: Example, task: Task) -> list[Message]:
    """The tuned model's request for a row: the instruction as system message, then the row's own messages."""
    messages = list(example.messages)
    if task.instruction and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": task.instruction})
    return messages


def encode_rows(rows: Sequence[Example], task: Task, chat: Chat, max_length: int) -> list[Encoded]:
    """Token ids of rows; `InputError` for a row longer than `max_length` tokens."""
    encoded = []
    for row in rows:
        item = chat.encode(request(row, task), row.answer or "")
        if len(item.ids) > max_length:
            raise InputError(
                f"line {row.line}: {len(item.ids)} tokens, more than max_length {max_length}; shorten the row or "
                "raise --max-length"
            )
        encoded.append(item)
    return encoded


def tune_run(
    data: Path,
    base: str,
    final: Path,
    case: Case,
    out: Output,
    *,
    overwrite: bool = False,
    input_column: str | None = None,
    output_column: str | None = None,
) -> dict[str, Any]:
    """Split, train, evaluate and write the run directory `final`; return its result.

    Raises `InputError` for bad data or base. A killed run is resumed by the same call.
    """
    examples = read_examples(data, input_column=input_column, output_column=output_column)
    try:
        task = derive_task(case.task, examples)
        cleaned = separate_split(examples, task, case.tune, out)
    except InputError as error:
        raise InputError(f"{data}: {error}") from None
    parts = cleaned.parts
    if cleaned.moved:
        out.warn(
            f"{len(cleaned.moved)} validation and test rows were near-duplicates of rows in an earlier part (first: "
            f"line {cleaned.moved[0].line}, like line {cleaned.moved[0].like_line}); moved there, "
            f"{len(cleaned.refilled)} replaced by other rows"
        )
    source = resolve(base, out)
    out.log(
        f"{data}: {len(examples)} rows, {len(parts.train)} train / {len(parts.validation)} validation / "
        f"{len(parts.test)} test; metric {task.metric}"
        + (f" over {len(task.labels)} labels" if task.labels else "")
    )
    if len(parts.train) < 50:
        out.warn(f"{len(parts.train)} training rows; 50 to 200 good examples are the usual minimum")
    with staged(final, overwrite=overwrite, resume=True) as work:
        return _run_in(work, data, source, cleaned, task, case, out, final.name)


def separate_split(examples: Sequence[Example], task: Task, settings: Tune, out: Output) -> Cleaned:
    """80/10/10 by class, then without near-duplicates across the parts."""

    def stratum(example: Example) -> str:
        return task.label(example.answer or "") if task.labels else ""

    return separate(
        split(examples, stratum=stratum, seed=settings.seed),
        stratum=stratum,
        seed=settings.seed,
        meaning=lambda texts: by_meaning(texts, settings.embedder, out=out),
    )


@dataclass
class Job:
    """A run before a weight is loaded: its parts as rows and as token ids, its settings, its plan."""

    source: Source
    fingerprint: dict[str, Any]
    cleaned: Cleaned
    extras: Extras
    task: Task
    chat: Chat
    case: Case
    device: str
    train_rows: list[Encoded]
    validation_rows: list[Encoded]
    test_rows: list[Encoded]
    defaults: Defaults
    plan: Plan


def _run_in(
    work: Path, data: Path, source: Source, cleaned: Cleaned, task: Task, case: Case, out: Output, name: str
) -> dict[str, Any]:
    from transformers.utils import logging

    from tune.model import add_adapter, load_base
    from tune.train import Trainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    manifest = Manifest("tune", seeds={"seed": case.tune.seed}, inputs=[describe_file(data)])
    job = prepare(data, source, cleaned, task, case, out)
    with manifest.timed("load"):
        net = add_adapter(load_base(source, job.device), case.tune)
    trainer = Trainer(net, job.train_rows, job.plan, work, job.device)
    if trainer.resume():
        out.log(f"going on from epoch {trainer.state.epoch + 1}, step {trainer.state.step}")
    with manifest.timed("train"):
        train(job, trainer, out)
    trainer.load_best()
    with manifest.timed("test"):
        answers: list[str] = []
        test = score_rows(job, net, cleaned.parts.test, job.test_rows, answers)
    with manifest.timed("gates"):
        gates = assess(job, net, test, answers, out)
    # The working files of a resumed run are no part of the artifact.
    for entry in work.iterdir():
        _remove(entry)
    write_parts(work, job, net)
    result = describe(job, trainer, test) | {"gates": [gate.model_dump(mode="json") for gate in gates]}
    write_text(work / "metrics.json", dumps(result) + "\n")
    manifest.config = configuration(job)
    manifest.result = {k: v for k, v in result.items() if k not in ("history", "losses")}
    write_text(work / "README.md", card(name, result, manifest.config, task, gates))
    manifest.write(work)
    return {**result, "timings": manifest.timings}


def prepare(data: Path, source: Source, cleaned: Cleaned, task: Task, case: Case, out: Output) -> Job:
    """Token ids of every row, defaults and plan; sets the task's `max_answer_tokens`."""
    from tune import model as models
    from tune.train import Plan

    settings, parts = case.tune, cleaned.parts
    device = models.pick_device()
    fingerprint = source.fingerprint()
    chat = Chat(load_tokenizer(source.path))
    try:
        extras = add_extras(parts.train, settings)
        train_rows = encode_rows(extras.train, task, chat, settings.max_length)
        validation_rows = encode_rows(parts.validation, task, chat, settings.max_length)
        test_rows = encode_rows(parts.test, task, chat, settings.max_length)
    except InputError as error:
        raise InputError(f"{data}, {error}") from None
    longest = max(r.answer_length for r in (*train_rows, *validation_rows, *test_rows))
    task.max_answer_tokens = max(8, round(1.5 * longest))
    train_rows += encode_rows(extras.general, Task(), chat, settings.max_length)
    defaults = models.choose_defaults(settings, source.config()["hidden_size"], len(train_rows))
    for key, reason in defaults.reasons.items():
        out.detail(f"{key}: {getattr(defaults, key)} ({reason})")
    plan = Plan(
        epochs=settings.epochs,
        patience=settings.patience,
        batch_rows=defaults.batch_rows,
        capacity=models.pack_capacity(settings.batch_tokens, device),
        learning_rate=defaults.learning_rate,
        seed=settings.seed,
        rows=len(train_rows),
        fingerprint=_digest(
            [fingerprint["sha256"], [r.ids for r in train_rows], settings.model_dump(mode="json")]
        ),
        target=case.task.target,
    )
    out.log(
        f"LoRA rank {settings.rank} on {source.name}, learning rate {plan.learning_rate:g}, {plan.batch_rows} rows a "
        f"step, at most {plan.epochs} epochs, on {device}"
    )
    return Job(
        source, fingerprint, cleaned, extras, task, chat, case, device, train_rows, validation_rows, test_rows,
        defaults, plan,
    )  # fmt: skip


def train(job: Job, trainer: Trainer, out: Output) -> None:
    """Run the plan under a progress bar; the validation rows are answered after each epoch."""
    plan = job.plan
    with out.progress() as progress:
        bar = progress.add_task("training", total=plan.epochs * trainer.steps_per_epoch, note="")

        def report(state: Any, rate: float) -> None:
            progress.update(
                bar,
                completed=state.epoch * trainer.steps_per_epoch + state.step,
                note=f"epoch {state.epoch + 1} loss {state.losses[-1]:.3f} {rate:.0f} tok/s",
            )

        def validate(net: Any) -> dict[str, Any]:
            figures = score_rows(job, net, job.cleaned.parts.validation, job.validation_rows)
            out.log(
                f"epoch {trainer.state.epoch + 1}: train loss {trainer.epoch_loss():.3f}, validation loss "
                f"{figures['loss']:.3f}, {job.task.metric} {figures['score']:.3f}"
            )
            return figures

        state = trainer.run(validate, report, save_seconds=SAVE_SECONDS)
        progress.update(bar, total=len(state.losses), note=state.stopped)
    out.log(f"stopped: {state.stopped}; best epoch {state.best_epoch + 1}")


def score_rows(
    job: Job, net: Any, rows: Sequence[Example], encoded: Sequence[Encoded], keep: list[str] | None = None
) -> dict[str, Any]:
    """Loss, and the task's scores of really generated answers, which `keep` receives."""
    from tune.generate import answers
    from tune.train import mean_loss

    task = job.task
    texts = answers(net, job.chat, [request(r, task) for r in rows], max_tokens=task.max_answer_tokens or 64)
    if keep is not None:
        keep.extend(texts)
    return {
        "loss": mean_loss(net, encoded, job.plan.capacity, job.device),
        **task.scores([r.answer or "" for r in rows], texts),
    }


def write_parts(work: Path, job: Job, net: Any) -> None:
    """What was trained, the split and the task."""
    net.save_pretrained(work / "adapter", safe_serialization=True)
    (work / "adapter" / "README.md").unlink(missing_ok=True)
    _adapter_base(work / "adapter" / "adapter_config.json", job.source)
    for name in ("train", "validation", "test"):
        write_jsonl(work / "splits" / f"{name}.jsonl", [e.row() for e in getattr(job.cleaned.parts, name)])
    write_text(work / "task.json", job.task.model_dump_json(indent=2) + "\n")


def describe(job: Job, trainer: Trainer, test: dict[str, Any]) -> dict[str, Any]:
    """The content of `metrics.json`."""
    state = trainer.state
    return {
        "task": job.task.name,
        "base": job.source.name,
        "method": job.case.tune.method,
        "stopped": state.stopped,
        "best_epoch": state.best_epoch + 1,
        "epochs": len(state.history),
        "test": test,
        "history": state.history,
        "losses": state.losses,
        "trained_tokens": state.tokens,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "adapter_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "rows": {n: len(getattr(job.cleaned.parts, n)) for n in ("train", "validation", "test")},
        "contamination": job.cleaned.report(),
        "test_read": "once, after the best epoch was chosen on validation",
    }


def configuration(job: Job) -> dict[str, Any]:
    """What the manifest records under `config`."""
    import torch

    return {
        "rows": job.extras.record,
        "base": job.fingerprint,
        "task": job.task.model_dump(),
        "tune": job.case.tune.model_dump(mode="json"),
        "defaults": {
            **job.defaults.reasons,
            "learning_rate": job.defaults.learning_rate,
            "batch_rows": job.defaults.batch_rows,
        },
        "device": job.device,
        "threads": torch.get_num_threads(),
    }


def _adapter_base(path: Path, source: Source) -> None:
    """Name the base by its name, not by a path of this machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.name
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
