"""`unshot export` from run directory to checked artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export import expected as expectations
from export import imatrix, parity
from export.device import Device, Need, as_dict, check_fits
from export.expected import Expected
from export.merge import Merged
from export.shipping import gates_of, write_shipping
from export.source import Model, open_source
from export.write import (
    Job,
    full_of,
    full_path,
    lora_base,
    made_by,
    parameters,
    refuse,
    room,
    size_of,
    write,
    write_importance,
)
from unshot.case import Case
from unshot.catalog.formats import Target
from unshot.console import Output
from unshot.contracts.manifest import Gate, Manifest, describe_file, staged
from unshot.contracts.parity import FileReport, Parity
from unshot.errors import GateError
from unshot.machine import free_memory

CHECK_ROWS = 32


@dataclass(frozen=True)
class Settings:
    """How an export is done; see `unshot export --help`."""

    base: str | None = None
    data: Path | None = None
    case: Case | None = None
    overwrite: bool = False
    allow_drift: bool = False
    check_rows: int = CHECK_ROWS
    low_memory: bool = False
    with_imatrix: bool = False
    device: Device | None = None
    context: int | None = None
    llama_cpp: Path | None = None


@dataclass
class Result:
    """What an export wrote: files and sizes by target, how equal they are, the gates."""

    out: str
    source: str
    base: str
    files: dict[str, str]
    bytes: dict[str, int]
    parity: list[FileReport]
    gates: list[Gate]
    timings: dict[str, float] = field(default_factory=dict)


def export_run(
    source: str, targets: Sequence[Target], final: Path, out: Output, settings: Settings | None = None
) -> Result:
    """Write and check every target into the directory `final`.

    Raises `InputError` for a bad run, base or architecture, `GateError` where an artifact is not equal to the
    evaluated model (nothing is then left under `final`, unless `allow_drift`). `low_memory` reads the evaluated model
    layer by layer, as happens by itself where it would not fit. `with_imatrix` gives llama.cpp's quantiser an
    importance matrix of the training rows. What would not fit `device` at `context` tokens is refused.
    """
    settings = settings or Settings()
    manifest = Manifest("export")
    with manifest.timed("open"):
        model = open_source(source, settings.base, out, settings.data, settings.case)
    merged = model.merged()
    converter = refuse(targets, model, merged, settings.with_imatrix, settings.llama_cpp)
    needs = check_fits(settings.device, list(targets), merged, settings.context) if settings.device else []
    for one in needs:
        out.log(str(one))
    with staged(final, overwrite=settings.overwrite) as work:
        room(final.parent, targets, merged)
        with out.progress() as progress:
            job = Job(model, merged, work, work / ".scratch", progress, converter)
            reports, sources = _write_and_check(job, targets, manifest, settings)
        _keep_parity(model, reports, sources, final, work, out, settings.allow_drift)
        gates = gates_of(model, reports)
        write_shipping(model, targets, reports, gates, work)
        result = Result(
            out=str(final),
            source=model.name,
            base=model.base.name,
            files={str(t): t.name for t in targets},
            bytes={str(t): size_of(work / t.name) for t in targets},
            parity=reports,
            gates=gates,
            timings=manifest.timings,
        )
        _record(manifest, model, targets, settings, needs, result)
        manifest.finish(work)
    return result


def _keep_parity(
    model: Model,
    reports: list[FileReport],
    sources: list[FileReport],
    final: Path,
    work: Path,
    out: Output,
    allow_drift: bool,
) -> None:
    """Write `parity.json`; `GateError` for a file that is not the model, with the figures beside `final`."""
    found = Parity(source=model.name, reports=reports, sources=sources)
    found.write(work)
    failed = [r for r in reports if not r.passed]
    if failed and not allow_drift:
        kept = final.parent / f"{final.name}.parity.json"
        found.write(kept)
        raise GateError(
            f"{failed[0].target} is not the model that was evaluated: "
            f"{'; '.join(failed[0].failures + failed[0].notes)} "
            f"(figures in {kept}; --allow-drift keeps the file all the same)"
        )
    for report in failed:
        out.warn(f"{report.target} drifts: {'; '.join(report.failures)}; kept because of --allow-drift")
    for report in reports:
        if report.right_up_to is not None:
            out.warn(f"{report.target} is right up to {report.right_up_to} tokens: {'; '.join(report.notes)}")
        if report.passed and not report.proven:
            out.warn(f"{report.target} is not proven here: {'; '.join(report.notes)}")


def _record(
    manifest: Manifest,
    model: Model,
    targets: Sequence[Target],
    settings: Settings,
    needs: list[Need],
    result: Result,
) -> None:
    """Fill the manifest's configuration, inputs and result."""
    device = settings.device
    manifest.config = {
        "name": model.name,
        "targets": [str(t) for t in targets],
        "made_by": {r.target: r.made_by for r in result.parity},
        "right_up_to": {r.target: r.right_up_to for r in result.parity if r.right_up_to is not None},
        "notes": model.notes,
        "check_rows": settings.check_rows,
        "allow_drift": settings.allow_drift,
        "imatrix": settings.with_imatrix,
        "device": as_dict(device, needs) if device else None,
    }
    manifest.base, manifest.task = model.fingerprint, model.task
    manifest.run = str(model.run.resolve()) if model.run else None
    manifest.gates = result.gates
    adapter = model.adapter_path if model.run else None
    manifest.inputs = model.inputs + (
        [describe_file(f) for f in sorted(adapter.iterdir()) if f.is_file()] if adapter else []
    )
    manifest.result = {
        "source": result.source,
        "base": result.base,
        "files": result.files,
        "bytes": result.bytes,
        "parity": [r.plain() for r in result.parity],
        "gates": [g.plain() for g in result.gates],
    }


def _write_and_check(
    job: Job, targets: Sequence[Target], manifest: Manifest, settings: Settings
) -> tuple[list[FileReport], list[FileReport]]:
    """Reports of the targets, and of the full-precision files that only served as their source."""
    rows = min(settings.check_rows, len(job.model.rows))
    low = settings.low_memory or not fits(job.merged)
    job.scratch.mkdir()
    if settings.with_imatrix:
        with manifest.timed("imatrix"):
            write_importance(job, job.work / imatrix.FILE, low_memory=low)
    made: dict[str, str] = {}
    # A full-precision artifact first, so that coarser ones are made from it.
    for target in sorted(targets, key=lambda t: full_of(t, job.merged) is not None):
        with manifest.timed(f"write {target}"):
            made[str(target)] = write(target, job)
    with manifest.timed("reference"):
        bar = job.progress.add_task(
            "the evaluated model", total=rows, note="one layer at a time" if low else ""
        )
        expected = expect(job, targets[0], rows, lambda n: job.progress.advance(bar, n), low_memory=low)
    checks = Checks(job, expected, manifest)
    reports = [checks.one(target) for target in targets]
    for report in reports:
        report.made_by = made[report.target]
    shutil.rmtree(job.scratch)
    shown = {r.target for r in reports}
    return reports, [r for name, (r, _) in checks.full.items() if name not in shown]


class Checks:
    """The gate over the files of one export: each full-precision file once, before the coarser ones it is held to."""

    def __init__(self, job: Job, expected: list[Expected], manifest: Manifest) -> None:
        self.job, self.expected, self.manifest = job, expected, manifest
        self.full: dict[str, tuple[FileReport, parity.Full | None]] = {}
        self.answers: dict[str, list[list[int]]] = {}  # of the full-precision files

    def one(
        self, target: Target, answers: list[list[int]] | None = None, rows: int | None = None
    ) -> FileReport:
        """The report of a target on its first `rows` rows (None: all), after its full-precision file's on all."""
        full = full_of(target, self.job.merged)
        if full is None:
            report = self._full(target, self.job.path(target))[0]
            if answers is not None:
                answers += self.answers[str(target)][:rows]
            return report
        path = full_path(full, self.job)
        first, source = self._full(full, path)
        report = self._check(target, self.job.path(target), rows, full=source, answers=answers)
        if not first.passed:
            report.passed = False
            report.failures.insert(
                0, f"its full-precision source {full} is not the model: {'; '.join(first.failures)}"
            )
        return report

    def _full(self, target: Target, path: Path) -> tuple[FileReport, parity.Full | None]:
        if str(target) not in self.full:
            keep = self.job.scratch / f"own-{target.kind}-{target.precision}"
            keep.mkdir(exist_ok=True)
            said: list[list[int]] = []
            self.answers[str(target)] = said
            report = self._check(target, path, keep=keep, answers=said)
            report.made_by = made_by(self.job) if target.kind == "gguf" else target.format.made_by
            own = parity.own_logits(self.expected, keep)
            self.full[str(target)] = (report, parity.Full(target, path, own) if own else None)
        return self.full[str(target)]

    def _check(self, target: Target, path: Path, rows: int | None = None, **more: Any) -> FileReport:
        progress = self.job.progress
        short = [e for e in self.expected if not e.long][:rows]
        expected = [*short, *(e for e in self.expected if e.long)]
        bar = progress.add_task(f"check {target}", total=len(expected), note="")
        with self.manifest.timed(f"check {target}"):
            lower = lora_base(target, self.job)
            report = check(
                self.job.model, target, path, expected, lambda: progress.advance(bar), lower, **more
            )
        progress.update(bar, note=report.verdict.replace("drifts", "DRIFTS"))
        return report


def expect(
    job: Job, target: Target, rows: int, tick: Callable[[int], None], *, low_memory: bool
) -> list[Expected]:
    """What the evaluated model says, held in memory or streamed layer by layer."""
    net = job.model.reference(streams=low_memory)
    proposed = None
    if low_memory:
        base = lora_base(target, job)
        proposed = expectations.propose(job.model, target, job.path(target), rows, base)
    return expectations.expect(job.model, net, rows, job.scratch, tick, proposed)


def fits(merged: Merged) -> bool:
    """Whether the model in fp32 takes less than half of the memory that is free now."""
    return parameters(merged) * 4 < free_memory() / 2


def check(
    model: Model,
    target: Target,
    path: Path,
    expected: list[Expected],
    tick: Callable[[], None] | None = None,
    base: Path | None = None,
    **more: Any,
) -> FileReport:
    """`parity.check`, with an engine that died as one more failure."""
    try:
        return parity.check(model, target, path, expected, tick, base, **more)
    except GateError as error:
        return FileReport(str(target), False, [str(error)])
