"""What is asked of a server: by default messages that no cache holds yet; and how it is spoken to."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unshot.contracts.figures import Figures
from unshot.data.prompts import Prompt
from unshot.data.rows import Message
from unshot.engines.address import parse_url, read_key, through_proxy
from unshot.engines.openai import CHAT, Api, served_models
from unshot.errors import InputError, UnshotError
from unshot.secret import remember_in
from unshot.text.counters import TemplateCounter
from unshot.text.tokenizers import counter_for

# Plain words of one token or two, to make prompts of any length and beginnings that no cache holds.
TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work number night point home water room mother area "
    "money story fact month lot right study book eye job word business issue side kind head house service friend"
)
WORDS = TEXT.split()
MARKER_WORDS = 4
# The model's name where none is given.
UNNAMED = "default"
# A server may round its cached prefix up to a block of tokens, and every prompt begins with the template's own.
TOLERANCE = 0.1
# Tokens of a template that every prompt begins with, and the block that a cache rounds them up to.
TEMPLATE = 40
# So many answers in one piece are not those that were too fast for two reads.
ONE_PIECE = 0.1


@dataclass(frozen=True)
class ServerOptions:
    """How to talk to a server."""

    model: str = UNNAMED
    api: str = CHAT
    key_env: str | None = None
    key_flag: str = "--key-env"
    timeout: float = 120.0
    tokenizer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    authorities: str | None = None
    verify: bool = True
    proxy: str | None = None

    def open(self, url: str) -> Api:
        """The API at `url`. Raises `InputError` for a bad URL or proxy, or a key that is not set."""
        address = parse_url(url, authorities=self.authorities, verify=self.verify)
        address = through_proxy(address, self.proxy)
        address.context()
        return Api(address, self.model, self.api, read_key(self.key_env, self.key_flag), self.extra)


def request_extra(text: str | None) -> dict[str, Any]:
    """`--request-extra`: a JSON object for every request's body. Raises `InputError`."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        # Not shown: it may hold a key.
        raise InputError("--request-extra is not a JSON object; give e.g. '{\"repeat_penalty\": 1.0}'")
    remember_in(value)
    return value


class Fresh:
    """Beginnings that no cache holds: a few words of this run's own, another for every number.

    The same `nonce` gives the same words again; without one they are drawn anew, so that a second run repeats nothing.
    """

    def __init__(self, nonce: str | None = None) -> None:
        self.nonce = nonce if nonce is not None else os.urandom(8).hex()
        self._number = 0

    def generator(self, number: int) -> random.Random:
        """The random numbers of request `number`."""
        return random.Random(hashlib.sha256(f"{self.nonce}:{number}".encode()).digest())

    def words(self) -> str:
        """The next words, as a sentence."""
        self._number += 1
        return sentence(self.generator(-self._number))


def sentence(generator: random.Random) -> str:
    """A few words, drawn."""
    return " ".join(generator.choices(WORDS, k=MARKER_WORDS)).capitalize() + "."


def digest(prompt: Prompt) -> str:
    """A short hash of the prompt's own text: two reports with the same had the same prompt."""
    return hashlib.sha256(json.dumps(prompt.messages("")).encode()).hexdigest()[:12]


def uncached(messages: Sequence[Message], words: str) -> list[Message]:
    """The messages with words in front of everything: nothing of them is in any cache."""
    return [{**messages[0], "content": f"{words} {messages[0]['content']}"}, *messages[1:]]


def fresh_input(messages: Sequence[Message], words: str) -> list[Message]:
    """The messages with words in front of the last: the shared prefix may be cached, what follows it may not."""
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{words} {last['content']}"}]


def shared_share(requests: Sequence[Sequence[Message]]) -> float:
    """The part of a request that is the same in all of them, by characters from the beginning: 0 to 1."""
    if len(requests) < 2:
        return 0.0
    texts = ["\0".join(f"{m['role']}\1{m['content']}" for m in messages) for messages in requests[:50]]
    shared = len(os.path.commonprefix(texts))
    return shared / (sum(map(len, texts)) / len(texts))


def cache_warning(
    where: str, asked: float, reported: float | None, *, repeated: bool, tokens: float | None = None
) -> str | None:
    """What to say where the server's cached share is not what the requests were made for; None where it is.

    Prompts of `tokens` on average all begin with their template's own, which are no repetition.
    """
    if reported is None:
        return None
    template = min(TEMPLATE / tokens, 0.5) if tokens else 0.0
    if reported > asked + TOLERANCE + template:
        return (
            f"{where}: the server took {reported:.0%} of the prompt tokens from its cache, where the requests share "
            f"{asked:.0%}: it has seen them before, and these times are the cache's"
        )
    if repeated and reported < TOLERANCE:
        return f"{where}: the requests repeat (--repeat), but the server reports {reported:.0%} of their tokens cached"
    return None


def side_warnings(where: str, model: str, figures: Figures) -> list[str | None]:
    """What a reader must know of one side's figures: tokens, times, prompts and models that are not what they seem."""
    return [
        token_warning(where, figures),
        piece_warning(where, figures),
        *asked_warnings(where, figures),
        cut_warning(where, figures),
        model_warning(where, model, figures.models),
    ]


def token_warning(where: str, figures: Figures) -> str | None:
    """What to say where tokens, or the time per token, are not known; None where they are."""
    if not figures.answered:
        return None
    if figures.tokens.output is None:
        return (
            f"{where}: the output tokens are not known, since the server reports no usage; give --tokenizer"
        )
    if figures.untimed:
        which = f"{figures.untimed} of {figures.answered} answers have " if figures.tpot_ms.count else ""
        return (
            f"{where}: {which}no time per token, since the server sends several tokens at once, or other pieces than "
            "tokens, and nobody knows how many the first ones were; give --tokenizer"
        )
    return None


def piece_warning(where: str, figures: Figures) -> str | None:
    """What to say of answers that came in one piece; a few may have been too short and fast for two reads."""
    if figures.one_piece < max(1, ONE_PIECE * figures.answered):
        return None
    which = "the" if figures.one_piece == figures.answered else f"{figures.one_piece} of {figures.answered}"
    return (
        f"{where}: {which} answers came in one piece: their time to first token is that of the whole answer, and there "
        "is no time per token"
    )


def asked_warnings(where: str, figures: Figures) -> list[str]:
    """What to say of a server that does otherwise than it was asked, or leaves out what it was asked for."""
    f, every = figures, figures.answered
    counts = (
        (f.past_limit, "answers are longer than was asked for (--max-tokens): the server ignores the limit, and their "
         "times and cost are of more work"),
        (f.ended_early, "answers ended before the length that was asked for (--ignore-eos): the server ignores it"),
        (f.held_open, "responses stayed open after their answer's end: the client waited half a second each time, and "
         "requests/s is lower by that"),
        (f.cached_known if f.cached_known < every else 0, "answers say how many of their prompt tokens were cached; "
         "the others count as none"),
    )  # fmt: skip
    return [f"{where}: {count} of {every} {words}" for count, words in counts if count]


def limit_warning(where: str, figures: Figures, limit: int) -> str | None:
    """What to say of answers to labelled rows that the limit cut."""
    if not figures.stopped_at_limit:
        return None
    return (
        f"{where}: {figures.stopped_at_limit} of {figures.answered} answers were cut at the limit of {limit} tokens "
        "(--max-tokens): their scores, times and cost are those of cut answers"
    )


def warm_warning(where: str, failed: Mapping[str, int], requests: int) -> str | None:
    """What to say of a warm-up whose requests failed, by their errors."""
    if not failed:
        return None
    kinds = ", ".join(f"{n} {kind}" for kind, n in failed.items())
    return (
        f"{where}: {sum(failed.values())} of {requests} warm-up requests failed ({kinds}): the first measured ones may "
        "have found a server that was not ready"
    )


def cut_warning(where: str, figures: Figures) -> str | None:
    """What to say of prompts that the server cut."""
    if not figures.cut_prompts:
        return None
    return (
        f"{where}: of {figures.cut_prompts} of {figures.answered} prompts the server counted fewer tokens, fewer than "
        "the words that it was sent: it cut them, or counts cached ones apart; what was answered, and its cost, may be "
        "of other prompts"
    )


def model_warning(where: str, asked: str, models: Mapping[str, int]) -> str | None:
    """What to say where answers are of another model than was asked for, or of several."""

    def same(name: str) -> bool:
        mine, theirs = (n.lower().rstrip("/").rpartition("/")[2] for n in (asked, name))
        return mine.startswith(theirs) or theirs.startswith(mine)

    others = {name: n for name, n in models.items() if not same(name)}
    if not others or (asked == UNNAMED and len(models) == 1):
        return None
    words = ", ".join(f"{n} of `{name}`" for name, n in others.items())
    return f"{where}: the server says that its answers are of another model than `{asked}`: {words}"


def prompt_of(api: Api, messages: Sequence[Message], counter: TemplateCounter | None) -> list[Message] | str:
    """What the API takes: the messages, or their text by the model's own template where that is known."""
    if api.kind == CHAT:
        return list(messages)
    if counter is not None:
        return str(counter.template.render(messages))
    return "\n\n".join(m["content"] for m in messages)


def open_tokenizer(name: str) -> TemplateCounter:
    """The tokenizer in a directory, a .gguf or a tokenizer.json, or of a model in the local hub cache."""
    found = counter_for(name, api=False)
    if not isinstance(found, TemplateCounter):
        raise InputError(
            f"--tokenizer {name}: it has no chat template; give the model's directory or its .gguf"
        )
    return found


def meet(api: Api, tokenizer: str | None) -> tuple[Api, TemplateCounter | None]:
    """The API with the model's name, and what counts its tokens: the tokenizer given, or the served model's own.

    Without a name asked for it is the model that the server lists, where it lists one. Its tokenizer is found where its
    name, or the directory that the server tells of, is on this machine. Of a server with several models only the one
    that is asked for counts (an adapter's base is one with it): another's tokenizer counts something else.
    """
    from unshot.engines.address import call

    try:
        status, body = call(api.address, "/models", key=api.key, timeout=5.0)
        served = served_models(body) if status == 200 else []
    except OSError:
        served = []
    if api.model == UNNAMED and len(served) == 1:
        api = replace(api, model=served[0][0])
    if tokenizer is not None:
        return api, open_tokenizer(tokenizer)
    mine = [names for names in served if api.model in names] or (served if len(served) == 1 else [])
    for name in dict.fromkeys([api.model, *(name for names in mine for name in names)]):
        try:
            return api, open_tokenizer(name)
        except (UnshotError, OSError, ValueError):
            continue
    return api, None
