"""`unshot run` killed in each of its stages and run again: `python -m tests.benchmarks.kill_run MODEL OUT [UNTIL]`.

MODEL is a small model's directory. One run is left alone; another is killed (SIGKILL, with its child processes) once in
every stage, as soon as that stage's working directory stands, and started again. Prints what was killed and whether the
two ended with the same files: the adapter's and the exported model's bytes, the gates, the verdict, the registry's
versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, command
from unshot.contracts.manifest import sha256
from unshot.pipeline import FOLDERS, STAGES, PipelineRecord

CASE = """
[task]
system = "Say which risk the clause carries."
examples = "few.jsonl"
instruction = "Which risk?"
data = "rows.jsonl"

[traffic]
rate = 1.0
output_tokens = 4

[baseline]
model = "smollm2-135m"
gpu = "cpu"

[candidate]
model = "{model}"
gpu = "cpu"

[tune]
epochs = 1
rank = 2
forgetting = false
robustness = false
embedder = "off"

[export]
to = ["gguf:q8_0"]

[bench]
requests = 4
"""


def write_case(folder: Path, model: Path) -> Path:
    """The demo's shortest rows with a small model: a case of seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "unshot" / "demo" / "data.jsonl").read_text(encoding="utf-8")
    rows = sorted(text.splitlines(keepends=True), key=len)
    (folder / "few.jsonl").write_text("".join(rows[:2]))
    (folder / "rows.jsonl").write_text("".join(rows[2:62]))
    (folder / "case.toml").write_text(CASE.format(model=model))
    return folder / "case.toml"


def start(case: Path, out: Path, until: str) -> subprocess.Popen[bytes]:
    """`unshot run` in a session of its own, so that it and its stage end together."""
    line = command(["run", "--case", case, "--out", out, "--until", until, "-q"])
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def kill_in(stage: str, case: Path, out: Path, until: str) -> str:
    """Run until the stage's work is on disk, then kill everything; what stood there, or how it ended before."""
    name = FOLDERS[stage]  # type: ignore[index]
    process = start(case, out, until)
    try:
        while process.poll() is None:
            # Of the registry the directory itself is the working one.
            for work in (out / f".{name}.partial", out / name / "versions"):
                with contextlib.suppress(OSError):
                    if work.is_dir() and any(work.iterdir()):
                        return "killed with " + ", ".join(sorted(p.name for p in work.iterdir())[:4])
            time.sleep(0.002)
        return f"ended with {process.returncode} before it could be killed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outcome(out: Path) -> dict[str, Any]:
    """What two runs must have in common."""
    record = PipelineRecord.read(out)
    found: dict[str, Any] = {
        "stages": [(line.stage, line.exit_code, [g.plain() for g in line.gates]) for line in record.stages],
        "verdict": record.verdict,
        "stopped": record.stopped,
        "files": {
            name: sha256(out / name)
            for name in (
                "run/adapter/adapter_model.safetensors",
                "artifacts/model-q8_0.gguf",
                "baseline/model-q8_0.gguf",
            )
            if (out / name).is_file()
        },
        "left": sorted(p.name for p in out.iterdir() if p.name.endswith((".partial", ".old"))),
    }
    with contextlib.suppress(OSError):
        state = json.loads((out / "registry" / "registry.json").read_text())
        found["versions"] = len(state["versions"])
    return found


def figures_apart(value: Any) -> Any:
    """An outcome without measured times, which no two runs share."""

    def kept(gate: dict[str, Any], stage: str) -> Any:
        measured = stage == "bench"
        return (gate["name"], gate["passed"]) if measured else {k: v for k, v in gate.items() if k != "at"}

    stages = [(stage, code, [kept(g, stage) for g in gates]) for stage, code, gates in value["stages"]]
    # The reason holds measured ratios; which gate stopped it is at its beginning.
    return {**value, "stages": stages, "stopped": (value["stopped"] or "").split("(")[0]}


def main() -> int:
    """Both runs; exit code 1 if they differ."""
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    until = sys.argv[3] if len(sys.argv) > 3 else "registry"
    case = write_case(folder / "case", model.resolve())
    begun = time.perf_counter()
    code = start(case, folder / "alone", until).wait()
    print(f"alone: exit code {code}, {time.perf_counter() - begun:.0f} s", flush=True)
    for stage in STAGES[: STAGES.index(until) + 1]:  # type: ignore[arg-type]
        print(f"{stage}: {kill_in(stage, case, folder / 'killed', until)}", flush=True)
    again = start(case, folder / "killed", until).wait()
    one, other = (figures_apart(outcome(folder / name)) for name in ("alone", "killed"))
    same = one == other and again == code
    print(f"again: exit code {again}; the same result: {'yes' if same else 'NO'}")
    if not same:
        print(json.dumps([one, other], indent=1, default=str))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
