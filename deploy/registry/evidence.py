"""What proves a version: the gates, scores and lineage in the manifests of its run, its export and its bench."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unshot.contracts.artifact import Artifact
from unshot.contracts.gates import Gate, read_gates
from unshot.contracts.manifest import NAME, Manifest, read_manifest
from unshot.contracts.registry import Alias, Answer, Origin, Scores, Version, Waiver
from unshot.errors import GateError, InputError

# A champion answers users; a challenger is measured beside it and only has to be the model that was evaluated.
NEEDED: dict[Alias, tuple[str, ...]] = {
    "champion": ("parity", "quality", "forgetting", "review"),
    "challenger": ("parity",),
}
FROM = {
    "parity": "`unshot export` leaves it",
    "quality": "`unshot bench` leaves it; add the report by `registry add ARTIFACT --bench REPORT`",
    "forgetting": "`unshot tune` or `unshot eval` leaves it; add the run by `registry add ARTIFACT --run RUN`",
    "review": "a person's reading of answers leaves it in the run's directory",
}


@dataclass
class Evidence:
    """Gates by stage, scores and lineage."""

    gates: dict[str, list[Gate]] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)
    lineage: dict[str, Origin] = field(default_factory=dict)


def digest(directory: Path) -> str:
    """SHA-256 of a directory's manifest: the name of its content."""
    return hashlib.sha256((directory / NAME).read_bytes()).hexdigest()


def collect(artifact: Path, run: Path | None, bench: Path | None) -> Evidence:
    """Read what the stages left. Raises `InputError` for a directory of another stage or another artifact."""
    found = Evidence()
    manifest = read_manifest(artifact, stage="export", verify=False)
    found.gates["export"] = gates_of(artifact)
    found.lineage["export"] = _origin(artifact, manifest)
    exported = Artifact(artifact, manifest)
    if run is not None:
        _same_run(exported, run)
    else:
        run = exported.run()
    if run is not None:
        tuned = read_manifest(run, stage="tune", verify=False)
        found.gates["tune"] = gates_of(run)
        found.lineage["tune"] = _origin(run, tuned).changed(data=tuned.inputs)
        found.scores.tune = tuned.score
    if bench is not None:
        report = read_manifest(bench, stage="bench", verify=False)
        _same_artifact(artifact, bench, report)
        found.gates["bench"] = gates_of(bench)
        found.lineage["bench"] = _origin(bench, report)
        found.scores.bench = Answer(report.verdict, report.reason)
    return found


def _origin(directory: Path, manifest: Manifest) -> Origin:
    return Origin(
        path=str(directory.resolve()),
        digest=digest(directory),
        created=manifest.created,
        unshot=manifest.tool.get("version"),
    )


def gates_of(directory: Path) -> list[Gate]:
    """The gates that a stage's directory holds now."""
    return list(read_gates(directory).values())


def _same_run(artifact: Artifact, run: Path) -> None:
    """Refuse a run that is not the one behind the artifact, told by its manifest's hash, else by its adapter's."""
    tuned = read_manifest(run, stage="tune", verify=False)
    same = artifact.made_from(run)
    if same is None:
        adapter = {f.sha256 for name, f in tuned.outputs.items() if name.startswith("adapter/")}
        same = not adapter or any(item.sha256 in adapter for item in artifact.manifest.inputs)
    if not same:
        named = artifact.manifest.run or "no run"
        raise InputError(
            f"{run}: not the run that {artifact.folder} was exported from ({named}), or tuned again since"
        )


def _same_artifact(artifact: Path, bench: Path, report: Manifest) -> None:
    """Refuse a bench report on another candidate, told by its files' hashes or its path."""
    exported = read_manifest(artifact, verify=False)
    ours = {facts.sha256 for facts in exported.outputs.values()}
    theirs = {item.sha256 for item in report.inputs}
    spec = report.candidate or ""
    path = Path(spec.split(":", 2 if spec.startswith("serve:") else 1)[-1])
    if ours & theirs or artifact.resolve() in (path.resolve(), path.resolve().parent):
        return
    raise InputError(f"{bench}: its candidate is {spec or 'unknown'}, not a file of {artifact}")


def missing(version: Version, alias: Alias, waived: Iterable[str]) -> dict[str, str]:
    """`gate -> why it does not hold` of those that an alias needs and nobody waived."""
    verdicts = version.verdicts()
    found = {}
    for name in NEEDED[alias]:
        passed, detail = verdicts.get(name, (None, "nobody looked"))
        if passed is not True and name not in waived:
            if passed is False:
                found[name] = f"failed ({detail})"
            elif name in verdicts:
                found[name] = f"undecided ({detail})"
            else:
                found[name] = f"missing ({FROM[name]})"
    return found


def check(version: Version, alias: Alias, waivers: Mapping[str, Waiver]) -> None:
    """Raise `GateError` unless every gate that the alias needs has passed or is waived, now or earlier."""
    waived = {*waivers, *(w.gate for w in version.waivers)}
    lacking = missing(version, alias, waived)
    if lacking:
        lines = "; ".join(f"{name}: {why}" for name, why in lacking.items())
        first = next(iter(lacking))
        raise GateError(
            f"{version.name} cannot become {alias}: {lines}. To take it upon yourself: "
            f'--waive {first}="REASON" --by NAME'
        )


def parse_waivers(texts: Iterable[str], by: str | None) -> dict[str, Waiver]:
    """`review="two of us read 50 answers"` as waivers. Raises `InputError` without a reason or a name."""
    known = NEEDED["champion"]
    found = {}
    for text in texts:
        gate, _, reason = text.partition("=")
        if gate not in known:
            raise InputError(f"--waive {text}: no gate `{gate}`; one of {', '.join(known)}")
        if not reason.strip():
            raise InputError(f'--waive {gate}: give the reason, --waive {gate}="REASON"')
        if not by:
            raise InputError(f"--waive {gate}: name who takes it upon themselves, --by NAME")
        found[gate] = Waiver(gate=gate, reason=reason.strip(), by=by)
    return found
