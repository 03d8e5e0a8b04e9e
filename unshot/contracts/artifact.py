"""What lies beside an exported file: the manifest with the task it was tuned for, and the run's rows it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unshot.contracts.manifest import NAME, Manifest, read_manifest, sha256, verify_file
from unshot.errors import InputError

# What `unshot export` writes; a Hugging Face directory is tune's or nobody's.
EXPORTED = ("gguf", "onnx", "genai")


@dataclass(frozen=True)
class Artifact:
    """A directory of `unshot export` with its manifest."""

    folder: Path
    manifest: Manifest

    def made_from(self, run: Path) -> bool | None:
        """Whether it was made from a run as that is now, by its manifest's hash; None where none is recorded.

        A run that was tuned again has another manifest, and other test rows.
        """
        known = {item.sha256 for item in self.manifest.inputs if Path(item.path).name == NAME}
        return sha256(run / NAME) in known if known else None

    def run(self) -> Path | None:
        """The run that it was made from: where it was, else beside the artifact; None where it is gone or another."""
        recorded = self.manifest.run
        if recorded is None:
            return None
        for place in (Path(recorded), self.folder.absolute().parent / Path(recorded).name):
            if (place / NAME).is_file() and self.made_from(place) is not False:
                return place
        return None

    def held_out(self) -> HeldOut | None:
        """Where the run behind it keeps its test rows; None without one.

        Raises `InputError` where they were changed since.
        """
        run = self.run()
        if run is None:
            return None
        written = read_manifest(run, stage="tune", verify=False)
        for name in ("splits/test.jsonl", "task.json"):
            if name not in written.outputs:
                raise InputError(f"{run}: its manifest lists no {name}; run `unshot tune` again")
            verify_file(run / name, written.outputs[name])
        return HeldOut(run / "splits" / "test.jsonl", run / "task.json")


@dataclass(frozen=True)
class HeldOut:
    """The test split of the run that made an artifact, and its task."""

    data: Path
    task: Path


def artifact_of(spec: str, *, verify: bool = True) -> Artifact | None:
    """The artifact that the file of a SPEC belongs to, None where it is none of `unshot export`'s.

    Raises `InputError` where, with `verify`, the file does not match its hash.
    """
    kind, _, target = spec.removeprefix("serve:").partition(":")
    path = Path(target).expanduser()
    if kind not in EXPORTED or not path.exists() or not (path.parent / NAME).is_file():
        return None
    manifest = read_manifest(path.parent, stage="export", verify=False)
    for name, facts in manifest.outputs.items():
        if verify and (name == path.name or name.startswith(f"{path.name}/")):
            verify_file(path.parent / name, facts)
    return Artifact(path.parent, manifest)
