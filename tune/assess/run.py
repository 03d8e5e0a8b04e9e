"""The gates that `unshot tune` leaves in its manifest, measured on the model it has just trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune.assess.forgetting import Measured, forgetting, measure, untuned
from tune.assess.robustness import robustness, sample
from tune.job import request
from tune.mix import read_general
from tune.score import answer_requests
from tune.wrapping import reformat
from unshot.console import Output
from unshot.contracts.gates import Gate
from unshot.methods import METHODS
from unshot.metrics.quality import FAILED, INCONCLUSIVE, PASSED, against_target
from unshot.metrics.scores import Scores

if TYPE_CHECKING:
    from tune.job import Job


def quality(scores: Scores, target: float | None, *, taught: bool = False) -> Gate:
    """Test score against the case's target, by its interval; undecided without one.

    `taught` means that a teacher gave the answers that are scored against.
    """
    verdict, why = (
        against_target(scores, target) if target is not None else (INCONCLUSIVE, "no target was set")
    )
    by = "agreement with the teacher on " if taught else ""
    return Gate(
        name="quality",
        passed={PASSED: True, FAILED: False}.get(verdict),
        detail=f"{by}{scores.rows} test rows: {scores.metric} {scores.score:.3f} "
        f"[{scores.low:.3f}, {scores.high:.3f}], {why}",
        figures={
            "metric": scores.metric,
            "score": scores.score,
            "low": scores.low,
            "high": scores.high,
            "rows": scores.rows,
            "target": target,
        },
    )


def general_before(job: Job, net: Any) -> Measured | None:
    """The general set before training, where the base is gone after it (full tuning, PiSSA); else None."""
    settings = job.case.tune
    if not settings.forgetting or not (METHODS[settings.method].whole or settings.init == "pissa"):
        return None
    return measure(job, net, read_general(job.case.tune.general))


def assess(
    job: Job, net: Any, test: dict[str, Any], answers: Sequence[str], before: Measured | None, out: Output
) -> list[Gate]:
    """Quality, robustness and forgetting of a tuned model.

    `test` and `answers` are the scores of the test split and what was answered. The last two gates cost one more
    pass over up to 96 test rows and two over the general set.
    """
    settings, task, rows = job.case.tune, job.task, job.cleaned.parts.test
    scores = Scores.of({k: v for k, v in test.items() if k != "loss"})
    gates = [quality(scores, job.config.target, taught=job.taught)]
    if settings.robustness:
        chosen = sample(rows, settings.seed)
        out.log(f"asking {len(chosen)} test rows in another form")
        asked = [reformat(request(rows[i], task), settings.seed, task.labels) for i in chosen]
        other = answer_requests(job, net, asked, task.max_answer_tokens or 64)
        plain = [answers[i] for i in chosen]
        gates.append(robustness(task, [rows[i] for i in chosen], plain, other, settings.robustness_gap))
    if settings.forgetting:
        general = read_general(settings.general)
        out.log(f"asking {len(general)} general questions, before and after tuning")
        after = measure(job, net, general)
        if before is None:
            with untuned(net) as base:
                before = measure(job, base, general)
        gates.append(forgetting(general, before, after, settings.forgetting_drop))
    for gate in gates:
        # A quality that misses its target is the command's exit code.
        if gate.passed is False and gate.name != "quality" and job.world.first:
            out.warn(f"gate {gate.name} failed: {gate.detail}")
    return gates
