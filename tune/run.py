"""`unshot tune` from data file to run directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune import processes
from tune.assess.card import card
from tune.assess.rehearsal import rehearse
from tune.assess.run import assess, general_before
from tune.contamination import Cleaned
from tune.data.split import Loaded, Splitting, announce_parts, class_of, load_parts, name_file
from tune.job import Job, Options, forecast, prepare, settle_memory, start
from tune.meaning import by_meaning
from tune.processes import World
from tune.score import answer_rows, score_rows
from tune.teach import bare_figures, prompt_worth, teach
from unshot.case import Case, TuneSettings
from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, Score, describe_data, staged
from unshot.contracts.task import Task, derive_task
from unshot.data.files import json_digest, write_text
from unshot.data.load import load_rows
from unshot.data.rows import Example, RowOptions, write_jsonl
from unshot.data.seal import record_reading
from unshot.errors import InputError
from unshot.methods import METHODS
from unshot.models import resolve
from unshot.text.chat import Encoded, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from tune.reporting import Reporter
    from tune.train import TrainConfig, Trainer

# The trained parameters before training, kept for the learning curve.
INITIAL = "initial.safetensors"
# The chat template of a run where it is not the base's own.
TEMPLATE = "chat_template.jinja"
# Seconds between checkpoints within an epoch.
SAVE_SECONDS = float(os.environ.get("UNSHOT_SAVE_SECONDS", "30"))


def tune_run(
    data: Path,
    base: str,
    final: Path,
    case: Case,
    out: Output,
    *,
    overwrite: bool = False,
    rows_as: RowOptions | None = None,
    splitting: Splitting | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Split, train, evaluate and write the run directory `final`; return its result.

    Raises `InputError` for bad data or base. A killed run is resumed by the same call. Under `torchrun` every
    process makes this call, and the first one writes.
    """
    options, splitting = options or Options(), splitting or Splitting()
    world = start(case, options)
    from tune.preference import REJECTED, check_rows

    if not world.first:
        out = Output(json_mode=out.json_mode, verbosity=-1)
    long = case.long_prompt()

    def read(path: Path) -> list[Example]:
        return load_rows(
            path,
            rows_as,
            out if world.first else None,
            prompt=long if long.given else None,
            instruction=case.task.instruction,
            used=(splitting.group_by, splitting.time, REJECTED if METHODS[case.tune.method].prefer else None),
            answers=case.tune.teacher is None,
            count=token_counter(base, case.tune.chat_template, out),
        )

    loaded = load_parts(data, splitting, read)
    if world.first:  # which may have to convert or fetch it
        resolve(base, out)
    processes.share(None, world)
    source = resolve(base)
    teaching = None
    if case.tune.teacher is not None:
        teaching = teach(source, long, loaded.all, case, out)
        loaded = replace(
            loaded,
            rows=teaching.answered(loaded.rows),
            own={name: teaching.answered(rows) for name, rows in loaded.own.items()},
        )
    if METHODS[case.tune.method].prefer:
        check_rows(loaded.rows, case.tune.method)
    data = loaded.data
    try:
        task = derive_task(case.task, loaded.all, out.log, embedder=case.tune.embedder)
        cleaned = separate_split(loaded, task, case.tune, out)
    except InputError as error:
        raise InputError(name_file(data, error)) from None
    if world.first:
        announce_parts(data, cleaned, task, out)
    job = prepare(data, source, cleaned, task, case, out, world, teaching)
    if options.dry_run:
        return forecast(job)
    job = settle_memory(job, out)
    folder = staged(final, overwrite=overwrite, resume=True) if world.first else nullcontext(final)
    with folder as work:
        result = _run_in(work, loaded, job, options, final, out)
        processes.leave(world)
    return result


def token_counter(base: str, template: str | None, out: Output) -> Callable[[str], int]:
    """Tokens of a text with the base model's tokenizer, which is loaded when the first text comes."""
    loaded: list[Tokenizer] = []

    def count(text: str) -> int:
        if not loaded:
            loaded.append(load_tokenizer(resolve(base, out, need_weights=False).path, template))
        return len(loaded[0].ids(text))

    return count


def separate_split(loaded: Loaded, task: Task, settings: TuneSettings, out: Output) -> Cleaned:
    """The parts (by default 80/10/10 by class) without near-duplicates across them."""
    cleaned, _ = loaded.divide(
        stratum=class_of(task),
        seed=settings.seed,
        meaning=lambda texts: by_meaning(texts, settings.embedder, out=out),
    )
    return cleaned


def _run_in(
    work: Path, loaded: Loaded, job: Job, options: Options, final: Path, out: Output
) -> dict[str, Any]:
    from tune.loss import core
    from tune.model import checkpoint_layers, prepare_model, round_weights, save_tuned, untouched
    from tune.preference import prefer
    from tune.reporting import Reporter, wanted

    settings, cleaned, first = job.case.tune, job.cleaned, job.world.first
    manifest = Manifest(
        "tune", seeds={"seed": settings.seed}, inputs=[describe_data(path) for path in loaded.files]
    )
    with manifest.timed("load"):
        base, kernels = load_with_kernels(job, out)
        net = prepare_model(base, settings)
        if settings.gradient_checkpointing:
            checkpoint_layers(net)
        job = replace(settle_packing(job, net, out), kernels=kernels)
    if (
        METHODS[settings.method].low_rank
        and settings.layers is None
        and first
        and (left := untouched(core(net)))
    ):
        out.warn(left)
    before = general_before(job, net)
    # A fresh adapter changes nothing yet: this is the base.
    bare = bare_figures(job, net) if job.teaching else None
    job = rehearse(job, net, work, out)
    trainer = make_trainer(job, net, work)
    if settings.on_policy:
        from tune.on_policy import OnPolicy

        trainer.refresh = OnPolicy(job, net, work).rows
    if options.learning_curve:
        trainer.keep(work / INITIAL)
    if trainer.resume():
        out.log(f"going on from epoch {trainer.state.epoch + 1}, step {trainer.state.step}")
    names = wanted(options.report_to) if first else []
    logs = options.log_dir or final.resolve().parent / f"{final.name}-logs"
    reporter = Reporter(
        names, logs, final.name, {**settings.plain(), "learning_rate": job.config.learning_rate}
    )
    with manifest.timed("train"):
        train(job, trainer, out, reporter)
    curve = None
    if options.learning_curve:
        with manifest.timed("learning curve"):
            curve = measure_curve(job, net, trainer, work, out)
    elif trainer.state.stopped.startswith("target"):
        out.log(
            "the target is met; with --learning-curve a run also says what the next point would likely cost"
        )
    trainer.load_best()
    preference = None
    if METHODS[settings.method].prefer:
        with manifest.timed("preference"):
            preference = prefer(job, net, trainer, out)
    if METHODS[settings.method].whole:
        net = round_weights(net, job.source, bf16=job.bf16)
    # Recorded before the rows are answered: a reading that breaks off counts.
    seal = record_reading(cleaned.parts.test, "tune", final) if first else None
    if seal and (warning := seal.warning()):
        out.warn(warning)
    with manifest.timed("test"):
        answers: list[str] = []
        test = score_rows(job, net, cleaned.parts.test, job.test_rows, answers)
    with manifest.timed("gates"):
        gates = assess(job, net, test, answers, before, out)
    result = describe(job, trainer, test) | {"gates": [gate.plain() for gate in gates]}
    if bare is not None:
        worth = prompt_worth(job, bare, bare_figures(job, net))
        result |= {"prompt_worth": worth.plain(), "gap_closed": worth.gap_closed}
    result |= {"split": loaded.splitting.record(), "test_seal": vars(seal) if seal else None}
    if curve is not None:
        result["learning_curve"] = curve
    if preference is not None:
        result["preference"] = vars(preference)
    # With FSDP the parts of the model come together in every process, though only the first one writes.
    net = gathered(net, job.world)
    if not first:
        return result
    # The working files of a resumed run are no part of the artifact.
    for entry in work.iterdir():
        _remove(entry)
    save_tuned(net, work, job.source, settings.method, job.chat)
    save_template(work, job)
    write_parts(work, job)
    write_text(work / "metrics.json", dumps(result) + "\n")
    manifest.config = configuration(job)
    manifest.base, manifest.task, manifest.tune = job.fingerprint, job.task, job.case.tune.placed()
    manifest.score = Score(**{k: result["test"][k] for k in Score.__struct_fields__})
    manifest.gates = gates
    manifest.result = {k: v for k, v in result.items() if k not in ("history", "losses")}
    write_text(work / "README.md", card(final.name, result, manifest, job.task, gates))
    manifest.finish(work)
    return {**result, "timings": manifest.timings}


def load_with_kernels(job: Job, out: Output) -> tuple[Any, list[str]]:
    """The base with the faster kernels that are installed here and say the same as torch's; what they are."""
    from tune.kernels import LIGER, adopt, installed
    from tune.model import load_base

    names, method = installed(job.device), job.case.tune.method
    base = load_base(job.source, job.device, bf16=job.bf16, method=method)
    taken, wrong = adopt(base, names, job.device, bf16=job.bf16)
    if wrong is not None:
        base = load_base(job.source, job.device, bf16=job.bf16, method=method)
        names = [name for name in names if name != LIGER]
        taken, _ = adopt(base, names, job.device, bf16=job.bf16)
        out.warn(f"{wrong} is installed and changes this model's logits; it is not used")
    if taken:
        out.log(f"kernels: {', '.join(taken)}, equal to torch's own on this model")
    return base, taken


def settle_packing(job: Job, net: Any, out: Output) -> Job:
    """Pack rows where the model is shown to keep them apart, else train them one by one, and say so."""
    from tune.loss import core
    from tune.packing import prove

    problem = prove(core(net), job.device, bf16=job.bf16)
    if problem is None:
        return replace(
            job, packing="rows share sequences; on this model they are blind to each other (shown)"
        )
    if job.world.first:
        out.warn(f"rows are trained one by one and not packed: {problem}")
    return replace(job, packing=f"rows one by one: {problem}", config=replace(job.config, capacity=1))


def save_template(work: Path, job: Job) -> None:
    """Keep the chat template of a run that is not the base's own."""
    template = job.chat.tokenizer.template
    if job.template or job.case.tune.chat_template:
        write_text(work / TEMPLATE, template.source)


def make_trainer(
    job: Job, net: Any, work: Path, rows: list[Encoded] | None = None, config: TrainConfig | None = None
) -> Trainer:
    """A trainer of the job's rows and settings, or of others."""
    from tune.train import Trainer

    return Trainer(
        net, rows or job.train_rows, config or job.config, work, job.device, bf16=job.bf16, world=job.world
    )


def train(job: Job, trainer: Trainer, out: Output, reporter: Reporter | None = None) -> None:
    """Run the training under a progress bar; the validation rows are answered after each epoch."""
    from tune.train import DIVERGED

    config = trainer.config
    if reporter:
        reporter.begin(trainer.model)
    with out.progress() as progress:
        bar = progress.add_task("training", total=config.epochs * trainer.steps_per_epoch, note="")

        def report(state: Any, rate: float) -> None:
            done = state.epoch * trainer.steps_per_epoch + state.step
            last = f" {job.task.metric} {state.history[-1]['score']:.3f}" if state.history else ""
            progress.update(
                bar,
                completed=done,
                note=f"epoch {state.epoch + 1} loss {state.losses[-1]:.3f}{last} {rate:,.0f} tok/s",
            )
            if reporter:
                place = done / trainer.steps_per_epoch
                reporter.log({"loss": state.losses[-1], "tokens_per_second": rate}, done, place)

        def validate(net: Any) -> dict[str, Any]:
            figures = score_rows(job, net, job.cleaned.parts.validation, job.validation_rows)
            out.log(
                f"epoch {trainer.state.epoch + 1}: train loss {trainer.epoch_loss():.3f}, validation loss "
                f"{figures['loss']:.3f}, {job.task.metric} {figures['score']:.3f}"
            )
            if reporter:
                place = trainer.state.epoch + 1
                scalars = {"eval_loss": figures["loss"], f"eval_{job.task.metric}": figures["score"]}
                reporter.log(scalars, place * trainer.steps_per_epoch, place)
            return figures

        state = trainer.run(validate, report, save_seconds=SAVE_SECONDS)
        progress.update(bar, total=len(state.losses), note=state.stopped)
    if reporter:
        reporter.end()
    if DIVERGED in state.stopped and job.world.first:
        out.warn(f"stopped: {state.stopped}; the last good state is kept")
    else:
        out.log(f"stopped: {state.stopped}; best epoch {state.best_epoch + 1}")


def measure_curve(job: Job, net: Any, trainer: Trainer, work: Path, out: Output) -> dict[str, Any] | None:
    """Train on smaller parts of the rows from the same beginning, and fit the learning curve; for the best epochs.

    None where the rows are too few for a part.
    """
    from tune.curve import MINIMUM, Point, learning_curve, parts, sentence

    # General rows are no examples of the task: each part takes its share of them along.
    task_rows, general = job.train_rows[: len(job.extras.train)], job.train_rows[len(job.extras.train) :]
    counts = parts(len(task_rows))
    if not counts:
        if job.world.first:
            out.warn(f"no learning curve: half of the training rows must be at least {MINIMUM}")
        return None
    validation = job.cleaned.parts.validation
    # Rows in a fixed random order, so that each part holds the one before.
    order = sorted(range(len(task_rows)), key=lambda i: json_digest([job.config.seed, task_rows[i].ids]))
    trainer.optimizer.state.clear()  # the smaller trainings have their own
    points = []
    for count in counts:
        rows = [*(task_rows[i] for i in order[:count]), *general[: round(len(general) * count / len(order))]]
        config = replace(
            job.config, rows=len(rows), target=None, fingerprint=f"{job.config.fingerprint} {count} rows"
        )
        smaller = make_trainer(job, net, work / f"curve-{count}", rows, config)
        if job.world.first:
            smaller.work.mkdir(exist_ok=True)
        smaller.restart(work / INITIAL)
        out.log(f"learning curve: {count} of {len(order)} training rows")
        smaller.resume()
        train(job, smaller, out)
        smaller.load_best()
        points.append(Point(count, answer_rows(job, net, validation)))
    trainer.load_best()
    points.append(Point(len(order), answer_rows(job, net, validation)))
    truth, requests = [r.answer or "" for r in validation], [r.text for r in validation]
    curve = learning_curve(job.task, truth, points, requests=requests, seed=job.config.seed)
    out.log(sentence(curve, job.case.plan.example_cost))
    return curve


def gathered(net: Any, world: World) -> Any:
    """The model with whole tensors again where FSDP had cut them."""
    if not world.fsdp:
        return net
    import torch

    for module in net.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(
                    processes.whole(value.detach()), requires_grad=value.requires_grad
                )
    return net


def write_parts(work: Path, job: Job) -> None:
    """The split and the task."""
    for name in ("train", "validation", "test"):
        write_jsonl(work / "splits" / f"{name}.jsonl", [e.row() for e in getattr(job.cleaned.parts, name)])
    write_text(work / "task.json", job.task.to_json(indent=2) + "\n")


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
        "trained_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "rows": {n: len(getattr(job.cleaned.parts, n)) for n in ("train", "validation", "test")},
        "contamination": job.cleaned.report(),
        "reference": "teacher" if job.taught else "data",
        "test_read": "once, after the best epoch was chosen on validation",
    }


def configuration(job: Job) -> dict[str, Any]:
    """What the manifest records under `config`."""
    import torch

    return {
        "rows": job.extras.record,
        "defaults": {
            **job.defaults.reasons,
            "learning_rate": job.defaults.learning_rate,
            "batch_rows": job.defaults.batch_rows,
        },
        "memory_estimate": job.memory.as_dict() if job.memory else None,
        "processes": {"count": job.world.size, "fsdp": job.world.fsdp},
        "packing": job.packing,
        "kernels": job.kernels,
        "chat_template": job.template,
        "device": job.device,
        "dtype": "bf16" if job.bf16 else "fp32",
        "threads": torch.get_num_threads(),
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
