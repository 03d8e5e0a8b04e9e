"""`unshot data label`: a teacher answers inputs with the long prompt; what it said becomes rows to tune on.

Every request is in the ledger before it counts, so that a killed run asks nothing twice that was answered; dollars are
kept by the usage that the server reports.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from tune.data.ledger import PAID, Entry, Ledger
from tune.data.teacher import Question, ServerTeacher, Teacher, read_reply
from tune.data.variations import Ask, VariationCounts, vary
from unshot.console import Output
from unshot.contracts.document import Document
from unshot.contracts.manifest import Manifest, describe_data, staged
from unshot.contracts.record import Record
from unshot.contracts.task import schema_check
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Message, write_jsonl
from unshot.errors import GateError, InputError, OutsideError
from unshot.metrics.answers import INVALID, parse_answer
from unshot.prices import TokenPrice

# Sampling temperature of several votes; one vote is greedy.
VOTE_TEMPERATURE = 0.7
Reason = Literal["truncated", "refused", "malformed", "failed", "invalid"]


class Usage(Record):
    """What a labelling run took. `dollars` is None if no price was given or a server reported no usage."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    without_usage: int
    dollars: float | None


class LabelReport(Document):
    """`label.json`: what was labelled by whom, what was left out and why."""

    FILE: ClassVar[str] = "label.json"
    WRITTEN_BY: ClassVar[str] = "`unshot data label`"

    teacher: str
    inputs: int
    labelled: int
    # Inputs without a usable answer, by reason.
    left_out: dict[str, int]
    repaired: int
    votes: int
    # Mean share of the votes that agree with the label; None with one vote.
    agreement: float | None
    usage: Usage
    # Inputs that the teacher wrote itself; None if none were asked for.
    variations: VariationCounts | None = None


@dataclass(frozen=True)
class LabelSettings:
    """How inputs are labelled. `budget` is in dollars; `labels`, `schema` and `answer_field` say what is valid."""

    votes: int = 1
    max_tokens: int = 256
    concurrency: int = 8
    budget: float | None = None
    labels: Sequence[str] | None = None
    answer_field: str | None = None
    schema: dict[str, object] | None = None

    def fault(self, text: str) -> str | None:
        """What is wrong with an answer, in words for the teacher; None for a valid one."""
        if self.schema is not None and (problem := schema_check(dict(self.schema))(text)):
            return f"it does not fit the schema ({problem})"
        if self.labels and parse_answer(text, labels=self.labels, field=self.answer_field) == INVALID:
            where = f" as `{self.answer_field}`" if self.answer_field else ""
            return f"it must be one of{where}: {', '.join(self.labels)}"
        return None


@dataclass
class Label:
    """One input on its way: its votes, and whether one of them had to be asked again."""

    row: Example
    valid: list[str] = field(default_factory=list)
    faults: list[Reason] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    repaired: int = 0

    def answer(self) -> tuple[str, float] | None:
        """The most frequent valid answer (the earliest of equally frequent ones) and its share of all votes."""
        if not self.valid:
            return None
        text, count = Counter(self.valid).most_common(1)[0]
        return text, count / (len(self.valid) + len(self.faults))


def questions(
    rows: Sequence[Example], prompt: Prompt, settings: LabelSettings
) -> Iterator[tuple[int, Question]]:
    """Every first question: the row's number and what is asked."""
    temperature = VOTE_TEMPERATURE if settings.votes > 1 else 0.0
    for number, row in enumerate(rows):
        messages = prompt.request(row)
        for vote in range(settings.votes):
            yield number, Question(messages, settings.max_tokens, temperature, vote)


def repair(question: Question, answer: str, fault: str) -> Question:
    """The same question with the answer that would not do and why: asked once."""
    more: list[Message] = [
        {"role": "assistant", "content": answer},
        {
            "role": "user",
            "content": f"Your answer cannot be used: {fault}. Give the answer again, and nothing else.",
        },
    ]
    return replace(question, messages=[*question.messages, *more])


class Labeller:
    """Asks the questions that the ledger lacks, within the budget."""

    def __init__(self, teacher: Teacher, ledger: Ledger, settings: LabelSettings) -> None:
        self.teacher, self.ledger, self.settings = teacher, ledger, settings
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._flying = self._done = self._total = 0

    def run(self, rows: Sequence[Example], prompt: Prompt, out: Output) -> list[Label]:
        """Labels of all rows. Raises `GateError` at the budget, `OutsideError` if the server refuses the key."""
        found = [Label(row) for row in rows]
        waiting = questions(rows, prompt, self.settings)
        threads = self.settings.concurrency if self.teacher.concurrent else 1
        running: dict[Future[tuple[Entry, str | None, bool]], int] = {}
        self._total = len(rows) * self.settings.votes
        with out.progress() as progress, ThreadPoolExecutor(threads) as pool:
            bar = progress.add_task("labelling", total=self._total, note="")
            try:
                for number, question in waiting:
                    while len(running) >= threads:
                        self._settle(running, found)
                    running[pool.submit(self._answer, question)] = number
                    progress.update(bar, completed=self._done, note=self._spent())
                while running:
                    self._settle(running, found)
                    progress.update(bar, completed=self._done, note=self._spent())
            finally:
                self.stop.set()
                for future in running:
                    future.cancel()
        return found

    def _answer(self, question: Question) -> tuple[Entry, str | None, bool]:
        """The entry of a question, what is wrong with its answer, and whether it was asked a second time."""
        entry = self.ask(question)
        fault = self.settings.fault(entry.text) if entry.status == "ok" else None
        if fault is None:
            return entry, None, False
        second = self.ask(repair(question, entry.text, fault))
        return second, self.settings.fault(second.text) if second.status == "ok" else None, True

    def ask(self, question: Question) -> Entry:
        """The answer from the ledger, else from the teacher. Raises as `run`."""
        known = self.ledger.paid(question.key(self.teacher.name))
        if known is not None:
            return known
        if self.stop.is_set():
            raise OutsideError("stopped")
        with self._lock:
            self._check_budget()
            self._flying += 1
        try:
            entry = self.teacher.ask(question)
            self.ledger.add(entry)
        finally:
            with self._lock:
                self._flying -= 1
        return entry

    def _settle(self, running: dict[Future[tuple[Entry, str | None, bool]], int], found: list[Label]) -> None:
        """Take in what has ended."""
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            label = found[running.pop(future)]
            entry, fault, again = future.result()
            label.repaired += again and fault is None
            if entry.status != "ok":
                label.faults.append(entry.status)
            elif fault is not None:
                label.faults.append("invalid")
            else:
                label.valid.append(entry.text)
                if entry.margin is not None:
                    label.margins.append(entry.margin)
            self._done += 1

    def _check_budget(self) -> None:
        """Raise unless one more request fits into the budget; what nobody priced counts as the dearest answer."""
        budget, ledger = self.settings.budget, self.ledger
        if budget is None:
            return
        if ledger.unpriced:
            raise OutsideError(
                f"{self.teacher.name} reports no usage, so that --budget cannot be kept; leave --budget out, or use a "
                "server that reports it"
            )
        if ledger.unsure > self.settings.concurrency and not ledger.priced:
            raise OutsideError(
                f"{ledger.unsure} requests to {self.teacher.name} got no answer or a malformed one, none of them with "
                f"its usage ({ledger.why()}): what they cost is not known, so that --budget cannot be kept"
            )
        spent = ledger.spent + ledger.unsure * ledger.dearest
        # Requests on their way cost about what the others did.
        coming = (self._flying + 1) * (ledger.spent / ledger.priced) if ledger.priced else 0.0
        if spent >= budget or (ledger.priced and spent + coming > budget):
            unsure = f", {ledger.unsure} more at most ${ledger.dearest:.4f} each" if ledger.unsure else ""
            raise GateError(
                f"the budget of ${budget:g} is reached after {self._done} of {self._total} answers "
                f"(${ledger.spent:.4f} spent{unsure}); what was answered is kept, and the same command with a larger "
                "--budget goes on"
            )

    def _spent(self) -> str:
        return f"${self.ledger.spent:.2f}"


def usage_of(entries: Sequence[Entry]) -> Usage:
    """Tokens and dollars of all requests."""
    paid = [e for e in entries if e.status in PAID]
    without = sum(e.prompt_tokens is None or e.output_tokens is None for e in paid)
    dollars = [e.dollars for e in paid]
    return Usage(
        requests=len(paid),
        prompt_tokens=sum(e.prompt_tokens or 0 for e in paid),
        cached_tokens=sum(e.cached_tokens or 0 for e in paid),
        output_tokens=sum(e.output_tokens or 0 for e in paid),
        without_usage=without,
        dollars=None if None in dollars else sum(d for d in dollars if d is not None),
    )


def label_file(
    data: Path,
    rows: Sequence[Example],
    prompt: Prompt,
    teacher: Teacher,
    settings: LabelSettings,
    final: Path,
    out: Output,
    *,
    overwrite: bool = False,
    answered: Path | None = None,
    variations: Ask | None = None,
) -> LabelReport:
    """Label every row and write `final`: labelled.jsonl, left_out.jsonl, ledger.jsonl and label.json.

    `answered` is a batch output file, whose answers count as asked; `variations` asks for new inputs first. Raises
    `GateError` at the budget (what was answered is kept for the same command), `InputError` where nothing could be
    labelled.
    """
    if not prompt.given:
        raise InputError("no long prompt: give --prompt or --system, or `examples` or `system` under [task]")
    with staged(final, overwrite=overwrite, resume=True) as work:
        ledger = Ledger(work, out)
        if answered is not None:
            read_batch(answered, ledger, teacher)
        known = len(ledger.entries)
        if known:
            out.log(f"{known} answers are known; going on with the rest")
        labeller, counts = Labeller(teacher, ledger, settings), None
        if variations is not None:
            threads = settings.concurrency if teacher.concurrent else 1
            new, counts = vary(rows, prompt, settings.labels, variations, labeller.ask, threads)
            rows = [*rows, *new]
            out.log(
                f"{counts.taken} of {counts.asked} new inputs by the teacher; {counts.near_duplicates} refused as "
                f"near-duplicates, {counts.unreadable} answers without a list"
            )
        labels = labeller.run(rows, prompt, out)
        report = _report(labels, teacher, settings, list(ledger.entries.values()))
        report.variations = counts
        if not report.labelled:
            why = f"; the last one: {said}" if (said := ledger.why()) else ""
            raise InputError(
                f"{teacher.name}: no usable answer to {len(rows)} inputs ({_reasons(report)}{why})"
            )
        if isinstance(teacher, ServerTeacher) and not teacher.takes_temperature:
            out.warn(f"{teacher.name} takes no temperature: its answers are sampled as it likes, not greedy")
        good = [(label, *found) for label in labels if (found := label.answer())]
        write_jsonl(work / "labelled.jsonl", [_row(label, text, share) for label, text, share in good])
        write_jsonl(
            work / "left_out.jsonl",
            [{**label.row.row(), "reasons": list(label.faults)} for label in labels if not label.valid],
        )
        report.write(work)
        manifest = Manifest("data-label", inputs=[describe_data(data)])
        manifest.result = report.plain()
        manifest.finish(work)
    return report


def _row(label: Label, text: str, share: float) -> dict[str, object]:
    extra: dict[str, object] = {"labelled_by": "teacher", "confidence": share}
    if label.margins:
        extra["margin"] = min(label.margins)
    return {**replace(label.row, answer=text).row(), **extra}


def _report(
    labels: Sequence[Label], teacher: Teacher, settings: LabelSettings, entries: list[Entry]
) -> LabelReport:
    good = [found for label in labels if (found := label.answer())]
    reasons = Counter(label.faults[0] for label in labels if not label.valid)
    return LabelReport(
        teacher=teacher.name,
        inputs=len(labels),
        labelled=len(good),
        left_out=dict(sorted(reasons.items())),
        repaired=sum(label.repaired for label in labels),
        votes=settings.votes,
        agreement=sum(share for _, share in good) / len(good) if good and settings.votes > 1 else None,
        usage=usage_of(entries),
    )


def _reasons(report: LabelReport) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in report.left_out.items()) or "none asked"


def read_batch(path: Path, ledger: Ledger, teacher: Teacher) -> None:
    """Take the answers of an OpenAI batch output file into the ledger. Raises `InputError` for another file."""
    price = teacher.price if isinstance(teacher, ServerTeacher) else None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            key, response = value["custom_id"], value["response"] or {}
            status, body = int(response.get("status_code") or 0), json.dumps(response.get("body"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: not a line of a batch output file ({error})") from None
        if ledger.paid(str(key)) is None:
            ledger.add(read_reply(str(key), status, body.encode(), price))


def forecast_lines(
    rows: Sequence[Example],
    prompt: Prompt,
    settings: LabelSettings,
    model: str | None,
    price: TokenPrice | None,
) -> list[str]:
    """What labelling will take, before anything is asked: requests, tokens, and dollars if a price is known."""
    from unshot.text.tokenizers import counter_for

    counter = counter_for(model or "unknown", api=True, approximate=True)
    sizes = [counter.prompt(prompt.request(row)) for row in rows]
    requests, tokens = len(rows) * settings.votes, sum(sizes) * settings.votes
    about = "" if counter.exact else "about "
    most = requests * settings.max_tokens
    lines = [f"{requests} requests, {about}{tokens:,} input tokens, at most {most:,} output tokens"]
    if price is None:
        return [*lines, "dollars: unknown without --price"]
    line = (
        f"dollars: {about}${price.of(tokens, 0, None):.2f} for the input, at most ${price.of(0, most, None):.2f} for "
        "the output"
    )
    if price.cached is not None and len(rows) > 1:
        shared = counter.shared(prompt.request(rows[0]), prompt.request(rows[1]))
        hits = shared * (requests - 1)
        line += f"; {about}${price.of(tokens, 0, hits):.2f} for the input if the server caches what requests share"
    return [*lines, line]
