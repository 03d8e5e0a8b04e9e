"""`unshot export search`: size, speed and quality of each quantisation here, and the smallest that is good enough.

Quality is what the evaluated model's answers lose on labelled rows of the run, row by row (`export.loss`), beside the
KL divergence of the parity gate. Speed is measured after everything is written, in rounds that take the artifacts in
turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from export import parity
from export.device import Device, as_dict, check_fits
from export.genai import ARCHITECTURES
from export.loss import Loss, paired_loss, rows_needed
from export.run import check, expect, fits
from export.source import Model, open_source
from export.speed import measure_speed
from export.targets import Target, parse_targets
from export.write import refuse, room, size_of, write, write_importance
from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, describe_file, staged, write_text
from unshot.data.rows import read_examples
from unshot.errors import GateError, InputError, OutsideError, UnshotError

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
    report: parity.Report = field(default_factory=lambda: parity.Report(""))
    loss: Loss | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    memory: int = 0
    verdict: str = ""
    why: str = ""

    def speed(self, what: str) -> float:
        """Median over the rounds."""
        values: list[float] = getattr(self, what)
        return statistics.median(values) if values else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """The row for `search.json`."""
        return {
            "target": str(self.target),
            "bytes": self.bytes,
            "prefill": self.speed("prefill"),
            "prefill_rounds": self.prefill,
            "decode": self.speed("decode"),
            "decode_rounds": self.decode,
            "memory": self.memory,
            "loss": asdict(self.loss) if self.loss else None,
            "parity": self.report.as_dict(),
            "verdict": self.verdict,
            "why": self.why,
        }


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
    device: Device | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Measure each format and write `report.html` and `search.json` into `final`; return the result.

    Raises `GateError` where none keeps the score within `limit` (the report is then written all the same).
    """
    manifest = Manifest("search")
    with manifest.timed("open"):
        model = open_source(source, base, out)
        model.rows = measured_rows(model, data)[:rows]
    merged = model.merged()
    targets = parse_targets(texts) if texts else ladder(merged.config)
    if any(t.kind == "lora" for t in targets):
        raise InputError("search compares whole models; leave lora:... out")
    refuse(targets, model, merged, with_imatrix)
    needs = check_fits(device, targets, merged, context) if device else []
    if device:
        out.log(f"all {len(needs)} formats fit {device.name}")
    with staged(final, overwrite=overwrite) as work:
        room(final.parent, targets, merged)
        candidates = measure(model, targets, work, manifest, out, rounds, with_imatrix=with_imatrix)
        for one in candidates:
            if not one.verdict:
                one.verdict, one.why = judge(one, limit)
        picked = pick(candidates)
        result = summary(model, candidates, picked, limit, manifest)
        from export.search_report import search_page

        write_text(work / "report.html", search_page(result))
        write_text(work / "search.json", dumps(result) + "\n")
        manifest.config = {
            "name": model.name,
            "targets": [str(t) for t in targets],
            "loss": limit,
            "rows": len(model.rows),
            "rounds": rounds,
            "imatrix": with_imatrix,
            "device": as_dict(device, needs) if device else None,
        }
        manifest.base, manifest.run = model.fingerprint, str(model.run) if model.run else None
        manifest.inputs = model.inputs + ([describe_file(data)] if data else [])
        manifest.result = {k: v for k, v in result.items() if k not in ("timings", "candidates")}
        manifest.finish(work)
    if picked is None:
        raise GateError(
            f"no format keeps the score within {limit:g} of the evaluated model on {len(model.rows)} rows; "
            f"see {final / 'report.html'}"
        )
    return {"out": str(final), **result}


def measured_rows(model: Model, data: Path | None) -> list[Any]:
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


def ladder(config: dict[str, Any]) -> list[Target]:
    """What is tried where nothing is named: the common GGUF types, and GenAI's where it can write this model."""
    texts = list(LADDER)
    if find_spec("onnxruntime_genai") and (config.get("architectures") or [""])[0] in ARCHITECTURES:
        texts += ["genai:int8", "genai:int4"]
    return parse_targets(texts)


def measure(
    model: Model,
    targets: Sequence[Target],
    work: Path,
    manifest: Manifest,
    out: Output,
    rounds: int,
    *,
    with_imatrix: bool,
) -> list[Candidate]:
    """Write every format, check it, and time it; the artifacts are gone afterwards."""
    merged = model.merged()
    low = not fits(merged)
    files, scratch = work / ".files", work / ".scratch"
    files.mkdir()
    scratch.mkdir()
    count = len(model.rows)
    candidates = [Candidate(t) for t in targets]
    with out.progress() as progress:
        if with_imatrix:
            with manifest.timed("imatrix"):
                write_importance(model, files / "imatrix.gguf", progress, low_memory=low)
        for one in candidates:
            with manifest.timed(f"write {one.target}"):
                try:
                    write(one.target, model, files, scratch, progress)
                except UnshotError as error:  # fp16 overflow, a quantiser that died: the others go on
                    one.verdict, one.why = "damaged", str(error)
                    continue
            one.bytes = size_of(files / one.target.name)
        written = [one for one in candidates if not one.verdict]
        if not written:
            raise GateError(f"no format could be written: {candidates[0].why}")
        with manifest.timed("reference"):
            bar = progress.add_task("the evaluated model", total=count, note="")
            expected = expect(
                model,
                written[0].target,
                files,
                count,
                scratch,
                lambda n: progress.advance(bar, n),
                low_memory=low,
            )
        for one in written:
            bar = progress.add_task(f"answers of {one.target}", total=count, note="")
            with manifest.timed(f"check {one.target}"):
                one.report = check(
                    model, one.target, files / one.target.name, expected, lambda b=bar: progress.advance(b)
                )
                one.loss = loss_of(model, expected, one.report)
        prompts = scratch / "prompts.json"
        order = np.random.default_rng(0).permutation(len(expected))[:PROMPTS]
        write_text(
            prompts, json.dumps([expected[i].ids[: expected[i].prompt] for i in sorted(order.tolist())])
        )
        bar = progress.add_task("speed", total=rounds * len(written), note="")
        with manifest.timed("speed"):
            for turn in range(rounds):
                # Back and forth, so that no artifact is always the first after the same neighbour.
                for one in written if turn % 2 == 0 else reversed(written):
                    progress.update(bar, note=str(one.target))
                    spec = f"{one.target.engine}:{files / one.target.name}"
                    progress.advance(bar)
                    try:
                        found = measure_speed(spec, prompts, tokens=TOKENS, repeats=PROMPTS)
                    except OutsideError as error:
                        one.verdict, one.why = "damaged", str(error)
                        continue
                    one.prefill.append(found.prefill)
                    one.decode.append(found.decode)
                    one.memory = max(one.memory, found.memory)
    shutil.rmtree(files)
    shutil.rmtree(scratch)
    return candidates


def loss_of(model: Model, expected: list[parity.Expected], report: parity.Report) -> Loss | None:
    """The paired loss; without labels or a task, equality with the evaluated model's answers is the score."""
    if len(report.answers) != len(expected):
        return None  # it died or failed an early rung
    rows = [
        (row.answer, e.answer, answer)
        for row, e, answer in zip(model.rows, expected, report.answers, strict=True)
        if e.whole
    ]
    if not rows:
        return None
    said = [model.chat.decode(ids).strip() for _, ids, _ in rows]
    found = [model.chat.decode(ids).strip() for _, _, ids in rows]
    task = model.task
    if task is None or any(truth is None for truth, _, _ in rows):
        return paired_loss("accuracy", said, said, found)
    truth = [task.label(str(t)) for t, _, _ in rows]
    return paired_loss(task.metric, truth, [task.label(a) for a in said], [task.label(a) for a in found])


def judge(one: Candidate, limit: float) -> tuple[str, str]:
    """`(verdict, why)`: `holds`, `unproven`, `loses` or `damaged`."""
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
) -> dict[str, Any]:
    """What `search.json` holds."""
    from unshot.contracts.manifest import hardware

    task = model.task
    labelled = task is not None and all(row.answer is not None for row in model.rows)
    metric = task.metric if task and labelled else "same answer as the evaluated model"
    command = (
        f"unshot export {model.run or model.base.name} --to {picked.target} --out artifacts/{model.name}"
        if picked
        else None
    )
    return {
        "source": model.name,
        "base": model.base.name,
        "metric": metric,
        "limit": limit,
        "rows": len(model.rows),
        "rows_needed": rows_needed(limit),
        "picked": str(picked.target) if picked else None,
        "proven": picked is not None and picked.verdict == "holds",
        "command": command,
        "candidates": [one.as_dict() for one in candidates],
        "hardware": hardware(),
        "timings": manifest.timings,
    }
