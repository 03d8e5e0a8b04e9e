"""The parity ladder: token ids, special tokens, template, served ids, weights, logits, greedy answers, task score.

Each rung compares the exported file, run in its own engine, with the model that was evaluated (base and adapter,
unmerged, fp32), or, for a coarser file, with the full-precision file that passed before it. A rung that fails is
reported with what failed and where.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from export import fp8
from export.boundaries import Boundary, boundaries, served_context, yarn_differs
from export.converter import known_pre
from export.engines import Engine
from export.expected import Expected, answer_tokens, context_for
from export.expected import expect as expect
from export.file_check import compare_directory, compare_with_model
from export.measure import Drift
from export.peft_adapter import compare_adapters
from export.probes import probes
from export.source import Model
from export.tensor_check import compare_weights
from unshot.catalog.formats import Target
from unshot.contracts.parity import (
    FileReport,
    GreedyFigures,
    Limits,
    LogitFigures,
    ServedFigures,
    SpecialFigures,
    TaskFigures,
    TemplateFigures,
    TokenFigures,
)
from unshot.metrics.scores import value_of
from unshot.metrics.thresholds import EXACT, limits
from unshot.text.chat import Tokenizer
from unshot.text.gguf import read_metadata


@dataclass
class Full:
    """A full-precision file that passed the gate: its path, and what its engine says at the expected positions."""

    target: Target
    path: Path
    expected: list[Expected]


def check(
    model: Model,
    target: Target,
    path: Path,
    expected: list[Expected],
    tick: Callable[[], None] | None = None,
    base: Path | None = None,
    full: Full | None = None,
    keep: Path | None = None,
    answers: list[list[int]] | None = None,
) -> FileReport:
    """Climb the ladder for one exported file; an adapter is run on the GGUF file `base`.

    With `full` the file is held against that full-precision file, else against `expected` of the evaluated model.
    `keep` is a folder for the file's own logits, where it is to serve as `full` itself; the file's greedy answers are
    appended to `answers`. Raises `GateError` where the engine cannot load or run the file.
    """
    bounds = Limits(**asdict(limits(target.precision)))
    report = FileReport(str(target), False, limits=bounds)
    found = engine_boundaries(model, target)
    if found:
        report.right_up_to = min(b.tokens for b in found)
        report.notes = [b.why for b in found]
        expected = [e for e in expected if len(e.ids) <= report.right_up_to]
    if target.engine == "gguf" and (differs := yarn_differs(model.config)):
        report.notes.append(f"the model has {differs}")
    if full is not None:
        report.against = str(full.target)
        if target.engine == "gguf":
            compare_weights(full.path, path, report)
        elif target.kind == "peft":
            compare_adapters(full.path, path, report)
    elif target.kind == "gguf":
        compare_with_model(model, path, report)
    elif target.kind == "hf":
        compare_directory(model, path, report)
    if target.precision == "w4a16" or (target.precision == "fp8" and not fp8.proven_here()):
        report.proven, report.passed = False, not report.failures
        package = "" if target.precision == "w4a16" else "the package compressed-tensors, or "
        report.notes.append(
            f"its tensors are the model's within their rounding; running it needs {package}vLLM"
        )
        return report
    whole, lora = (path, None) if base is None else (base, path)
    context = context_for(model, [e.ids for e in expected])
    exact = full is None and bounds.kl <= EXACT.kl
    with Engine(target.engine, whole, context=context, lora=lora, exact=exact) as engine:
        check_tokens(model, engine, report)
        check_special(model, engine, path if target.kind == "peft" else whole, report)
        check_template(model, engine, report)
        check_served(model, engine, report)
        if not report.failures:  # numbers on other tokens would say nothing
            said = check_numbers(model, engine, expected, report, tick, full, keep)
            if answers is not None:
                answers += said
            report.probes = probes(model, engine, served_context(model.config, found))
    report.passed = not report.failures
    return report


def engine_boundaries(model: Model, target: Target) -> list[Boundary]:
    """Up to how many tokens the target's engine computes the model: llama.cpp alone lacks anything that is known."""
    return boundaries(model.config) if target.engine == "gguf" else []


def check_tokens(model: Model, engine: Engine, report: FileReport) -> None:
    """Token ids of the real prompts and of varied strings, equal one by one."""
    tokenizer = model.chat.tokenizer
    special = [t.content for t in tokenizer.added.values()]
    texts = [model.chat.render(m) for m in model.requests()] + [r.answer for r in model.rows if r.answer]
    probes = probe_strings(special)
    if composes(tokenizer) and engine.kind in ("gguf", "genai"):
        # These have no Unicode normalisation: text that is not NFC gets other ids there, and no file can mend that.
        probes = [unicodedata.normalize("NFC", text) for text in probes]
        report.figures.normalizer = "NFC; this engine does not normalise, so send it composed (NFC) text"
    if engine.kind == "gguf" and known_pre(model.tokenizer) in ASCII_CASE:
        probes = [text for text in probes if not CAPITAL_INSIDE.search(text)]
        inside = "llama.cpp splits a word at a capital only where both letters are ASCII (not größeÄnderung)"
        report.figures.normalizer = "; ".join(filter(None, [report.figures.normalizer, inside]))
    texts += probes
    ours = tokenizer.many(texts)
    theirs = engine.tokenize(texts)
    wrong = [(t, a, b) for t, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    report.figures.tokens = TokenFigures(len(texts), len(wrong))
    if wrong:
        text, ours_ids, theirs_ids = wrong[0]
        report.failures.append(
            f"token ids differ on {len(wrong)} of {len(texts)} strings, first {text[:40]!r}: "
            f"{_differing(ours_ids, theirs_ids)}"
        )


def _differing(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two id sequences part, as `[1, 2] became [1, 3]`."""
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return f"{list(ours[at : at + 4])} became {list(theirs[at : at + 4])}"


def composes(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer normalises text to NFC."""
    normalizer = tokenizer.backend.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def check_special(model: Model, engine: Engine, path: Path, report: FileReport) -> None:
    """Special tokens are control tokens, and the engine stops where the tuned model ends its turn."""
    if model.chat.end not in engine.info.end:
        report.failures.append(
            f"the engine does not stop at the end-of-turn token {model.chat.end} (it stops at {engine.info.end[:8]})"
        )
    eos = model.chat.tokenizer.eos
    if eos is not None and eos not in engine.info.end:
        report.failures.append(f"eos token {eos} is not among the engine's end tokens {engine.info.end[:8]}")
    if engine.kind == "gguf" and eos is not None and engine.info.eos != eos:
        report.failures.append(f"eos token is {engine.info.eos} in the file, {eos} in the tokenizer")
    odd = [i for i in engine.info.end if i not in model.ends and not ends_by_name(model, i)]
    if odd:
        named = ", ".join(repr(model.chat.tokenizer.token(i)) for i in odd[:4])
        report.failures.append(f"the engine would stop at {named}, which ends no answer of the model")
    bos = model.chat.tokenizer.bos
    if engine.kind == "gguf" and bos is not None and engine.info.bos != bos:
        report.failures.append(
            f"start-of-text token is {engine.info.bos} in the file, {bos} in the tokenizer"
        )
    wrong = special_tokens(model, engine.kind, path)
    report.figures.special_tokens = SpecialFigures(
        len(model.chat.tokenizer.added), len(wrong), model.chat.end
    )
    if wrong:
        report.failures.append(f"{len(wrong)} special tokens are not control tokens, first {wrong[0]!r}")


def ends_by_name(model: Model, number: int) -> bool:
    """Whether llama.cpp takes a special token for an end by its text alone, whatever a file says."""
    token = model.chat.tokenizer.added.get(number)
    return token is not None and re.search(ENDS, token.content) is not None


def special_tokens(model: Model, kind: str, path: Path) -> list[str]:
    """Special tokens of the tokenizer that the file holds as ordinary text."""
    special = {i: t.content for i, t in model.chat.tokenizer.added.items() if t.special}
    if kind == "gguf":
        types = read_metadata(path)["tokenizer.ggml.token_type"]
        return [text for i, text in special.items() if types[i] != 3]
    data = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    marked = {t["id"] for t in data.get("added_tokens", []) if t.get("special")}
    return [text for i, text in special.items() if i not in marked]


def check_template(model: Model, engine: Engine, report: FileReport) -> None:
    """The template's bytes are equal, and so is what the engine renders with it."""
    ours = model.chat.tokenizer.template.source
    if engine.info.template != ours:
        report.failures.append("the chat template in the file is not the tuned model's, byte for byte")
    requests = model.requests()
    wrong = [
        n
        for n, (messages, text) in enumerate(zip(requests, engine.render(requests), strict=True))
        if model.chat.render(messages) != text
    ]
    report.figures.template = TemplateFigures(len(requests), len(wrong))
    if wrong and engine.info.template == ours:
        report.failures.append(
            f"the template renders differently on {len(wrong)} of {len(requests)} conversations"
        )


def check_served(model: Model, engine: Engine, report: FileReport) -> None:
    """The ids that a server of this engine makes of each prompt are those that the model was tuned and scored with."""
    requests = model.requests()
    ours = [model.chat.prompt_ids(messages) for messages in requests]
    theirs = engine.served(requests)
    wrong = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    report.figures.served = ServedFigures(len(requests), len(wrong), engine.info.add_bos)
    if wrong:
        report.failures.append(
            f"a server makes other token ids of {len(wrong)} of {len(requests)} prompts, first "
            f"{_differing(*wrong[0])} (start-of-text token)"
        )


def check_numbers(
    model: Model,
    engine: Engine,
    expected: list[Expected],
    report: FileReport,
    tick: Callable[[], None] | None = None,
    full: Full | None = None,
    keep: Path | None = None,
) -> list[list[int]]:
    """Logits at the same positions of the same tokens, then greedy answers (returned) and the task's score."""
    assert report.limits is not None
    tie = report.limits.tie
    against = {tuple(e.ids): e for e in full.expected} if full else {}
    drift, far, swept = Drift(tie), Drift(tie), Drift(tie)
    exact = full is None and report.limits.kl <= EXACT.kl
    rows: list[Expected] = []
    answers: list[list[int]] = []
    greedy = equal = 0
    for row in expected:
        if row.sweep and not exact:  # a coarse file's rounding of unlikely text says nothing
            continue
        reference = against.get(tuple(row.ids), row).load()
        found = engine.logits(row.ids, row.start)
        if keep:
            np.save(keep / row.logits.name, found)
        following = np.array(row.ids[row.start + 1 :], dtype=np.int64)
        (swept if row.sweep else far if row.long else drift).add(reference, found, following)
        if row.long:
            continue
        answer = engine.generate(row.prompt, answer_tokens(model), engine.info.end)
        rows.append(row)
        answers.append(answer)
        cut = replace(row, answer=until(row.answer, engine.info.end))
        equal += row.whole and answer == cut.answer
        greedy += same_answer(cut, answer, reference, tie, model.chat.end)
        if tick:
            tick()
    report.figures.logits = drift.figures()
    report.figures.greedy = GreedyFigures(len(rows), equal / len(rows), greedy / len(rows))
    judge(report, report.figures.logits, greedy / len(rows))
    if far.positions:
        report.figures.longest = max(len(e.ids) for e in expected if not e.sweep)
        report.figures.long_logits = far.figures()
        judge(report, report.figures.long_logits, None, f" at {report.figures.longest} tokens")
    if swept.positions:
        report.figures.unseen_logits = swept.figures()
        judge(report, report.figures.unseen_logits, None, " of tokens that no row has")
    _task(model, rows, answers, report)
    return answers


def own_logits(expected: list[Expected], keep: Path) -> list[Expected]:
    """The expected rows with the logits that a checked file gave itself, of those that it was run on."""
    found = [replace(e, logits=keep / e.logits.name) for e in expected]
    return [e for e in found if e.logits.is_file()]


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


def judge(report: FileReport, figures: LogitFigures, greedy: float | None, where: str = "") -> None:
    """Hold the figures against the limits; what is not a finite number fails."""
    bounds = report.limits
    assert bounds is not None
    for text, value, limit, bad in (
        ("mean KL divergence", figures.kl, bounds.kl, figures.kl > bounds.kl),
        ("top-1 agreement", figures.top1, bounds.top1, figures.top1 < bounds.top1),
        ("cosine of the logits", figures.cosine, bounds.cosine, figures.cosine < bounds.cosine),
        (
            "perplexity ratio", figures.perplexity, bounds.perplexity,
            # Of the few tokens of one long sequence it is noise in a coarse file.
            not where and figures.perplexity is not None and figures.perplexity > bounds.perplexity,
        ),
    ):  # fmt: skip
        if bad or not np.isfinite(value if value is not None else 0.0):
            report.failures.append(f"{text} {value:.4g}{where}, limit {limit:g}")
    if figures.largest_difference is None:
        report.failures.append(f"the engine's logits hold NaN or infinity{where} (fp16 overflow?)")
    if greedy is not None and greedy < bounds.greedy:
        report.failures.append(f"greedy answers agree on {greedy:.1%}, limit {bounds.greedy:.0%}")


def _task(model: Model, expected: list[Expected], answers: list[list[int]], report: FileReport) -> None:
    """The task's score of the export's answers and of the reference's, on the rows that have a right answer."""
    if model.task is None or report.limits is None:
        return
    known = [
        (row.answer, e.answer, answer, row.text)
        for row, e, answer in zip(model.rows, expected, answers, strict=False)
        if e.whole and row.answer is not None
    ]
    if not known:
        return
    texts = [
        [model.chat.decode(ids).strip() for ids in each]
        for each in ([k[1] for k in known], [k[2] for k in known])
    ]
    ours = model.task.answers([str(k[0]) for k in known], texts[0], requests=[k[3] for k in known])
    reference, export = (value_of(model.task.metric, a) for a in (ours, ours.with_answers(texts[1])))
    report.figures.task = TaskFigures(model.task.metric, len(known), reference, export, reference - export)
    # One row's worth is noise on a small test split.
    if reference - export > max(report.limits.task, 1 / len(known)):
        report.failures.append(
            f"{model.task.metric} fell from {reference:.3f} to {export:.3f}, limit {report.limits.task:g}"
        )


# Pre-tokenizers whose upper and lower case llama.cpp takes for [A-Z] and [a-z] (`unicode_regex_split`), and the text
# that no file can mend there: a capital behind a small letter, one of the two beyond ASCII.
ASCII_CASE = ("gpt-4o", "tekken")
CAPITAL_INSIDE = re.compile(r"[^\W\d_][À-ÖØ-ÞİŁŸΑ-ΩА-Я]|[ß-öø-ÿſłα-ωа-я][A-Z]")
# Texts that llama.cpp (`llama_vocab::impl::load`) takes for the end of a turn, a text, or a file, by their spelling.
ENDS = re.compile(r"(?i)end|eo[stmg]|</s>|return|call|flush|fim.?(pad|rep|sep)|pad|repo|file_sep|reponame")
# Strings on which two tokenizers disagree if they disagree at all: digits, spaces, code, scripts, emoji.
PARTS = (
    "the", "The", "THE", " contract", "Clause", "don't", "WE'LL", "I'm", "naïve", "Übergröße", "Łódź", "привет",
    "договор", "合同", "条款", "こんにちは", "안녕하세요", "مرحبا", "שלום", "नमस्ते",
    "🙂", "👩‍💻", "🇫🇷", "0", "7", "42", "2024", "1,234.56", "3.14159", "10^-3", "0x1F",
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n ", "\u00a0", "\u3000",
    ".", "...", ",", ";", ":", "!", "?!", "-", "—", "(", ")", "[", "]", "{", "}", "{{x}}", "<", ">", "<b>", "</b>",
    "&amp;", "/", "\\", "//", "==", "!=", "->", "=>", "+=", "self.__init__", "def f(x):", "return", "lambda",
    "SELECT *", "$100", "€5", "50%", "#1", "@me", "a@b.co", "https://x.org/a?b=1&c=2", "'", '"', "``", "`x`",
    "_", "__", "snake_case", "camelCase", "e\u0301", "ﬁ", "Ω", "½", "²", "\u200b", "\u200d", "ſ", "İ", "ß",
)  # fmt: skip


def probe_strings(special: Sequence[str], count: int = 600, seed: int = 7) -> list[str]:
    """`count` fixed strings joined from awkward parts, each special token among and beside them."""
    generator = random.Random(seed)
    strings = [*PARTS, *special]
    for token in special:
        left, right = generator.choice(PARTS), generator.choice(PARTS)
        strings += [f"{left}{token}{right}", f"{token}{token}", f"{left} {token} {right}"]
    while len(strings) < count:
        length = generator.randint(2, 12)
        glue = generator.choice(("", " ", ""))
        strings.append(glue.join(generator.choice(PARTS) for _ in range(length)))
    return strings
