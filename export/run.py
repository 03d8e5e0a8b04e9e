"""`unshot export` from run directory to checked artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export import imatrix, parity, reference
from export.device import Device, as_dict, check_fits
from export.gates import gates_of
from export.merge import Merged
from export.shipping import write_shipping
from export.source import Model, open_source
from export.streamed import streamed
from export.targets import Target
from export.write import lora_base, parameters, refuse, room, size_of, write, write_importance
from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, describe_file, staged, write_text
from unshot.errors import GateError
from unshot.machine import free_memory

CHECK_ROWS = 32


def export_run(
    source: str,
    targets: Sequence[Target],
    final: Path,
    out: Output,
    *,
    base: str | None = None,
    overwrite: bool = False,
    allow_drift: bool = False,
    check_rows: int = CHECK_ROWS,
    low_memory: bool = False,
    with_imatrix: bool = False,
    device: Device | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Write and check every target into the directory `final`; return its result.

    Raises `InputError` for a bad run, base or architecture, `GateError` where an artifact is not equal to the
    evaluated model (nothing is then left under `final`, unless `allow_drift`). `low_memory` reads the evaluated model
    layer by layer, as happens by itself where it would not fit. `with_imatrix` gives llama.cpp's quantiser an
    importance matrix of the training rows. What would not fit `device` at `context` tokens is refused.
    """
    manifest = Manifest("export")
    with manifest.timed("open"):
        model = open_source(source, base, out)
    merged = model.merged()
    refuse(targets, model, merged, with_imatrix)
    needs = check_fits(device, list(targets), merged, context) if device else []
    for one in needs:
        out.log(str(one))
    with staged(final, overwrite=overwrite) as work:
        room(final.parent, targets, merged)
        reports = _write_and_check(
            model,
            targets,
            work,
            manifest,
            out,
            check_rows,
            low=low_memory or not fits(merged),
            with_imatrix=with_imatrix,
        )
        failed = [r for r in reports if not r.passed]
        text = dumps({"source": model.name, "reports": [r.as_dict() for r in reports]}) + "\n"
        write_text(work / "parity.json", text)
        if failed and not allow_drift:
            kept = final.parent / f"{final.name}.parity.json"
            write_text(kept, text)
            raise GateError(
                f"{failed[0].target} is not the model that was evaluated: {'; '.join(failed[0].failures)} "
                f"(figures in {kept}; --allow-drift keeps the file all the same)"
            )
        for report in failed:
            out.warn(f"{report.target} drifts: {'; '.join(report.failures)}; kept because of --allow-drift")
        gates = gates_of(model, reports)
        write_shipping(model, targets, reports, gates, work)
        result = {
            "source": model.name,
            "base": model.base.name,
            "files": {str(t): t.name for t in targets},
            "bytes": {str(t): size_of(work / t.name) for t in targets},
            "parity": [r.as_dict() for r in reports],
            "gates": [g.plain() for g in gates],
            "timings": manifest.timings,
        }
        manifest.config = {
            "name": model.name,
            "targets": [str(t) for t in targets],
            "check_rows": check_rows,
            "allow_drift": allow_drift,
            "imatrix": with_imatrix,
            "device": as_dict(device, needs) if device else None,
        }
        manifest.base, manifest.task = model.fingerprint, model.task
        manifest.run = str(model.run) if model.run else None
        manifest.gates = gates
        manifest.inputs = model.inputs + (
            [describe_file(f) for f in sorted(model.adapter_path.iterdir()) if f.is_file()]
            if model.adapter_path
            else []
        )
        manifest.result = {k: v for k, v in result.items() if k != "timings"}
        manifest.finish(work)
    return {"out": str(final), **result}


def _write_and_check(
    model: Model,
    targets: Sequence[Target],
    work: Path,
    manifest: Manifest,
    out: Output,
    rows: int,
    *,
    low: bool,
    with_imatrix: bool = False,
) -> list[parity.Report]:
    rows = min(rows, len(model.rows))
    scratch = work / ".scratch"
    scratch.mkdir()
    reports = []
    with out.progress() as progress:
        if with_imatrix:
            with manifest.timed("imatrix"):
                write_importance(model, work / imatrix.FILE, progress, low_memory=low)
        for target in targets:
            with manifest.timed(f"write {target}"):
                write(target, model, work, scratch, progress)
        with manifest.timed("reference"):
            bar = progress.add_task(
                "the evaluated model", total=rows, note="one layer at a time" if low else ""
            )
            expected = expect(
                model, targets[0], work, rows, scratch, lambda n: progress.advance(bar, n), low_memory=low
            )
        for target in targets:
            bar = progress.add_task(f"check {target}", total=rows, note="")
            with manifest.timed(f"check {target}"):
                lower = lora_base(target, scratch)
                report = check(
                    model, target, work / target.name, expected, lambda b=bar: progress.advance(b), lower
                )
            progress.update(bar, note="equal" if report.passed else "DRIFTS")
            reports.append(report)
    shutil.rmtree(scratch)
    return reports


def expect(
    model: Model, target: Target, work: Path, rows: int, scratch: Path, tick: Any, *, low_memory: bool
) -> list[parity.Expected]:
    """What the evaluated model says, held in memory or streamed layer by layer."""
    if not low_memory:
        return parity.expect(
            model, reference.evaluated(model.base.path, model.adapter_path), rows, scratch, tick
        )
    proposed = parity.propose(model, target, work / target.name, rows, lora_base(target, scratch))
    net = streamed(model.base.path, model.base.weight_files(), model.adapter_path)
    return parity.expect(model, net, rows, scratch, tick, proposed)


def fits(merged: Merged) -> bool:
    """Whether the model in fp32 takes less than half of the memory that is free now."""
    return parameters(merged) * 4 < free_memory() / 2


def check(
    model: Model, target: Target, path: Path, expected: Any, tick: Any, base: Path | None = None
) -> parity.Report:
    """`parity.check`, with an engine that died as one more failure."""
    try:
        return parity.check(model, target, path, expected, tick, base)
    except GateError as error:
        report = parity.Report(str(target))
        report.failures.append(str(error))
        return report
