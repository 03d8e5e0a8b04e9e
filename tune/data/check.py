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
from tune.data.agreement import agreement, settle_first
from tune.data.balance import Labels, balance
from tune.data.store import Texts
from tune.data.variety import WARN, Reservoir, template_share
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

MINIMUM, COMFORTABLE = 50, 200
# Findings of one kind in the report itself; all of them are in the files beside it.
LISTED = 1000
# Rows up to which the answers are held against the case as `tune` does; it takes memory for each.
JUDGED = 300_000
# Tokens of the request and of the answer of each row, or what is wrong with it.
Count = Callable[[Sequence[Example]], Sequence[tuple[int, int] | str]]
Render = Callable[[Sequence[Message]], str]


def count_words(rows: Sequence[Example]) -> list[tuple[int, int]]:
    """Words of prompt and answer of each row."""
    return [(sum(len(m["content"].split()) for m in r.messages), len((r.answer or "").split())) for r in rows]


class Findings:
    """Findings of one kind: the first `LISTED` in memory, all of them as JSONL where a folder is given."""

    def __init__(self, handle: IO[str] | None) -> None:
        self.first: list[dict[str, Any]] = []
        self.total = 0
        self._handle = handle

    def add(self, **facts: Any) -> None:
        """Record one finding."""
        self.total += 1
        if len(self.first) < LISTED:
            self.first.append(facts)
        if self._handle:
            self._handle.write(json.dumps(facts, ensure_ascii=False) + "\n")

    def report(self) -> dict[str, Any]:
        """`{total, listed}`."""
        return {"total": self.total, "listed": self.first}


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
        self.labels = Labels(field)
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
        self.personal = self._findings("personal")
        self.too_long = self._findings("too_long")
        self._redacted = self._open("redacted") if redact and folder else None
        self._waiting: list[Example] = []

    def _open(self, name: str) -> IO[str] | None:
        if self._folder is None:
            return None
        return self._files.enter_context(
            (self._folder / f"{name}.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        )

    def _findings(self, name: str) -> Findings:
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
            self.personal.add(line=row.line, kinds=sorted(kinds))
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
                self.too_long.add(line=row.line, length=prompt + answer)
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

    def report(self) -> dict[str, Any]:
        """Everything found; lists hold their first 1,000 entries, but `malformed` all."""
        counts = self.labels.counts()
        names = list(self.systems)
        systems = [names[i] for i in self.system]
        pairs = near.similar_inputs(systems, self.texts, threshold=self.threshold)
        duplicates, contradictions = self._alike(pairs, free_text=counts is None)
        good = len(self.lines) - self.refused
        malformed = self._findings("malformed")
        for fault in self.faults:
            malformed.add(line=fault.line, problem=fault.problem)
        result: dict[str, Any] = {
            "rows": self.rows,
            "well_formed": good,
            "minimum": {"at_least": MINIMUM, "usual": COMFORTABLE, "enough": good >= MINIMUM},
            "malformed": [vars(f) for f in self.faults],
            "length": self._lengths(),
            "labels": balance(counts, self.labels.field()) if counts else None,
            "contradictions": contradictions,
            "agreement": self._agreement(),
            "duplicates": duplicates,
            "paraphrases": self._paraphrases(pairs),
            "variety": {
                "template_share": template_share(self.sample.items),
                "sampled": len(self.sample.items),
                "usual_system_prompt": self.prompts.systems.most_common(1)[0][1] / good
                if self.prompts.systems
                else None,
            },
            "personal_data": {"kinds": dict(self.kinds), **self.personal.report()},
        }
        result["warnings"] = warnings(result) + [t for t in (self.labels.note(), self.unfit) if t]
        result["ready"] = (
            good >= MINIMUM and not self.faults and not (self.strict_length and self.too_long.total)
        )
        result["ready"] = result["ready"] and not self.unfit
        self._files.close()
        return result

    def _lengths(self) -> dict[str, Any]:
        def spread(values: array[int]) -> dict[str, float]:
            data = np.frombuffer(values, dtype=np.uint64) if len(values) else np.zeros(1)
            low, mid, high, most = np.quantile(data, [0, 0.5, 0.95, 1])
            return {"min": float(low), "median": float(mid), "p95": float(high), "max": float(most)}

        return {
            "unit": self.unit,
            "prompt": spread(self.prompt),
            "answer": spread(self.answer),
            "context": self.context,
            "too_long": self.too_long.report(),
        }

    def _alike(self, pairs: near.Pairs, *, free_text: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        duplicates, differing = self._findings("duplicates"), []
        for (a, b, similarity), equal in zip(pairs, pairs.equal, strict=True):
            duplicates.add(
                line=self.lines[b],
                like_line=self.lines[a],
                similarity=round(similarity, 3),
                equal=bool(equal),
            )
            one, other = self.labels.label(self.answers[a]), self.labels.label(self.answers[b])
            if one != other:
                differing.append((-similarity, a, b, one, other))
        contradictions = self._findings("contradictions")
        for similarity, a, b, one, other in sorted(differing):
            contradictions.add(
                lines=[self.lines[a], self.lines[b]],
                similarity=round(-similarity, 3),
                answers=[one[:200], other[:200]],
                texts=[self.texts[a][:200], self.texts[b][:200]],
            )
        exact = int(pairs.equal.sum())
        roots = near.components(len(self.lines), list(zip(pairs.first, pairs.second, strict=True)))
        surplus = len(self.lines) - len(np.unique(roots))
        return (
            {
                "threshold": self.threshold,
                "exact_rows": exact,
                "near_rows": surplus - exact,
                **duplicates.report(),
            },
            {"free_text": free_text, **contradictions.report()},
        )

    def _paraphrases(self, pairs: near.Pairs) -> dict[str, Any] | None:
        """Pairs alike in meaning that are not so by their texts; None without an embedder."""
        found = by_meaning(self.texts, self.embedder, out=self.out)
        if found is None:
            return None
        known = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
        paraphrases = self._findings("paraphrases")
        differ = 0
        for a, b, similarity in sorted(found.pairs, key=lambda p: -p[2]):
            if (a, b) in known:
                continue
            one, other = self.labels.label(self.answers[a]), self.labels.label(self.answers[b])
            differ += one != other
            paraphrases.add(
                lines=[self.lines[a], self.lines[b]],
                similarity=round(similarity, 3),
                answers=[one[:200], other[:200]],
                texts=[self.texts[a][:200], self.texts[b][:200]],
            )
        return {**found.record(), "different_answers": differ, **paraphrases.report()}

    def _agreement(self) -> dict[str, Any] | None:
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
            return {"items": 0, "note": "no input has answers of two annotators"}
        settle = self._findings("settle_first")
        for item in settle_first(ratings):
            settle.add(
                lines=[self.lines[row] for row in members[item]],
                answers=ratings[item],
                text=self.texts[item][:200],
            )
        return {**result, "settle_first": settle.report()}


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader should act on, one sentence each."""
    found = []
    if result["malformed"]:
        found.append(f"{len(result['malformed'])} malformed rows; training refuses them")
    if result["well_formed"] < COMFORTABLE:
        found.append(
            f"{result['well_formed']} usable rows; 50 to 200 good examples are the usual minimum for one task"
        )
    labels = result["labels"]
    if labels and labels["below_5"]:
        found.append(f"{len(labels['below_5'])} of {labels['classes']} classes have fewer than 5 rows")
    if labels and labels["missing"]:
        found.append(labels["missing"])
    if labels and labels["alike"]:
        pairs = ", ".join(f"`{a}` and `{b}`" for a, b in labels["alike"][:5])
        found.append(f"{len(labels['alike'])} pairs of labels that may be one: {pairs}")
    if labels and labels["largest"] > 10 * labels["smallest"]:
        found.append(f"the largest class has {labels['largest']} rows, the smallest {labels['smallest']}")
    contradictions = result["contradictions"]
    if contradictions["total"] and not contradictions["free_text"]:
        found.append(f"{contradictions['total']} pairs of near-identical inputs with different answers")
    if result["duplicates"]["exact_rows"] or result["duplicates"]["near_rows"]:
        found.append(
            f"{result['duplicates']['exact_rows']} rows repeat an earlier input, "
            f"{result['duplicates']['near_rows']} more nearly do"
        )
    paraphrases = result["paraphrases"]
    if paraphrases and paraphrases["different_answers"] and not contradictions["free_text"]:
        found.append(
            f"{paraphrases['different_answers']} pairs of inputs close in meaning have different answers; look at them"
        )
    alpha = (result["agreement"] or {}).get("krippendorff_alpha")
    if alpha is not None and alpha < 0.8:
        found.append(f"annotators agree too little (Krippendorff's alpha {alpha:.2f}; 0.8 is the usual bar)")
    share = result["variety"]["template_share"]
    if share > WARN:
        found.append(
            f"{share:.0%} of the prompts' words are one template; the model may learn the wrapping: vary it "
            "(`unshot tune --augment-format`)"
        )
    if result["personal_data"]["total"]:
        kinds = ", ".join(f"{n} {k}" for k, n in sorted(result["personal_data"]["kinds"].items()))
        found.append(f"{result['personal_data']['total']} rows hold personal data ({kinds}); see --redact")
    length = result["length"]
    if length["too_long"]["total"]:
        found.append(
            f"{length['too_long']['total']} rows are longer than {length['context']} {length['unit']}"
        )
    return found


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
) -> dict[str, Any]:
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
    result = {"data": str(path), **check.report()}
    said = summary.lines({annotator})
    result["reading"] = {
        "format": summary.format(),
        "formats": dict(summary.formats),
        "unused": summary.unused_fields({annotator}),
        "notes": dict(summary.notes),
        "example": shown(check.example, Prompt(system=instruction), render) if check.example else None,
        "example_rendered": render is not None,
    }
    result["prompts"] = {
        "changed": check.prompts.changed,
        "kept": len(check.prompts.systems),
        "words_less": check.prompts.tokens(lambda text: len(text.split())),
    }
    result["warnings"] += said + check.prompts.lines(length, instruction=instruction)
    return result
