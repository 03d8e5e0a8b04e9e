"""The registry as a plain directory: `registry.json` with everything it knows, `versions/vN` with the artifacts.

Every change is one rename of `registry.json` under a lock, so that a reader sees the state before it or after it, a
crash leaves one of the two, and aliases and history cannot disagree.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from deploy.registry import evidence
from unshot.contracts.manifest import NAME, FileFacts, read_manifest, staged, write_text
from unshot.contracts.record import RecordError
from unshot.contracts.registry import Alias, Event, State, Version, Waiver
from unshot.errors import InputError, OutsideError

if TYPE_CHECKING:
    from deploy.registry.evidence import Evidence

STATE = "registry.json"
DEFAULT = Path("unshot-registry")
T = TypeVar("T")


def user() -> str:
    """The login name, for the history."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class Registry:
    """A directory store. Reads take no lock; changes wait for each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / STATE

    @property
    def place(self) -> str:
        return str(self.folder)

    def state(self) -> State:
        """What the registry knows now. Raises `InputError` for a damaged file."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return State()
        try:
            return State.from_json(text)
        except RecordError as error:
            raise InputError(f"{self.path}: {error}; it was changed by hand or by a newer unshot") from None

    def stamp(self) -> object:
        """Something cheap that differs after every change: the gateway compares it several times a second."""
        try:
            facts = self.path.stat()
        except OSError:
            return None
        return (facts.st_ino, facts.st_mtime_ns, facts.st_size)

    def change(self, what: Callable[[State], T]) -> T:
        """Apply `what` to the state and make it the state, or raise and change nothing."""
        with self._locked():
            state = self.state()
            result = what(state)
            write_text(self.path, state.to_json(indent=1) + "\n")
            self._sync()
            return result

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / ".lock").open("w")
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror})") from None
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def artifact(self, number: int) -> Path:
        """The directory of a version's files."""
        return self.folder / "versions" / f"v{number}"

    def verified(self, number: int) -> Path:
        """The same, its files checked against their hashes. Raises `InputError`."""
        folder = self.artifact(number)
        read_manifest(folder, stage="export")
        if evidence.digest(folder) != self.state().versions[number].digest:
            raise InputError(f"{folder}: its {NAME} is not the one that was added; it was changed since")
        return folder

    def add(
        self,
        artifact: Path,
        *,
        run: Path | None = None,
        bench: Path | None = None,
        by: str | None = None,
        note: str = "",
        link: bool = False,
    ) -> tuple[Version, bool]:
        """Take an artifact in, or bring its gates up to date where it is there; `(version, whether it is new)`.

        The files are copied, with `link` hard-linked. Raises `InputError` for a bad directory, `OutsideError`
        where there is no room.
        """
        manifest = read_manifest(artifact, stage="export")
        found = evidence.collect(artifact, run, bench)
        content = evidence.digest(artifact)
        who = by or user()
        known = next((v for v in self.state().versions.values() if v.digest == content), None)
        if known is not None:
            return self.change(lambda state: renewed(state, known.number, found, who)), False
        with self._locked():
            number = max([0, *self.state().versions, *self._present()]) + 1
            self._take(artifact, manifest.outputs, self.artifact(number), link=link)
        version = Version(
            number=number,
            by=who,
            note=note,
            source=str(artifact.resolve()),
            digest=content,
            files={name: facts.bytes for name, facts in manifest.outputs.items()},
            base=manifest.base.name if manifest.base else None,
            task=manifest.task.plain() if manifest.task else None,
            lineage=found.lineage,
            scores=found.scores,
            gates=found.gates,
        )

        def enter(state: State) -> None:
            state.versions[number] = version
            state.history.append(
                Event(by=who, action="add", subject=version.name, after=version.source, why=note)
            )

        self.change(enter)
        return version, True

    def _present(self) -> Iterator[int]:
        """Numbers that have a directory, entered or not: a crash between the two must not reuse one."""
        for path in (self.folder / "versions").glob("v*"):
            if path.name[1:].isdigit():
                yield int(path.name[1:])

    def _take(self, source: Path, names: Mapping[str, FileFacts], target: Path, *, link: bool) -> None:
        size = sum(facts.bytes for facts in names.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        if not link and shutil.disk_usage(self.folder).free < size * 1.01:
            raise OutsideError(
                f"{self.folder}: {size / 1e9:.2f} GB do not fit on the disk; free some space, or pass --link "
                "where the store is on the artifact's disk"
            )
        with staged(target) as work:
            for name in [*names, NAME]:
                to = work / name
                to.parent.mkdir(parents=True, exist_ok=True)
                if link and name != NAME:
                    try:
                        os.link(source / name, to)
                        continue
                    except OSError:
                        pass  # another file system: copied like the others
                shutil.copyfile(source / name, to)

    def refresh(self, number: int, by: str) -> Version:
        """Read the gates of a version's run and bench again: a review may have come since.

        A stage whose directory is gone or changed keeps the gates that it had.
        """
        version = self.state().versions[number]
        fresh = {}
        for stage, origin in version.lineage.items():
            folder = Path(origin["path"])
            if (folder / NAME).is_file() and evidence.digest(folder) == origin["digest"]:
                fresh[stage] = evidence.gates_of(folder)
        if all(version.gates.get(stage) == gates for stage, gates in fresh.items()):
            return version
        return self.change(lambda state: _replace(state, number, fresh, by))

    def move(
        self,
        alias: Alias,
        number: int,
        *,
        by: str,
        why: str = "",
        waivers: dict[str, Waiver] | None = None,
    ) -> Event:
        """Point an alias at a version whose gates allow it. Raises `GateError`, else it is done."""
        given = waivers or {}

        def apply(state: State) -> Event:
            version = state.versions[number]
            evidence.check(version, alias, given)
            version.waivers += given.values()
            before = state.aliases.get(alias)
            if alias == "champion":
                if before != number:
                    state.earlier.append(before)
                if state.aliases.get("challenger") == number:
                    del state.aliases["challenger"]
            state.aliases[alias] = number
            reasons = [why, *(f"{w.gate} waived by {w.by}: {w.reason}" for w in given.values())]
            return _note(state, by, "promote", alias, before, number, "; ".join(filter(None, reasons)))

        return self.change(apply)

    def rollback(self, *, by: str, why: str = "") -> Event:
        """Put the champion before this one back (none, where this was the first). Raises `InputError`."""

        def apply(state: State) -> Event:
            before = state.aliases.get("champion")
            if before is None or not state.earlier:
                raise InputError("nothing to roll back: no version was promoted to champion")
            after = state.earlier.pop()
            if after is None:
                del state.aliases["champion"]
            else:
                state.aliases["champion"] = after
            return _note(state, by, "rollback", "champion", before, after, why)

        return self.change(apply)

    def set_split(self, percent: float, *, by: str, why: str = "") -> Event:
        """Set the candidate's share, percent."""

        def apply(state: State) -> Event:
            before, state.split = state.split, percent
            event = Event(
                by=by,
                action="split",
                subject="split",
                before=None if before is None else f"{before:g}",
                after=f"{percent:g}",
                why=why,
            )
            state.history.append(event)
            return event

        return self.change(apply)


def _note(
    state: State, by: str, action: str, subject: str, before: int | None, after: int | None, why: str
) -> Event:
    event = Event(
        by=by,
        action=action,  # type: ignore[arg-type]
        subject=subject,
        before=None if before is None else f"v{before}",
        after=None if after is None else f"v{after}",
        why=why,
    )
    state.history.append(event)
    return event


def renewed(state: State, number: int, found: Evidence, by: str) -> Version:
    """Put newly found gates, scores and lineage over a version's own."""
    version = state.versions[number]
    version.lineage.update(found.lineage)
    version.scores.update(found.scores)
    return _replace(state, number, found.gates, by)


def _replace(state: State, number: int, gates: dict[str, list[evidence.Gate]], by: str) -> Version:
    version = state.versions[number]
    version.gates.update(gates)
    state.history.append(
        Event(by=by, action="gates", subject=version.name, why=f"gates of {', '.join(gates)} read again")
    )
    return version


def open_registry(folder: Path | None, *, tracking: str | None = None, must_exist: bool = True) -> Registry:
    """The store at `folder`, or the one in MLflow at `tracking` with `folder` as the cache of its files.

    Raises `InputError` where there is none and there must be one, `OutsideError` where MLflow is not installed.
    """
    if tracking:
        from deploy.registry.mlflow import MlflowRegistry

        return MlflowRegistry(folder or DEFAULT, tracking)
    registry = Registry(folder or DEFAULT)
    if must_exist and not registry.path.is_file():
        raise InputError(f"{registry.folder}: no registry there; `unshot deploy registry add` makes one")
    return registry
