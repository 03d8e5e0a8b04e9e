"""A language model as judge: two answers side by side, asked twice with the order swapped.

A judge prefers what stands first more often than chance, so only a preference that survives the swap counts; the rest
are ties (Zheng et al., "Judging LLM-as-a-Judge", NeurIPS 2023, section 3.4). How often the two orders contradict each
other is reported. A judge's word is worth what its agreement with people is: see `unshot eval --from-review --judge`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from unshot.console import Output
from unshot.contracts.record import Record
from unshot.data.rows import Message
from unshot.engines.address import call, parse_url, read_key
from unshot.engines.openai import CHAT, PATHS
from unshot.errors import InputError, OutsideError
from unshot.metrics.intervals import Interval, mean

Verdict = Literal["first", "second", "tie"]
KEYS = ("UNSHOT_JUDGE_KEY", "OPENAI_API_KEY")
MAX_TOKENS = 64
TRIES = 4
TIMEOUT_S = 120

QUESTION = """You compare two answers to the same request. Judge only how correct and helpful each answer is for what \
was asked. Length, style and the order in which the answers stand do not count.

[Request]
{request}

[Answer A]
{a}

[Answer B]
{b}

Which answer is better? Reply with one word: A, B, or TIE if they are equally good."""


class Judge(Protocol):
    """Answers one chat request greedily."""

    @property
    def name(self) -> str:
        """What the result calls it."""

    def ask(self, messages: Sequence[Message]) -> str:
        """The reply's text."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass
class Endpoint:
    """Any server with OpenAI's `/chat/completions`; the key comes from the environment and is never written down."""

    url: str
    model: str
    # The environment variable that holds the key; None: the usual ones, where they are set.
    key_env: str | None = None

    @property
    def name(self) -> str:
        """`model at url`, as the result shows it."""
        return f"{self.model} at {self.url}"

    def ask(self, messages: Sequence[Message]) -> str:
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": MAX_TOKENS}
        address = parse_url(self.url)
        key = read_key(self.key_env or next((k for k in KEYS if os.environ.get(k)), None), "--judge-key-env")
        raw = json.dumps(body, ensure_ascii=False).encode()
        for attempt in range(TRIES):
            try:
                status, answer = call(address, PATHS[CHAT], body=raw, key=key, timeout=TIMEOUT_S)
                if status == 200:
                    return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                if attempt + 1 == TRIES:
                    raise OutsideError(
                        f"{self.url}: no usable answer from the judge ({type(error).__name__}: {error})"
                    ) from None
            else:
                if status in (401, 403):
                    raise OutsideError(
                        f"{self.url}: the judge refuses the key (HTTP {status}); set {' or '.join(KEYS)}, "
                        "or name its variable by --judge-key-env"
                    )
                if status not in (408, 409, 429, 500, 502, 503, 504) or attempt + 1 == TRIES:
                    raise OutsideError(f"{self.url}: the judge answered HTTP {status}")
            time.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")

    def close(self) -> None:
        pass


class LocalJudge:
    """A model file on this machine (`gguf:PATH`, or another engine's spec)."""

    def __init__(self, spec: str) -> None:
        from unshot.engines import open_engine

        self.spec = spec
        self._engine = open_engine(spec)

    @property
    def name(self) -> str:
        """The engine's spec."""
        return self.spec

    def ask(self, messages: Sequence[Message]) -> str:
        return self._engine.generate(self._engine.prompt_ids(messages), max_tokens=MAX_TOKENS).text

    def close(self) -> None:
        self._engine.close()


def open_judge(spec: str, model: str | None, key_env: str | None = None) -> Judge:
    """`http(s)://.../v1` with a model's name, or `gguf:PATH`; `InputError` for anything else."""
    if spec.startswith(("http://", "https://")):
        if not model:
            raise InputError(f"--judge {spec} needs the model's name there; give --judge-model NAME")
        parse_url(spec)
        read_key(key_env, "--judge-key-env")
        return Endpoint(spec, model, key_env)
    if ":" not in spec:
        raise InputError(f"--judge {spec}: give http://HOST/v1 (with --judge-model) or gguf:PATH")
    return LocalJudge(spec)


@dataclass(frozen=True)
class Pair:
    """One request with two answers."""

    request: str
    first: str
    second: str


def read_verdict(reply: str) -> str | None:
    """`A`, `B` or `TIE` where the reply says just one of them (a reasoning block before it is passed over)."""
    text = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).strip()
    # The word alone, then the usual phrases; a lone "A" in a sentence may be the article.
    if found := re.match(
        r"\W*(?:answer\s+)?(a|b|tie)\b\W*(?:$|\n|is (?:better|best)\b)", text, flags=re.IGNORECASE
    ):
        return found[1].upper()
    found_words = re.findall(
        r"\b(?:answer|option)\s+([AB])\b|\ba (tie)\b|\[\[([ABC])\]\]", text, flags=re.IGNORECASE
    )
    said = {next(w for w in match if w).upper().replace("C", "TIE") for match in found_words}
    return said.pop() if len(said) == 1 else None


def ask_both(judge: Judge, pair: Pair) -> tuple[str | None, str | None]:
    """The verdicts on first and second, and on second and first: `A`, `B`, `TIE` or None (unreadable)."""
    replies = []
    for a, b in ((pair.first, pair.second), (pair.second, pair.first)):
        question = QUESTION.format(request=pair.request, a=a.strip() or "(empty)", b=b.strip() or "(empty)")
        replies.append(read_verdict(judge.ask([{"role": "user", "content": question}])))
    return replies[0], replies[1]


def judge_pair(judge: Judge, pair: Pair) -> tuple[Verdict, str]:
    """The verdict over both orders, and how it came about: `equal`, `both`, `swapped`, `tie` or `unreadable`."""
    if pair.first.strip() == pair.second.strip():
        return "tie", "equal"
    one, other = ask_both(judge, pair)
    if one is None or other is None:
        return "tie", "unreadable"
    if (one, other) == ("A", "B"):
        return "first", "both"
    if (one, other) == ("B", "A"):
        return "second", "both"
    return "tie", "tie" if "TIE" in (one, other) else "swapped"


# Both orders prefer what stands first, or what stands second.
CONTRADICTIONS = (("A", "A"), ("B", "B"))
# What one order's verdict says of the first answer against the reference: at least as good, or not.
_GOOD = ({"A": 1.0, "TIE": 1.0, "B": 0.0}, {"B": 1.0, "TIE": 1.0, "A": 0.0})


def judge_rows(
    judge: Judge, requests: Sequence[str], references: Sequence[str], answers: Sequence[str | None]
) -> np.ndarray:
    """Whether each answer is at least as good as its reference, the mean over both orders, shape `(rows,)`.

    NaN where a reply cannot be read or the two orders contradict each other; an answer equal to the reference is 1 and
    an unanswered request 0 without a question. Raises `OutsideError` if no row could be judged.
    """
    values = np.full(len(answers), np.nan)
    for i, (request, reference, given) in enumerate(zip(requests, references, answers, strict=True)):
        if given is None or given.strip() == reference.strip():
            values[i] = float(given is not None)
            continue
        one, other = ask_both(judge, Pair(request, given, reference))
        if one is not None and other is not None and (one, other) not in CONTRADICTIONS:
            values[i] = (_GOOD[0][one] + _GOOD[1][other]) / 2
    if np.isnan(values).all():
        raise OutsideError(
            f"{judge.name}: none of {len(values)} verdicts can be used (unreadable, or turned round with the order); "
            "take another judge"
        )
    return values


class Judged(Record, kw_only=True):
    """The summary of pairs: wins, losses and ties of the first side, and its win rate (a tie is half)."""

    judge: str
    pairs: int
    wins: int
    losses: int
    ties: int
    equal_answers: int
    # Shares of the asked pairs whose two orders contradict each other, and whose replies say nothing; None: none asked.
    position: float | None
    unreadable: float | None
    win_rate: Interval
    # What the other side was, `run` or `reference`.
    against: str = ""


def judge_pairs(judge: Judge, pairs: Sequence[Pair], out: Output) -> tuple[Judged, list[Verdict]]:
    """All verdicts, and their summary. Equal answers are ties without a question."""
    verdicts: list[Verdict] = []
    ways: list[str] = []
    with out.progress() as progress:
        bar = progress.add_task("judging", total=len(pairs), note=judge.name)
        for pair in pairs:
            verdict, way = judge_pair(judge, pair)
            verdicts.append(verdict)
            ways.append(way)
            progress.advance(bar)
    values = np.array([{"first": 1.0, "tie": 0.5, "second": 0.0}[v] for v in verdicts])
    asked = len(ways) - ways.count("equal")
    summary = Judged(
        judge=judge.name,
        pairs=len(pairs),
        wins=verdicts.count("first"),
        losses=verdicts.count("second"),
        ties=verdicts.count("tie"),
        equal_answers=ways.count("equal"),
        position=ways.count("swapped") / asked if asked else None,
        unreadable=ways.count("unreadable") / asked if asked else None,
        win_rate=mean(values),
    )
    return summary, verdicts
