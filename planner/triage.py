"""Should this be tuned at all? The article's order: better prompt, then retrieval, then tools, then tuning.

Source of the order and of the example counts: "Fine-Tuning LLMs for Domain-Specific Tasks: A Practical Guide"
(2026-03-19), sections "When Fine-Tuning Is Not the Answer" and "Step 1: Curate Training Data".
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from unshot.case import TaskSettings
from unshot.errors import InputError, nearest

FAILS = ("facts", "tools", "format", "jargon", "reasoning", "latency", "cost")
FEWEST, ENOUGH = 50, 100
# Few-shot examples below which the prompt itself has not been tried out.
TRIED = 3


class Economics(Struct, frozen=True):
    """What the forecast says: dollars per month of the cheapest way to keep the prompt and to tune, at `rate`.

    `break_even` is requests per second (None: never), `payback_months` None where tuning never pays back.
    `latency_met` says whether the best tuned option holds the SLO, `prompt_latency_met` the same for the best option
    with the long prompt (None: no SLO, or not known). `untuned` are other ways to keep the prompt that cost less than
    `tuned` (name, $ per month) and whose quality is not known; `cheaper_tuned` other tuned options that cost less.
    """

    rate: float
    keep: str
    keep_monthly: float
    tuned: str
    tuned_monthly: float
    break_even: float | None
    payback_months: float | None
    horizon_months: float
    latency_met: bool | None = None
    prompt_latency_met: bool | None = None
    untuned: tuple[tuple[str, float], ...] = ()
    cheaper_tuned: tuple[tuple[str, float], ...] = ()

    @property
    def pays(self) -> bool:
        """Whether tuning is cheaper and pays back within the horizon."""
        return self.payback_months is not None and self.payback_months <= self.horizon_months


class Triage(Struct, frozen=True):
    """The answer with its reasons, what would change it, and what was not said."""

    answer: Literal["yes", "not yet"]
    headline: str
    reasons: tuple[str, ...]
    would_change: tuple[str, ...]
    unknown: tuple[str, ...]


def triage(task: TaskSettings, *, shots: int, economics: Economics | None, unfit: str = "") -> Triage:
    """Judge from the questionnaire in `[task]`, the prompt's number of examples and the forecast.

    `unfit` says why no tuned option can run on the GPUs asked for, where none can. Raises `InputError` for an
    unknown kind of failure.
    """
    fails = _fails(task)
    unknown = _unknown(task)
    reached = task.current is not None and task.target is not None and task.current >= task.target
    blocks: list[tuple[str, str, str]] = []  # headline, reason, what would change it
    grounds: list[tuple[str, str]] = []  # headline, reason

    if reached and not fails & {"latency", "cost"}:
        blocks.append(
            (
                "the target is met",
                f"the prompt reaches {task.current:.0%}, the target is {task.target:.0%}; a further point costs more",
                "a higher target that the business can name a value for, or cost and latency that hurt",
            )
        )
    if "facts" in fails:
        blocks.append(
            (
                "retrieval first",
                "facts are missing: retrieve them at inference; they change, and weights do not",
                "answers that stay wrong with the right passages in the prompt",
            )
        )
    if "tools" in fails:
        blocks.append(
            (
                "function calling first",
                "the model must reach a system or calculate: call tools rather than train commands into weights",
                "tool calls that are still wrong with a good schema",
            )
        )
    if shots < TRIED and fails - {"latency", "cost", "facts", "tools"}:
        blocks.append(
            (
                "a better prompt first",
                f"the prompt holds {shots} examples: examples of the edge cases, an explicit format and reasoning "
                "steps are cheaper than training",
                f"the same failures with a prompt of {TRIED} or more examples that cover them",
            )
        )
    if task.examples_at_hand is not None and task.examples_at_hand < FEWEST:
        blocks.append(
            (
                "collect examples first",
                f"{task.examples_at_hand} labelled examples; {FEWEST}-200 are the least to start with",
                f"{ENOUGH} or more examples, the prompt's failures above all",
            )
        )
    if "format" in fails:
        grounds.append(("the format", "the answer's form must hold every time; tuning makes it the default"))
    if "jargon" in fails:
        grounds.append(("domain language", "the base model misreads terms that training examples can teach"))
    if "reasoning" in fails:
        grounds.append(("a fixed way of reasoning", "a decision framework must be followed consistently"))
    if unfit:
        blocks.append(
            (
                "the candidate does not run on the GPUs asked for",
                unfit,
                "a larger or faster GPU, a smaller model, lower precision, or a looser SLO",
            )
        )
    if economics is not None:
        _money(fails, economics, blocks, grounds)
    return _answer(blocks, grounds, unknown, task, economics)


def _money(
    fails: set[str],
    found: Economics,
    blocks: list[tuple[str, str, str]],
    grounds: list[tuple[str, str]],
) -> None:
    saving = found.keep_monthly - found.tuned_monthly
    beat = (
        f"{found.tuned} at ${found.tuned_monthly:,.0f} a month against {found.keep} at "
        f"${found.keep_monthly:,.0f} a month"
    )
    if found.pays:
        months = found.payback_months or 0.0
        back = "at once" if months < 0.05 else f"in {months:.1f} months"
        grounds.append(("cost", f"{beat}: ${saving:,.0f} saved a month, paid back {back}"))
    elif saving > 0:
        if found.payback_months is not None and not fails - {"cost"}:
            blocks.append(
                (
                    "it does not pay back in time",
                    f"{beat}: payback takes {found.payback_months:.0f} months, the horizon is {found.horizon_months:g}",
                    "a longer horizon, more traffic, or cheaper data and engineering",
                )
            )
    elif not fails - {"cost"}:
        more = (
            f"more than {found.break_even:.3g} requests per second (now {found.rate:g})"
            if found.break_even is not None
            else "a much cheaper GPU, fewer replicas, or a dearer API: at no rate does tuning win on cost"
        )
        blocks.append(("cost speaks for the prompt", f"{beat}, prompt caching included", more))
    if found.latency_met and found.prompt_latency_met is False:
        grounds.append(("latency", f"{found.tuned} holds the SLO, no option with the long prompt does"))
    if "latency" in fails and found.latency_met is False:
        blocks.append(
            (
                "no tuned option holds the SLO",
                "the forecast's latency is above the SLO on every GPU asked for",
                "a faster GPU, lower precision, a smaller model, or a looser SLO",
            )
        )


def _answer(
    blocks: list[tuple[str, str, str]],
    grounds: list[tuple[str, str]],
    unknown: list[str],
    task: TaskSettings,
    economics: Economics | None,
) -> Triage:
    if blocks:
        reasons = [reason for _, reason, _ in blocks] + [f"for it: {reason}" for _, reason in grounds]
        return Triage(
            "not yet",
            f"Not yet: {blocks[0][0]}",
            tuple(reasons),
            tuple(change for _, _, change in blocks),
            tuple(unknown),
        )
    if grounds:
        change = ["a prompt or a cheaper API model that reaches the target on a held-out test set"]
        if economics is not None and economics.break_even is not None and economics.pays:
            change.append(
                f"traffic below {economics.break_even:.3g} requests per second, where the prompt costs less"
            )
        if task.target is not None:
            change.append(f"a tuned model that stays below {task.target:.0%} on that test set")
        reasons = [reason for _, reason in grounds]
        headline = f"Yes, because of {' and '.join(name for name, _ in grounds)}"
        if economics is not None:
            if economics.untuned and {name for name, _ in grounds} <= {"cost"}:
                # Without a failure that needs tuning, a cheaper way to keep the prompt comes first.
                name, monthly = economics.untuned[0]
                headline += f", unless {name} answers as well: ${monthly:,.0f} a month without tuning"
            reasons += [f"cheaper, if it answers as well: {_list(economics.untuned)}"] * bool(
                economics.untuned
            )
            reasons += [f"cheaper tuned options: {_list(economics.cheaper_tuned)}"] * bool(
                economics.cheaper_tuned
            )
        return Triage("yes", headline, tuple(reasons), tuple(change), tuple(unknown))
    return Triage(
        "not yet",
        "Not yet: nothing speaks for tuning so far",
        ("neither a failure of the prompt nor a saving was found",),
        ("a failure that examples can teach (format, jargon, reasoning), or cost or latency that hurts",),
        tuple(unknown),
    )


def _list(options: tuple[tuple[str, float], ...]) -> str:
    return "; ".join(f"{name} at ${monthly:,.0f} a month" for name, monthly in options[:3])


def _fails(task: TaskSettings) -> set[str]:
    fails = {f.strip().lower() for f in task.fails}
    for name in fails:
        if name not in FAILS:
            raise InputError(
                f"[task] fails: unknown '{name}'; accepted: {', '.join(FAILS)} ({nearest(name, FAILS)})"
            )
    return fails


def _unknown(task: TaskSettings) -> list[str]:
    questions = []
    if not task.fails:
        questions.append(f"what fails today? ([task] fails: {', '.join(FAILS)})")
    if task.current is None:
        questions.append("what does the prompt reach now? ([task] current, 0 to 1)")
    if task.target is None:
        questions.append("what is good enough? ([task] target, 0 to 1)")
    if task.examples_at_hand is None:
        questions.append("how many labelled examples could be had? ([task] examples_at_hand)")
    return questions
