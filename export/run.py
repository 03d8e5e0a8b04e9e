"""`unshot export` from run directory to checked artifacts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from export import gguf_file, gguf_lora, onnx_graph, parity, reference
from export.engines import require
from export.gates import gates_of
from export.kquants import quantise
from export.merge import Merged
from export.shipping import write_shipping
from export.source import Model, open_source
from export.streamed import streamed
from export.targets import QUANTISED, STREAMED, Target
from unshot.console import Output, dumps
from unshot.errors import GateError, OutsideError
from unshot.manifest import Manifest, describe_file, staged, write_text

CHECK_ROWS = 32
# Room left on the disk beyond what is written, bytes.
SPARE = 64 * 1024 * 1024


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
) -> dict[str, Any]:
    """Write and check every target into the directory `final`; return its result.

    Raises `InputError` for a bad run, base or architecture, `GateError` where an artifact is not equal to the
    evaluated model (nothing is then left under `final`, unless `allow_drift`). `low_memory` reads the evaluated model
    layer by layer, as happens by itself where it would not fit.
    """
    manifest = Manifest("export")
    for target in targets:
        require(target.engine)
    with manifest.timed("open"):
        model = open_source(source, base, out)
    merged = model.merged()
    for target in targets:
        refuse_unsupported(target, merged)
    with staged(final, overwrite=overwrite) as work:
        room(final.parent, targets, merged)
        reports = _write_and_check(
            model, targets, work, manifest, out, check_rows, low=low_memory or not fits(merged)
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
            "bytes": {str(t): _size(work / t.name) for t in targets},
            "parity": [r.as_dict() for r in reports],
            "gates": [g.model_dump(mode="json") for g in gates],
            "timings": manifest.timings,
        }
        manifest.config = {
            "base": model.fingerprint,
            "source": {"run": str(model.run) if model.run else None, "name": model.name},
            "targets": [str(t) for t in targets],
            "check_rows": check_rows,
            "allow_drift": allow_drift,
            "task": model.task.model_dump() if model.task else None,
        }
        manifest.inputs = model.inputs + (
            [describe_file(f) for f in sorted(model.adapter_path.iterdir()) if f.is_file()]
            if model.adapter_path
            else []
        )
        manifest.result = {k: v for k, v in result.items() if k != "timings"}
        manifest.write(work)
    return {"out": str(final), **result}


def refuse_unsupported(target: Target, merged: Any) -> None:
    """Refuse an architecture before any work."""
    if target.kind == "lora":
        gguf_lora.refuse(merged.adapter if merged.adapter.config else None)
    if target.kind != "onnx":
        precision = target.precision if target.precision in STREAMED else "f32"
        gguf_file.tensor_plan(merged, gguf_file.family_of(merged.config), merged.config, precision)
    else:
        onnx_graph.supported(str(merged.config.get("model_type")))


def _write_and_check(
    model: Model,
    targets: Sequence[Target],
    work: Path,
    manifest: Manifest,
    out: Output,
    rows: int,
    *,
    low: bool,
) -> list[parity.Report]:
    rows = min(rows, len(model.rows))
    scratch = work / ".scratch"
    scratch.mkdir()
    reports = []
    with out.progress() as progress:
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


def free_memory() -> int:
    """Bytes of memory that can be had without swapping; a large number where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


def parameters(merged: Merged) -> int:
    """Number of weights."""
    return sum(math.prod(merged.shape(name)) for name in merged.names())


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


def lora_base(target: Target, scratch: Path) -> Path | None:
    """The GGUF of the bare base that an exported adapter is run on; None for other targets."""
    return next(scratch.glob("base-*.gguf")) if target.kind == "lora" else None


def write(target: Target, model: Model, work: Path, scratch: Path, progress: Any) -> None:
    """Write one target under its final name inside the working directory."""
    merged = model.merged()
    path = work / target.name
    if target.kind == "gguf":
        streamed_as = target.precision if target.precision in STREAMED else middle(merged)
        plan = gguf_file.tensor_plan(merged, gguf_file.family_of(merged.config), merged.config, streamed_as)
        total = sum(gguf_file.nbytes(t.shape, t.kind) for t in plan)
        bar = progress.add_task(f"write {target}", total=total, note="")
        facts = gguf_file.Facts(
            model.name,
            model.base.name,
            model.base.license,
            model.chat.tokenizer.chat_template,
            model.chat.end,
        )
        first = path if streamed_as == target.precision else scratch / f"model-{streamed_as}.gguf"
        if not first.exists():  # several quantisations share one source
            gguf_file.write_gguf(
                first, merged, model.base.path, streamed_as, facts, lambda n: progress.advance(bar, n)
            )
        if first != path:
            progress.update(bar, completed=total, note="quantising")
            quantise(first, path, target.precision)
            progress.update(bar, note="")
        return
    bar = progress.add_task(f"write {target}", total=1, note="")
    if target.kind == "lora":
        facts = gguf_file.Facts(model.name, model.base.name, model.base.license, None, model.chat.end)
        gguf_lora.write_lora(path, merged, target.precision, facts)
        lower = scratch / f"base-{middle(merged)}.gguf"
        if not lower.exists():
            bare = Merged(model.base.weight_files(), model.base.config())
            template = replace(facts, template=model.chat.tokenizer.chat_template)
            gguf_file.write_gguf(lower, bare, model.base.path, middle(merged), template)
        progress.advance(bar)
        return
    ends = [model.chat.end]
    eos = model.chat.tokenizer.eos_token_id
    if eos is not None and eos not in ends:
        ends.append(eos)
    onnx_graph.write_onnx(path, model.base.path, merged, scratch / "merged", ends)
    progress.advance(bar)


def middle(merged: Merged) -> str:
    """What llama.cpp's quantiser reads: f32 (the merge as it is), bf16 where that would take too much disk."""
    return "f32" if parameters(merged) < 2_000_000_000 else "bf16"


def room(folder: Path, targets: Sequence[Target], merged: Merged) -> None:
    """`OutsideError` where the disk has not enough room for what will be written."""
    count = parameters(merged)
    per = {"f32": 4.0, "fp32": 8.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
    # Quantised files are made from a streamed one that lies beside them meanwhile.
    shared = 4.0 if any(t.kind == "lora" or t.precision in QUANTISED for t in targets) else 0.0
    needed = int(count * (shared + sum(per.get(t.precision, 1.0) for t in targets))) + SPARE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutsideError(
            f"{folder}: {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB; free some space or choose "
            "another --out"
        )


def _size(path: Path) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    )
