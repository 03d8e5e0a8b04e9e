"""What the registry knows, as one document: versions, aliases, the split, and the history of every change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta, field

from unshot.contracts.document import Document
from unshot.contracts.manifest import Gate, InputFile, Score
from unshot.contracts.record import Record, RecordError
from unshot.contracts.task import Task
from unshot.errors import InputError, nearest

Alias = Literal["champion", "challenger"]
ALIASES: tuple[Alias, ...] = ("champion", "challenger")


def now() -> str:
    """The time as every record of the registry writes it: UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Waiver(Record):
    """A gate that somebody took upon themselves."""

    gate: str
    reason: str
    by: str
    at: str = field(default_factory=now)


class Origin(Record):
    """A stage's directory behind a version. `digest` is the SHA-256 of its manifest."""

    path: str
    digest: str
    created: str = ""
    unshot: str | None = None
    # The files that a run was tuned on.
    data: list[InputFile] = field(default_factory=list)


class Answer(Record):
    """What a bench said of the claim."""

    verdict: str | None = None
    reason: str | None = None


class Scores(Record):
    """Figures that a version was added with: the sealed test's score, and the bench's answer."""

    tune: Score | None = None
    bench: Answer | None = None


RolloutState = Literal["running", "done", "rolled back", "stopped"]
Percent = Annotated[float, Meta(ge=0, le=100)]


class Rollout(Record, kw_only=True):
    """A version on its way to all users: the candidate's share goes up step by step and is held for a while.

    `step` is the index of the share that is held now, `since` when that began (seconds since 1970).
    """

    target: int
    steps: list[Percent]
    hold_s: float
    step: int = 0
    since: float
    started: str = field(default_factory=now)
    by: str
    # What was served before, and goes on being served where the rollout is taken back.
    before: int | None = None
    before_split: Percent | None = None
    state: RolloutState = "running"
    why: str = ""


class Version(Record, kw_only=True):
    """One artifact directory of `unshot export`."""

    number: int
    added: str = field(default_factory=now)
    by: str
    note: str = ""
    # Where the artifact was added from.
    source: str
    # SHA-256 of the artifact's manifest, which holds its files' hashes.
    digest: str
    # Name -> bytes.
    files: dict[str, int]
    base: str | None = None
    # Labels, answer field and short prompt, as tuned.
    task: Task | None = None
    # Stage -> the directory it left.
    lineage: dict[str, Origin] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)
    # Stage -> the gates it left.
    gates: dict[str, list[Gate]] = field(default_factory=dict)
    waivers: list[Waiver] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"v{self.number}"

    def verdicts(self) -> dict[str, tuple[bool | None, str]]:
        """`gate -> (passed, detail)` over all stages: no where one says no, yes where one says yes and none no.

        An export carries copies of its run's gates; of the two the newer one counts, since a review comes later.
        """
        found: dict[str, tuple[bool | None, str]] = {}
        newest = {
            gate.name: gate.at
            for gate in sorted(
                (*self.gates.get("tune", []), *self.gates.get("export", [])), key=lambda g: g.at
            )
        }
        for stage, gates in self.gates.items():
            for gate in gates:
                if stage in ("tune", "export") and gate.at < newest[gate.name]:
                    continue
                before = found.get(gate.name)
                if before is None or gate.passed is False or (before[0] is None and gate.passed):
                    found[gate.name] = (gate.passed, f"{stage}: {gate.detail}")
        return found


class Event(Record, kw_only=True):
    """One change: who, when, from what, to what, and why."""

    at: str = field(default_factory=now)
    by: str
    action: Literal["add", "gates", "promote", "rollback", "split", "rollout"]
    # The alias that moved, the version that was added, or `split`.
    subject: str
    before: str | None = None
    after: str | None = None
    why: str = ""


class State(Document):
    """The whole registry."""

    FILE: ClassVar[str] = "registry.json"
    VERSION: ClassVar[int] = 2
    WRITTEN_BY: ClassVar[str] = (
        "the last change against a restored copy, or add the versions to a new --store"
    )

    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[Alias, int] = field(default_factory=dict)
    # Champions before this one, the last one last; None: there was none.
    earlier: list[int | None] = field(default_factory=list)
    # The candidate's share in percent; None: the gateway's own.
    split: Percent | None = None
    history: list[Event] = field(default_factory=list)
    # The last rollout, under way or over.
    rollout: Rollout | None = None

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any] | None:
        """Version 1 kept tasks, origins and scores as whatever the manifests held."""
        if version != 1:
            return None
        versions = {k: upgraded_version(v) for k, v in (raw.get("versions") or {}).items()}
        return {k: v for k, v in raw.items() if k != "format"} | {"versions": versions}

    @classmethod
    def of(cls, raw: Any) -> Self:
        """As every record, and what it points to is there. Raises `RecordError`."""
        found = super().of(raw)
        for number, version in found.versions.items():
            if number != version.number:
                raise RecordError(f"`versions.{number}` holds the version {version.number}")
        held = [*found.aliases.values(), *(n for n in found.earlier if n is not None)]
        if found.rollout is not None:
            held.append(found.rollout.target)
        for number in held:
            if number not in found.versions:
                raise RecordError(f"v{number} is named and is not among `versions`")
        return found

    def find(self, text: str) -> Version:
        """The version that `v3`, `3`, `champion` or `challenger` names. Raises `InputError`."""
        if text in ALIASES:
            number = self.aliases.get(text)  # type: ignore[call-overload]
            if number is None:
                raise InputError(f"no version is {text}; make one by `unshot deploy promote VERSION`")
            return self.versions[number]
        digits = text.removeprefix("v")
        if digits.isdigit() and int(digits) in self.versions:
            return self.versions[int(digits)]
        known = [v.name for v in self.versions.values()]
        if not known:
            raise InputError(f"no version `{text}`: the registry is empty; use `unshot deploy registry add`")
        raise InputError(f"no version `{text}`; {nearest(text, [*known, *self.aliases])}")

    def names(self, number: int) -> list[str]:
        """The aliases of a version."""
        return [alias for alias, held in self.aliases.items() if held == number]


def upgraded_version(raw: dict[str, Any]) -> dict[str, Any]:
    """A version's entry of a registry of version 1, in today's fields."""
    scores = raw.get("scores") or {}
    test, bench = scores.get("tune") or {}, scores.get("bench") or {}
    names = Score.__struct_fields__
    task = raw.get("task")
    return {
        **raw,
        "task": {k: v for k, v in task.items() if k in Task.__struct_fields__} if task else None,
        "lineage": {
            stage: {k: v for k, v in origin.items() if k in Origin.__struct_fields__}
            for stage, origin in (raw.get("lineage") or {}).items()
        },
        "scores": {
            "tune": {k: test[k] for k in names} if all(k in test for k in names) else None,
            "bench": {k: bench.get(k) for k in Answer.__struct_fields__} if bench else None,
        },
    }
