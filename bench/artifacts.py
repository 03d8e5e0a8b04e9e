"""What the manifests beside an artifact say: that its files are as they were written, and which rows it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unshot.contracts.manifest import NAME, Manifest, read_manifest, verify_file
from unshot.errors import InputError

# What `unshot export` writes; a Hugging Face directory is tune's or nobody's.
EXPORTED = ("gguf", "onnx", "genai")


@dataclass(frozen=True)
class HeldOut:
    """The test split of the run that made an artifact, and its task."""

    data: Path
    task: Path


def artifact_manifest(spec: str) -> Manifest | None:
    """The manifest of `unshot export` beside the artifact of a SPEC, None where there is none.

    Raises `InputError` where the artifact's files do not match their hashes.
    """
    kind, _, target = spec.removeprefix("serve:").partition(":")
    path = Path(target)
    if kind not in EXPORTED or not path.exists():
        return None
    folder = path.parent
    if not (folder / NAME).is_file():
        return None
    manifest = read_manifest(folder, stage="export", verify=False)
    for name, facts in manifest.outputs.items():
        if name == path.name or name.startswith(f"{path.name}/"):
            verify_file(folder / name, facts)
    return manifest


def held_out(manifest: Manifest | None) -> HeldOut | None:
    """Where the run behind an exported artifact keeps its test rows; None where it had none or is gone.

    Raises `InputError` where they were changed since.
    """
    run = manifest.run if manifest else None
    if not run or not (Path(run) / NAME).is_file():
        return None
    written = read_manifest(Path(run), stage="tune", verify=False)
    names = ("splits/test.jsonl", "task.json")
    for name in names:
        if name not in written.outputs:
            raise InputError(f"{run}: its manifest lists no {name}; run `unshot tune` again")
        verify_file(Path(run) / name, written.outputs[name])
    return HeldOut(*(Path(run) / name for name in names))
