"""What to do: tune, try something else first, keep the prompt, or tune although it costs more.

The order "better prompt, retrieval, tools, tuning" and the example counts are those of "Fine-Tuning LLMs for
Domain-Specific Tasks: A Practical Guide" (2026-03-19), sections "When Fine-Tuning Is Not the Answer" and
"Step 1: Curate Training Data".
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from unshot.case import TaskSettings
from unshot.contracts.plan import Verdict
from unshot.errors import InputError, nearest
from unshot.report.formats import dollars, months, per_second

FAILS = ("facts", "tools", "format", "jargon", "reasoning", "latency", "cost")
FEWEST, ENOUGH = 50, 100
# Few-shot examples below which the prompt itself has not been tried out.
TRIED = 3


class Rival(NamedTuple):
    """Another usable option: its name and running dollars per month."""

    name: str
    monthly: float


class Economics(Struct, frozen=True):
    """What the forecast says: running dollars per month of the cheapest way to keep the prompt and to tune, at `rate`.

    `once` is the one-off cost of tuning beyond that of keeping. `break_even` is requests per second (None: never),
    `payback_months` None if tuning never pays back, `cheaper` the share of draws in which it is cheaper per month.
    `latency_met` says whether the best tuned option holds the SLO, `prompt_latency_met` the same for the best option
    with the long prompt (None: no SLO, or not known). `untuned` are other ways to keep the prompt that cost less than
    both `keep` and `tuned` and whose quality is not known; `cheaper_tuned` other tuned options below `tuned`;
    `uncounted` those that cost less than all of these before their reasoning tokens, which are not known;
    `keep_counted` is False where that holds of `keep` itself.
    """

    rate: float
    keep: str
    keep_monthly: float
    tuned: str
    tuned_monthly: float
    once: float
    break_even: float | None
    payback_months: float | None
    horizon_months: float
    cheaper: float | None = None
    latency_met: bool | None = None
    prompt_latency_met: bool | None = None
    untuned: tuple[Rival, ...] = ()
    cheaper_tuned: tuple[Rival, ...] = ()
    uncounted: tuple[Rival, ...] = ()
    keep_counted: bool = True

    @property
    def saving(self) -> float:
        """Running dollars saved per month."""
        return self.keep_monthly - self.tuned_monthly

    @property
    def net(self) -> float:
        """Dollars saved over the horizon, one-off costs taken off."""
        return self.saving * self.horizon_months - self.once

    @property
    def pays(self) -> bool:
        """Whether tuning is cheaper and pays back within the horizon."""
        return self.payback_months is not None and self.payback_months <= self.horizon_months


class Absent(Struct, frozen=True):
    """There is no way to keep the prompt with today's model: `today` cannot serve the requests, and `why`.

    `slow`: it misses the SLO (else it cannot run as described). `tuned` is the cheapest tuned option, dollars per month
    and once; `untuned` are other usable options with the long prompt, cheapest first.
    """

    today: str
    why: str
    slow: bool
    tuned: str
    monthly: float
    once: float
    untuned: tuple[Rival, ...] = ()


class Reason(NamedTuple):
    """Something that speaks for or against tuning: a short name, the sentence, and what would change it."""

    name: str
    text: str
    change: str = ""


def judge_case(
    task: TaskSettings,
    *,
    shots: int,
    economics: Economics | None,
    unfit: str = "",
    absent: Absent | None = None,
) -> Verdict:
    """Judge from the questionnaire in `[task]`, the prompt's number of examples and the forecast.

    `unfit` says why no tuned option can run on the GPUs asked for, if none can; `absent` stands for `economics` where
    today's model cannot serve the prompt. Raises `InputError` for an unknown kind of failure.
    """
    fails = _fails(task)
    against = _against(task, fails, shots, unfit)
    grounds = _grounds(fails, economics)
    if economics is not None and "latency" in fails and economics.latency_met is False:
        against.append(
            Reason(
                "no tuned option holds the SLO",
                "the forecast's latency is above the SLO on every GPU asked for",
                "a faster GPU, lower precision, a smaller model, or a looser SLO",
            )
        )
    unknown = _unknown(task)
    if against:
        reasons = [r.text for r in against] + [f"for tuning: {g.text}" for g in grounds]
        first = against[0]
        headline = f"Keep the prompt: {first.name}"
        changes = [r.change for r in against]
        text = f"{headline}. {_sentence(first.text)}"
        return Verdict("keep the prompt", headline, text, reasons, changes, unknown)
    if absent is not None:
        return _without_today(absent, grounds, unknown)
    if economics is None:
        headline = "Keep the prompt: nothing speaks for tuning so far"
        reason = "neither a failure of the prompt nor a saving was found"
        change = (
            "a failure that examples can teach (format, jargon, reasoning), or cost or latency that hurts"
        )
        return Verdict(
            "keep the prompt", headline, f"{headline}. {_sentence(reason)}", [reason], [change], unknown
        )
    return _by_money(task, grounds, economics, unknown)


def _by_money(task: TaskSettings, grounds: list[Reason], found: Economics, unknown: list[str]) -> Verdict:
    teaches = [g for g in grounds if g.name != "cost"]
    reasons = [_money(found), *(g.text for g in grounds if g.name != "cost")]
    reasons += [f"cheaper, if it answers as well: {_list(found.untuned)}"] * bool(found.untuned)
    reasons += [f"cheaper tuned options: {_list(found.cheaper_tuned)}"] * bool(found.cheaper_tuned)
    change = _changes(task, found)
    if not found.keep_counted and not found.pays:
        change.insert(
            0, f"the reasoning tokens of {found.keep}, of which none is counted (--reasoning-tokens)"
        )
    if found.uncounted:
        least = f"{_list(found.uncounted[:1])} without any"
        change.insert(0, f"the reasoning tokens of what may be cheaper still: {least} (--reasoning-tokens)")
    horizon = f"over {found.horizon_months:g} months"
    if found.break_even is None:
        since = "no rate makes tuning the cheaper one"
    else:
        now = per_second(found.rate, found.break_even)
        since = f"tuning is cheaper from {per_second(found.break_even)} on (now {now})"
    sure = "no error bars"
    if found.cheaper is not None:
        sure = f"at today's rate it is in {found.cheaper:.0%} of the draws"
    if found.untuned and not teaches:
        best = found.untuned[0]
        headline = f"Try {best.name} first"
        saves = dollars((found.keep_monthly - best.monthly) * found.horizon_months)
        beside = f"tuning would save {dollars(found.net)}" if found.net > 0 else "tuning saves nothing there"
        summary = (
            f"{headline}: {dollars(best.monthly)} a month instead of {dollars(found.keep_monthly)} for {found.keep}, "
            f"{saves} saved {horizon} if it answers as well ({beside}); {since}; {sure}. "
            f"{_would(change)}"
        )
        return Verdict("try first", headline, summary, reasons, change, unknown)
    if found.pays:
        headline = f"Tune: {dollars(found.net)} saved {horizon}"
        summary = f"{headline} with {found.tuned} against {found.keep}; {since}; {sure}. {_would(change)}"
        return Verdict("tune", headline, summary, reasons, change, unknown)
    if teaches:
        more = -found.net / found.horizon_months
        headline = f"Not for money: {dollars(more)} a month more for {' and '.join(g.name for g in teaches)}"
        summary = (
            f"{headline}, one-off costs spread {horizon}: {found.tuned} against {found.keep}; {since}; {sure}. "
            f"{_would(change)}"
        )
        return Verdict("not for money", headline, summary, reasons, change, unknown)
    headline = (
        "Keep the prompt: it costs less"
        if found.saving <= 0
        else "Keep the prompt: tuning pays back too late"
    )
    summary = (
        f"{headline}. Tuning would lose {dollars(-found.net)} {horizon} ({found.tuned} against {found.keep}); {since}; "
        f"{sure}. {_would(change)}"
    )
    return Verdict("keep the prompt", headline, summary, reasons, change, unknown)


def _without_today(found: Absent, grounds: list[Reason], unknown: list[str]) -> Verdict:
    """Where today's model cannot serve the prompt, nothing can be saved against it."""
    beside = f"{found.tuned} at {dollars(found.monthly)} a month and {dollars(found.once)} once"
    reasons = [f"{found.today} is not usable: {found.why}", f"tuned: {beside}", *(g.text for g in grounds)]
    reasons += [f"usable, if it answers as well: {_list(found.untuned)}"] * bool(found.untuned)
    if not found.slow:
        headline = "No comparison: by the forecast, what runs today cannot serve this traffic"
        change = ["[baseline] model, gpu and precision as they really are, or requests that fit them"]
        text = f"{headline} ({found.today}: {found.why}). {_would(change)}"
        return Verdict("keep the prompt", headline, text, reasons, change, unknown)
    change = ["a looser SLO, or a faster GPU for today's model"]
    if found.untuned and not grounds:
        best = found.untuned[0]
        headline = f"Try {best.name} first"
        text = (
            f"{headline}: {dollars(best.monthly)} a month, if it answers as well; {found.today} misses the SLO "
            f"({found.why}). Tuning: {beside}. {_would(change)}"
        )
        return Verdict("try first", headline, text, reasons, change, unknown)
    headline = f"Tune: {found.today} misses the SLO"
    text = f"{headline} ({found.why}); {beside} holds it. {_would(change)}"
    return Verdict("tune", headline, text, reasons, change, unknown)


def _against(task: TaskSettings, fails: set[str], shots: int, unfit: str) -> list[Reason]:
    """What speaks against tuning whatever it costs, weightiest first."""
    found = []
    reached = task.current is not None and task.target is not None and task.current >= task.target
    if reached and not fails & {"latency", "cost"}:
        found.append(
            Reason(
                "the target is met",
                f"the prompt reaches {task.current:.0%}, the target is {task.target:.0%}; a further point costs more",
                "a higher target that the business can name a value for, or cost and latency that hurt",
            )
        )
    if "facts" in fails:
        found.append(
            Reason(
                "retrieval first",
                "facts are missing: retrieve them at inference; they change, and weights do not",
                "answers that stay wrong with the right passages in the prompt",
            )
        )
    if "tools" in fails:
        found.append(
            Reason(
                "function calling first",
                "the model must reach a system or calculate: call tools rather than train commands into weights",
                "tool calls that are still wrong with a good schema",
            )
        )
    if shots < TRIED and fails - {"latency", "cost", "facts", "tools"}:
        found.append(
            Reason(
                "a better prompt first",
                f"the prompt holds {shots} examples: examples of the edge cases, an explicit format and reasoning "
                "steps are cheaper than training",
                f"the same failures with a prompt of {TRIED} or more examples that cover them",
            )
        )
    if task.examples_at_hand is not None and task.examples_at_hand < FEWEST:
        found.append(
            Reason(
                "collect examples first",
                f"{task.examples_at_hand} labelled examples; {FEWEST}-200 are the least to start with",
                f"{ENOUGH} or more examples, the prompt's failures above all",
            )
        )
    if unfit:
        found.append(
            Reason(
                "the candidate cannot serve this on the GPUs asked for",
                unfit,
                "a larger or faster GPU, a smaller model, lower precision, or a looser SLO",
            )
        )
    return found


def _grounds(fails: set[str], economics: Economics | None) -> list[Reason]:
    """What speaks for tuning."""
    texts = {
        "format": ("the format", "the answer's form must hold every time; tuning makes it the default"),
        "jargon": ("domain language", "the base model misreads terms that training examples can teach"),
        "reasoning": ("a fixed way of reasoning", "a decision framework must be followed consistently"),
    }
    found = [Reason(*texts[name]) for name in texts if name in fails]
    if economics is None:
        return found
    if economics.pays:
        found.append(Reason("cost", _money(economics)))
    if economics.latency_met and economics.prompt_latency_met is False:
        found.append(
            Reason("latency", f"{economics.tuned} holds the SLO, no option with the long prompt does")
        )
    return found


def _money(found: Economics) -> str:
    beat = (
        f"{found.tuned} at {dollars(found.tuned_monthly)} a month against {found.keep} at "
        f"{dollars(found.keep_monthly)} a month, prompt caching included"
    )
    if found.saving <= 0:
        return f"{beat}: {dollars(-found.saving)} a month more"
    return f"{beat}: {dollars(found.saving)} a month less, {_paid_back(found.payback_months)}"


def _paid_back(value: float | None) -> str:
    text = months(value)
    return f"paid back in {text}" if text.endswith("months") else f"paid back {text}"


def _changes(task: TaskSettings, found: Economics) -> list[str]:
    if found.pays:
        change = ["a prompt or a cheaper API model that reaches the target on a held-out test set"]
        if found.break_even:
            change.append(f"traffic below {per_second(found.break_even)}, where the prompt costs less")
        if task.target is not None:
            change.append(f"a tuned model that stays below {task.target:.0%} on that test set")
        return change
    if found.saving > 0:
        return ["a longer horizon, more traffic, or cheaper data and engineering"]
    if found.break_even is not None:
        return [f"traffic above {per_second(found.break_even)}, where tuning costs less"]
    return ["a much cheaper GPU, fewer replicas, or a dearer API: at no rate does tuning win on cost"]


def _would(change: list[str]) -> str:
    return f"Would change it: {change[0]}."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _list(options: tuple[Rival, ...]) -> str:
    return "; ".join(f"{o.name} at {dollars(o.monthly)} a month" for o in options[:3])


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
