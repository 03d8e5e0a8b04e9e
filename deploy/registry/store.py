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
from typing import TYPE_CHECKING, Literal, TypeVar

from deploy.registry import evidence
from unshot.contracts.manifest import NAME, FileFacts, read_manifest, staged
from unshot.contracts.registry import Alias, Event, RolloutState, State, Version, Waiver
from unshot.data.files import write_text
from unshot.errors import InputError, OutsideError

if TYPE_CHECKING:
    from deploy.registry.evidence import Evidence

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
        self.path = folder / State.FILE

    @property
    def place(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        """Whether there is a registry, empty or not."""
        return self.path.is_file()

    def state(self) -> State:
        """What the registry knows now, empty where there is none yet. Raises `InputError` for a damaged file."""
        try:
            return State.read(self.path) if self.path.exists() else State()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None

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
            return self._change(what)

    def _change(self, what: Callable[[State], T]) -> T:
        """The same for a caller that holds the lock."""
        state = self.state()
        result = what(state)
        write_text(self.path, state.to_json(indent=1) + "\n")
        self._sync()
        return result

    def create(self, *, by: str) -> bool:
        """Make an empty registry; whether there was none."""
        with self._locked():
            if self.exists():
                return False
            self._change(lambda state: None)
            return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / ".lock").open("a+")  # a pipe in its place would block a mere "w"
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror or error})") from None
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
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link; a version's files lie in the registry itself")
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

        def enter(state: State) -> Version:
            state.versions[number] = Version(
                number=number,
                by=who,
                note=note,
                source=str(artifact.resolve()),
                digest=content,
                files={name: facts.bytes for name, facts in manifest.outputs.items()},
                base=manifest.base.name if manifest.base else None,
                task=manifest.task,
                lineage=found.lineage,
                scores=found.scores,
                gates=found.gates,
            )
            state.history.append(
                Event(by=who, action="add", subject=f"v{number}", after=str(artifact.resolve()), why=note)
            )
            return state.versions[number]

        # One addition at a time, its copying included: two of the same artifact end as one version.
        with self._locked():
            versions = self.state().versions
            known = next((v for v in versions.values() if v.digest == content), None)
            if known is not None:
                return self._change(lambda state: renewed(state, known.number, found, who)), False
            number = max([0, *versions, *self._present()]) + 1
            self._take(artifact, manifest.outputs, self.artifact(number), link=link)
            return self._change(enter), True

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
            folder = Path(origin.path)
            if (folder / NAME).is_file() and evidence.digest(folder) == origin.digest:
                fresh[stage] = evidence.gates_of(folder)
        if all(version.gates.get(stage) == gates for stage, gates in fresh.items()):
            return version
        return self.change(lambda state: _replace(state, number, fresh, by))

    def may_move(self, alias: Alias, number: int, waivers: dict[str, Waiver]) -> None:
        """Raise unless a version's gates allow an alias and its files are those that were added."""
        evidence.check(self.state().versions[number], alias, waivers)
        self.verified(number)

    def move(
        self,
        alias: Alias,
        number: int,
        *,
        by: str,
        why: str = "",
        waivers: dict[str, Waiver] | None = None,
    ) -> Event:
        """Point an alias at a version whose gates allow it and whose files are those that were added.

        Raises `GateError` where a gate does not hold, `InputError` where a file is gone or changed.
        """
        given = waivers or {}
        self.may_move(alias, number, given)

        def apply(state: State) -> Event:
            version = state.versions[number]
            evidence.check(version, alias, given)
            version.waivers += given.values()
            before = state.aliases.get(alias)
            if alias == "champion":
                end_rollout(state, "stopped", f"v{number} was promoted by {by}")
                if before != number:
                    state.earlier.append(before)
                if state.aliases.get("challenger") == number:
                    del state.aliases["challenger"]
            state.aliases[alias] = number
            reasons = [why, *(f"{w.gate} waived by {w.by}: {w.reason}" for w in given.values())]
            return _note(state, by, "promote", alias, before, number, "; ".join(filter(None, reasons)))

        return self.change(apply)

    def rollback(self, *, by: str, why: str = "", champion: int | None = None) -> Event:
        """Put the champion before this one back (none, where this was the first).

        `champion` is the one to be taken back, None: the one that is it now. Raises `InputError` where there is nothing
        to take back, or where another change was quicker: two rollbacks at once go back one version, not two.
        """
        expected = champion if champion is not None else self.state().aliases.get("champion")

        def apply(state: State) -> Event:
            before = state.aliases.get("champion")
            if before != expected:
                now = f"v{before}" if before is not None else "none"
                raise InputError(
                    f"the champion is {now} by now, not v{expected}: another change was quicker, nothing was changed"
                )
            if before is None or not state.earlier:
                raise InputError("nothing to roll back: no version was promoted to champion")
            after = state.earlier.pop()
            if after is None:
                del state.aliases["champion"]
            else:
                state.aliases["champion"] = after
            end_rollout(state, "stopped", f"rolled back by {by}")
            return _note(state, by, "rollback", "champion", before, after, why)

        return self.change(apply)

    def set_split(self, percent: float, *, by: str, why: str = "") -> Event:
        """Set the candidate's share, percent. Raises `InputError` for what is none."""
        if not 0 <= percent <= 100:  # also what is not a number
            raise InputError(f"the share is {percent:g}; it must be between 0 and 100 percent")

        def apply(state: State) -> Event:
            end_rollout(state, "stopped", f"the share was set by {by}")
            return note_split(state, percent, by, why)

        return self.change(apply)


def note_split(state: State, percent: float, by: str, why: str) -> Event:
    """Change the share and put it on record."""
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


def end_rollout(state: State, how: RolloutState, why: str) -> None:
    """End a rollout that is under way, on record."""
    if state.rollout is None or state.rollout.state != "running":
        return
    state.rollout.state, state.rollout.why = how, why
    state.history.append(
        Event(
            by=state.rollout.by,
            action="rollout",
            subject=f"v{state.rollout.target}",
            before=f"{state.rollout.steps[state.rollout.step]:g}%",
            after=how,
            why=why,
        )
    )


def _note(
    state: State,
    by: str,
    action: Literal["promote", "rollback"],
    subject: str,
    before: int | None,
    after: int | None,
    why: str,
) -> Event:
    event = Event(
        by=by,
        action=action,
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
    version.scores.tune = found.scores.tune or version.scores.tune
    version.scores.bench = found.scores.bench or version.scores.bench
    return _replace(state, number, found.gates, by)


def _replace(state: State, number: int, gates: dict[str, list[evidence.Gate]], by: str) -> Version:
    version = state.versions[number]
    version.gates.update(gates)
    state.history.append(
        Event(by=by, action="gates", subject=version.name, why=f"gates of {', '.join(gates)} read again")
    )
    return version
