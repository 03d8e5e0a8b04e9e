"""The long prompt inside the rows: logs hold it in every request, and a row that keeps it teaches the model nothing.

Recognised are the case's own prompt (system prompt, few-shot turns in any number, a text with slots) and, where the
rows all begin with the same messages, those. They are taken out, so that the tuned model's instruction has their place.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from unshot.data.example import Example, Message
from unshot.data.prompts import SLOT, Prompt

# Rows that must share their first messages before these count as a prompt.
LEAST = 2
# Words with which all inputs begin that are a prompt, from so many rows on.
LONG, MANY = 30, 10
# Earlier turns are few-shot examples where so large a share of the rows has the same; so many turns are compared.
RECURRING, TURNS = 0.2, 10_000


@dataclass
class PromptsInRows:
    """What the rows hold of prompts: the texts taken out with their rows, and the system prompts left in."""

    rows: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    shared: bool = False
    systems: Counter[str] = field(default_factory=Counter)
    # What the inputs seen so far all begin with; None before the first.
    beginning: str | None = None
    turns: Counter[tuple[str, str]] = field(default_factory=Counter)

    def see(self, row: Example) -> None:
        """Take in a row as it is used."""
        if row.system:
            self.systems[row.system] += 1
        text = row.text
        self.beginning = text if self.beginning is None else os.path.commonprefix([self.beginning, text])
        for asked, said in itertools.pairwise(row.messages[:-1]):
            pair = (asked["content"], said["content"])
            if asked["role"] == "user" and (pair in self.turns or len(self.turns) < TURNS):
                self.turns[pair] += 1

    def tokens(self, count: Callable[[str], int]) -> int:
        """Tokens of what was taken out, over all rows."""
        return sum(count(text) * rows for text, rows in self.removed.items())

    def lines(
        self,
        count: Callable[[str], int] | None = None,
        *,
        instruction: str | None = None,
        replaced: bool = True,
    ) -> list[str]:
        """What a user must know, one sentence each. Lengths are tokens by `count`, else words."""
        unit, measure = ("tokens", count) if count else ("words", lambda text: len(text.split()))
        found = []
        if self.changed and _fold(instruction or "") not in map(_fold, self.removed):
            whose = "the first messages, the same in all rows," if self.shared else "the long prompt"
            does = (
                "is replaced by the instruction" if instruction else "is taken out (no instruction is given)"
            )
            found.append(
                f"{whose} in {self.changed} of {self.rows} rows {does}: {self.tokens(measure):,} {unit} less "
                "(--keep-system leaves it)"
            )
        if self.systems:
            found.append(self._mixture(measure, unit, instruction, replaced))
        often = [n for n in self.turns.values() if n >= max(MANY, RECURRING * self.rows)]
        if often:
            found.append(
                f"{len(often)} earlier questions with their answers recur in up to {max(often)} of {self.rows} rows: "
                "they look like few-shot examples and stay in every request; give the old prompt in the case file "
                "to take them out"
            )
        shared = self.beginning or ""
        if self.rows >= MANY and len(shared.split()) >= LONG:
            found.append(
                f"all {self.rows} inputs begin with the same {measure(shared)} {unit}, which the tuned model would "
                "need in every request; where they are the old prompt, give it in the case file (`examples`: a text "
                "with a {{slot}} for the input)"
            )
        return found

    def _mixture(
        self, measure: Callable[[str], int], unit: str, instruction: str | None, replaced: bool
    ) -> str:
        carried = self.systems.total()
        text = self.systems.most_common(1)[0][0]
        if len(self.systems) == 1:
            what = f"{carried} of {self.rows} rows have the same system prompt of their own ({measure(text)} {unit})"
        else:
            most = ", ".join(f"{n} rows" for _, n in self.systems.most_common(3))
            what = (
                f"a mixture of system prompts: {len(self.systems)} different ones in {carried} of {self.rows} rows "
                f"(the commonest in {most})"
            )
        if instruction:
            return f"{what}; each stands in its row in place of the instruction"
        hint = (
            ""
            if not replaced
            else "; --instruction, or the old prompt in the case file, replaces a shared one"
        )
        return f"{what}; it stays in every request{hint}"


def take_out_prompt(
    rows: Sequence[Example], prompt: Prompt | None, *, keep: bool = False, shared: bool = True
) -> tuple[list[Example], PromptsInRows]:
    """The rows without `prompt`, and a report. `shared` also takes out first messages that all rows have alike.

    `keep` changes nothing and only reports the system prompts.
    """
    report = PromptsInRows(len(rows))
    result = list(rows)
    if not keep:
        find = Finder(prompt) if prompt else None
        if find:
            result = [find(row, report) for row in rows]
        if shared and not report.changed:
            beginning = SharedBeginning()
            if all(beginning.add(row) for row in result):
                result = [beginning.take_out(row, report) for row in result]
    for row in result:
        report.see(row)
    return result, report


class Finder:
    """Finds one prompt in rows, whatever their white space."""

    def __init__(self, prompt: Prompt) -> None:
        self.system = _fold(prompt.system or "")
        slotted = prompt.system is not None and SLOT.search(prompt.system)
        self.slotted = _pattern(prompt.system or "") if slotted else None
        self.system_slots = SLOT.findall(prompt.system or "")
        self.pairs = {(_fold(e.text), _fold(e.answer or "")) for e in prompt.examples}
        self.slots: list[str] = []
        self.pattern: re.Pattern[str] | None = None
        self.template = _fold(prompt.template or "")
        if prompt.template is not None:
            self.slots = SLOT.findall(prompt.template)
            self.pattern = _pattern(prompt.template)

    def __call__(self, row: Example, report: PromptsInRows) -> Example:
        """The row without the prompt; `report` gets what was taken out."""
        messages, gone, extra = list(row.messages), [], dict(row.extra)
        if len(messages) > 1 and messages[0]["role"] == "system":
            found = self._in_system(messages[0]["content"])
            if found is not None:
                gone.append(_without(messages.pop(0)["content"], found.values()))
                extra = {**found, **extra}
        at = 1 if messages[0]["role"] == "system" else 0
        while len(messages) > at + 2 and self._is_pair(messages[at], messages[at + 1]):
            gone += [messages.pop(at)["content"], messages.pop(at)["content"]]
        if (
            self.pattern
            and messages[-1]["role"] == "user"
            and (filled := self._fill(messages[-1]["content"]))
        ):
            text, values, static = filled
            gone.append(static)
            messages[-1] = {**messages[-1], "content": text}
            extra = {**values, **extra} if len(values) > 1 else extra
        if not gone:
            return row
        report.changed += 1
        report.removed["\n".join(gone)] += 1
        return replace(row, messages=tuple(messages), extra=extra)

    def _in_system(self, text: str) -> dict[str, str] | None:
        """What stands in the slots of the case's system prompt, if the text is that prompt; None for another text."""
        if self.slotted and (match := self.slotted.fullmatch(text.strip())):
            return {name: match[f"s{i}"] for i, name in enumerate(self.system_slots)}
        folded = _fold(text)
        return {} if folded and folded in (self.system, self.template) else None

    def _is_pair(self, question: Message, answer: Message) -> bool:
        roles = (question["role"], answer["role"]) == ("user", "assistant")
        return roles and (_fold(question["content"]), _fold(answer["content"])) in self.pairs

    def _fill(self, text: str) -> tuple[str, dict[str, str], str] | None:
        """The input that fills the template, its slots' values, and the static rest; None for another text."""
        assert self.pattern is not None
        match = self.pattern.fullmatch(text.strip())
        if match is None:
            return None
        values = {name: match[f"s{i}"].strip() for i, name in enumerate(self.slots)} or {
            "": match["rest"].strip()
        }
        if not any(values.values()):
            return None
        return "\n\n".join(values.values()), values, _without(text, values.values())


def _without(text: str, values: Iterable[str]) -> str:
    """The static rest of a text whose slots held these values."""
    for value in values:
        text = text.replace(value, "", 1)
    return text


def _pattern(template: str) -> re.Pattern[str]:
    """The template as a pattern: slots are groups, white space is any."""
    names = SLOT.findall(template)
    pieces = [
        r"\s+".join(map(re.escape, piece.split()))
        for piece in re.split(SLOT.pattern.replace("(", "(?:"), template)
    ]
    if not names:
        return re.compile(pieces[0] + r"\s+(?P<rest>.+)", re.DOTALL)
    whole = pieces[0]
    for i, piece in enumerate(pieces[1:]):
        whole += rf"\s*(?P<s{i}>.*?)\s*" + piece
    return re.compile(whole.removeprefix(r"\s*"), re.DOTALL)


class SharedBeginning:
    """The messages that all rows begin with: a system prompt, few-shot turns, or both; rows are added one by one."""

    def __init__(self) -> None:
        self.rows = 0
        self._first: tuple[Message, ...] = ()

    def add(self, row: Example) -> bool:
        """Take in a row; False as soon as the rows have nothing in common."""
        whole = row.messages[:-1]
        length = min(len(whole), len(self._first)) if self.rows else len(whole)
        first = self._first or whole
        length = next((i for i in range(length) if row.messages[i] != first[i]), length)
        # What is left of a row must begin with a user's turn.
        while length and row.messages[length]["role"] != "user":
            length -= 1
        self._first = first[:length]
        self.rows += 1
        return bool(self._first)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The shared messages; none from fewer than two rows."""
        return self._first if self.rows >= LEAST else ()

    def take_out(self, row: Example, report: PromptsInRows) -> Example:
        """The row without the shared messages; `report` gets them."""
        shared = self.messages
        if not shared:
            return row
        report.shared = True
        report.changed += 1
        report.removed["\n".join(m["content"] for m in shared)] += 1
        return replace(row, messages=row.messages[len(shared) :])


def _fold(text: str) -> str:
    return " ".join(text.split())
