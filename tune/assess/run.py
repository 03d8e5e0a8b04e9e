"""The gates that `unshot tune` leaves in its manifest, measured on the model it has just trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tune.assess.forgetting import forgetting, measure, read_general, untuned
from tune.assess.robustness import reformatted, robustness, sample
from unshot.console import Output
from unshot.gates import Gate

if TYPE_CHECKING:
    from tune.run import Job


def quality(test: dict[str, Any], target: float | None) -> Gate:
    """Test score against the case's target; undecided without one."""
    detail = f"{test['rows']} test rows: {test['metric']} {test['score']:.3f} [{test['low']:.3f}, {test['high']:.3f}]"
    detail += f", target {target:g}" if target is not None else ", no target was set"
    return Gate(
        name="quality",
        passed=None if target is None else test["score"] >= target,
        detail=detail,
        figures={k: test[k] for k in ("metric", "score", "low", "high", "rows")} | {"target": target},
    )


def assess(job: Job, net: Any, test: dict[str, Any], answers: Sequence[str], out: Output) -> list[Gate]:
    """Quality, robustness and forgetting of a tuned model.

    `test` and `answers` are the scores of the test split and what was answered. The last two gates cost one more
    pass over up to 96 test rows and two over the general set.
    """
    from tune.generate import answers as generate
    from tune.run import request

    settings, task, rows = job.case.tune, job.task, job.cleaned.parts.test
    gates = [quality(test, job.plan.target)]
    if settings.robustness:
        chosen = sample(rows, settings.seed)
        out.log(f"asking {len(chosen)} test rows in another form")
        asked = reformatted([request(rows[i], task) for i in chosen], task, settings.seed)
        other = generate(net, job.chat, asked, max_tokens=task.max_answer_tokens or 64)
        truth = [rows[i].answer or "" for i in chosen]
        plain = [answers[i] for i in chosen]
        gates.append(robustness(task, truth, plain, other, settings.robustness_gap, settings.seed))
    if settings.forgetting:
        general = read_general(settings.general)
        out.log(f"asking {len(general)} general questions, before and after tuning")
        after = measure(net, job.chat, general, job.plan.capacity, job.device)
        with untuned(net, job.source, job.device) as base:
            before = measure(base, job.chat, general, job.plan.capacity, job.device)
        gates.append(forgetting(general, before, after, settings.forgetting_drop))
    for gate in gates:
        if gate.passed is False and gate.name != "quality":  # that one is the command's exit code
            out.warn(f"gate {gate.name} failed: {gate.detail}")
    return gates
