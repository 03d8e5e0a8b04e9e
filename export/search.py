"""`unshot export search`: size, speed and quality of each quantisation here, and the smallest that is good enough.

Quality is what the evaluated model's answers lose on labelled rows of the run, row by row (`export.loss`), beside the
KL divergence of the parity gate. Speed is measured after everything is written, in rounds that take the artifacts in
turn, so that a machine that slows down slows all of them. Rows are spent in rounds (`export.race`).
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.progress import Progress

from export.device import Device, as_dict, check_fits
from export.expected import Expected
from export.families import Config
from export.genai import ARCHITECTURES
from export.loss import Loss, paired_loss
from export.race import race
from export.run import Checks, expect, fits
from export.search_report import Found, Row, search_page
from export.source import Model, open_source
from export.speed import measure_speed
from export.write import Job, refuse, room, size_of, write, write_importance
from unshot.catalog.formats import Target, parse_targets
from unshot.console import Output
from unshot.contracts.manifest import Manifest, describe_data, staged
from unshot.contracts.parity import FileReport
from unshot.data.files import write_text
from unshot.data.rows import Example, read_examples
from unshot.errors import GateError, InputError, OutsideError, UnshotError
from unshot.metrics.answers import Answers
from unshot.metrics.intervals import rows_needed

LADDER = (
    "gguf:f16", "gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "gguf:iq4_xs", "gguf:q3_k_m", "gguf:q2_k",
)  # fmt: skip
ROWS = 96
ROUNDS = 3
TOKENS = 32  # of each timed answer
PROMPTS = 4  # timed in each round


@dataclass
class Candidate:
    """One quantisation with what was measured. Speeds are tokens per second, one value a round."""

    target: Target
    bytes: int = 0
    report: FileReport = field(default_factory=lambda: FileReport("", False))
    loss: Loss | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    memory: int = 0
    measured: int = 0  # rows answered, those of earlier rounds counted again
    verdict: str = ""
    why: str = ""

    def row(self) -> Row:
        """The row for `search.json`."""
        return Row(
            target=str(self.target),
            bytes=self.bytes,
            prefill=statistics.median(self.prefill) if self.prefill else None,
            prefill_rounds=self.prefill,
            decode=statistics.median(self.decode) if self.decode else None,
            decode_rounds=self.decode,
            memory=self.memory,
            loss=self.loss,
            parity=self.report,
            verdict=self.verdict,
            why=self.why,
        )


def search_run(
    source: str,
    texts: Sequence[str],
    final: Path,
    out: Output,
    *,
    limit: float = 0.02,
    base: str | None = None,
    data: Path | None = None,
    rows: int = ROWS,
    rounds: int = ROUNDS,
    overwrite: bool = False,
    with_imatrix: bool = False,
    every_row: bool = False,
    device: Device | None = None,
    context: int | None = None,
) -> Found:
    """Measure each format and write `report.html` and `search.json` into `final`; return the result.

    Raises `GateError` where none keeps the score within `limit` (the report is then written all the same).
    """
    manifest = Manifest("search")
    with manifest.timed("open"):
        model = open_source(source, base, out)
        model.rows = shuffled(measured_rows(model, data))[:rows]
    merged = model.merged()
    targets = parse_targets(texts) if texts else ladder(merged.config)
    if any(t.format.on_base for t in targets):
        raise InputError("search compares whole models; leave adapters alone (lora:..., peft:...) out")
    converter = refuse(targets, model, merged, with_imatrix)
    needs = check_fits(device, targets, merged, context) if device else []
    if device:
        out.log(f"all {len(needs)} formats fit {device.name}")
    with staged(final, overwrite=overwrite) as work:
        room(final.parent, targets, merged)
        with out.progress() as progress:
            job = Job(model, merged, work / ".files", work / ".scratch", progress, converter)
            candidates = measure(
                job, targets, manifest, rounds, limit, with_imatrix=with_imatrix, every_row=every_row
            )
        for one in candidates:
            if not one.verdict:
                one.verdict, one.why = judge(one, limit, len(model.rows))
        picked = pick(candidates)
        result = summary(model, candidates, picked, limit, manifest)
        write_text(work / "report.html", search_page(result))
        write_text(work / "search.json", result.to_json(indent=2) + "\n")
        manifest.config = {
            "name": model.name,
            "targets": [str(t) for t in targets],
            "loss": limit,
            "rows": len(model.rows),
            "rounds": rounds,
            "imatrix": with_imatrix,
            "every_row": every_row,
            "device": as_dict(device, needs) if device else None,
        }
        manifest.inputs = model.inputs + ([describe_data(data)] if data else [])
        manifest.result = {
            k: v for k, v in result.plain().items() if k not in ("timings", "candidates", "out")
        }
        manifest.base, manifest.run = model.fingerprint, str(model.run.resolve()) if model.run else None
        manifest.finish(work)
    if picked is None:
        raise GateError(
            f"no format keeps the score within {limit:g} of the evaluated model on {len(model.rows)} rows; "
            f"see {final / 'report.html'}"
        )
    return result.changed(out=str(final))


def measured_rows(model: Model, data: Path | None) -> list[Example]:
    """Rows the formats are compared on: the file given, else the run's test and validation splits.

    Both versions of the model answer the same rows, so that rows by which the checkpoint was picked favour neither.
    """
    if data is not None:
        return read_examples(data)
    rows = list(model.rows)
    more = model.run / "splits" / "validation.jsonl" if model.run else None
    if more is not None and more.is_file():
        rows += read_examples(more)
    return rows


def shuffled(rows: list[Example]) -> list[Example]:
    """The rows in a fixed random order, so that a few of them are like all."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def ladder(config: Config) -> list[Target]:
    """What is tried where nothing is named: the common GGUF types, and GenAI's where it can write this model."""
    texts = list(LADDER)
    if find_spec("onnxruntime_genai") and (config.get("architectures") or [""])[0] in ARCHITECTURES:
        texts += ["genai:int8", "genai:int4"]
    return parse_targets(texts)


def measure(
    job: Job,
    targets: Sequence[Target],
    manifest: Manifest,
    rounds: int,
    limit: float,
    *,
    with_imatrix: bool,
    every_row: bool,
) -> list[Candidate]:
    """Write every format, check it, and time it; the artifacts are gone afterwards."""
    low = not fits(job.merged)
    job.work.mkdir()
    job.scratch.mkdir()
    candidates = [Candidate(t) for t in targets]
    if with_imatrix:
        with manifest.timed("imatrix"):
            write_importance(job, job.work / "imatrix.gguf", low_memory=low)
    written = _write_all(job, candidates, manifest)
    count = len(job.model.rows)
    with manifest.timed("reference"):
        bar = job.progress.add_task("the evaluated model", total=count, note="")
        expected = expect(
            job, written[0].target, count, lambda n: job.progress.advance(bar, n), low_memory=low
        )
    checks = Checks(job, expected, manifest)

    def ask(one: Candidate, rows: int) -> float | None:
        """The candidate's gate and loss on the first rows; None where it fails the gate on all of them."""
        answers: list[list[int]] = []
        one.report = checks.one(one.target, answers, rows)
        one.loss = loss_of(job.model, expected, answers, rows)
        one.measured += rows
        if one.loss is None or (rows == count and not one.report.passed):
            return None
        return one.loss.loss

    if every_row:
        for one in written:
            ask(one, count)
    else:
        smallest_first = sorted(written, key=lambda one: one.bytes)
        race(
            smallest_first,
            count,
            limit,
            ask,
            lambda one: judge(one, limit, count)[0] in good_enough(limit, count),
        )
    with manifest.timed("speed"):
        _time_all(job, written, expected, rounds)
    shutil.rmtree(job.work)
    shutil.rmtree(job.scratch)
    return candidates


def _write_all(job: Job, candidates: list[Candidate], manifest: Manifest) -> list[Candidate]:
    """Write what can be written; `GateError` where nothing can."""
    for one in candidates:
        with manifest.timed(f"write {one.target}"):
            try:
                write(one.target, job)
            except UnshotError as error:  # fp16 overflow, a quantiser that died: the others go on
                one.verdict, one.why = "damaged", str(error)
                continue
        one.bytes = size_of(job.path(one.target))
    written = [one for one in candidates if not one.verdict]
    if not written:
        raise GateError(f"no format could be written: {candidates[0].why}")
    return written


def _time_all(job: Job, written: list[Candidate], expected: list[Expected], rounds: int) -> None:
    """Rounds that take the artifacts in turn."""
    rows = [e for e in expected if not e.long]
    prompts = job.scratch / "prompts.json"
    order = np.random.default_rng(0).permutation(len(rows))[:PROMPTS]
    write_text(prompts, json.dumps([rows[i].ids[: rows[i].prompt] for i in sorted(order.tolist())]))
    progress: Progress = job.progress
    bar = progress.add_task("speed", total=rounds * len(written), note="")
    for turn in range(rounds):
        # Back and forth, so that no artifact is always the first after the same neighbour.
        for one in written if turn % 2 == 0 else reversed(written):
            progress.update(bar, note=str(one.target))
            spec = f"{one.target.engine}:{job.path(one.target)}"
            progress.advance(bar)
            try:
                found = measure_speed(spec, prompts, tokens=TOKENS, repeats=PROMPTS)
            except OutsideError as error:
                one.verdict, one.why = "damaged", str(error)
                continue
            one.prefill.append(found.prefill)
            one.decode.append(found.decode)
            one.memory = max(one.memory, found.memory)


def good_enough(limit: float, rows: int) -> tuple[str, ...]:
    """Verdicts at which a search ends: where so few rows can prove nothing, a larger format proves no more."""
    return ("holds",) if rows >= rows_needed(limit) else ("holds", "unproven")


def loss_of(
    model: Model, expected: list[Expected], answers: list[list[int]], count: int | None = None
) -> Loss | None:
    """The paired loss on the first `count` rows; without labels or a task, equality with the evaluated model's answers
    is the score.
    """
    requests = [e for e in expected if not e.long][:count]
    if len(answers) != len(requests):
        return None  # it died or failed an early rung
    rows = [
        (row, e.answer, answer)
        for row, e, answer in zip(model.rows[: len(requests)], requests, answers, strict=True)
        if e.whole
    ]
    if not rows:
        return None
    said = [model.chat.decode(ids).strip() for _, ids, _ in rows]
    found = [model.chat.decode(ids).strip() for _, _, ids in rows]
    task = model.task
    if task is None or any(row.answer is None for row, _, _ in rows):
        # The evaluated model's answers are the references, each a class of its own text.
        same = Answers(said, list(said))
        return paired_loss("exact_match", same, same.with_answers(found))
    truth, asked = [str(row.answer) for row, _, _ in rows], [row.text for row, _, _ in rows]
    reference = task.answers(truth, said, requests=asked)
    return paired_loss(task.metric, reference, reference.with_answers(found))


def judge(one: Candidate, limit: float, rows: int) -> tuple[str, str]:
    """`(verdict, why)`: `holds`, `unproven`, `loses`, `damaged`, or `passed over` (not measured on all rows)."""
    if one.loss is not None and one.loss.rows < rows and one.report.figures.logits:
        if one.loss.loss * one.loss.rows > limit * rows:
            return (
                "loses",
                f"it lost {one.loss.loss:.3f} on the first {one.loss.rows} rows, more than all may lose",
            )
        return "passed over", f"a smaller one was good enough; measured on {one.loss.rows} rows"
    if not one.report.passed:
        return "damaged", one.report.failures[0]
    if one.loss is None:
        return "damaged", "no answers to compare"
    if one.loss.loss > limit:
        return "loses", f"it loses {one.loss.loss:.3f}, the limit is {limit:g}"
    if one.loss.high > limit:
        return "unproven", f"up to {one.loss.high:.3f} could be lost on {one.loss.rows} rows"
    high = one.loss.high
    return "holds", f"at most {high:.3f} is lost" if high > 0 else f"it scores at least {-high:.3f} more"


def pick(candidates: Sequence[Candidate]) -> Candidate | None:
    """The smallest that is shown to hold; else the smallest that holds on these rows."""
    for verdict in ("holds", "unproven"):
        good = [one for one in candidates if one.verdict == verdict]
        if good:
            return min(good, key=lambda one: one.bytes)
    return None


def summary(
    model: Model, candidates: Sequence[Candidate], picked: Candidate | None, limit: float, manifest: Manifest
) -> Found:
    """What `search.json` holds."""
    from unshot.contracts.manifest import hardware

    task = model.task
    labelled = task is not None and all(row.answer is not None for row in model.rows)
    command = (
        f"unshot export {model.run or model.base.name} --to {picked.target} --out artifacts/{model.name}"
        if picked
        else None
    )
    machine = hardware()
    return Found(
        source=model.name,
        base=model.base.name,
        metric=task.metric if task and labelled else "same answer as the evaluated model",
        limit=limit,
        rows=len(model.rows),
        rows_needed=rows_needed(limit),
        picked=str(picked.target) if picked else None,
        proven=picked is not None and picked.verdict == "holds",
        command=command,
        candidates=[one.row() for one in candidates],
        cpu=machine.cpu,
        cores=machine.cores or 1,
        timings=manifest.timings,
        evaluations=sum(one.measured for one in candidates),
    )
