"""A run directory opened, its sealed test read on the record, its answers generated."""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tune import near
from tune.evaluate.judge import Judge, Pair, judge_pairs
from tune.evaluate.review import SHEETS, draw, shown, write_sheet
from tune.evaluate.scores import Answers, compare
from tune.job import request
from tune.meaning import by_meaning
from tune.model import has_tuned
from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, describe_file, read_manifest, sha256, staged
from unshot.contracts.task import Task, read_task
from unshot.data import seal
from unshot.data.files import write_text
from unshot.data.load import load_rows
from unshot.data.rows import Example, RowOptions, read_examples, write_jsonl
from unshot.engines.embedder import find_embedder
from unshot.errors import InputError, OutsideError
from unshot.metrics.scores import INVALID
from unshot.models import Source, resolve
from unshot.text.chat import Chat, load_tokenizer

READINGS = "readings.jsonl"


@dataclass(frozen=True)
class Run:
    """A directory of `unshot tune` with its base model."""

    path: Path
    base: Source
    task: Task
    method: str = "lora"


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
    method = manifest.tune.method if manifest.tune else "lora"
    return Run(path, source, read_task(path / "task.json"), method)


def record_reading(run: Run, data: Path, against: Path | None) -> dict[str, Any]:
    """Append a reading to `readings.jsonl` in the run (not among its hashed files) and return it with its number.

    The run's own test split was first read by `unshot tune`, so that its readings here start at 2. Written
    before the rows are answered: a reading that breaks off counts. `OutsideError` where it cannot be written.
    """
    path = run.path / READINGS
    own = data.resolve() == (run.path / "splits" / "test.jsonl").resolve()
    digest = sha256(data)
    try:
        with path.open("a+", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            before = [json.loads(line) for line in handle if line.strip()]
            reading = {
                "reading": 1 + own + sum(r.get("sha256") == digest for r in before),
                "data": "splits/test.jsonl" if own else str(data),
                "sha256": digest,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "compared_with": str(against) if against else None,
            }
            handle.write(json.dumps(reading) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    except ValueError:
        raise InputError(f"{path}: not a list of readings; it was changed by hand") from None
    except OSError as error:
        raise OutsideError(
            f"{path}: the reading cannot be recorded ({error.strerror}), so none is done"
        ) from None
    return reading


def answer(run: Run, rows: Sequence[Example], out: Output) -> list[str]:
    """The tuned model's greedy answers, in order."""
    from tune.generate import answers
    from tune.model import load_tuned, pick_device

    device = pick_device()

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    net = load_tuned(run.path, run.base, device, method=run.method)
    chat = Chat(load_tokenizer(run.base.path))
    with out.progress() as progress:
        bar = progress.add_task("answering", total=len(rows), note=run.path.name)
        return answers(
            net,
            chat,
            [request(row, run.task) for row in rows],
            max_tokens=run.task.max_answer_tokens or 64,
            progress=lambda n: progress.update(bar, advance=n),
        )


def seen_rows(
    run: Run, rows: Sequence[Example], embedder: str | None, out: Output
) -> dict[int, dict[str, Any]]:
    """Test rows with a near-duplicate among the run's training rows: index to `{line, train_line, similarity, by}`.

    `by` is `text`, or `meaning` for paraphrases that an embedder finds.
    """
    train = read_examples(run.path / "splits" / "train.jsonl")
    found: dict[int, dict[str, Any]] = {}
    # Training rows first, so that an equal text is always linked to one of them.
    both = [*train, *rows]
    pairs = near.similar_inputs([e.system for e in both], [e.dialogue for e in both])
    for a, b, similarity in pairs:
        index = b - len(train)
        if a < len(train) <= b and similarity > found.get(index, {}).get("similarity", 0):
            found[index] = {
                "line": rows[index].line,
                "train_line": train[a].line,
                "similarity": round(similarity, 3),
                "by": "text",
            }
    close = by_meaning([e.dialogue for e in both], embedder, out=out)
    for a, b, similarity in close.pairs if close else ():
        index = b - len(train)
        known = found.get(index)
        if a < len(train) <= b and (
            known is None or (known["by"] == "meaning" and similarity > known["similarity"])
        ):
            found[index] = {
                "line": rows[index].line,
                "train_line": train[a].line,
                "similarity": round(similarity, 3),
                "by": "meaning",
            }
    # A test row equal to an earlier one is linked to that, not to what both are like.
    for (a, b, _), equal in zip(pairs, pairs.equal, strict=True):
        if equal and a - len(train) in found:
            found[b - len(train)] = {**found[a - len(train)], "line": rows[b - len(train)].line}
    return dict(sorted(found.items()))


def evaluate_run(
    path: Path,
    out: Output,
    *,
    data: Path | None = None,
    other: Path | None = None,
    base: str | None = None,
    final: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    rows_as: RowOptions | None = None,
    embedder: str | None = None,
    judge: Judge | None = None,
    judge_rows: int = 50,
    review: Path | None = None,
    review_rows: int = 50,
) -> dict[str, Any]:
    """Score a run (and another one on the same rows); `final` receives scores and answers. Raises `InputError`.

    `judge` compares the answers of up to `judge_rows` rows with the other run's (else with the references); `review`
    is the sheet to draw for people.
    """
    if review is not None and review.suffix.lower() not in SHEETS:
        raise InputError(f"{review}: a review sheet is a .csv or an .html file")
    if review is not None and review.exists() and not overwrite:
        raise InputError(f"{review}: already there; choose another name or pass --overwrite")
    encoder = find_embedder(embedder)
    runs = [open_run(path, base, out)]
    if other is not None:
        runs.append(open_run(other, base, out))
        if (
            runs[0].task.labels != runs[1].task.labels
            or runs[0].task.answer_field != runs[1].task.answer_field
        ):
            raise InputError(f"{other}: tuned for other labels than {path}; only runs of one task compare")
    source = data or path / "splits" / "test.jsonl"
    rows = load_rows(source, rows_as, out, instruction=runs[0].task.instruction)
    for row in rows:
        if runs[0].task.label(row.answer or "") == INVALID:
            raise InputError(
                f"{source}, line {row.line}: the answer {row.answer!r:.80} is none of the task's labels; "
                f"see {path / 'task.json'}"
            )
    readings = [record_reading(run, source, other) for run in runs]
    seals = [seal.record_reading(rows, "eval", run.path) for run in runs]
    truth = [row.answer or "" for row in rows]
    texts = [answer(run, rows, out) for run in runs]
    scored = [Answers(runs[0].task, truth, given, seed=seed) for given in texts]
    systems = []
    for run, given, system, reading, sealed in zip(runs, texts, scored, readings, seals, strict=True):
        seen = seen_rows(run, rows, embedder, out)
        clean = [i for i in range(len(rows)) if i not in seen]
        report = {
            "run": str(run.path),
            **system.report(),
            "reading": reading,
            "test_seal": vars(sealed),
            "like_training": list(seen.values()),
        }
        if seen and clean:
            unseen = Answers(run.task, [truth[i] for i in clean], [given[i] for i in clean], seed=seed)
            report["without_like_training"] = {"rows": len(clean), "score": unseen.metric()}
        if "rouge" in report and encoder is not None:
            report["bertscore"] = system.bertscore(encoder)
        systems.append(report)
    result: dict[str, Any] = {"data": str(source), **systems[0]}
    if len(runs) == 2:
        result["other"] = systems[1]
        result["comparison"] = compare(scored[0], scored[1])
    if judge is not None:
        against = texts[1] if len(runs) == 2 else truth
        chosen = sorted(random.Random(seed).sample(range(len(rows)), min(judge_rows, len(rows))))
        pairs = [Pair(shown(rows[i]), texts[0][i], against[i]) for i in chosen]
        result["judge"], _ = judge_pairs(judge, pairs, out, seed=seed)
        result["judge"]["against"] = "run" if len(runs) == 2 else "reference"
    if review is not None:
        others = texts[1] if len(runs) == 2 else None
        sheet = draw(path, runs[0].task, rows, texts[0], others, count=review_rows, seed=seed)
        write_sheet(review, sheet, runs[0].task.instruction)
        result["review"] = {
            "sheet": str(review),
            "rows": len(sheet),
            "name": sheet[0]["id"].rsplit("-", 1)[0],
        }
    if final is not None:
        with staged(final, overwrite=overwrite) as work:
            write_text(work / "scores.json", dumps(result) + "\n")
            for name, given in zip(("answers", "other_answers"), texts, strict=False):
                lines = [
                    {"line": r.line, "truth": r.answer, "answer": a} for r, a in zip(rows, given, strict=True)
                ]
                write_jsonl(work / f"{name}.jsonl", lines)
            manifest = Manifest("eval", seeds={"seed": seed}, inputs=[describe_file(source)])
            manifest.inputs += [describe_file(run.path / "manifest.json") for run in runs]
            manifest.finish(work)
    return result
