"""One pass over a data file, then the questions that need all rows: duplicates, contradictions, agreement."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from tune import near
from tune.data.agreement import AnnotatorAgreement, Disputed, SettleFirst, agreement, settle_first
from tune.data.balance import Labels, balance
from tune.data.check_report import (
    COMFORTABLE,
    MINIMUM,
    CheckReport,
    Contradictions,
    Duplicate,
    Duplicates,
    Findings,
    Lengths,
    LongRow,
    LongRows,
    Malformed,
    Minimum,
    Pair,
    Paraphrases,
    PersonalData,
    PersonalRow,
    Prompts,
    Reading,
    Spread,
    Texts,
    Variety,
)
from tune.data.variety import Reservoir, template_share
from tune.meaning import by_meaning
from unshot.case import TaskSettings
from unshot.console import Output
from unshot.contracts.task import derive_task
from unshot.data import personal as pii
from unshot.data.example import fold
from unshot.data.load import shown
from unshot.data.old_prompt import Finder, PromptsInRows, SharedBeginning
from unshot.data.prompts import Prompt
from unshot.data.rows import Example, Fault, Message, RowOptions, Summary, scan
from unshot.errors import InputError

# Rows up to which the answers are held against the case as `tune` does; it takes memory for each.
JUDGED = 300_000
# Tokens of the request and of the answer of each row, or what is wrong with it.
Count = Callable[[Sequence[Example]], Sequence[tuple[int, int] | str]]
Render = Callable[[Sequence[Message]], str]


def count_words(rows: Sequence[Example]) -> list[tuple[int, int]]:
    """Words of prompt and answer of each row."""
    return [(sum(len(m["content"].split()) for m in r.messages), len((r.answer or "").split())) for r in rows]


class Check:
    """What has been seen of a data file so far; `read` it, then ask for the `report`.

    `folder` receives the full lists (and `redacted.jsonl` with `redact`). `count` gives the tokens (default:
    words) of prompt and answer; rows longer than `context` are listed,
    and with `strict_length` refused. The old `prompt`, or what all rows begin with
    (`shared`), is taken out of the rows first, as `unshot tune` does.
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        redact: bool = False,
        region: str = "US",
        field: str | None = None,
        labels: Sequence[str] | None = None,
        annotator: str = "annotator",
        count: Count | None = None,
        context: int | None = None,
        strict_length: bool = False,
        threshold: float = near.THRESHOLD,
        embedder: str | None = None,
        prompt: Prompt | None = None,
        shared: SharedBeginning | None = None,
        out: Output | None = None,
    ) -> None:
        self.count, self.unit = count or count_words, "tokens" if count else "words"
        self.region, self.annotator, self.context, self.threshold = region, annotator, context, threshold
        self.embedder, self.out = embedder, out
        self.rows = self.refused = 0
        self.strict_length = strict_length
        self.faults: list[Fault] = []
        self.lines, self.prompt, self.answer = array("Q"), array("Q"), array("Q")
        self.texts, self.answers = Texts(), Texts()
        self.labels = Labels(field, labels)
        self.sample = Reservoir()
        self.systems: dict[str, int] = {}
        self.system, self.prompts = array("Q"), PromptsInRows()
        self._find = Finder(prompt) if prompt else None
        self._shared = shared
        self.kinds: Counter[str] = Counter()
        self.people: dict[int, str] = {}
        self.example: Example | None = None
        self.unfit: str | None = None
        self._files = contextlib.ExitStack()
        self._folder = folder
        self.personal: Findings[PersonalRow] = self._findings("personal")
        self.too_long: Findings[LongRow] = self._findings("too_long")
        self._redacted = self._open("redacted") if redact and folder else None
        self._waiting: list[Example] = []

    def _open(self, name: str) -> IO[str] | None:
        if self._folder is None:
            return None
        return self._files.enter_context(
            (self._folder / f"{name}.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        )

    def _findings(self, name: str) -> Findings[Any]:
        return Findings(self._open(name))

    def read(self, items: Iterator[Example | Fault], progress: Callable[[int], None] | None = None) -> None:
        """Take in all rows; `progress` is called with the number of rows so far, every thousand."""
        for item in items:
            self.rows += 1
            if progress and self.rows % 1000 == 0:
                progress(self.rows)
            if isinstance(item, Fault):
                self.faults.append(item)
            else:
                self._take(item)
        self._measure()
        if progress:
            progress(self.rows)

    def _take(self, row: Example) -> None:
        self.prompts.rows += 1
        if self._find:
            row = self._find(row, self.prompts)
        if self._shared:
            row = self._shared.take_out(row, self.prompts)
        answer = row.answer or ""
        number = len(self.lines)
        self.lines.append(row.line)
        self.texts.append(row.dialogue)
        self.system.append(self.systems.setdefault(row.system, len(self.systems)))
        self.answers.append(answer)
        self.labels.add(answer)
        self.sample.add(row.text)
        self.prompts.see(row)
        if row.extra.get(self.annotator) not in (None, ""):
            self.people[number] = str(row.extra[self.annotator])
        kinds, clean = pii.scan_row(row, self.region)
        if kinds:
            self.kinds.update(kinds)
            self.personal.add(PersonalRow(row.line, sorted(kinds)))
        if self._redacted:
            self._redacted.write(json.dumps(clean.row(), ensure_ascii=False) + "\n")
        self.example = self.example or row
        self._waiting.append(row)
        if len(self._waiting) == 256:
            self._measure()

    def _measure(self) -> None:
        for row, found in zip(self._waiting, self.count(self._waiting), strict=True):
            if isinstance(found, str):
                self.faults.append(Fault(row.line, found, row.where))
                self.refused += 1
                continue
            prompt, answer = found
            self.prompt.append(prompt)
            self.answer.append(answer)
            if self.context is not None and prompt + answer > self.context:
                self.too_long.add(LongRow(row.line, prompt + answer))
        self._waiting.clear()

    def judge(self, task: TaskSettings) -> None:
        """Add the first answer that does not fit the case's labels, field, schema or metric, in the words of `tune`."""
        if not 0 < len(self.lines) <= JUDGED:
            return
        rows = (Example((), self.answers[i], line, where=f"line {line}") for i, line in enumerate(self.lines))
        try:
            derive_task(task, list(rows))
        except InputError as error:
            line, _, problem = str(error).removeprefix("line ").partition(": ")
            if problem and line.isdigit():
                self.faults.append(Fault(int(line), problem))
                self.refused += 1
            else:
                self.unfit = str(error)

    def report(self, data: Path, reading: Reading, prompts: Prompts) -> CheckReport:
        """Everything found in `data`."""
        counts = self.labels.counts()
        names = list(self.systems)
        systems = [names[i] for i in self.system]
        pairs = near.similar_inputs(systems, self.texts, threshold=self.threshold)
        duplicates, contradictions = self._alike(pairs, free_text=counts is None)
        good = len(self.lines) - self.refused
        malformed = [Malformed(f.line, f.problem, f.where) for f in self.faults]
        listed: Findings[Malformed] = self._findings("malformed")
        for row in malformed:
            listed.add(row)
        too_long = self.strict_length and self.too_long.total > 0
        usual = self.prompts.systems.most_common(1)
        result = CheckReport(
            data=str(data),
            rows=self.rows,
            well_formed=good,
            minimum=Minimum(MINIMUM, COMFORTABLE, good >= MINIMUM),
            malformed=malformed,
            length=self._lengths(),
            labels=balance(counts, self.labels.field()) if counts else None,
            contradictions=contradictions,
            agreement=self._agreement(),
            duplicates=duplicates,
            paraphrases=self._paraphrases(pairs),
            variety=Variety(
                template_share(self.sample.items),
                len(self.sample.items),
                usual[0][1] / good if usual else None,
            ),
            personal_data=PersonalData(dict(self.kinds), self.personal.total, self.personal.listed),
            reading=reading,
            prompts=prompts,
            ready=good >= MINIMUM and not self.faults and not too_long and not self.unfit,
        )
        result.warnings = result.advice() + [t for t in (self.labels.note(), self.unfit) if t]
        self._files.close()
        return result

    def _lengths(self) -> Lengths:
        def spread(values: array[int]) -> Spread:
            data = np.frombuffer(values, dtype=np.uint64) if len(values) else np.zeros(1)
            return Spread(*(float(q) for q in np.quantile(data, [0, 0.5, 0.95, 1])))

        long = LongRows(self.too_long.total, self.too_long.listed)
        return Lengths(self.unit, spread(self.prompt), spread(self.answer), self.context, long)

    def _pair(self, a: int, b: int, similarity: float, one: str, other: str) -> Pair:
        return Pair(
            [self.lines[a], self.lines[b]],
            round(similarity, 3),
            [one[:200], other[:200]],
            [self.texts[a][:200], self.texts[b][:200]],
        )

    def _alike(self, pairs: near.Pairs, *, free_text: bool) -> tuple[Duplicates, Contradictions]:
        duplicates: Findings[Duplicate] = self._findings("duplicates")
        differing = []
        for (a, b, similarity), equal in zip(pairs, pairs.equal, strict=True):
            duplicates.add(Duplicate(self.lines[b], self.lines[a], round(similarity, 3), bool(equal)))
            one, other = self.labels.label(self.answers[a]), self.labels.label(self.answers[b])
            if one != other:
                differing.append((-similarity, a, b, one, other))
        contradictions: Findings[Pair] = self._findings("contradictions")
        for similarity, a, b, one, other in sorted(differing):
            contradictions.add(self._pair(a, b, -similarity, one, other))
        exact = int(pairs.equal.sum())
        roots = near.components(len(self.lines), list(zip(pairs.first, pairs.second, strict=True)))
        surplus = len(self.lines) - len(np.unique(roots))
        return (
            Duplicates(self.threshold, exact, surplus - exact, duplicates.total, duplicates.listed),
            Contradictions(free_text, contradictions.total, contradictions.listed),
        )

    def _paraphrases(self, pairs: near.Pairs) -> Paraphrases | None:
        """Pairs alike in meaning that are not so by their texts; None without an embedder."""
        found = by_meaning(self.texts, self.embedder, out=self.out)
        if found is None:
            return None
        known = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
        paraphrases: Findings[Pair] = self._findings("paraphrases")
        differ = 0
        for a, b, similarity in sorted(found.pairs, key=lambda p: -p[2]):
            if (a, b) in known:
                continue
            one, other = self.labels.label(self.answers[a]), self.labels.label(self.answers[b])
            differ += one != other
            paraphrases.add(self._pair(a, b, similarity, one, other))
        return Paraphrases(
            found.embedder, found.threshold, len(found.pairs), differ, paraphrases.total, paraphrases.listed
        )

    def _agreement(self) -> AnnotatorAgreement | None:
        if not self.people:
            return None
        items: dict[str, int] = {}
        ratings: dict[int, dict[str, str]] = {}
        members: dict[int, list[int]] = {}
        for row, name in self.people.items():
            item = items.setdefault(f"{self.system[row]} {fold(self.texts[row])}", row)
            ratings.setdefault(item, {})[name] = self.labels.label(self.answers[row])
            members.setdefault(item, []).append(row)
        result = agreement(ratings)
        if result is None:
            return AnnotatorAgreement(items=0, note="no input has answers of two annotators")
        settle: Findings[Disputed] = self._findings("settle_first")
        for item in settle_first(ratings):
            lines = [self.lines[row] for row in members[item]]
            settle.add(Disputed(lines, ratings[item], self.texts[item][:200]))
        return result.changed(settle_first=SettleFirst(settle.total, settle.listed))


def check_file(
    path: Path,
    *,
    rows_as: RowOptions | None = None,
    prompt: Prompt | None = None,
    instruction: str | None = None,
    render: Render | None = None,
    length: Callable[[str], int] | None = None,
    task: TaskSettings | None = None,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> CheckReport:
    """`Check` of a file or files; its report with the file's name and how it was read.

    The old `prompt`, or what all rows begin with, is taken out where `instruction` or `prompt` replaces it.
    """
    options, annotator = rows_as or RowOptions(), settings.get("annotator", "annotator")
    replaces = not options.keep_system and (prompt is not None or instruction is not None)
    shared = SharedBeginning() if replaces else None
    if shared:
        rows = (r for r in scan(path, options.columns) if isinstance(r, Example))
        if not all(shared.add(row) for row in rows):
            shared = None
    check = Check(prompt=prompt if replaces else None, shared=shared, **settings)
    summary = Summary(path)
    check.read(scan(path, options.columns, summary=summary), progress)
    if task is not None:
        check.judge(task)
    reading = Reading(
        format=summary.format(),
        formats=dict(summary.formats),
        unused=summary.unused_fields({annotator}),
        notes=dict(summary.notes),
        example=shown(check.example, Prompt(system=instruction), render) if check.example else None,
        example_rendered=render is not None,
    )
    found = check.prompts
    words = found.tokens(lambda text: len(text.split()))
    result = check.report(path, reading, Prompts(found.changed, len(found.systems), words))
    result.warnings += summary.lines({annotator}) + found.lines(length, instruction=instruction)
    return result
