"""Ollama's Modelfile, with the chat template in Go's form: Ollama does not run the one in the file.

It guesses a template by likeness and relies on the file's start-of-text rule, so the text that the model was tuned
with is written out, taken from what its own template renders, and proven on conversations of several kinds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from export.source import Model
from unshot.catalog.formats import Target
from unshot.data.rows import Message
from unshot.errors import InputError


@dataclass(frozen=True)
class Pieces:
    """What stands before all messages, around each role's content, and before the answer."""

    start: str
    around: dict[str, tuple[str, str]]
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation."""
        text = "".join(
            f"{self.around[m['role']][0]}{m['content']}{self.around[m['role']][1]}" for m in messages
        )
        return f"{self.start}{text}{self.answer}"

    def go(self) -> str:
        """The same as a Go template."""
        roles = [
            f'{{{{ {"else if" if n else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for n, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{self.start}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def pieces(model: Model) -> Pieces | None:
    """The pieces of the chat template; None where it is no such sum of pieces."""
    first, reply, second = "unshot-user", "unshot-assistant", "unshot-second"
    talk: list[Message] = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": second},
    ]
    system: Message = {"role": "system", "content": "unshot-system"}
    try:
        plain = _split(model.chat.render(talk), [first, reply, second])
        led = _split(model.chat.render([system, *talk]), ["unshot-system", first, reply, second])
    except InputError:  # the template takes no system message, or refuses such a conversation
        return None
    if plain is None or led is None:
        return None
    before_user, to_reply, to_user, tail = plain
    head, after_system = led[0], led[1]
    opening = _common_end([before_user, after_system, to_user])
    start = before_user[: len(before_user) - len(opening)]
    if not head.startswith(start):
        return None
    closing = os.path.commonprefix([to_reply, tail])
    found = Pieces(
        start,
        {
            "system": (head[len(start) :], after_system[: len(after_system) - len(opening)]),
            "user": (opening, closing),
            "assistant": (to_reply[len(closing) :], to_user[: len(to_user) - len(opening)]),
        },
        tail[len(closing) :],
    )
    probes: list[list[Message]] = [talk, [system, *talk], talk[:1], [system, *talk[:1]]]
    right = all(found.render(probe) == model.chat.render(probe) for probe in probes)
    # What Go's template language or the Modelfile would take for its own cannot be written out.
    return found if right and not any(mark in found.render(talk) for mark in ("{{", "}}", '"""')) else None


def _split(text: str, marks: list[str]) -> list[str] | None:
    """The texts between the marks, which each stand there once and in order."""
    if any(text.count(mark) != 1 for mark in marks):
        return None
    found = []
    for mark in marks:
        before, there, text = text.partition(mark)
        if not there:
            return None
        found.append(before)
    return [*found, text]


def _common_end(texts: list[str]) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def modelfile(model: Model, target: Target, context: int) -> str:
    """The Modelfile of a GGUF, served with `context` tokens."""
    stop = model.chat.tokenizer.token(model.chat.end)
    lines = [f"FROM ./{target.name}", "PARAMETER temperature 0", f"PARAMETER num_ctx {context}"]
    lines.append(f"PARAMETER stop {json.dumps(stop)}")
    found = pieces(model)
    if found:
        lines.append(f'TEMPLATE """{found.go()}"""')
    else:
        lines.insert(
            0,
            "# Ollama guesses the chat template here, which is not proven; llama-server runs the file's own.",
        )
    if model.task and model.task.instruction:
        lines.append(f"SYSTEM {json.dumps(model.task.instruction, ensure_ascii=False)}")
    if model.base.license:
        lines.append(f"LICENSE {json.dumps(model.base.license)}")
    return "\n".join(lines) + "\n"
