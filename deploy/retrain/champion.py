"""What is to be beaten: a tuned run with its exported files, by registry version or by directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.contracts.manifest import Manifest, read_manifest
from unshot.contracts.task import Task, read_task
from unshot.errors import InputError

# The schema of the champion's answers, beside the case file that is made of it.
SCHEMA = "answer.schema.json"


@dataclass(frozen=True)
class Champion:
    """A run of `unshot tune`, what it was tuned with, and the directory of its exported files where there is one."""

    name: str
    run: Path
    manifest: Manifest
    task: Task
    artifact: Path | None

    @property
    def sealed(self) -> Path:
        """The test rows that it was never tuned on."""
        return self.run / "splits" / "test.jsonl"

    @property
    def base(self) -> str:
        """The base model as `unshot tune --base` takes it: the directory it was in where that is still there."""
        if self.manifest.base is None:
            raise InputError(f"{self.run}: no record of its base; run `unshot tune` again")
        return self.manifest.base.location()

    def case_text(self, target: float | None) -> str:
        """A case file with its task and its settings, so that the next run differs by its rows alone."""
        # The file's version and what the data says are no keys of a case; the schema is a file beside it.
        own = ("version", "max_answer_tokens", "answer_schema", "embedder")
        task = {k: v for k, v in self.task.plain().items() if k not in own}
        task["answer_schema"] = SCHEMA if self.task.answer_schema is not None else None
        sections = {
            "task": {**task, "system": self.task.instruction, "target": target},
            "candidate": {"model": self.base},
            "tune": self.manifest.tune.plain() if self.manifest.tune else {},
        }
        lines = [f"# Written by `unshot deploy retrain`: what {self.name} was tuned with."]
        for name, values in sections.items():
            lines.append(f"\n[{name}]")
            lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"

    def score(self) -> tuple[str, float]:
        """The metric and the score of its sealed test, as `unshot tune` read it."""
        if self.manifest.score is None:
            raise InputError(f"{self.run}: no score of its sealed test; run `unshot tune` again")
        return self.manifest.score.metric, self.manifest.score.score


def _toml(value: Any) -> str:
    """A value as TOML: JSON's texts, numbers, truths and lists are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def find_champion(text: str, store: Path, tracking: str | None) -> Champion:
    """A run directory, or a version of the registry with the run it came from. Raises `InputError`."""
    folder = Path(text)
    artifact: Path | None = None
    if folder.is_dir():
        name = text
    else:
        from deploy.registry.locate import open_registry

        found = open_registry(store, tracking=tracking)
        version = found.state().find(text)
        name, artifact = version.name, found.artifact(version.number)
        where = version.lineage["tune"].path if "tune" in version.lineage else None
        if where is None or not Path(where).is_dir():
            raise InputError(
                f"{text}: the run it was exported from is gone ({where or 'not recorded'}), and its test rows with it; "
                "give the run's directory as --champion"
            )
        folder = Path(where)
    manifest = read_manifest(folder, stage="tune")
    return Champion(name, folder, manifest, read_task(folder / "task.json"), artifact)
