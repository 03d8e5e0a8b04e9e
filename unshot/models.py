"""Where a base model comes from: a local directory, the embedded default, or a hub name. safetensors only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot import catalog, embedded
from unshot.console import Output
from unshot.contracts.manifest import BaseModel, sha256
from unshot.data.files import optional_object, read_object
from unshot.errors import InputError, OutsideError, nearest

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A base model on disk, in the Hugging Face layout."""

    name: str
    path: Path
    license: str | None = None

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return read_object(self.path / "config.json", advice="; copy the file again")

    def weight_files(self) -> list[Path]:
        """The safetensors files that belong to the model, in name order.

        The index decides; without one it is `model.safetensors`, else every file but Mistral's consolidated copy.
        Raises `InputError` for a shard that the index names and that is missing, and where two sets of weights lie
        there.
        """
        index, whole = self.path / INDEX, self.path / "model.safetensors"
        there = sorted(self.path.glob("*.safetensors"))
        if os.path.lexists(index):
            names = _index_files(index)
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise InputError(
                    f"{self.path}: {missing[0]} is missing ({len(missing)} of the {len(names)} files that {INDEX} "
                    "names); copy or download it again"
                )
            if whole in there and whole.name not in names:
                raise InputError(
                    f"{whole}: lies beside {INDEX}, which does not name it; remove the one that is stale, since "
                    "libraries differ in which they load"
                )
            return [self.path / name for name in names]
        if whole in there:
            return [whole]
        own = [f for f in there if not f.name.startswith(("consolidated", "adapter"))]
        if there and not own:
            raise InputError(
                f"{self.path}: {there[0].name} is no Hugging Face model (Mistral's own layout, or an adapter alone); "
                "give the directory with model*.safetensors"
            )
        return _whole_set(own)

    def stray_files(self) -> list[str]:
        """Names of safetensors files that lie in the directory and are not part of the model."""
        own = set(self.weight_files())
        return [f.name for f in sorted(self.path.glob("*.safetensors")) if f not in own]

    def fingerprint(self) -> BaseModel:
        """What a manifest records: name, path, and the SHA-256 of each weight file and the tokenizer."""
        files = [*self.weight_files(), self.path / "tokenizer.json", self.path / "config.json"]
        hashes = {f.name: sha256(f) for f in files if f.is_file()}
        return BaseModel(self.name, str(self.path), self.license, hashes)


def _index_files(index: Path) -> list[str]:
    """The files that an index names, sorted; `InputError` where it is none."""
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not an index of weights ({error}); copy or download it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: names the file `{name}`, which is outside the directory")
    return names


def _whole_set(files: list[Path]) -> list[Path]:
    """The files as they are; `InputError` where numbered shards do not make a whole set."""
    numbers = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", f.name) for f in files]
    totals = {(n[1], int(n[3])) for n in numbers if n}
    if len(totals) > 1 or (totals and not all(numbers)):
        raise InputError(
            f"{files[0].parent}: several sets of weights lie there ({', '.join(f.name for f in files[:4])}), and no "
            f"{INDEX} says which belong together; keep one set"
        )
    for stem, total in totals:
        have = {int(n[2]) for n in numbers if n}
        missing = sorted(set(range(1, total + 1)) - have)
        if missing:
            raise InputError(
                f"{files[0].parent}: {stem}-{missing[0]:05d}-of-{total:05d}.safetensors is missing ({len(missing)} of "
                f"{total} shards); copy or download it again"
            )
    return files


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
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json there; give a Hugging Face model directory")
    if not (path / "tokenizer.json").is_file():
        raise InputError(f"{path}: no tokenizer.json there; {_make_tokenizer(path)}")
    source = Source(path.name, path.resolve())
    source.config()
    # Read late, when a run has cost its hours; refused here.
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        optional_object(path / name, advice="; mend it or copy the model again")
    if need_weights and not source.weight_files():
        other = (
            "; pickled weights (*.bin) are not loaded, convert them to safetensors"
            if any(path.glob("*.bin"))
            else ""
        )
        raise InputError(f"{path}: no *.safetensors there{other}")
    return source


def _make_tokenizer(path: Path) -> str:
    """How to get a `tokenizer.json`, from what the directory holds."""
    others = [n for n in ("tokenizer.model", "vocab.json", "spiece.model") if (path / n).is_file()]
    if not others:
        return "give a Hugging Face model directory with its tokenizer"
    return (
        f'make one from {others[0]} with `python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{path}').save_pretrained('{path}')\"` (needs `pip install sentencepiece protobuf`)"
    )


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


def attention_of(config: Mapping[str, Any]) -> str | None:
    """The attention that a model must be loaded with, None where transformers' own choice is right.

    torch's fused attention leaves out a soft cap on the attention logits (Gemma 2), so that such a model would compute
    something else; only the plain implementation has it.
    """
    return "eager" if config.get("attn_logit_softcapping") else None
