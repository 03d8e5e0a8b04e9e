"""`unshot export verify`: an artifact where it lies now, against what the export recorded; `diff`: two of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from export.engines import Engine
from export.measure import Drift
from export.probes import TOKENS, ask_again, bound
from export.shipping import SUMS
from export.source import built_in
from export.tensor_check import different_metadata, relative_error
from unshot.catalog.formats import Target, parse_target
from unshot.contracts.manifest import sha256
from unshot.contracts.parity import FileReport, LogitFigures, Parity
from unshot.data.rows import Message
from unshot.errors import GateError, InputError, UnshotError
from unshot.text.gguf import read


@dataclass
class Verified:
    """One file of an artifact: `verdict` is equal, differs or not proven; `failures` say why it differs."""

    target: str
    file: str
    verdict: str
    prompts: int = 0
    answers: int = 0
    kl: float = 0.0
    failures: list[str] = field(default_factory=list)


def verify(folder: Path) -> list[Verified]:
    """Every file of an artifact: its hashes, then its answers on this machine against those recorded.

    Raises `InputError` for a directory that is no artifact. A file whose engine is not installed here, or without
    recorded answers, is *not proven*; one that failed the gate when it was exported still differs.
    """
    if not (folder / Parity.FILE).is_file():
        raise InputError(f"{folder}: no {Parity.FILE} there; give a directory that `unshot export` wrote")
    changed = changed_files(folder)
    return [_one(folder, report, changed) for report in Parity.read(folder).reports]


def changed_files(folder: Path) -> dict[str, str]:
    """Files that are missing, or that do not have the hash that `SHA256SUMS` gives them."""
    path = folder / SUMS
    if not path.is_file():
        raise InputError(f"{path}: no such file; the artifact cannot be told from a changed one")
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path}: `{line[:80]}` names no file of the artifact")
        if not file.is_file():
            found[name] = "is missing"
        elif sha256(file) != digest:
            found[name] = f"has changed since the export (its hash is not that of {SUMS})"
    return found


def _one(folder: Path, report: FileReport, changed: dict[str, str]) -> Verified:
    target = parse_target(report.target)
    found = Verified(report.target, target.name, "differs")
    found.failures += [
        f"{name} {what}"
        for name, what in changed.items()
        if name == target.name or Path(name).parts[0] == target.name
    ]
    found.failures += [f"{Parity.FILE} {changed[Parity.FILE]}"] if Parity.FILE in changed else []
    if not report.passed:
        found.failures.append(f"it failed the gate when it was exported: {'; '.join(report.failures[:2])}")
    if found.failures:
        return found
    if target.format.on_base or not report.probes:
        why = "an adapter is checked on its base" if target.format.on_base else "no answers were recorded"
        return Verified(report.target, target.name, "not proven", failures=[f"unchanged; {why}"])
    try:
        with Engine(target.engine, folder / target.name, context=_context(report)) as engine:
            answers = ask_again(engine, report.probes, bound(target.precision))
    except GateError as error:
        found.failures.append(str(error))
        return found
    except UnshotError as error:  # the engine is not installed here
        return Verified(report.target, target.name, "not proven", failures=[f"unchanged; {error}"])
    found.prompts, found.answers, found.kl, found.failures = (
        answers.prompts, answers.answers, answers.kl, answers.failures,
    )  # fmt: skip
    found.verdict = "differs" if found.failures else "equal"
    return found


def _context(report: FileReport) -> int:
    return max(256, max(len(p.ids) for p in report.probes) + TOKENS + 1)


@dataclass
class Compared:
    """One pair of files. `tensors` are those that differ with their relative errors, the largest first."""

    target: str
    same_bytes: bool
    metadata: list[str] = field(default_factory=list)
    tensors: list[tuple[str, float]] = field(default_factory=list)
    logits: LogitFigures | None = None
    answers: int = 0
    prompts: int = 0


def diff(one: Path, two: Path) -> list[Compared]:
    """The files of two artifacts by target, or two files; `InputError` where they have none in common.

    Files that differ are run on the built-in prompts, both with the token ids that the first one's server makes.
    """
    pairs = _pairs(one, two)
    return [_compare(target, a, b) for target, a, b in pairs]


def _pairs(one: Path, two: Path) -> list[tuple[Target, Path, Path]]:
    if one.suffix == ".gguf" and two.suffix == ".gguf":
        for path in (one, two):
            if not path.is_file():
                raise InputError(f"{path}: no such file")
        return [(Target("gguf", "f32"), one, two)]
    for folder in (one, two):
        if not (folder / Parity.FILE).is_file():
            raise InputError(f"{folder}: neither a .gguf file nor a directory that `unshot export` wrote")
    targets = [{r.target for r in Parity.read(folder).reports} for folder in (one, two)]
    common = [parse_target(t) for t in sorted(targets[0] & targets[1]) if not t.startswith("lora")]
    if not common:
        raise InputError(
            f"{one} has {', '.join(sorted(targets[0]))}, {two} {', '.join(sorted(targets[1]))}: none in common; "
            "give two .gguf files to compare across precisions"
        )
    return [(t, one / t.name, two / t.name) for t in common]


def _compare(target: Target, one: Path, two: Path) -> Compared:
    found = Compared(
        str(target) if one.parent != two.parent else f"{one.name}, {two.name}", _hash(one) == _hash(two)
    )
    if found.same_bytes:
        return found
    if target.kind == "gguf":
        a, b = read(one), read(two)
        found.metadata = different_metadata(a, b)
        ours, theirs = a.tensors, b.tensors
        for name in ours.keys() | theirs.keys():
            whole = name in ours and name in theirs and ours[name].shape == theirs[name].shape
            error = relative_error(ours[name], theirs[name]) if whole else float("inf")
            if error:
                found.tensors.append((name, error))
        found.tensors.sort(key=lambda pair: -pair[1])
    if not target.format.on_base:  # an adapter answers nothing alone
        _answers(target.engine, one, two, found)
    return found


def _answers(kind: str, one: Path, two: Path, found: Compared) -> None:
    drift = Drift(tie=0.0)
    with Engine(kind, one) as first, Engine(kind, two) as second:
        for text in built_in()[:8]:
            messages: list[Message] = [{"role": "user", "content": text}]
            (ids,) = first.served([messages])
            following = np.array(ids[1:], dtype=np.int64)
            drift.add(first.logits(ids), second.logits(ids), following)
            answers = [e.generate(len(ids), TOKENS, first.info.end) for e in (first, second)]
            found.prompts += 1
            found.answers += answers[0] == answers[1]
    found.logits = drift.figures()


def _hash(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    return " ".join(f"{f.relative_to(path)} {sha256(f)}" for f in sorted(path.rglob("*")) if f.is_file())
