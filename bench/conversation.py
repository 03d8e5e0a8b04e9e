"""Conversations of several turns: what each user says, and the next turn once the answer has come."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from bench.answer import read_answer
from bench.schedule import Load
from bench.traffic import cache_warning, shared_share
from unshot.contracts.figures import Figures
from unshot.data.example import Example
from unshot.data.prompts import Prompt
from unshot.data.rows import Message
from unshot.engines.http import Exchange
from unshot.errors import InputError


@dataclass(frozen=True)
class Conversation:
    """What one user says: the first request, the later turns' texts, and the seconds of thought before each of those.

    Seconds of None are drawn from `--think-time`.
    """

    first: list[Message]
    later: tuple[str, ...] = ()
    thoughts: tuple[float | None, ...] = ()


@dataclass
class Talk:
    """A run's conversations: `script(n)` is what the n-th says, `request` makes the bytes of a turn.

    The answers that come stand in the next turns' history, whatever a log or a row had there. `asked` keeps the
    messages of every turn by conversation and turn, `early` counts the conversations that could not go on.
    """

    script: Callable[[int], Conversation]
    request: Callable[[Sequence[Message], int, int], bytes]
    kind: str
    think: tuple[float, float]
    seed: int = 0
    first: int = 0
    # For the report: whose conversations they are, and how long is thought.
    what: str = ""
    pause: str = ""
    asked: dict[tuple[int, int], list[Message]] = field(default_factory=dict)
    early: int = 0

    def messages(self, number: int, turn: int = 0) -> list[Message]:
        """The messages of a turn that was reached."""
        if turn == 0 and (number, 0) not in self.asked:
            self.asked[number, 0] = self.script(number).first
        return self.asked[number, turn]

    def count(self, requests: int, most: int | None) -> int:
        """How many conversations have so many turns, of at most `most`."""
        count = turns = 0
        while turns < requests and count != most:
            turns += 1 + len(self.script(self.first + count).later)
            count += 1
        return count

    def follow(self, exchange: Exchange) -> tuple[float, bytes] | None:
        """The time to think and the next turn's request; None where the conversation is over, or cannot go on."""
        number, turn = self.first + exchange.origin, exchange.turn
        said = self.script(number)
        if turn >= len(said.later):
            return None
        answer = read_answer(exchange, self.kind)
        text = answer.text_of("answer")
        if answer.error is not None or not text.strip():
            self.early += 1
            return None
        messages: list[Message] = [
            *self.messages(number, turn),
            {"role": "assistant", "content": text},
            {"role": "user", "content": said.later[turn]},
        ]
        self.asked[number, turn + 1] = messages
        seconds = said.thoughts[turn]
        if seconds is None:
            seconds = random.Random(f"{self.seed}:{number}:{turn}").uniform(*self.think)
        return seconds, self.request(messages, number, turn + 1)

    def shared(self, begin: float) -> dict[int, float]:
        """By turn, the part of its requests that was sent or received before, by characters.

        Of a later turn that is all but its user's new words; of the first it is `begin`.
        """
        whole: Counter[int] = Counter()
        fresh: Counter[int] = Counter()
        for (_, turn), messages in self.asked.items():
            whole[turn] += sum(len(m["content"]) for m in messages)
            fresh[turn] += len(messages[-1]["content"])
        return {turn: 1 - fresh[turn] / max(n, 1) if turn else begin for turn, n in sorted(whole.items())}


def of_rows(rows: Sequence[Example], prompt: Prompt, turns: int) -> list[Conversation]:
    """Rows as conversations of at most `turns` turns.

    Where a row has several user messages it is a conversation of its own; else `turns` rows make one, in turn.
    """
    users = [[i for i, m in enumerate(row.messages) if m["role"] == "user"] for row in rows]
    if any(len(found) > 1 for found in users):
        return [
            undated(
                prompt.request(replace(row, messages=row.messages[: found[0] + 1])),
                [row.messages[i]["content"] for i in found[1:turns]],
            )
            for row, found in zip(rows, users, strict=True)
            if found
        ]
    parts = (rows[i : i + turns] for i in range(0, len(rows), turns))
    return [undated(prompt.request(part[0]), [row.text for row in part[1:]]) for part in parts]


def undated(first: list[Message], later: Sequence[str]) -> Conversation:
    """A conversation whose thoughts are drawn."""
    return Conversation(first, tuple(later), (None,) * len(later))


def of_log(load: Load, prompt: Prompt, turns: int, *, timed: bool) -> tuple[Load, list[Conversation]]:
    """A request log as conversations that begin at the log's own times, and the load of their first turns.

    A request whose messages are an earlier one's, an answer and another user message is that conversation's next turn;
    what its user thought is the time from the earlier one's end (`e2e_s`) to it. Raises `InputError` where no request
    continues another, or where (not `timed`) an end is missing and so no time to think is known.
    """
    starts: list[float] = []
    found: list[Conversation] = []
    # The conversation whose last request was these messages, and when that was answered.
    last: dict[str, list[tuple[int, float | None]]] = {}
    asked = zip(load.times, load.requests, load.spans or (None,) * len(load.times), strict=True)
    for when, said, span in asked:
        messages = prompt.messages(said) if isinstance(said, str) else said
        key = json.dumps(messages[:-2])
        if len(messages) > 2 and last.get(key) and messages[-2]["role"] == "assistant":
            which, ended = last[key].pop(0)
            if ended is None and not timed:
                raise InputError(
                    "--turns: the log does not say when an answer had come (`e2e_s`), so nobody knows how long its "
                    "user thought; give --think-time"
                )
            before = found[which]
            thought = None if timed or ended is None else max(0.0, when - ended)
            if len(before.later) < turns - 1:
                found[which] = replace(
                    before,
                    later=(*before.later, messages[-1]["content"]),
                    thoughts=(*before.thoughts, thought),
                )
        else:
            which = len(found)
            starts.append(when)
            found.append(Conversation(messages))
        last.setdefault(json.dumps(messages), []).append((which, None if span is None else when + span))
    if not any(c.later for c in found):
        raise InputError(
            "--turns: no request of the log continues another (its `messages`, an answer and one user message more); "
            "replay it without --turns"
        )
    return replace(load, times=tuple(starts), requests=tuple(c.first for c in found), spans=()), found


def talk_warnings(talk: Talk, turns: Sequence[Figures], *, repeated: bool) -> list[str | None]:
    """What to say of caches that are not those of the conversations, and of conversations that could not go on."""
    found: list[str | None] = []
    begin = shared_share([m for (_, turn), m in talk.asked.items() if turn == 0])
    for turn, asked in talk.shared(1.0 if repeated else begin).items():
        tokens = turns[turn].tokens if turn < len(turns) else None
        reported, mean = (tokens.cached_share, tokens.prompt) if tokens else (None, None)
        found.append(
            cache_warning(
                f"turn {turn + 1}", 1.0 if repeated else asked, reported, repeated=False, tokens=mean
            )
        )
        if turn and reported is not None and reported < asked / 2:
            found.append(
                f"turn {turn + 1}: the server took {reported:.0%} of the prompt tokens from its cache, where a turn "
                f"shares {asked:.0%} with those before it: it caches no prefixes, or conversations move between servers"
            )
    if talk.early:
        started = sum(turn == 0 for _, turn in talk.asked)
        found.append(
            f"{talk.early} of {started} conversations ended at a turn that failed or had no text: what their users "
            "would have said next was not asked"
        )
    return found


def parse_think(text: str | None) -> tuple[float, float]:
    """`--think-time`: seconds, or LOW-HIGH; 0 where it is not given. Raises `InputError`."""
    low, _, high = (text or "0").partition("-")
    try:
        span = float(low), float(high or low)
    except ValueError:
        span = (-1.0, -1.0)
    if not 0 <= span[0] <= span[1] < float("inf"):
        raise InputError(f"--think-time is `{text}`; give seconds, or LOW-HIGH, from 0")
    return span
