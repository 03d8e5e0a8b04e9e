"""What a file says to built-in prompts: kept in `parity.json` when it passed the gate, asked again by `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from export.engines import Engine
from export.measure import log_softmax
from export.source import Model, built_in
from unshot.contracts.parity import Probe
from unshot.data.rows import Example, Message
from unshot.metrics.thresholds import limits

PROMPTS, TOKENS, TOP = (0, 4, 7, 11), 16, 20
TIE = 0.1


def probes(model: Model, engine: Engine, context: int) -> list[Probe]:
    """The open file's answers to four built-in prompts, as many as the context holds."""
    texts = built_in()
    rows = [Example(({"role": "user", "content": texts[n]},), None, n) for n in PROMPTS]
    found = []
    for row in rows:
        messages = model.prompt.request(row)
        ids = model.chat.prompt_ids(messages)
        if len(ids) + TOKENS < context:
            found.append(ask(engine, [(m["role"], m["content"]) for m in messages], ids))
    return found


def ask(engine: Engine, messages: list[tuple[str, str]], ids: list[int], top: Sequence[int] = ()) -> Probe:
    """The open file's answer to a prompt; `top` are the tokens to give, else its likeliest."""
    given = log_softmax(engine.logits(ids, len(ids) - 1))[0]
    chosen = list(top) or np.argsort(-given)[:TOP].tolist()
    answer = engine.generate(len(ids), TOKENS, engine.info.end)
    return Probe(messages, ids, answer, chosen, [round(float(given[i]), 6) for i in chosen])


@dataclass
class Difference:
    """How far a file's answers now are from those that were recorded."""

    prompts: int = 0
    kl: float = 0.0
    answers: int = 0
    failures: list[str] = field(default_factory=list)


def bound(precision: str) -> float:
    """The KL, nats, that the same bytes may show on another machine: other kernels sum in another order, and those of
    8-bit activations round otherwise. A choice: a fifth of what the precision itself may cost.
    """
    return min(0.01, max(1e-4, limits(precision).kl / 5))


def ask_again(engine: Engine, recorded: Sequence[Probe], limit: float) -> Difference:
    """Ask an open file its recorded prompts. KL is over the recorded tokens and the rest as one, in nats."""
    found = Difference(len(recorded))
    for probe in recorded:
        messages: list[Message] = [{"role": r, "content": c} for r, c in probe.messages]
        if engine.served([messages])[0] != probe.ids:
            found.failures.append("a server would make other token ids of the prompt")
            continue
        now = ask(engine, probe.messages, probe.ids, probe.top)
        kl = _divergence(np.array(probe.log_probabilities), np.array(now.log_probabilities))
        found.kl = max(found.kl, kl)
        same = now.answer == probe.answer
        found.answers += same
        if not kl <= limit:
            found.failures.append(f"KL {kl:.2g} of the next token, limit {limit:g}")
        elif not same and not (now.answer[:1] == probe.answer[:1] or _near(probe)):
            found.failures.append("another first token than recorded")
    return found


def _near(probe: Probe) -> bool:
    return len(probe.top) > 1 and probe.log_probabilities[0] - probe.log_probabilities[1] <= TIE


def _divergence(one: np.ndarray, two: np.ndarray) -> float:
    p, q = (np.append(np.exp(v), max(1 - np.exp(v).sum(), 1e-12)) for v in (one, two))
    return float((p * np.log(p / np.maximum(q, 1e-12))).sum())
