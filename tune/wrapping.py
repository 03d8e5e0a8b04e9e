"""The same question in another form: other wrapping, order and whitespace, the words untouched.

Two disjoint sets of forms: `AUGMENT` for training rows (`--augment-format`), `REFORMAT` for test rows, so that the
robustness gate never asks for a form that training has shown.
"""

from __future__ import annotations

import hashlib
import random
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

from unshot.data.rows import Example, Message

# Share of the training rows that get another form; the others keep the one that requests will have.
SHARE = 0.5

Form = Callable[[str, random.Random], str]


def _chosen(patterns: Sequence[str]) -> Form:
    return lambda text, chance: chance.choice(patterns).replace("{}", text)


def _rewrapped(low: int, high: int) -> Form:
    def form(text: str, chance: random.Random) -> str:
        width = chance.randint(low, high)
        # Lines that mean something (lists, code, tables) stay as they are.
        if "\n" in text or re.search(r"[{}<>|`]|\s{2,}", text):
            return text
        return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)

    return form


def _spaced(text: str, chance: random.Random) -> str:
    before, after = chance.choice([("\n", ""), ("", "\n"), ("\n", "\n"), ("  ", ""), ("", " ")])
    return f"{before}{text}{after}"


AUGMENT: dict[str, Form] = {
    "label": _chosen(["Input: {}", "Message: {}", "INPUT:\n{}", "Here it is:\n\n{}"]),
    "quotes": _chosen(['"{}"', "'{}'", "“{}”"]),
    "rule": _chosen(["---\n{}\n---", "###\n{}\n###", "## Input\n\n{}"]),
    "ending": _chosen(["{}\n\nAnswer:", "{}\n\nOutput:"]),
    "lines": _rewrapped(30, 60),
    "space": _spaced,
}
REFORMAT: dict[str, Form] = {
    "label": _chosen(["Text: {}", "TEXT:\n\n{}", "Please look at this:\n{}"]),
    "tags": _chosen(["<text>{}</text>", "<document>\n{}\n</document>", "[{}]"]),
    "fence": _chosen(['"""\n{}\n"""', "```\n{}\n```", "***\n{}\n***"]),
    "ending": _chosen(["{}\n\nYour answer:", "{}\nResult:"]),
    "lines": _rewrapped(18, 28),
    "space": lambda text, chance: "\n\n" + text + chance.choice(["\n\n", "   ", "\n"]),
}
# The instruction moved from the system turn into the question, before or after it.
ORDERS = ("before", "after")


def _chance(seed: int, salt: str, text: str) -> random.Random:
    """Chance that depends on the seed and the text, not on the order of the rows."""
    digest = hashlib.sha256(f"{salt}\n{seed}\n{text}".encode(errors="surrogatepass")).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def _with_text(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with `text` in the place of the last user turn's."""
    changed = [m.copy() for m in messages]
    for message in reversed(changed):
        if message["role"] == "user":
            message["content"] = text
            break
    return changed


def augment(rows: Sequence[Example], seed: int) -> tuple[list[Example], dict[str, int]]:
    """Training rows of which about half have another form, and how often each form was used.

    Rows whose form cannot be varied (several lines, markup) keep it. The same seed and text give the same form.
    """
    result, used = [], dict.fromkeys(AUGMENT, 0)
    for row in rows:
        chance = _chance(seed, "augment", row.text)
        if chance.random() >= SHARE:
            result.append(row)
            continue
        name = chance.choice(list(AUGMENT))
        text = AUGMENT[name](row.text, chance)
        used[name] += text != row.text
        result.append(replace(row, messages=tuple(_with_text(row.messages, text))))
    return result, used


def reformat(messages: Sequence[Message], seed: int, labels: Sequence[str] | None = None) -> list[Message]:
    """A request in another form than any that training has seen; the words stay.

    One form of `REFORMAT`; where there is an instruction (system turn), every third request has it in the question
    instead. Labels that the instruction lists change their case.
    """
    text = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    chance = _chance(seed, "reformat", text)
    changed = _with_text(messages, REFORMAT[chance.choice(list(REFORMAT))](text, chance))
    if changed[0]["role"] != "system":
        return changed
    for label in labels or ():
        if re.search(rf"\b{re.escape(label)}\b", changed[0]["content"]):
            changed[0]["content"] = re.sub(rf"\b{re.escape(label)}\b", label.upper(), changed[0]["content"])
    if chance.random() < 1 / 3 and changed[-1]["role"] == "user":
        instruction = changed[0]["content"].strip()
        question = changed[-1]["content"]
        both = [instruction, question] if chance.choice(ORDERS) == "before" else [question, instruction]
        return [*changed[1:-1], {"role": "user", "content": "\n\n".join(both)}]
    return changed
