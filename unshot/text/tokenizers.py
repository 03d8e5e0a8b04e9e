"""Find the counter of a model: its tokenizer on this machine, where the user says, or as an approximation.

Where the tokenizer is not at hand the caller decides: `TokenizerMissing` says how to get it, or `approximate` counts
with a stated error. Nothing is guessed in silence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from unshot.cache import cache_dir
from unshot.errors import InputError
from unshot.text.chat import load_tokenizer
from unshot.text.counters import ApproximateCounter, Counter, OpenAICounter, TemplateCounter, family_of
from unshot.text.encodings import TokenizerMissing, load_encoding, openai_encoding


class Paths(Struct, frozen=True):
    """Where `--tokenizer` says tokenizers are: `model -> path`, and `default` for any open model without one."""

    by_model: dict[str, Path]
    default: Path | None = None
    ranks: Path | None = None

    @classmethod
    def parse(cls, values: Sequence[str]) -> Paths:
        """Read `PATH` or `MODEL=PATH`; a `.tiktoken` path without a model is the API model's."""
        by_model: dict[str, Path] = {}
        default = ranks = None
        for value in values:
            name, separator, rest = value.partition("=")
            path = Path(rest if separator and not Path(value).exists() else value).expanduser()
            if not path.exists():
                raise InputError(
                    f"--tokenizer {value}: no such file or directory; give PATH or MODEL=PATH (a model directory, a "
                    "tokenizer.json, a .gguf or a .tiktoken file)"
                )
            if path != Path(value).expanduser():
                by_model[name] = path
            elif path.suffix == ".tiktoken":
                ranks = path
            else:
                default = path
        return cls(by_model, default, ranks)

    def find(self, model: str, *, api: bool) -> Path | None:
        """The path given for `model`, if any."""
        return self.by_model.get(model) or (self.ranks if api else self.default)


def counter_for(
    model: str,
    *,
    api: bool,
    paths: Paths | None = None,
    approximate: bool = False,
    template: str | None = None,
) -> Counter:
    """The counter of `model`; exact where its tokenizer is at hand, else approximate where that was allowed.

    `template` is another chat template of an open model, as `load_tokenizer` takes it. Raises `TokenizerMissing` with
    the ways out, `InputError` for a tokenizer that cannot be read.
    """
    given = (paths or Paths({})).find(model, api=api)
    try:
        if api:
            return _api_counter(model, given)
        return open_counter(given or _open_model(model), template)
    except TokenizerMissing:
        if not approximate:
            raise
    return approximate_counter(model)


def approximate_counter(model: str) -> ApproximateCounter:
    """A counter that scales cl100k (else the number of bytes) by the family's measured ratio."""
    try:
        encoding = load_encoding("cl100k_base", download=False)
    except TokenizerMissing:
        # 4.6 bytes a cl100k token, 3.8 to 5.5 over the texts of tokenizers.toml.
        return ApproximateCounter(model, lambda text: len(text.encode()) / 4.6, "bytes / 4.6", 0.2)
    return ApproximateCounter(model, lambda text: float(len(encoding.encode_ordinary(text))), "cl100k", 0.0)


def _api_counter(model: str, given: Path | None) -> Counter:
    name = openai_encoding(model)
    if given is not None and given.suffix != ".tiktoken":
        return open_counter(given)
    if name is None:
        if given is not None:
            raise InputError(f"--tokenizer {given}: {model} is not an OpenAI model; give its tokenizer.json")
        raise TokenizerMissing(
            f"{model}: its provider publishes no tokenizer; pass --approximate (error up to "
            f"{family_of(model)[1]['error']:.0%}, stated in the report), or --tokenizer {model}=PATH"
        )
    return OpenAICounter(load_encoding(name, path=given), name)


def open_counter(path: Path, template: str | None = None) -> TemplateCounter:
    """The counter of an open model from its directory, its `tokenizer.json`, or a `.gguf` file."""
    tokenizer = load_tokenizer(path, template)
    file = "vocabulary" if path.suffix == ".gguf" else "tokenizer.json"
    changed = f"; {'; '.join(tokenizer.repairs)}" if tokenizer.repairs else ""
    return TemplateCounter(tokenizer, f"{file} of {tokenizer.where}{changed}")


def _open_model(model: str) -> Path:
    """Where an open model's tokenizer is on this machine."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    from unshot import embedded

    if model == embedded.NAME:
        folder = cache_dir() / f"{embedded.NAME}-v{embedded.CONVERSION}"
        return folder if (folder / "tokenizer.json").is_file() else embedded.gguf_path()
    folder_in_cache = _hub_cache(model)
    if folder_in_cache is not None:
        return folder_in_cache
    raise TokenizerMissing(
        f"{model}: its tokenizer is not on this machine; pass --tokenizer {model}=PATH (its model directory, "
        "tokenizer.json or .gguf), or --approximate (error up to "
        f"{family_of(model)[1]['error']:.0%}, stated in the report)"
    )


def _hub_cache(model: str) -> Path | None:
    """A model directory in the local Hugging Face cache, by hub name or by catalog name; never the network."""
    repo = model if model.count("/") == 1 else _catalog_repo(model)
    if repo is None:
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = hub / f"models--{repo.replace('/', '--')}" / "snapshots"
    found = [p.parent for p in snapshots.glob("*/tokenizer.json")] if snapshots.is_dir() else []
    return max(found, key=lambda p: p.stat().st_mtime) if found else None


def _catalog_repo(model: str) -> str | None:
    from unshot.catalog import models

    entry = models().get(model.lower())
    return entry.repo if entry else None
