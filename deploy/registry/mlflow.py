"""The registry in MLflow's model registry: versions are model versions, aliases are its aliases.

The registered model has the name of the store directory, which caches the files. What MLflow has no place for (gates,
lineage, history, the champions before) is in tags. MLflow has no transaction over several of them: the aliases, which
decide what is served, are written last and each in one step.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from msgspec import field

from deploy.registry.store import Registry
from unshot.contracts.manifest import FileFacts, staged
from unshot.contracts.record import Record, RecordError
from unshot.contracts.registry import ALIASES, Event, Percent, Rollout, State, Version, upgraded_version
from unshot.errors import InputError, OutsideError

PREFIX = "unshot."
FRESH = 2.0
T = TypeVar("T")


class Rest(Record):
    """What the registered model's own tag holds: the state that MLflow has no place for."""

    earlier: list[int | None] = field(default_factory=list)
    split: Percent | None = None
    rollout: Rollout | None = None
    # What older unshots put into the same tag, always empty there.
    format: int | None = None
    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)


class MlflowRegistry(Registry):
    """`folder` caches artifacts and holds the lock among processes of this machine."""

    def __init__(self, folder: Path, tracking: str) -> None:
        super().__init__(folder)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise OutsideError(
                f"--mlflow needs MLflow ({error}); run `pip install 'unshot[mlflow]'`"
            ) from None
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.tracking = tracking
        self.name = folder.resolve().name
        self._error = MlflowException
        with self._outside():
            self._client: Any = MlflowClient(tracking_uri=tracking, registry_uri=tracking)
        self._sources: dict[int, tuple[str, str]] = {}
        self._stamp: object = None
        self._stamped = 0.0
        self._refreshing: threading.Thread | None = None

    @property
    def place(self) -> str:
        return f"{self.name} in {self.tracking}"

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise OutsideError(f"MLflow at {self.tracking}: {str(error)[:300]}") from None

    def _model(self) -> Any:
        """The registered model, None where there is none yet."""
        try:
            return self._client.get_registered_model(self.name)
        except self._error as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def state(self) -> State:
        with self._outside():
            model = self._model()
            if model is None:
                return State()
            found = self._client.search_model_versions(f"name='{self.name}'")
        tags = model.tags
        state = State()
        for item in found:
            if text := item.tags.get(f"{PREFIX}version"):
                state.versions[int(item.version)] = self._version(text, item.version)
        state.aliases = {
            a: int(model.aliases[a])
            for a in ALIASES
            if a in model.aliases and int(model.aliases[a]) in state.versions
        }
        where = f"MLflow, {self.name}"
        try:
            for key in sorted(k for k in tags if k.startswith(f"{PREFIX}history.")):
                state.history.append(Event.from_json(tags[key]))
            rest = Rest.from_json(tags.get(f"{PREFIX}rest") or "{}")
        except RecordError as error:
            raise InputError(f"{where}: a tag of the registry was changed ({error})") from None
        state.earlier, state.split, state.rollout = rest.earlier, rest.split, rest.rollout
        return state

    def _version(self, text: str, number: str) -> Version:
        """A version's tag; one of an older unshot is read in its form."""
        try:
            return Version.of(upgraded_version(json.loads(text)))
        except (RecordError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"MLflow, {self.name} v{number}: its tag was changed ({error})") from None

    def stamp(self) -> object:
        """As of some two seconds ago: MLflow is asked beside, never while an answer waits."""
        idle = self._refreshing is None or not self._refreshing.is_alive()
        if idle and time.monotonic() - self._stamped > FRESH:
            self._refreshing = threading.Thread(target=self._refresh, daemon=True)
            self._refreshing.start()
            if self._stamp is None:
                self._refreshing.join(timeout=30)
        return self._stamp

    def _refresh(self) -> None:
        with contextlib.suppress(Exception):  # MLflow away: what is served stays
            model = self._model()
            if model is not None:
                self._stamp = (tuple(sorted(model.aliases.items())), tuple(sorted(model.tags.items())))
        self._stamped = time.monotonic()

    def exists(self) -> bool:
        with self._outside():
            return self._model() is not None

    def _change(self, what: Callable[[State], T]) -> T:
        before = self.state()
        after = copy.deepcopy(before)
        result = what(after)
        with self._outside():
            self._write(before, after)
        return result

    def _write(self, before: State, after: State) -> None:
        client, name = self._client, self.name
        if self._model() is None:
            client.create_registered_model(name)
        for number, version in after.versions.items():
            if before.versions.get(number) != version:
                if number not in before.versions:
                    self._create(number, version)
                tag = version.to_json()
                client.set_model_version_tag(name, str(number), f"{PREFIX}version", tag)
                for gate, (passed, _) in version.verdicts().items():
                    client.set_model_version_tag(name, str(number), f"{PREFIX}gate.{gate}", str(passed))
        for number in range(len(before.history), len(after.history)):
            key = f"{PREFIX}history.{number:06d}"
            client.set_registered_model_tag(name, key, after.history[number].to_json())
        rest = Rest(earlier=after.earlier, split=after.split, rollout=after.rollout)
        client.set_registered_model_tag(name, f"{PREFIX}rest", rest.to_json())
        for alias in ALIASES:
            held = after.aliases.get(alias)
            if held != before.aliases.get(alias):
                if held is None:
                    client.delete_registered_model_alias(name, alias)
                else:
                    client.set_registered_model_alias(name, alias, str(held))

    def _present(self) -> Iterator[int]:
        """MLflow numbers the versions, whatever lies in the cache."""
        return iter(())

    def _create(self, number: int, version: Version) -> None:
        """Make the model version; the number is MLflow's to give."""
        source, run = self._sources[number]
        made = self._client.create_model_version(self.name, source, run_id=run, description=version.note)
        if int(made.version) != number:
            self._client.delete_model_version(self.name, made.version)
            raise OutsideError(
                f"MLflow gave number {made.version} where {number} was due: another machine added one; try again"
            )

    def _take(self, source: Path, names: Mapping[str, FileFacts], target: Path, *, link: bool) -> None:
        """Into the cache, and up to MLflow as a run's artifacts."""
        shutil.rmtree(target, ignore_errors=True)  # of an addition that was broken off
        super()._take(source, names, target, link=link)
        with self._outside():
            experiment = self._client.get_experiment_by_name("unshot")
            number = (
                experiment.experiment_id
                if experiment is not None
                else self._client.create_experiment("unshot")
            )
            run = self._client.create_run(number, run_name=f"{self.name} {target.name}").info.run_id
            self._client.log_artifacts(run, str(target), "artifact")
            self._client.set_terminated(run)
        self._sources[int(target.name[1:])] = (f"runs:/{run}/artifact", run)

    def artifact(self, number: int) -> Path:
        """The cached directory, fetched from MLflow where this machine has none."""
        folder = super().artifact(number)
        if folder.is_dir():
            return folder
        with self._outside():
            if self._model() is None or number not in self.state().versions:
                return folder
            source = self._client.get_model_version(self.name, str(number))
            with staged(folder) as work:
                self._client.download_artifacts(source.run_id, "artifact", str(work))
                for path in list((work / "artifact").iterdir()):
                    path.rename(work / path.name)
                (work / "artifact").rmdir()
        return folder
