"""Gates: the yes-or-no answers that stages leave in their manifests and that a promotion asks for.

A stage writes its gates into `manifest.json`. What comes after the directory was closed (a human
review, a bench run) is appended to `gates.jsonl` beside the manifest, which is not among the hashed files; the newest
line of a name counts.
"""

from __future__ import annotations

from pathlib import Path

from unshot.contracts.manifest import Gate as Gate
from unshot.contracts.manifest import read_manifest
from unshot.contracts.record import RecordError
from unshot.data.files import append_after
from unshot.errors import InputError

LATER = "gates.jsonl"


def read_gates(directory: Path) -> dict[str, Gate]:
    """The gates of a stage's directory by name, later ones over those of its manifest; `InputError` for a bad file."""
    manifest = read_manifest(directory, verify=False)
    found: dict[str, Gate] = {gate.name: gate for gate in manifest.gates}
    later = directory / LATER
    try:
        if later.is_file():
            for line in later.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    gate = Gate.from_json(line)
                    found[gate.name] = gate
    except (RecordError, UnicodeDecodeError) as error:
        raise InputError(
            f"{directory}: its gates cannot be read ({error}); {LATER} or the manifest was changed by hand"
        ) from None
    return found


def add_gate(directory: Path, gate: Gate) -> None:
    """Append `gate` to a finished stage's directory, flushed to the disk before this returns."""
    read_manifest(directory, verify=False)
    append_after(directory / LATER, lambda _: gate.to_json())
