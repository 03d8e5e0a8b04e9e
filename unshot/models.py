"""Where a base model comes from: a local directory, the embedded default, or a hub name. safetensors only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot import catalog, embedded
from unshot.console import Output
from unshot.contracts.manifest import BaseModel, sha256
from unshot.errors import InputError, OutsideError, nearest


@dataclass(frozen=True)
class Source:
    """A base model on disk, in the Hugging Face layout."""

    name: str
    path: Path
    license: str | None = None

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        loaded: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return loaded

    def weight_files(self) -> list[Path]:
        """The safetensors files, in name order."""
        return sorted(self.path.glob("*.safetensors"))

    def fingerprint(self) -> BaseModel:
        """What a manifest records: name, path, and the SHA-256 of each weight file and the tokenizer."""
        files = [*self.weight_files(), self.path / "tokenizer.json", self.path / "config.json"]
        hashes = {f.name: sha256(f) for f in files if f.is_file()}
        return BaseModel(self.name, str(self.path), self.license, hashes)


def resolve(name: str | Path, out: Output | None = None, *, need_weights: bool = True) -> Source:
    """Find a base model by directory, embedded name, hub name (`org/model`) or the catalog's name of one.

    Raises `InputError` for something that is no model, `OutsideError` where the hub cannot be reached.
    """
    text = str(name)
    if text == embedded.NAME:
        return Source(embedded.NAME, embedded.ensure(out), embedded.LICENSE)
    path = Path(text)
    if path.exists() or text.startswith((".", "/", "~")):
        return _local(path.expanduser(), need_weights)
    if text.count("/") == 1:
        return _hub(text, need_weights)
    try:
        repository = catalog.model(text).repo
    except InputError:
        known = [embedded.NAME, *catalog.models()]
        raise InputError(
            f"unknown model '{text}': no such directory, no hub name (org/model), and not in the catalog; "
            f"{nearest(text, known)}"
        ) from None
    if out is not None:
        out.log(f"{text}: {repository} on the model hub")
    return _hub(repository, need_weights)


def _local(path: Path, need_weights: bool) -> Source:
    if path.is_file():
        raise InputError(
            f"{path}: is a file; give the model's directory (config.json, *.safetensors, tokenizer.json)"
        )
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a model directory or `{embedded.NAME}`")
    for needed in ("config.json", "tokenizer.json"):
        if not (path / needed).is_file():
            raise InputError(f"{path}: no {needed} there; give a Hugging Face model directory")
    source = Source(path.name, path.resolve())
    try:
        source.config()
    except ValueError as error:
        raise InputError(f"{path / 'config.json'}: not valid JSON ({error})") from None
    if need_weights and not source.weight_files():
        other = (
            "; pickled weights (*.bin) are not loaded, convert them to safetensors"
            if any(path.glob("*.bin"))
            else ""
        )
        raise InputError(f"{path}: no *.safetensors there{other}")
    return source


def _hub(name: str, need_weights: bool) -> Source:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise OutsideError(
            f"{name}: hub names need huggingface_hub; run `pip install 'unshot[tune]'`"
        ) from None
    patterns = ["*.json", "*.jinja", "tokenizer*", *(["*.safetensors"] if need_weights else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:120]
        raise OutsideError(
            f"{name}: could not be had from the model hub ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a local directory"
        ) from None
    return Source(name, _local(folder, need_weights).path)
