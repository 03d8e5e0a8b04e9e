"""What a chat template lacks for a short system prompt and a plain answer, added where that is certain.

The additions are Jinja before and after the template's own text, so that the template that is written into a run and
its exports does the same in any engine:

- contents given as parts, for templates that write only parts;
- the system message put before the first question, for templates that refuse or drop it;
- a thinking block that the generation prompt opens, switched off or closed;
- the header before the answer (gpt-oss's `<|channel|>final<|message|>`), put at the end of the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

from unshot.data.rows import Message
from unshot.errors import InputError
from unshot.text.template import Template

SYSTEM, QUESTION, ANSWER = "unshot9system", "unshot9question", "unshot9answer"

_PARTS = (
    "{%- set unshot = namespace(all=[]) -%}{%- for message in messages -%}{%- set unshot.all = unshot.all + "
    "[{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}] if message['content'] is "
    "string else message['content']}] -%}{%- endfor -%}{%- set messages = unshot.all -%}"
)
_FOLD = (
    "{%- if messages|length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + "
    "messages[2:] -%}{%- endif -%}"
)
_QUIET = "{%- set enable_thinking = false -%}"
_OPEN = re.compile(r"<(?:think|thinking|reasoning)>", re.DOTALL)
# Other families' marks of a thinking block, where the prompt ends with one: <thought>, [THINK], <seed:think>, ...
_AT_END = re.compile(
    r"(<\|?|\[|◁)((?:\w+[:_])?(?:think|thinking|thoughts?|reason|reasoning|scratchpad))(\|?>|\]|▷)\s*\Z",
    re.IGNORECASE,
)
# What a model writes of it itself.
_OPENED = re.compile(r"\s*(<(think|thinking|reasoning)>|\[THINK\]|<\|channel\|>analysis)")
_CLOSED = re.compile(r"(</(think|thinking|reasoning)>|\[/THINK\]|<\|channel\|>final<\|message\|>)\s*")


def repaired(template: Template, special: Collection[str]) -> tuple[Template, list[str]]:
    """The template with what it lacks, and what was added, in words; itself where it lacks nothing.

    `special` are the tokenizer's added tokens. A template that refuses even a plain question is left as it is.
    """
    notes: list[str] = []
    user: list[Message] = [{"role": "user", "content": QUESTION}]
    both: list[Message] = [{"role": "system", "content": SYSTEM}, *user]

    def adopt(candidate: Template, messages: Sequence[Message], wanted: Sequence[str], note: str) -> bool:
        nonlocal template
        text = _render(candidate, messages)
        # A template that writes a list of parts as Python or JSON shows it has not taken the parts.
        if text is None or not all(w in text for w in wanted) or re.search(r"['\"]type['\"]:", text):
            return False
        template = candidate
        notes.append(note)
        return True

    if QUESTION not in (_render(template, user) or ""):
        adopt(
            _before(template, _PARTS), user, [QUESTION], "message contents are given to the template as parts"
        )
    if not all(w in (_render(template, both) or "") for w in (SYSTEM, QUESTION)):
        note = "the system message is put before the first question, as the template refuses or drops it"
        adopt(_before(template, _FOLD), both, [SYSTEM, QUESTION], note)
    prompt = _render(template, user)
    if prompt is None:
        return template, notes
    if opened := thinks(prompt):
        quiet = _before(template, _QUIET)
        if "enable_thinking" in template.source and not thinks(_render(quiet, user) or opened):
            adopt(quiet, user, [QUESTION], "thinking is switched off (enable_thinking=false)")
        else:
            note = f"the thinking block that the prompt opens is closed before the answer ({closing(opened)})"
            adopt(_after(template, f"\n{closing(opened)}\n\n"), user, [QUESTION], note)
        return template, notes
    full = _render(template, [*user, {"role": "assistant", "content": ANSWER}], generate=False) or ""
    if full.startswith(prompt) and ANSWER in full[len(prompt) :]:
        header = full[len(prompt) : full.index(ANSWER, len(prompt))]
        if any(token in header for token in special) and not re.search(
            r"</(think|thinking|reasoning)>", header
        ):
            adopt(
                _after(template, header),
                user,
                [prompt + header],
                f"the prompt ends with the header {header!r}",
            )
    return template, notes


def thinks(prompt: str) -> str | None:
    """The mark that opens the thinking block in which a prompt ends, if it does."""
    for found in _OPEN.finditer(prompt):
        if closing(found[0]) not in prompt[found.end() :]:
            return found[0]
    at_end = _AT_END.search(prompt)
    return at_end[0].strip() if at_end else None


def closing(opened: str) -> str:
    """The mark that ends a thinking block: </think>, [/THINK], <|END_THINKING|>."""
    if "START_" in opened.upper():
        return re.sub(
            "START_", lambda word: "END_" if word[0].isupper() else "end_", opened, flags=re.IGNORECASE
        )
    left = 2 if opened.startswith("<|") else 1
    return f"{opened[:left]}/{opened[left:]}"


def answer_begin(text: str) -> int:
    """Where the answer begins in what a model wrote: behind its thoughts; 0 without any, the end if they never end.

    The opening mark may be missing, since some templates put it into the prompt.
    """
    closed = _CLOSED.search(text)
    return closed.end() if closed else len(text) if _OPENED.match(text) else 0


def _render(template: Template, messages: Sequence[Message], *, generate: bool = True) -> str | None:
    try:
        return template.render(messages, generate=generate)
    except InputError:
        return None


def _before(template: Template, added: str) -> Template:
    # An expression keeps what stands first in the template as it is; blanks before a block go, as they do there.
    own = re.sub(r"\A[ \t]+(?=\{[%#])", "", template.source)
    return Template(added + "{{ '' }}" + own, template.tokens, template.where)


def _after(template: Template, text: str) -> Template:
    own = template.source.removesuffix("\n")
    literal = json.dumps(text, ensure_ascii=False)
    return Template(
        f"{own}{{{{ {literal} if add_generation_prompt else '' }}}}", template.tokens, template.where
    )
