"""The two prompts being compared: the long few-shot one and the tuned model's short one.

Both are chat messages, so that any chat template renders them. The long prompt is the system prompt, the
examples as user/assistant turns, then the input; or a text file with a `{{text}}`-style slot, or without a
slot (then the input follows it). The short prompt is the instruction, then the input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unshot.data.example import with_tools
from unshot.data.files import column_names, kind_of
from unshot.data.rows import Columns, Example, Message, read_examples, read_text
from unshot.errors import InputError

# A column's name; JSON in doubled braces is none.
SLOT = re.compile(r"\{\{\s*(\w[^{}\":\n]*?)\s*\}\}")


@dataclass(frozen=True)
class Prompt:
    """A reusable prompt. `prefix` holds the static messages; `template` a text with a slot for the input."""

    system: str | None = None
    examples: tuple[Example, ...] = field(default=())
    template: str | None = None

    @property
    def given(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.system or self.examples or self.template)

    @property
    def slots(self) -> list[str]:
        """The columns that the template names."""
        return SLOT.findall(self.template or "")

    @property
    def columns(self) -> list[str]:
        """The columns that fill slots anywhere in it."""
        return [*SLOT.findall(self.system or ""), *self.slots]

    def static(self) -> list[Message]:
        """The messages that are the same in every request (the cacheable prefix), template aside."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for example in self.examples:
            messages.extend(m for m in example.messages if m["role"] != "system" or not self.system)
            messages.append({"role": "assistant", "content": example.answer or ""})
        return messages

    def messages(self, text: str, columns: Mapping[str, Any] | None = None) -> list[Message]:
        """The whole request for one input text; `columns` fill the template's slots of the same name."""
        if self.template is not None:
            if SLOT.search(self.template):
                known = columns or {}
                content = SLOT.sub(lambda slot: str(known.get(slot[1], text)), self.template)
            else:
                content = f"{self.template.rstrip()}\n\n{text}"
            return [*self.static(), {"role": "user", "content": content}]
        return [*self.static(), {"role": "user", "content": text}]

    def request(self, row: Example) -> list[Message]:
        """The whole request for a row: this prompt round the row's conversation.

        Slots are filled with the row's columns, one of a template's with its last user text. Raises `InputError` where
        more of them have no column. A system prompt that belongs
        to the row stands in place of an instruction, and follows the system prompt of a long prompt: nothing is lost.
        The row's function definitions go with the request.
        """
        return with_tools(self._around(row), row.tools)

    def unfilled(self, rows: Sequence[Example]) -> list[str]:
        """A sentence for each slot of the system prompt that some rows have no column for, and send as it stands."""
        lines = []
        for slot in dict.fromkeys(SLOT.findall(self.system or "")):
            without = sum(row.extra.get(slot) is None for row in rows)
            if without:
                lines.append(f"`{{{{{slot}}}}}` is sent as it stands: no column `{slot}` ({without} rows)")
        return lines

    def _around(self, row: Example) -> list[Message]:
        own = row.system
        columns = _columns(row, self.columns)
        asked = _fill(self.system, columns)
        turns = list(row.messages[bool(own) :])
        if not self.examples and self.template is None:
            system = own or asked
            return [{"role": "system", "content": system}, *turns] if system else turns
        both = own if not asked else f"{asked}\n\n{own}" if own else asked
        before = Prompt(both, self.examples).static()
        if self.template is None:
            return [*before, *turns]
        empty = [slot for slot in dict.fromkeys(self.slots) if slot not in columns]
        if len(empty) > 1:
            raise InputError(
                f"{row.where or 'a row'}: no column for the prompt's slots {', '.join(empty)}: its text fills one of "
                "them; add the columns, or take the other slots out of the prompt"
            )
        last = max((i for i, m in enumerate(turns) if m["role"] == "user"), default=len(turns))
        return [*before, *turns[:last], self.messages(row.text, columns)[-1], *turns[last + 1 :]]


def load_prompt(path: Path | None, *, system: str | None = None, columns: Columns | None = None) -> Prompt:
    """Read a few-shot file: JSONL/JSON/CSV rows become chat turns, any other text a template.

    Rows are read by `columns` as far as they have them, so that examples have the form of the inputs.

    Raises `InputError` for a missing, empty or malformed file.
    """
    if path is None:
        return Prompt(system=system)
    if kind_of(path) != "jsonl" or {".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes}:
        fitting = columns and columns.fitting(column_names(path))
        return Prompt(system=system, examples=tuple(read_examples(path, fitting)))
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: empty; it needs the few-shot prompt")
    return Prompt(system=system, template=text)


def _columns(row: Example, slots: Iterable[str]) -> dict[str, str]:
    """The columns of the row that slots name, as texts; one without a value is none."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name in slots
        if (value := row.extra.get(name)) is not None
    }


def _fill(text: str | None, columns: Mapping[str, str]) -> str | None:
    """A system prompt with its slots filled, as far as the row has columns of their names."""
    return SLOT.sub(lambda slot: columns.get(slot[1], slot[0]), text) if text and columns else text
