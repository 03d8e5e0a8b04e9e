"""The gates that `unshot tune` leaves in its manifest, measured on the model it has just trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tune.assess.forgetting import forgetting, measure, read_general, untuned
from tune.assess.robustness import reformatted, robustness, sample
from unshot.case import Tune
from unshot.chat import Chat
from unshot.console import Output
from unshot.data import Example, Message
from unshot.gates import Gate
from unshot.models import Source
from unshot.task import Task


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


def assess(
    net: Any,
    source: Source,
    chat: Chat,
    task: Task,
    settings: Tune,
    *,
    target: float | None,
    test: dict[str, Any],
    rows: Sequence[Example],
    requests: Sequence[Sequence[Message]],
    answers: Sequence[str],
    capacity: int,
    device: str,
    out: Output,
) -> list[Gate]:
    """Quality, robustness and forgetting of a tuned model.

    `rows`, `requests` and `answers` are the test split with what was asked and answered. The last two gates cost one
    more pass over up to 96 test rows and two over the general set.
    """
    from tune.generate import answers as generate

    gates = [quality(test, target)]
    if settings.robustness:
        chosen = sample(rows, settings.seed)
        out.log(f"asking {len(chosen)} test rows in another form")
        asked = reformatted([requests[i] for i in chosen], task, settings.seed)
        other = generate(net, chat, asked, max_tokens=task.max_answer_tokens or 64)
        truth = [rows[i].answer or "" for i in chosen]
        plain = [answers[i] for i in chosen]
        gates.append(robustness(task, truth, plain, other, settings.robustness_gap, settings.seed))
    if settings.forgetting:
        general = read_general(settings.general)
        out.log(f"asking {len(general)} general questions, before and after tuning")
        after = measure(net, chat, general, capacity, device)
        with untuned(net, source, device) as base:
            before = measure(base, chat, general, capacity, device)
        gates.append(forgetting(general, before, after, settings.forgetting_drop))
    for gate in gates:
        if gate.passed is False and gate.name != "quality":  # that one is the command's exit code
            out.warn(f"gate {gate.name} failed: {gate.detail}")
    return gates
