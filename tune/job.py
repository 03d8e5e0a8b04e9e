"""A tuning run before a weight is loaded: rows as token ids, settings with reasons, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune import processes
from tune.contamination import Cleaned
from tune.mix import Extras, add_extras, rehearsal_share
from tune.processes import World
from tune.prove import prove_template, rows_to_prove
from unshot.case import Case
from unshot.console import Output
from unshot.contracts.manifest import BaseModel
from unshot.contracts.task import Task
from unshot.data.files import json_digest
from unshot.data.load import shown
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Message
from unshot.errors import InputError
from unshot.methods import METHODS
from unshot.models import Source
from unshot.text.chat import Chat, Encoded, load_tokenizer

if TYPE_CHECKING:
    from tune.base import Shape
    from tune.defaults import Defaults
    from tune.distil import Teaching
    from tune.memory import Estimate, Load
    from tune.train import TrainConfig


@dataclass(frozen=True)
class Options:
    """What a run does beside training: it does not change the model."""

    dry_run: bool = False
    learning_curve: bool = False
    report_to: str | None = None
    log_dir: Path | None = None
    fsdp: bool = False


def start(case: Case, options: Options) -> World:
    """Refuse what cannot run here, before any work, and join the launcher's other processes."""
    from tune.model import check_settings, pick_device
    from tune.reporting import wanted

    method = METHODS[case.tune.method]
    check_settings(case.tune)
    if case.tune.teacher not in (None, "self"):
        raise InputError(
            f"--teacher {case.tune.teacher}: tune takes `self` (the base with the long prompt); for another model run "
            f"`unshot data label INPUTS --teacher {case.tune.teacher}` and tune on what it wrote"
        )
    if case.tune.teacher is not None and (case.tune.init == "pissa" or case.tune.loss_on == "all"):
        raise InputError("--teacher goes without --init pissa and without --loss-on all; leave it out")
    if case.tune.on_policy and (case.tune.teacher is None or not method.low_rank or case.tune.epochs < 2):
        able = ", ".join(name for name, known in METHODS.items() if known.low_rank)
        raise InputError(
            f"--on-policy goes with --teacher self, --method {able}, and at least two epochs: the student is sampled "
            "from the second one on"
        )
    method.check(pick_device())
    if method.prefer and (case.tune.teacher is not None or case.tune.init == "pissa"):
        raise InputError(f"--method {method.name} goes without --teacher and --init pissa; leave it out")
    wanted(options.report_to)
    world = processes.join(fsdp=options.fsdp)
    if method.prefer and world.size > 1:
        raise InputError(f"--method {method.name} runs in one process; start it without torchrun")
    if case.tune.on_policy and world.size > 1:
        raise InputError("--on-policy runs in one process; leave it out, or start one")
    if options.fsdp and world.size == 1:
        raise InputError(
            "--fsdp shares a model between processes; start them with torchrun or accelerate launch"
        )
    if world.fsdp and (not method.shards or options.learning_curve):
        able = ", ".join(name for name, known in METHODS.items() if known.shards)
        raise InputError(f"FSDP goes with {able}, and without --learning-curve; leave it out")
    return world


@dataclass
class Job:
    """A run before a weight is loaded: its parts as rows and as token ids, its settings."""

    source: Source
    fingerprint: BaseModel
    cleaned: Cleaned
    task: Task
    chat: Chat
    case: Case
    device: str
    train_rows: list[Encoded]
    validation_rows: list[Encoded]
    test_rows: list[Encoded]
    defaults: Defaults
    config: TrainConfig
    world: World
    bf16: bool
    extras: Extras
    shape: Shape
    template: list[str]
    teaching: Teaching | None = None
    memory: Estimate | None = None
    # Whether rows may be packed: what `tune.packing` found.
    packing: str = "to be shown at the start of the run"
    # Faster kernels that the model was loaded with (`tune.kernels`).
    kernels: list[str] = field(default_factory=list)

    @property
    def taught(self) -> bool:
        """Whether a model gave answers of the test rows that no person has judged."""
        return self.teaching is not None or any(row.by_teacher for row in self.cleaned.parts.test)


def request(example: Example, task: Task) -> list[Message]:
    """The tuned model's request for a row: the instruction as system message, then the row's own messages."""
    return Prompt(system=task.instruction).request(example)


def encode_rows(
    rows: Sequence[Example],
    task: Task,
    chat: Chat,
    max_length: int,
    teaching: Teaching | None = None,
    *,
    context: int | None = None,
    every: bool = False,
) -> list[Encoded]:
    """Token ids of rows, the answer's from the teacher if there is one; `InputError` for a row that is too long.

    `context` is what the model holds; with `every` the earlier answers of a conversation carry loss too.
    """
    encoded = []
    for row in rows:
        where = row.where or f"line {row.line}"
        try:
            if teaching is None:
                item = chat.encode(request(row, task), row.answer or "", every=every)
            else:
                item = teaching.taught(row, chat.prompt_ids(request(row, task)))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if context is not None and len(item.ids) > context:
            raise InputError(
                f"{where}: {len(item.ids)} tokens, longer than the model's context of {context}; shorten the "
                "row or leave it out"
            )
        if len(item.ids) > max_length:
            raise InputError(
                f"{where}: {len(item.ids)} tokens, more than max_length {max_length}; shorten the row or "
                "raise --max-length"
            )
        encoded.append(item)
    return encoded


def prepare(
    data: Path,
    source: Source,
    cleaned: Cleaned,
    task: Task,
    case: Case,
    out: Output,
    world: World,
    teaching: Teaching | None = None,
) -> Job:
    """Token ids of every row, defaults and plan; sets the task's `max_answer_tokens`."""
    from transformers.utils import logging

    from tune import defaults as choices
    from tune.base import inspect_base
    from tune.loss import with_virtual
    from tune.model import pick_device, uses_bf16
    from tune.train import TrainConfig

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings, parts = case.tune, cleaned.parts
    device = pick_device()
    if device == "cuda" and world.size > 1:
        device = f"cuda:{world.local}"
    bf16 = uses_bf16(settings, device)
    fingerprint = source.fingerprint()
    shape = inspect_base(source, settings.method)
    chat = Chat(load_tokenizer(source.path, settings.chat_template))
    extras = add_extras(parts.train, settings)
    first = rows_to_prove(extras.train)
    template = prove_template(chat, source, first, [request(row, task) for row in first])
    for note in template if world.first else []:
        out.warn(f"chat template: {note}")

    def encoded(rows: Sequence[Example]) -> list[Encoded]:
        every = settings.loss_on == "all"
        return encode_rows(
            rows, task, chat, settings.max_length, teaching, context=shape.context, every=every
        )

    train_rows, validation_rows, test_rows = map(encoded, (extras.train, parts.validation, parts.test))
    example = shown(parts.train[0], Prompt(system=task.instruction), chat.render)
    out.log(f"an example row, as the model sees it:\n{example}")
    longest = max(r.answer_length for r in (*train_rows, *validation_rows, *test_rows))
    task.max_answer_tokens = max(8, round(1.5 * longest))
    train_rows += encode_rows(extras.general, Task(), chat, settings.max_length, context=shape.context)
    if METHODS[settings.method].virtual:
        train_rows, validation_rows, test_rows = (
            with_virtual(rows, settings.virtual_tokens) for rows in (train_rows, validation_rows, test_rows)
        )
    defaults = choices.choose_defaults(settings, shape, len(train_rows))
    config = TrainConfig(
        epochs=settings.epochs,
        patience=settings.patience,
        batch_rows=defaults.batch_rows,
        capacity=choices.pack_capacity(
            settings.batch_tokens, device, apart=world.size == 1 and not METHODS[settings.method].virtual
        ),
        learning_rate=defaults.learning_rate,
        schedule=settings.schedule,
        seed=settings.seed,
        rows=len(train_rows),
        fingerprint=json_digest(
            [
                fingerprint.sha256,
                [[r.ids for r in rows] for rows in (train_rows, validation_rows)],
                settings.plain(),
                task.plain(),
                bf16,
            ]
        ),  # what chooses the best epoch is part of a training too
        target=case.task.target,
    )
    out.log(
        f"{settings.method} on {source.name}, learning rate {config.learning_rate:g}, {config.batch_rows} rows a step, "
        f"at most {config.epochs} epochs, on {device} in {'bf16' if bf16 else 'fp32'}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )
    for key, reason in defaults.reasons.items():
        value = f"{getattr(defaults, key)}; " if hasattr(defaults, key) else ""
        out.detail(f"{key}: {value}{reason}")
    return Job(
        source, fingerprint, cleaned, task, chat, case, device, train_rows, validation_rows, test_rows, defaults,
        config, world, bf16, extras, shape, template, teaching,
    )  # fmt: skip


def load_of(job: Job) -> Load:
    """What the run asks of memory."""
    from tune.batches import batches
    from tune.generate import BATCH
    from tune.memory import Load

    steps = [
        packs
        for epoch in range(min(job.config.epochs, 3))
        for packs in batches(
            job.train_rows,
            batch_rows=job.config.batch_rows,
            capacity=job.config.capacity,
            seed=job.config.seed,
            epoch=epoch,
        )
    ]
    largest = max((p for packs in steps for p in packs), key=lambda p: len(p.ids))
    answered = [*job.validation_rows, *job.test_rows]
    return Load(
        tokens=len(largest.ids),
        targets=max(len(p.targets) for packs in steps for p in packs),
        packs=max(len(packs) for packs in steps),
        prompt=max(r.prompt_length for r in answered) + (job.task.max_answer_tokens or 64),
        batch=min(BATCH, len(job.test_rows)),
    )


def settle_memory(job: Job, out: Output) -> Job:
    """Decide on gradient checkpointing: as given, else where the estimate without it exceeds what is free.

    The first process decides for all.
    """
    from tune.memory import KEPT, estimate, free_bytes, lean_malloc, surely_fits

    settings, load = job.case.tune, load_of(job)
    if processes.share(surely_fits(job.source, job.shape, load, job.device), job.world):
        return job
    asked = bool(settings.gradient_checkpointing)
    memory = estimate(job.source, job.shape, settings, load, job.device, checkpointing=asked)
    free = processes.share(free_bytes(job.device), job.world)
    if settings.gradient_checkpointing is None and memory.training > 0.9 * free:
        out.log(f"estimated {memory.peak / 1e9:.2f} GB, {free / 1e9:.2f} GB free: gradient checkpointing on")
        memory = estimate(job.source, job.shape, settings, load, job.device, checkpointing=True)
        case = job.case.changed(tune=settings.changed(gradient_checkpointing=True))
        job = replace(job, case=case)
    if job.device == "cpu" and KEPT * memory.peak > free:
        lean_malloc()
        out.detail("memory is short: freed blocks go back to the system at once")
    if memory.peak > 0.95 * free and job.world.first:
        out.warn(
            f"estimated peak {memory.peak / 1e9:.2f} GB, {free / 1e9:.2f} GB free; choose a smaller base, --method "
            "lora or qlora, or a shorter --max-length"
        )
    return replace(job, memory=memory)


def forecast(job: Job) -> dict[str, Any]:
    """What a run would do: settings with their reasons, and its memory."""
    from tune.memory import estimate, free_bytes, meta_model
    from tune.model import untouched

    settings = job.case.tune
    memory = estimate(
        job.source,
        job.shape,
        settings,
        load_of(job),
        job.device,
        checkpointing=bool(settings.gradient_checkpointing),
    )
    notes = list(job.template)
    if share := rehearsal_share(settings):
        notes.append(f"not counted here: rehearsal rows, {share:.0%} of the training rows (--rehearsal)")
    if METHODS[settings.method].low_rank and settings.layers is None:
        notes += [left] if (left := untouched(meta_model(job.source, settings, job.device))) else []
    return {
        "notes": notes,
        "base": job.source.name,
        "method": settings.method,
        "plan": {k: v for k, v in vars(job.config).items() if k != "fingerprint"},
        "reasons": job.defaults.reasons | {"packing": job.packing, "base": job.shape.words},
        "device": job.device,
        "steps": job.config.epochs * -(-job.config.rows // job.config.batch_rows),
        "train_tokens": sum(len(r.ids) for r in job.train_rows),
        "memory": {**memory.as_dict(), "free": free_bytes(job.device)},
        "memory_terms": memory.lines(),
    }
