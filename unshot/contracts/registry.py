"""What the registry knows, as one document: versions, aliases, the split, and the history of every change."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from msgspec import field

from unshot.contracts.gates import Gate
from unshot.contracts.record import Record
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
    task: dict[str, Any] | None = None
    # Run, data and bench with their hashes.
    lineage: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
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
    action: Literal["add", "gates", "promote", "rollback", "split"]
    # The alias that moved, the version that was added, or `split`.
    subject: str
    before: str | None = None
    after: str | None = None
    why: str = ""


class State(Record):
    """The whole registry."""

    format: int = 1
    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[Alias, int] = field(default_factory=dict)
    # Champions before this one, the last one last; None: there was none.
    earlier: list[int | None] = field(default_factory=list)
    # The candidate's share in percent; None: the gateway's own.
    split: float | None = None
    history: list[Event] = field(default_factory=list)

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
