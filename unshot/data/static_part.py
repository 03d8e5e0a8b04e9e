"""What requests share: the prompt that stands in all of them, its versions, and the slots where they differ.

Requests of one version have the same first messages; where one message is a text with the input inside, the tokens
that all requests share in one order are the text, and what lies between them are slots. Example turns that are chosen
for each request (few-shot by retrieval) belong to no request's input either.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from unshot.data.example import Message
from unshot.data.log_formats import Call

# Requests that are looked at together for versions; those that match none wait for the next look.
WINDOW = 4000
# A version has at least this share of the requests looked at, and this many of them.
SHARE, LEAST = 0.005, 3
# A user's or an assistant's turn belongs to the prompt where this share of the requests before it has it.
TURN_SHARE = 0.1
# Requests of a version that must have its text for the text to be a template.
AGREE = 0.98
# Texts that a template is drawn from.
TEXTS = 60
# Words that some of the texts must share to be a version of a prompt: people often ask alike.
VERSION_WORDS = 12
# Example turns are chosen for each request where more selections than this are seen, and this share of the turns in
# more than one neighbourhood: a conversation's turns always follow the same ones.
SELECTIONS, MIXED = 12, 0.8
# A system prompt's slots may hold long texts (passages looked up for the request) where this share of them differ.
LOOKED_UP = 0.5
TOKEN = re.compile(r"\s+|\w+|[^\w\s]")


Pair = tuple[str, str]


@dataclass(frozen=True)
class Template:
    """A text with slots: `pieces` are the static parts round them, one more than there are slots."""

    pieces: tuple[str, ...]
    system: bool = False

    @property
    def names(self) -> list[str]:
        """The slots' names."""
        slots = len(self.pieces) - 1
        if self.system:
            return [f"system_{i + 1}" for i in range(slots)]
        return ["text"] if slots == 1 else [f"slot_{i + 1}" for i in range(slots)]

    def text(self) -> str:
        """The template as a prompt file has it."""
        slots = [f"{{{{{name}}}}}" for name in self.names]
        return self.pieces[0] + "".join(s + p for s, p in zip(slots, self.pieces[1:], strict=True))

    @property
    def static(self) -> str:
        """The static parts alone."""
        return "".join(self.pieces)

    def values(self, text: str) -> list[str] | None:
        """What stands in the slots of a text; None for a text that does not fit."""
        first, *rest = self.pieces
        if (
            not text.startswith(first)
            or not text.endswith(rest[-1])
            or len(text) < len(first) + len(rest[-1])
        ):
            return None
        at, end, found = len(first), len(text) - len(rest[-1]), []
        for piece in rest[:-1]:
            place = text.find(piece, at, end)
            if place < 0:
                return None
            found.append(text[at:place])
            at = place + len(piece)
        found.append(text[at:end])
        return found


@dataclass
class Version:
    """One version of a prompt: messages that are the same in every request, then one that may be a template.

    `requests` counts what matched. The message after `head` is the first that differs from request to request. With
    `system` the first message of `head` is a system prompt with slots. With `examples` each request has some of these
    question and answer pairs between `head` and the input.
    """

    head: tuple[Message, ...]
    template: Template | None = None
    system: Template | None = None
    examples: frozenset[Pair] = frozenset()
    requests: int = 0
    times: list[float] = field(default_factory=list)
    models: Counter[str] = field(default_factory=Counter)

    @property
    def empty(self) -> bool:
        """Whether the requests share nothing."""
        return not self.head and self.template is None

    @property
    def static(self) -> list[str]:
        """The static texts."""
        head = [m["content"] for m in self.head]
        if self.system:
            head[0] = self.system.static
        return head + ([self.template.static] if self.template else [])

    def turns(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages behind the static part, without the examples that were chosen for the request."""
        return messages[-1:] if self.examples else messages[len(self.head) :]

    def match(self, messages: Sequence[Message]) -> list[str] | None:
        """The values of the template's slots (one, the whole text, without a template); None for another version."""
        size = len(self.head)
        if len(messages) <= size:
            return None
        if self.examples:
            pairs = example_pairs(messages[size:])
            if pairs is None or 2 * sum(pair in self.examples for pair in pairs) < len(pairs):
                return None
        for place in range(size - 1, -1, -1):
            own, other = self.head[place], messages[place]
            if own["role"] != other["role"]:
                return None
            if place == 0 and self.system:
                if self.system.values(other["content"]) is None:
                    return None
            elif own["content"] != other["content"]:
                return None
        text = self.turns(messages)[0]["content"]
        return self.template.values(text) if self.template else [text]


def example_pairs(turns: Sequence[Message]) -> list[Pair] | None:
    """The question and answer pairs before a last question; None for turns of another form."""
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"] or any(
        t.get("tool_calls") for t in turns
    ):
        return None
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns) - 1, 2)]


def _chosen_examples(talks: Sequence[Sequence[Message]], at: int) -> frozenset[Pair]:
    """The pairs behind message `at` where each talk has a selection of its own; none where they are a conversation."""
    found = [pairs for talk in talks if (pairs := example_pairs(talk[at:])) is not None]
    before: dict[Pair, set[Pair | None]] = defaultdict(set)
    uses: Counter[Pair] = Counter()
    for pairs in found:
        uses.update(pairs)
        for pair, previous in zip(pairs, [None, *pairs], strict=False):
            before[pair].add(previous)
    selections = {tuple(pairs) for pairs in found if pairs}
    if len(found) < MIXED * len(talks) or len(selections) <= SELECTIONS:
        return frozenset()
    if all(len(pairs) == 1 for pairs in found):
        often = sum(count for count in uses.values() if count > 1)
    else:
        often = sum(uses[pair] for pair, others in before.items() if len(others) > 1)
    return frozenset(uses) if often >= MIXED * uses.total() else frozenset()


def find_versions(calls: Sequence[Call]) -> list[Version]:
    """The versions in some requests, those with most static text first; what shares nothing is one without a text."""
    least = max(LEAST, round(SHARE * len(calls)))
    versions = _split([call.messages for call in calls], 0, least)
    counted = []
    for version in versions:
        count = sum(version.match(call.messages) is not None for call in calls)
        counted.append((count, version))
    ranked = sorted(
        counted, key=lambda p: (-(len(p[1].head) + bool(p[1].template) + bool(p[1].examples)), -p[0])
    )
    return [version for count, version in ranked if count >= min(least, len(calls))]


def _split(talks: Sequence[Sequence[Message]], at: int, least: int) -> list[Version]:
    """Versions of talks that are equal before message `at`."""
    head = tuple(talks[0][:at])
    if any(len(talk) <= at for talk in talks):
        talks = [talk for talk in talks if len(talk) > at]
    if not talks:
        return []
    groups: dict[tuple[str, str], list[Sequence[Message]]] = defaultdict(list)
    for talk in talks:
        groups[talk[at]["role"], talk[at]["content"]].append(talk)
    versions: list[Version] = []
    rest: list[Sequence[Message]] = []
    if at == 0 and len(groups) > 1 and (slotted := _slotted_system(talks)):
        template, members = slotted
        message: Message = {"role": "system", "content": template.text()}
        for version in _split(members, 1, least):
            head = (message, *version.head[1:])
            versions.append(Version(head, version.template, template, version.examples))
        talks = [t for t in talks if not any(v.match(t) is not None for v in versions)]
        groups = {
            key: m for key, m in groups.items() if template.values(key[1]) is None or key[0] != "system"
        }
    if len(groups) == 1 and at == 0 and next(iter(groups))[0] == "system" and len(talks[0]) > 1:
        return [*versions, *_split(next(iter(groups.values())), 1, least)]
    head = tuple(talks[0][:at]) if talks else head
    if len(groups) > 1 and (chosen := _chosen_examples(talks, at)):
        members = [t for t in talks if Version(head, examples=chosen).match(t) is not None]
        texts = [talk[-1]["content"] for talk in members]
        return [*versions, *(Version(head, text, None, chosen) for text in _templates(texts, least))]
    for (role, _), members in groups.items():
        # A message is part of the prompt where it recurs and the last message differs; a user's "Hello" is none.
        last = {m[-1]["content"] for m in members if len(m) > at + 1}
        often = len(members) >= (least if role == "system" else max(least, TURN_SHARE * len(talks)))
        if often and len(last) > 1:
            versions += _split(members, at + 1, least)
        else:
            rest += members
    if len(rest) >= least or not versions:
        while head and head[-1]["role"] == "user":  # a prompt ends before a user's turn
            head = head[:-1]
        texts = [t[len(head)]["content"] for t in rest]
        versions += [Version(head, template) for template in _templates(texts, least)]
    return versions


def _slotted_system(talks: Sequence[Sequence[Message]]) -> tuple[Template, list[Sequence[Message]]] | None:
    """A system prompt with slots, and the talks that have it.

    The slots hold short values (a date, a name), or longer ones where they differ from talk to talk (passages that
    were looked up): a long text that recurs is another version of the prompt.
    """
    own = [talk for talk in talks if talk[0]["role"] == "system" and len(talk) > 1]
    texts = list(dict.fromkeys(talk[0]["content"] for talk in own))
    if len(texts) < 3:
        return None
    template = draw_template(texts, sentences=False)
    values = [template.values(text) for text in texts] if template else []
    looked_up = len(texts) > LOOKED_UP * len(own)
    if template is None or any(v is None for v in values):
        return None
    if not looked_up and any(len(part.split()) > 2 for v in values for part in v or []):
        return None
    return Template(template.pieces, system=True), own


def _templates(texts: Sequence[str], least: int) -> list[Template | None]:
    """The templates in texts: those that share a beginning or an end belong together. None: they share nothing."""
    distinct = list(dict.fromkeys(texts))
    found: list[Template | None] = _by_gap(distinct, least) if len(distinct) >= 2 else []
    distinct = [t for t in distinct if not any(f and f.values(t) is not None for f in found)]
    least = max(least, len(texts) // 50)
    for part in (slice(0, 6), slice(-6, None)):
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for text in distinct:
            tokens = [t for t in TOKEN.findall(text) if not t.isspace()]
            if len(tokens) > 6:
                groups[tuple(tokens[part])].append(text)
        for members in groups.values():
            if len(members) >= least:
                parts = _by_gap(members, least)
                found += [p for p in parts if p and len(re.findall(r"\w+", p.static)) >= VERSION_WORDS]
        distinct = [t for t in distinct if not any(f and f.values(t) is not None for f in found)]
    return [*found, None] if distinct or not found else found


def _by_gap(texts: list[str], least: int) -> list[Template | None]:
    """The template of texts; several where a slot holds one of a few long texts, which is a change of the prompt."""
    template = draw_template(texts)
    if template is None:
        return []
    values = [v for t in texts if (v := template.values(t)) is not None]
    if len(values) < AGREE * len(texts) and len(values) < least:
        return []
    for slot in range(len(template.pieces) - 1):
        counts = Counter(v[slot] for v in values)
        often = {v for v, n in counts.items() if n >= least}
        words = max(len(v.split()) for v in often) if often else 0
        if 1 < len(often) <= 8 and sum(counts[v] for v in often) >= AGREE * len(values) and words >= 3:
            parts: list[Template | None] = []
            for value in sorted(often):
                own = [t for t in texts if (v := template.values(t)) is not None and v[slot] == value]
                parts += _by_gap(own, least)
            return parts
    return [template]


def draw_template(texts: Sequence[str], *, sentences: bool = True) -> Template | None:
    """What texts share token by token, in order; None where that is next to nothing.

    Where slots hold `sentences`, the full stop behind the last one is its own.
    """
    step = max(1, len(texts) // TEXTS)
    sample = [TOKEN.findall(text) for text in texts[::step][:TEXTS]]
    if len(sample) < 2:
        return None
    start = os.path.commonprefix([*sample])  # type: ignore[type-var]
    rest = [tokens[len(start) :] for tokens in sample]
    end = os.path.commonprefix([tokens[::-1] for tokens in rest])[::-1]  # type: ignore[type-var]
    middles = [tokens[: len(tokens) - len(end)] for tokens in rest]
    blocks = _common(middles) if all(middles) else []
    pieces = [
        "".join(start),
        *("".join(block) for block in blocks),
        _without_stop("".join(end)) if sentences else "".join(end),
    ]
    if not any(len(re.findall(r"\w+", piece)) >= 2 for piece in pieces) or any("{{" in p for p in pieces):
        return None
    return Template(tuple(pieces))


def _without_stop(end: str) -> str:
    """The text behind the last slot without the full stop or question mark that ends the input."""
    match = re.match(r"[.?!]+(?=\s|$)", end)
    return end[match.end() :] if match else end


def _common(sequences: Sequence[Sequence[str]]) -> list[list[str]]:
    """Runs of tokens that all sequences have in one order: at least two words, or a whole line."""
    shortest, *others = sorted(sequences, key=len)
    blocks = [list(shortest)]
    for other in others:
        matched: list[list[str]] = []
        at = 0
        for block in blocks:
            matcher = difflib.SequenceMatcher(None, block, list(other[at:]), autojunk=False)
            last = 0
            for a, b, size in matcher.get_matching_blocks():
                run = block[a : a + size]
                if _counts(run):
                    matched.append(run)
                    last = b + size
            at += last
        blocks = matched
        if not blocks:
            return []
    return [trimmed for block in blocks if _counts(trimmed := _trim(block))]


def _counts(run: Sequence[str]) -> bool:
    words = sum(token[0].isalnum() for token in run)
    signs = any(not token[0].isalnum() and not token.isspace() for token in run)
    return words >= 2 or (words + signs >= 1 and any("\n" in token for token in run))


def _trim(run: list[str]) -> list[str]:
    """A run between slots without the full stop that ends the input before it."""
    start = next((i for i, token in enumerate(run) if "\n" in token), 0)
    return run[start:] if all(token in ".?!" for token in run[:start]) else run
