"""The parity ladder: token ids, special tokens, template, logits, greedy answers, task score.

Each rung compares the exported file, run in its own engine, with the model that was evaluated (base and adapter,
unmerged, fp32). A rung that fails is reported with what failed and where.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.engines import Engine
from export.measure import Drift
from export.probes import probe_strings
from export.source import Model
from export.targets import Target
from unshot.metrics.thresholds import limits
from unshot.text.chat import Tokenizer

BATCH = 8  # rows the reference runs together
WINDOW = 48  # positions compared at the end of each prompt, besides those of the answer
ANSWER_TOKENS = 16  # length of a greedy answer where the task does not say


@dataclass
class Expected:
    """What the evaluated model says about one row: prompt ids, greedy answer, logits of the compared positions."""

    ids: list[int]
    prompt: int
    answer: list[int]
    start: int
    logits: Path
    whole: bool = True  # False: only the beginning of the answer is known

    def load(self) -> np.ndarray:
        """fp32 logits, shape `(len(ids) - start, vocab)`."""
        values: np.ndarray = np.load(self.logits)
        return values


@dataclass
class Report:
    """Figures of one artifact, and what failed."""

    target: str
    figures: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)  # the export's greedy answers, row by row

    @property
    def passed(self) -> bool:
        """Whether every rung held."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """The report as written to `parity.json`."""
        return {
            "target": self.target,
            "passed": self.passed,
            "failures": self.failures,
            "figures": self.figures,
            "limits": self.limits,
        }


def expect(
    model: Model,
    reference: Any,
    rows: int,
    folder: Path,
    tick: Callable[[int], None] | None = None,
    proposed: list[list[int]] | None = None,
) -> list[Expected]:
    """The evaluated model's answers and logits on the first `rows` rows, kept as files in `folder`.

    `proposed` are an engine's greedy answers, for a reference that cannot generate: it follows them as far as it
    agrees.
    """
    prompts = [model.chat.prompt_ids(messages) for messages in model.requests()[:rows]]
    found: list[Expected | None] = [None] * len(prompts)
    # What every prompt begins with would be counted once a row, and its first token, where a small model keeps its
    # attention sink, is an outlier in 8 bits that no answer depends on.
    same = min(common_prefix(prompts), min(len(p) for p in prompts) - 1)
    # Neighbours in length share a batch, so that little of it is padding; a streamed model reads itself once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = BATCH if proposed is None else len(order)
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        batch = [prompts[i] for i in chosen]
        if proposed is None:
            answers = reference.generate(batch, answer_tokens(model), model.chat.end)
        else:
            answers = [proposed[i] for i in chosen]
        whole = [p + a for p, a in zip(batch, answers, strict=True)]
        starts = [max(same, len(p) - WINDOW) for p in batch]
        for i, answer, ids, start, logits in zip(
            chosen, answers, whole, starts, reference.logits(whole, starts), strict=True
        ):
            path = folder / f"expected-{i}.npy"
            np.save(path, logits)
            row = Expected(ids, len(prompts[i]), answer, start, path)
            if proposed is not None:
                follow(row, logits, model.chat.end, answer_tokens(model))
            found[i] = row
        if tick:
            tick(len(chosen))
    return [row for row in found if row is not None]


def follow(row: Expected, logits: np.ndarray, end: int, tokens: int) -> None:
    """Turn a proposed answer into the reference's own, as far as its logits tell; `whole` says if that is all of it."""
    own: list[int] = []
    for step, choice in enumerate(logits[row.prompt - row.start - 1 :].argmax(axis=1).tolist()):
        if choice == end:
            row.answer = own
            return
        if len(own) == tokens:
            break
        own.append(choice)
        if step >= len(row.answer) or row.answer[step] != choice:
            row.whole = len(own) == tokens
            break
    row.answer = own


def propose(model: Model, target: Target, path: Path, rows: int, base: Path | None = None) -> list[list[int]]:
    """The exported file's own greedy answers to the first `rows` rows."""
    prompts = [model.chat.prompt_ids(messages) for messages in model.requests()[:rows]]
    longest = max(len(p) for p in prompts) + answer_tokens(model)
    answers = []
    whole, lora = (path, None) if base is None else (base, path)
    with Engine(target.engine, whole, context=max(256, longest + 8), lora=lora) as engine:
        for ids in prompts:
            engine.logits(ids, len(ids) - 1)
            answers.append(
                engine.generate(len(ids), answer_tokens(model), [*engine.info["end"], model.chat.end])
            )
    return answers


def common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share; at least 1, so that a lone row skips its first token too."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length if len(sequences) > 1 else 1


def answer_tokens(model: Model) -> int:
    """How many tokens a greedy answer may have."""
    return (model.task.max_answer_tokens if model.task else None) or ANSWER_TOKENS


def check(
    model: Model,
    target: Target,
    path: Path,
    expected: list[Expected],
    tick: Callable[[], None] | None = None,
    base: Path | None = None,
) -> Report:
    """Climb the ladder for one exported file; an adapter is run on the GGUF file `base`.

    Raises `GateError` where its engine cannot load or run it.
    """
    bounds = limits(target.precision)
    report = Report(str(target), limits=bounds.as_dict())
    longest = max(len(e.ids) for e in expected) + answer_tokens(model)
    whole, lora = (path, None) if base is None else (base, path)
    with Engine(target.engine, whole, context=max(256, longest + 8), lora=lora) as engine:
        check_tokens(model, engine, report)
        check_special(model, engine, whole, report)
        check_template(model, engine, report)
        if report.failures:
            return report  # numbers on other tokens would say nothing
        check_numbers(model, engine, expected, report, tick)
    return report


def check_tokens(model: Model, engine: Engine, report: Report) -> None:
    """Token ids of the real prompts and of varied strings, equal one by one."""
    tokenizer = model.chat.tokenizer
    special = [t.content for t in tokenizer.added.values()]
    texts = [model.chat.render(m) for m in model.requests()] + [r.answer for r in model.rows if r.answer]
    probes = probe_strings(special)
    if composes(tokenizer) and engine.kind in ("gguf", "genai"):
        # These have no Unicode normalisation: text that is not NFC gets other ids there, and no file can mend that.
        probes = [unicodedata.normalize("NFC", text) for text in probes]
        report.figures["normalizer"] = "NFC; this engine does not normalise, so send it composed (NFC) text"
    texts += probes
    ours = tokenizer.many(texts)
    theirs = engine.tokenize(texts)
    wrong = [(t, a, b) for t, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    report.figures["tokens"] = {"strings": len(texts), "mismatches": len(wrong)}
    if wrong:
        text, ours_ids, theirs_ids = wrong[0]
        at = next((i for i, (a, b) in enumerate(zip(ours_ids, theirs_ids, strict=False)) if a != b), -1)
        report.failures.append(
            f"token ids differ on {len(wrong)} of {len(texts)} strings, first {text[:40]!r}: "
            f"{ours_ids[at : at + 4]} became {theirs_ids[at : at + 4]}"
        )


def composes(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer normalises text to NFC."""
    normalizer = tokenizer.backend.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def check_special(model: Model, engine: Engine, path: Path, report: Report) -> None:
    """Special tokens are control tokens, and the engine stops where the tuned model ends its turn."""
    if model.chat.end not in engine.info["end"]:
        report.failures.append(
            f"the engine does not stop at the end-of-turn token {model.chat.end} (it stops at {engine.info['end'][:8]})"
        )
    eos = model.chat.tokenizer.eos
    if eos is not None and eos not in engine.info["end"]:
        report.failures.append(
            f"eos token {eos} is not among the engine's end tokens {engine.info['end'][:8]}"
        )
    if engine.kind == "gguf" and eos is not None and engine.info["eos"] != eos:
        report.failures.append(f"eos token is {engine.info['eos']} in the file, {eos} in the tokenizer")
    wrong = special_tokens(model, engine.kind, path)
    report.figures["special_tokens"] = {
        "checked": len(model.chat.tokenizer.added), "wrong": len(wrong), "end": model.chat.end,
    }  # fmt: skip
    if wrong:
        report.failures.append(f"{len(wrong)} special tokens are not control tokens, first {wrong[0]!r}")


def special_tokens(model: Model, kind: str, path: Path) -> list[str]:
    """Special tokens of the tokenizer that the file holds as ordinary text."""
    special = {i: t.content for i, t in model.chat.tokenizer.added.items() if t.special}
    if kind == "gguf":
        from gguf import GGUFReader

        field = GGUFReader(path).fields["tokenizer.ggml.token_type"]
        types = field.contents()
        return [text for i, text in special.items() if types[i] != 3]
    import json

    data = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    marked = {t["id"] for t in data.get("added_tokens", []) if t.get("special")}
    return [text for i, text in special.items() if i not in marked]


def check_template(model: Model, engine: Engine, report: Report) -> None:
    """The template's bytes are equal, and so is what the engine renders with it."""
    ours = model.chat.tokenizer.template.source
    if engine.info["template"] != ours:
        report.failures.append("the chat template in the file is not the tuned model's, byte for byte")
    requests = model.requests()
    wrong = [
        n
        for n, (messages, text) in enumerate(zip(requests, engine.render(requests), strict=True))
        if model.chat.render(messages) != text
    ]
    report.figures["template"] = {"conversations": len(requests), "mismatches": len(wrong)}
    if wrong and engine.info["template"] == ours:
        report.failures.append(
            f"the template renders differently on {len(wrong)} of {len(requests)} conversations"
        )


def check_numbers(
    model: Model,
    engine: Any,
    expected: list[Expected],
    report: Report,
    tick: Callable[[], None] | None = None,
) -> None:
    """Logits at the same positions of the same tokens, then greedy answers and the task's score."""
    bounds = limits(report.target.partition(":")[2])
    drift = Drift(bounds.tie)
    answers, greedy, equal = [], 0, 0
    stop = engine.info["end"]
    for row in expected:
        reference = row.load()
        drift.add(
            reference, engine.logits(row.ids, row.start), np.array(row.ids[row.start + 1 :], dtype=np.int64)
        )
        answer = engine.generate(row.prompt, answer_tokens(model), stop)
        answers.append(answer)
        row = replace(row, answer=until(row.answer, stop))
        equal += row.whole and answer == row.answer
        greedy += same_answer(row, answer, reference, bounds.tie, model.chat.end)
        if tick:
            tick()
    figures = drift.figures()
    report.figures["logits"] = figures
    report.figures["greedy"] = {
        "rows": len(expected),
        "equal": equal / len(expected),
        "equal_or_tied": greedy / len(expected),
    }
    judge(report, figures, greedy / len(expected))
    report.answers = answers
    _task(model, expected, answers, report)


def until(answer: list[int], stop: list[int]) -> list[int]:
    """The answer up to where the engine would end it: it may know more end tokens than the chat template's."""
    return next((answer[:n] for n, token in enumerate(answer) if token in stop), answer)


def same_answer(row: Expected, answer: list[int], reference: np.ndarray, tie: float, end: int) -> bool:
    """Whether a greedy answer is the reference's, or leaves it first at a near-tie of the reference's logits."""
    for step, token in enumerate([*row.answer, end] if row.whole else row.answer):
        found = answer[step] if step < len(answer) else end
        if found == token:
            continue
        at = row.prompt - row.start - 1 + step
        return at < len(reference) and bool(reference[at].max() - reference[at][found] <= tie)
    return True


def judge(report: Report, figures: dict[str, Any], greedy: float) -> None:
    """Hold the figures against the limits."""
    bounds = report.limits
    for name, text, bad in (
        ("kl", "mean KL divergence", figures["kl"] > bounds["kl"]),
        ("top1", "top-1 agreement", figures["top1"] < bounds["top1"]),
        ("cosine", "cosine of the logits", figures["cosine"] < bounds["cosine"]),
        (
            "perplexity",
            "perplexity ratio",
            figures["perplexity"] is not None and figures["perplexity"] > bounds["perplexity"],
        ),
    ):
        if bad or not np.isfinite(figures[name] if figures[name] is not None else 0.0):
            report.failures.append(f"{text} {figures[name]:.4g}, limit {bounds[name]:g}")
    if not np.isfinite(figures["largest_difference"]):
        report.failures.append("the engine's logits hold NaN or infinity (fp16 overflow?)")
    if greedy < bounds["greedy"]:
        report.failures.append(f"greedy answers agree on {greedy:.1%}, limit {bounds['greedy']:.0%}")


def _task(model: Model, expected: list[Expected], answers: list[list[int]], report: Report) -> None:
    """The task's score of the export's answers and of the reference's, on the rows that have a right answer."""
    if model.task is None:
        return
    known = [
        (row.answer, e.answer, answer)
        for row, e, answer in zip(model.rows, expected, answers, strict=False)
        if e.whole and row.answer is not None
    ]
    if not known:
        return
    truth = [right for right, _, _ in known]
    ours = model.task.scores(truth, [model.chat.decode(ids).strip() for _, ids, _ in known])
    theirs = model.task.scores(truth, [model.chat.decode(ids).strip() for _, _, ids in known])
    loss = ours["score"] - theirs["score"]
    report.figures["task"] = {
        "metric": ours["metric"],
        "rows": len(known),
        "reference": ours["score"],
        "export": theirs["score"],
        "loss": loss,
    }
    # One row's worth is noise on a small test split.
    if loss > max(report.limits["task"], 1 / len(known)):
        report.failures.append(
            f"{ours['metric']} fell from {ours['score']:.3f} to {theirs['score']:.3f}, limit {report.limits['task']:g}"
        )
