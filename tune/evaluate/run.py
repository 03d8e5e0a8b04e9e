"""A run directory opened, its sealed test read on the record, its answers generated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from msgspec import structs

from tune import near
from tune.evaluate.review import SHEETS, draw, shown, write_sheet
from tune.evaluate.scores import compare, figures
from tune.job import request
from tune.meaning import by_meaning
from tune.model import has_tuned
from unshot.case import TuneSettings
from unshot.console import Output
from unshot.contracts.evaluation import Evaluation, Reading, Seen, Sheet, System, Unseen
from unshot.contracts.manifest import Manifest, describe_data, describe_file, read_manifest, sha256, staged
from unshot.contracts.task import Task, hold_metric, read_task
from unshot.data import seal
from unshot.data.files import append_after
from unshot.data.load import load_rows
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, RowOptions, read_examples, write_jsonl
from unshot.engines.embedder import find_embedder
from unshot.errors import InputError, OutsideError
from unshot.metrics.answers import INVALID, Tools
from unshot.metrics.judge import Judge, Pair, judge_pairs
from unshot.metrics.registry import metric as find_metric
from unshot.metrics.scores import score_interval
from unshot.models import Source, resolve
from unshot.text.chat import Chat, load_tokenizer, run_template

READINGS = "readings.jsonl"


@dataclass(frozen=True)
class Run:
    """A directory of `unshot tune` with its base model."""

    path: Path
    base: Source
    task: Task
    tune: TuneSettings


def open_run(path: Path, base: str | None, out: Output) -> Run:
    """Check a run directory and find its base; `InputError` where either is not what was tuned."""
    manifest = read_manifest(path, stage="tune")
    recorded = manifest.base
    if recorded is None or not recorded.sha256 or not has_tuned(path):
        raise InputError(
            f"{path}: the run has no tuned model or no record of its base; run `unshot tune` again"
        )
    source = resolve(base or recorded.location(), out)
    for name, digest in recorded.sha256.items():
        if not (source.path / name).is_file() or sha256(source.path / name) != digest:
            raise InputError(
                f"{source.path / name}: not the file that {path} was tuned on; give that base with --base "
                f"(it was {recorded.name})"
            )
    return Run(path, source, read_task(path / "task.json"), manifest.tune or TuneSettings())


def record_reading(run: Run, data: Path, against: Path | None) -> Reading:
    """Append a reading to `readings.jsonl` in the run (not among its hashed files) and return it with its number.

    The run's own test split was first read by `unshot tune`, so that its readings here start at 2. Written
    before the rows are answered: a reading that breaks off counts. `OutsideError` where it cannot be written.
    """
    path = run.path / READINGS
    own = data.resolve() == (run.path / "splits" / "test.jsonl").resolve()
    digest = describe_data(data).sha256
    reading = Reading(
        reading=1 + own,
        data="splits/test.jsonl" if own else str(data),
        sha256=digest,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        compared_with=str(against) if against else None,
    )

    def numbered(lines: list[str]) -> str:
        reading.reading += sum(Reading.from_json(line).sha256 == digest for line in lines)
        return reading.to_json()

    try:
        append_after(path, numbered)
    except ValueError as error:
        raise InputError(f"{path}: not a list of readings ({error}); it was changed by hand") from None
    except OSError as error:
        raise OutsideError(
            f"{path}: the reading cannot be recorded ({error.strerror}), so none is done"
        ) from None
    return reading


def answer(run: Run, rows: Sequence[Example], out: Output) -> list[str]:
    """The tuned model's greedy answers, in order."""
    from tune.generate import answers
    from tune.model import load_tuned, pick_device, uses_bf16

    device = pick_device()

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bf16 = uses_bf16(run.tune, device)
    out.log(f"{run.path.name} answers on {device} in {'bf16' if bf16 else 'fp32'}")
    net = load_tuned(run.path, run.base, device, bf16=bf16, method=run.tune.method)
    chat = Chat(load_tokenizer(run.base.path, run_template(run.path)))
    with out.progress() as progress:
        bar = progress.add_task("answering", total=len(rows), note=run.path.name)
        return answers(
            net,
            chat,
            [request(row, run.task) for row in rows],
            max_tokens=run.task.max_answer_tokens or 64,
            progress=lambda n: progress.update(bar, advance=n),
        )


def seen_rows(run: Run, rows: Sequence[Example], embedder: str | None, out: Output) -> dict[int, Seen]:
    """Test rows with a near-duplicate among the run's training rows, by index.

    `by` is `text`, or `meaning` for paraphrases that an embedder finds.
    """
    train = read_examples(run.path / "splits" / "train.jsonl")
    found: dict[int, Seen] = {}

    def link(a: int, index: int, similarity: float, by: str) -> None:
        found[index] = Seen(rows[index].line, train[a].line, round(similarity, 3), by)

    # Training rows first, so that an equal text is always linked to one of them.
    pairs = near.similar_pairs([e.text for e in (*train, *rows)])
    for a, b, similarity in pairs:
        index = b - len(train)
        if a < len(train) <= b and (index not in found or similarity > found[index].similarity):
            link(a, index, similarity, "text")
    close = by_meaning([e.text for e in (*train, *rows)], embedder, out=out)
    for a, b, similarity in close.pairs if close else ():
        index = b - len(train)
        known = found.get(index)
        if a < len(train) <= b and (
            known is None or (known.by == "meaning" and similarity > known.similarity)
        ):
            link(a, index, similarity, "meaning")
    # A test row equal to an earlier one is linked to that, not to what both are like.
    for (a, b, _), equal in zip(pairs, pairs.equal, strict=True):
        if equal and a - len(train) in found:
            found[b - len(train)] = found[a - len(train)].changed(line=rows[b - len(train)].line)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Ask:
    """What `unshot eval` was asked for beside the run; see its options."""

    data: Path | None = None
    other: Path | None = None
    base: str | None = None
    final: Path | None = None
    overwrite: bool = False
    seed: int = 0
    # How DATA is read, and the long prompt that its rows may hold.
    rows_as: RowOptions | None = None
    prompt: Prompt | None = None
    # None: the task's own.
    metric: str | None = None
    embedder: str | None = None
    # Compares the answers of up to `judge_rows` rows with the other run's (else with the references).
    judge: Judge | None = None
    judge_rows: int = 50
    # The sheet to draw for people.
    review: Path | None = None
    review_rows: int = 50


def evaluate_run(path: Path, out: Output, ask: Ask) -> Evaluation:
    """Score a run (and another one on the same rows); `ask.final` receives scores and answers. Raises `InputError`."""
    if ask.review is not None and ask.review.suffix.lower() not in SHEETS:
        raise InputError(f"{ask.review}: a review sheet is a .csv or an .html file")
    if ask.review is not None and ask.review.exists() and not ask.overwrite:
        raise InputError(f"{ask.review}: already there; choose another name or pass --overwrite")
    encoder = find_embedder(ask.embedder)
    runs = _open(path, ask, out)
    task = runs[0].task
    source = ask.data or path / "splits" / "test.jsonl"
    rows = load_rows(
        source, ask.rows_as if ask.data else None, out, prompt=ask.prompt, instruction=task.instruction
    )
    for row in rows:
        if task.label(row.answer or "") == INVALID:
            raise InputError(
                f"{source}, line {row.line}: the answer {row.answer!r:.80} is none of the task's labels; "
                f"see {path / 'task.json'}"
            )
    truth = [row.answer or "" for row in rows]
    requests = [shown(row) for row in rows]
    tools = Tools(ask.judge, ask.embedder) if ask.judge or ask.embedder else None
    blank = task.answers(truth, truth, requests=requests, tools=tools)
    hold_metric(task.metric, blank)
    readings = [record_reading(run, source, ask.other) for run in runs]
    seals = [seal.record_reading(rows, "eval", run.path) for run in runs]
    texts = [answer(run, rows, out) for run in runs]
    scored = [blank.with_answers(given) for given in texts]
    systems = []
    for run, answers, reading, sealed in zip(runs, scored, readings, seals, strict=True):
        seen = seen_rows(run, rows, ask.embedder, out)
        clean = [i for i in range(len(rows)) if i not in seen]
        unseen = None
        if seen and clean:
            unseen = Unseen(len(clean), score_interval(task.metric, answers.subset(clean), seed=ask.seed))
        systems.append(
            System(
                **structs.asdict(figures(task, answers, embedder=encoder, seed=ask.seed)),
                run=str(run.path),
                reading=reading,
                test_seal=sealed,
                like_training=list(seen.values()),
                without_like_training=unseen,
            )
        )
    if taught := sum(row.by_teacher for row in rows):
        words = f"{taught} of {len(rows)} rows were labelled by a teacher: agreement with it, not accuracy"
        for system in systems:
            system.caution = "; ".join(filter(None, (words, system.caution)))
    result = Evaluation(**structs.asdict(systems[0]), data=str(source))
    if len(runs) == 2:
        result.other = systems[1]
        result.comparison = compare(task, scored[0], scored[1])
    if ask.judge is not None:
        against = texts[1] if len(runs) == 2 else truth
        chosen = sorted(random.Random(ask.seed).sample(range(len(rows)), min(ask.judge_rows, len(rows))))
        pairs = [Pair(requests[i], texts[0][i], against[i]) for i in chosen]
        result.judge, _ = judge_pairs(ask.judge, pairs, out)
        result.judge.against = "run" if len(runs) == 2 else "reference"
    if ask.review is not None:
        others = texts[1] if len(runs) == 2 else None
        sheet = draw(path, task, rows, texts[0], others, count=ask.review_rows, seed=ask.seed)
        write_sheet(ask.review, sheet, task.instruction)
        result.review = Sheet(str(ask.review), len(sheet), sheet[0]["id"].rsplit("-", 1)[0])
    if ask.final is not None:
        _write(ask, result, source, rows, texts, runs)
    return result


def _open(path: Path, ask: Ask, out: Output) -> list[Run]:
    """The run and the one it is compared with, under the metric that was asked for."""
    runs = [open_run(path, ask.base, out)]
    if ask.other is not None:
        runs.append(open_run(ask.other, ask.base, out))
        one, other = runs[0].task, runs[1].task
        if one.labels != other.labels or one.answer_field != other.answer_field:
            raise InputError(
                f"{ask.other}: tuned for other labels than {path}; only runs of one task compare"
            )
    if ask.metric is not None:
        name = find_metric(ask.metric).name
        runs = [replace(run, task=run.task.changed(metric=name)) for run in runs]
    return runs


def _write(
    ask: Ask,
    result: Evaluation,
    source: Path,
    rows: Sequence[Example],
    texts: Sequence[Sequence[str]],
    runs: Sequence[Run],
) -> None:
    assert ask.final is not None
    with staged(ask.final, overwrite=ask.overwrite) as work:
        result.write(work / "scores.json")
        for name, given in zip(("answers", "other_answers"), texts, strict=False):
            lines = [
                {"line": r.line, "truth": r.answer, "answer": a} for r, a in zip(rows, given, strict=True)
            ]
            write_jsonl(work / f"{name}.jsonl", lines)
        manifest = Manifest("eval", seeds={"seed": ask.seed}, inputs=[describe_data(source)])
        manifest.inputs += [describe_file(run.path / "manifest.json") for run in runs]
        manifest.finish(work)
