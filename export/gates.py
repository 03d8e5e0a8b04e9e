"""The gates of the run that is exported, carried along with the export's own `parity`."""

from __future__ import annotations

from collections.abc import Sequence

from export.parity import Report
from export.source import Model
from unshot.contracts.gates import Gate, read_gates

WORDS = {True: "passed", False: "**failed**", None: "undecided"}
NOT_REVIEWED = (
    "**No human has reviewed this model's answers.** The scores are automated metrics alone; do not ship on those. "
    "`unshot eval RUN --review sheet.html` draws a blinded sample from the run."
)


def gates_of(model: Model, reports: Sequence[Report]) -> list[Gate]:
    """The run's gates by name (none for a bare base), `parity` of this export, and `review` in any case."""
    found = read_gates(model.run) if model.run else {}
    failed = [f"{r.target}: {'; '.join(r.failures)}" for r in reports if not r.passed]
    found["parity"] = Gate(
        name="parity",
        passed=not failed,
        detail="; ".join(failed) or f"{len(reports)} files equal to the evaluated model within their limits",
        figures={"files": {r.target: r.passed for r in reports}},
    )
    if model.run and "review" not in found:
        found["review"] = Gate(
            name="review", passed=None, detail="no human has reviewed the answers; automated metrics alone"
        )
    return list(found.values())


def gate_lines(gates: Sequence[Gate]) -> list[str]:
    """The gates as the model card shows them; a missing review is said in words."""
    if not any(gate.name == "review" for gate in gates):
        return []
    lines = ["## Gates", "", "| gate | answer | what was seen |", "|---|---|---|"]
    for gate in gates:
        lines.append(f"| {gate.name} | {WORDS[gate.passed]} | {gate.detail.replace('|', '/')} |")
    review = next(gate for gate in gates if gate.name == "review")
    # A gate that nobody filled in has no figures.
    return [*lines, "", *([] if review.figures else [NOT_REVIEWED, ""])]
