"""Which registry a command line means: a directory, or MLflow with the directory as the cache of its files."""

from __future__ import annotations

from pathlib import Path

from deploy.registry.store import Registry
from unshot.errors import InputError

DEFAULT = Path("unshot-registry")


def open_registry(folder: Path | None, *, tracking: str | None = None, must_exist: bool = True) -> Registry:
    """The store at `folder`, or the one in MLflow at `tracking` with `folder` as the cache of its files.

    Raises `InputError` where there is none and there must be one, `OutsideError` where MLflow is not installed.
    """
    if tracking:
        from deploy.registry.mlflow import MlflowRegistry

        return MlflowRegistry(folder or DEFAULT, tracking)
    registry = Registry(folder or DEFAULT)
    if must_exist and not registry.exists():
        raise InputError(
            f"{registry.folder}: no registry there; `unshot deploy registry add` makes one with its first version, "
            "`unshot deploy registry init` an empty one"
        )
    return registry
