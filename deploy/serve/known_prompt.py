"""The task's long prompt in a client's own request: found exactly, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.serve.parameters import Json, text_of
from unshot.data.prompts import SLOT, Prompt


def own_messages(messages: Sequence[Json], prompt: Prompt | None) -> list[Json] | None:
    """What is the user's own in a request that begins with `prompt`, message by message; None where it does not.

    A prompt that differs by one character is another prompt. Of a template the text in its slot is the user's.
    """
    if prompt is None or not (prompt.system or prompt.examples or prompt.template):
        return None
    static = prompt.static()
    front, rest = messages[: len(static)], list(messages[len(static) :])
    if not rest or len(front) != len(static):
        return None
    for given, known in zip(front, static, strict=True):
        if given.get("role") != known["role"] or text_of(given) != known["content"] or len(given) > 2:
            return None
    if any(m["role"] in ("system", "developer") for m in rest):
        return None
    if prompt.template is None:
        return rest
    inside = in_template(text_of(rest[-1]), prompt.template)
    if inside is None or rest[-1].get("role") != "user":
        return None
    return [*rest[:-1], {"role": "user", "content": inside}]


def in_template(text: str, template: str) -> str | None:
    """The text in a template's slot (behind a template that has none); None where the rest is not the template."""
    slots = list(SLOT.finditer(template))
    if len(slots) > 1:
        return None
    begin, end = (slots[0].start(), slots[0].end()) if slots else (0, 0)
    before, after = (template[:begin], template[end:]) if slots else (f"{template.rstrip()}\n\n", "")
    if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        return None
    return text[len(before) : len(text) - len(after)]
