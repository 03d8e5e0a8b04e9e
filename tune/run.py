"""`unshot tune` from data file to run directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune.assess.card import card
from tune.assess.run import assess
from tune.contamination import Cleaned, separate
from tune.extras import add_extras
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


def _run_in(
    work: Path,
    data: Path,
    source: Source,
    cleaned: Cleaned,
    task: Task,
    case: Case,
    out: Output,
    final_name: str,
) -> dict[str, Any]:
    from tune import model as models

    parts = cleaned.parts

    settings = case.tune
    device = models.pick_device()

    import torch
    from transformers.utils import logging

    from tune.train import Plan, Trainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    manifest = Manifest("tune", seeds={"seed": settings.seed})
    manifest.inputs = [describe_file(data)]
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
    with manifest.timed("load"):
        net = models.add_adapter(models.load_base(source, device), settings)
    trainer = Trainer(net, train_rows, plan, work, device)
    if trainer.resume():
        out.log(f"going on from epoch {trainer.state.epoch + 1}, step {trainer.state.step}")

    with out.progress() as progress:
        bar = progress.add_task("training", total=plan.epochs * trainer.steps_per_epoch, note="")

        def report(state: Any, rate: float) -> None:
            progress.update(
                bar,
                completed=state.epoch * trainer.steps_per_epoch + state.step,
                note=f"epoch {state.epoch + 1} loss {state.losses[-1]:.3f} {rate:.0f} tok/s",
            )

        def validate(net: Any) -> dict[str, Any]:
            figures = _evaluate(net, parts.validation, validation_rows, task, chat, plan.capacity, device)
            out.log(
                f"epoch {trainer.state.epoch + 1}: train loss {trainer.epoch_loss():.3f}, validation loss "
                f"{figures['loss']:.3f}, {task.metric} {figures['score']:.3f}"
            )
            return figures

        with manifest.timed("train"):
            state = trainer.run(validate, report, save_seconds=SAVE_SECONDS)
        progress.update(bar, total=len(state.losses), note=state.stopped)
    out.log(f"stopped: {state.stopped}; best epoch {state.best_epoch + 1}")
    trainer.load_best()
    with manifest.timed("test"):
        texts: list[str] = []
        test = _evaluate(net, parts.test, test_rows, task, chat, plan.capacity, device, texts)
    with manifest.timed("gates"):
        gates = assess(
            net, source, chat, task, settings, target=plan.target, test=test, rows=parts.test,
            requests=[request(r, task) for r in parts.test], answers=texts, capacity=plan.capacity, device=device,
            out=out,
        )  # fmt: skip
    # The working files of a resumed run are no part of the artifact.
    for entry in work.iterdir():
        _remove(entry)
    net.save_pretrained(work / "adapter", safe_serialization=True)
    (work / "adapter" / "README.md").unlink(missing_ok=True)
    _adapter_base(work / "adapter" / "adapter_config.json", source)
    for name in ("train", "validation", "test"):
        write_jsonl(work / "splits" / f"{name}.jsonl", [e.row() for e in getattr(parts, name)])
    write_text(work / "task.json", task.model_dump_json(indent=2) + "\n")
    result = {
        "task": task.name,
        "base": source.name,
        "method": settings.method,
        "stopped": state.stopped,
        "best_epoch": state.best_epoch + 1,
        "epochs": len(state.history),
        "test": test,
        "history": state.history,
        "losses": state.losses,
        "trained_tokens": state.tokens,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "adapter_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "rows": {n: len(getattr(parts, n)) for n in ("train", "validation", "test")},
        "contamination": cleaned.report(),
        "gates": [gate.model_dump(mode="json") for gate in gates],
        "test_read": "once, after the best epoch was chosen on validation",
    }
    write_text(work / "metrics.json", dumps(result) + "\n")
    manifest.config = {
        "rows": extras.record,
        "base": fingerprint,
        "task": task.model_dump(),
        "tune": settings.model_dump(mode="json"),
        "defaults": {
            **defaults.reasons,
            "learning_rate": defaults.learning_rate,
            "batch_rows": defaults.batch_rows,
        },
        "device": device,
        "threads": torch.get_num_threads(),
    }
    manifest.result = {k: v for k, v in result.items() if k not in ("history", "losses")}
    write_text(work / "README.md", card(final_name, result, manifest.config, task, gates))
    manifest.write(work)
    return {**result, "timings": manifest.timings}


def _evaluate(
    net: Any,
    rows: Sequence[Example],
    encoded: Sequence[Encoded],
    task: Task,
    chat: Chat,
    capacity: int,
    device: str,
    keep: list[str] | None = None,
) -> dict[str, Any]:
    """Loss, and the task's scores of really generated answers; `keep` receives the answers."""
    from tune.generate import answers
    from tune.train import mean_loss

    texts = answers(net, chat, [request(r, task) for r in rows], max_tokens=task.max_answer_tokens or 64)
    if keep is not None:
        keep.extend(texts)
    return {
        "loss": mean_loss(net, encoded, capacity, device),
        **task.scores([r.answer or "" for r in rows], texts),
    }


def _adapter_base(path: Path, source: Source) -> None:
    """Name the base by its name, not by a path of this machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.name
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
