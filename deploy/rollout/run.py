"""One step after the other: hold a share, look at the log, go on or take the version back.

All of it is in the registry, so that another process can go on where this one was killed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from deploy.ab.outcomes import E2E, METRICS, by_assignment
from deploy.ab.run import WORSE, Comparison, TestPlan, analyse, current, judge
from deploy.ab.strata import sample_ratio, stratify
from deploy.answers import LoggedRequest, gather
from deploy.registry import evidence
from deploy.registry.store import Registry, end_rollout, note_split
from unshot.console import Output
from unshot.contracts.registry import Event, Rollout, State, Waiver
from unshot.contracts.request_log import Feedback, Unreadable, read_feedback, read_requests
from unshot.contracts.task import Task
from unshot.errors import InputError
from unshot.metrics.thresholds import AB_ERROR, AB_POWER

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Decision = Literal["hold", "next", "back", "done", "over"]


@dataclass(frozen=True)
class Bounds:
    """What takes a version back. `margin` is how much worse quality, or how much more failures there may be, `slower`
    how many times as long an answer may take; `least` answers of the candidate are needed before the next step.
    """

    margin: float = 0.02
    slower: float = 1.5
    least: int = 30


@dataclass(frozen=True)
class Seen:
    """What a look at the log says: what to do, why, and the answers of the candidate in this step."""

    decision: Decision
    why: str
    answers: int = 0


def parse_steps(text: str) -> list[float]:
    """`1,10,50,100` as shares in percent that rise to 100. Raises `InputError`."""
    try:
        steps = [float(part.removesuffix("%")) for part in text.split(",")]
        rises = all(a < b for a, b in itertools.pairwise(steps))
        if not rises or not 0 < steps[0] <= steps[-1] == 100:
            raise ValueError
    except (ValueError, IndexError):
        raise InputError(
            f"--steps is `{text[:60]}`; give rising percents that end with 100, e.g. 1,10,50,100"
        ) from None
    return steps


def parse_hold(text: str) -> float:
    """`30m`, `2h`, `90s` or `1d` in seconds. Raises `InputError`."""
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * UNITS[unit]
        if not 0 < seconds <= 90 * 86400:
            raise ValueError
    except (ValueError, KeyError):
        raise InputError(
            f"--hold is `{text[:60]}`; give a time of at most 90 days, e.g. 90s, 30m, 2h, 1d"
        ) from None
    return seconds


def begin(
    registry: Registry, number: int, steps: Sequence[float], hold: float, *, by: str,
    waivers: Mapping[str, Waiver], now: float,
) -> Rollout:  # fmt: skip
    """Make a version the champion with the first step's share, or go on with its rollout that is under way.

    Raises `GateError` where a gate does not hold, `InputError` where another rollout is under way.
    """
    under_way = registry.state().rollout
    if under_way is not None and under_way.state == "running":
        if under_way.target != number or under_way.steps != list(steps) or under_way.hold_s != hold:
            given = ",".join(f"{s:g}" for s in under_way.steps)
            raise InputError(
                f"a rollout of v{under_way.target} ({given}, held {under_way.hold_s:g} s each) is under way; go on "
                "with that one, or end it by `unshot deploy rollback` or `unshot deploy split`"
            )
        return under_way
    registry.may_move("champion", number, dict(waivers))

    def apply(state: State) -> Rollout:
        version = state.versions[number]
        evidence.check(version, "champion", waivers)
        version.waivers += waivers.values()
        before = state.aliases.get("champion")
        if before == number:
            raise InputError(f"v{number} is the champion already; change its share by `unshot deploy split`")
        state.earlier.append(before)
        if state.aliases.get("challenger") == number:
            del state.aliases["challenger"]
        state.aliases["champion"] = number
        state.rollout = Rollout(
            target=number,
            steps=list(steps),
            hold_s=hold,
            since=now,
            by=by,
            before=before,
            before_split=state.split,
        )
        state.split = steps[0]
        reasons = "; ".join(f"{w.gate} waived by {w.by}: {w.reason}" for w in waivers.values())
        note(state, before=f"v{before}" if before is not None else None, after=f"{steps[0]:g}%", why=reasons)
        return state.rollout

    return registry.change(apply)


def note(state: State, *, before: str | None, after: str, why: str) -> None:
    """Put a step of the rollout on record."""
    assert state.rollout is not None
    name = f"v{state.rollout.target}"
    state.history.append(
        Event(by=state.rollout.by, action="rollout", subject=name, before=before, after=after, why=why)
    )


def running(state: State, number: int) -> Rollout:
    """The rollout under way of a version. Raises `InputError` where somebody ended it."""
    found = state.rollout
    if found is None or found.state != "running" or found.target != number:
        raise InputError(
            f"the rollout of v{number} is over: {found.why if found is not None else 'it was never begun'}"
        )
    return found


def go_on(registry: Registry, number: int, why: str, now: float) -> Rollout:
    """The next step, or the end where the last one was held."""

    def apply(state: State) -> Rollout:
        found = running(state, number)
        if found.step + 1 == len(found.steps):
            end_rollout(state, "done", why)
            return found
        before = found.steps[found.step]
        found.step, found.since = found.step + 1, now
        state.split = found.steps[found.step]
        note(state, before=f"{before:g}%", after=f"{state.split:g}%", why=why)
        return found

    return registry.change(apply)


def take_back(registry: Registry, number: int, why: str) -> Rollout:
    """Put back what was served before, champion and share, in one change."""

    def apply(state: State) -> Rollout:
        found = running(state, number)
        end_rollout(state, "rolled back", why)
        if state.aliases.get("champion") == number:
            before = state.earlier.pop() if state.earlier else None
            if before is None:
                state.aliases.pop("champion", None)
            else:
                state.aliases["champion"] = before
            state.history.append(
                Event(by=found.by, action="rollback", subject="champion", before=f"v{number}",
                      after=None if before is None else f"v{before}", why=why)
            )  # fmt: skip
        if found.before_split is None:
            state.split = None
        else:
            note_split(state, found.before_split, found.by, "as before the rollout")
        return found

    return registry.change(apply)


def look(folder: Path, rollout: Rollout, bounds: Bounds, task: Task | None, now: float, out: Output) -> Seen:
    """What the log says of a rollout that is under way; the arms are compared since it began, within each share."""
    unreadable = Unreadable()
    started = began(rollout)
    asked = gather(read_requests(folder, unreadable, since=started)) if any(folder.glob("requests-*")) else []
    feedback = read_feedback(folder, unreadable)
    if skipped := unreadable.sentence():
        out.warn(skipped)
    name = f"v{rollout.target}"
    mine = [
        one
        for one in asked
        if one.time >= rollout.since and any(r.arm == "candidate" and r.version == name for r in one.tries)
    ]
    answers = sum(not one.request_fault for one in mine)
    last = rollout.step + 1 == len(rollout.steps)
    held = now - rollout.since >= rollout.hold_s
    worse = verdict(asked, feedback, bounds, task)
    if worse is not None:
        return Seen("back", worse, answers)
    mismatch = sample_ratio(asked)
    if mismatch is not None and mismatch.found:
        return Seen("hold", mismatch.sentence(), answers)
    if not held:
        return Seen(
            "hold", f"{max(0.0, rollout.hold_s - (now - rollout.since)):.0f} s of this step are left", answers
        )
    if answers < bounds.least:
        return Seen("hold", f"{answers} answers in this step, {bounds.least} are needed", answers)
    return Seen("done" if last else "next", f"{answers} answers, nothing worse than its bound", answers)


def began(rollout: Rollout) -> float:
    """When a rollout began, seconds since 1970."""
    return datetime.fromisoformat(rollout.started).timestamp()


def verdict(
    asked: Sequence[LoggedRequest], feedback: Mapping[str, Feedback], bounds: Bounds, task: Task | None
) -> str | None:
    """Why the candidate is worse, beyond doubt over all looks together; None where that cannot be said."""
    plan = TestPlan(AB_ERROR.value, AB_POWER.value, bounds.margin, bounds.margin, "split")
    seen = by_assignment(asked, feedback, task, stratify(asked).codes)
    analysed: dict[str, Comparison] = {m.name: analyse(seen[m.name], plan, pairs=False) for m in METRICS}
    found = judge(analysed, plan)
    if found["verdict"] == WORSE:
        return found["reason"]
    slower = current(analysed[E2E.name])
    if slower and math.isfinite(slower[1]) and slower[1] > math.log(bounds.slower):
        times, low = math.exp(slower[0]), math.exp(slower[1])
        return f"answers take {times:.2f} times as long (at least {low:.2f}), {bounds.slower:g} is allowed"
    return None


def rollout_run(
    registry: Registry,
    rollout: Rollout,
    folder: Path,
    bounds: Bounds,
    out: Output,
    *,
    task: Task | None,
    poll: float,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Rollout:
    """Follow a rollout to its end; what it is then. Raises `InputError` where the log cannot be read."""
    number, said = rollout.target, ""
    while True:
        found = registry.state().rollout
        if found is None or found.target != number or found.state != "running":
            return found if found is not None and found.target == number else rollout
        seen = look(folder, found, bounds, task, clock(), out)
        share = f"v{number} at {found.steps[found.step]:g}%"
        if seen.decision == "back":
            out.warn(f"{share}: taken back; {seen.why}")
            take_back(registry, number, seen.why)
        elif seen.decision in ("next", "done"):
            after = go_on(registry, number, seen.why, clock())
            then = "done" if after.state == "done" else f"-> {after.steps[after.step]:g}%"
            out.log(f"{share}: {then}; {seen.why}")
        else:
            if seen.why != said and "s of this step" not in seen.why:
                out.log(f"{share}: held; {seen.why}")
            said = seen.why
            sleep(poll)
