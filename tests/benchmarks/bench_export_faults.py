"""Plant every fault of `tests.export_faults`, and the thirteen of `tests/test_export_gate.py`, at five precisions.

    python -m tests.benchmarks.bench_export_faults [PART OF A FAULT'S NAME]

Prints one line a fault: the precisions at which it passed (none, where the gate is right) and what f32 said.
`TARGETS=gguf:f32` in the environment plants them at these formats alone; a coarser file is never equal where its f32
source is not (`export.run.Checks`). `IN_PROCESS=1` runs the engines in this process, which an abort of one would end.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

from export import parity
from export.run import Settings, export_run
from tests.benchmarks.bench_export_matrix import InProcess
from tests.export_cases import make_run
from tests.export_faults import FAULTS
from tests.tiny_models import make
from unshot.catalog.formats import parse_targets
from unshot.console import Output
from unshot.errors import InputError

FIVE = "gguf:f32 gguf:q8_0 gguf:q6_k gguf:q5_k_m gguf:q4_k_m"
TARGETS = os.environ.get("TARGETS", FIVE).split()


def main() -> None:
    """See the module's text."""
    if os.environ.get("IN_PROCESS"):
        parity.Engine = InProcess  # type: ignore[misc, assignment]
    chosen = [n for n in FAULTS if not sys.argv[1:] or any(part in n for part in sys.argv[1:])]
    runs: dict[str, Path] = {}
    passed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        for number, name in enumerate(chosen):
            fault = FAULTS[name]
            kind = f"{fault.model} {fault.config} {fault.adapter}"
            begin = time.perf_counter()
            if kind not in runs:
                root = Path(scratch, str(number))
                runs[kind] = make_run(
                    make(fault.model, root / "base", **fault.config), root / "run", **fault.adapter
                )
                right = _reports(runs[kind], root / "right")
                print(f"right {kind}: {right}", flush=True)
            with pytest.MonkeyPatch.context() as patch:
                fault.plant(patch)
                found = _reports(runs[kind], Path(scratch, f"{number}-wrong"))
            wrong = [t for t, said in found.items() if said.startswith("equal")]
            passed += bool(wrong)
            verdict = f"PASSED at {', '.join(wrong)}" if wrong else "caught"
            seconds = time.perf_counter() - begin
            print(f"{verdict}: {name} ({seconds:.0f} s): {found.get('gguf:f32', found)}", flush=True)
    print(f"{len(chosen)} faults, {passed} passed somewhere")


def _reports(run: Path, final: Path) -> dict[str, str]:
    try:
        done = export_run(
            str(run),
            parse_targets(TARGETS),
            final,
            Output(verbosity=-1),
            Settings(check_rows=2, allow_drift=True),
        )
    except InputError as error:
        return {"refused": str(error)}
    return {
        r.target: f"equal (KL {r.figures.logits.kl:.1e})"
        if r.passed and r.figures.logits
        else "; ".join(r.failures)
        for r in done.parity
    }


if __name__ == "__main__":
    main()
