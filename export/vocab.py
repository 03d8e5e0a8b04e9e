"""The tokenizer as GGUF metadata: tokens, types, scores, merges, pre-tokenizer, special ids, chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unshot.errors import InputError
from unshot.text import gguf as patterns

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What splits text before BPE -> llama.cpp's name for it (llama-vocab.cpp). The gate then proves it on strings.
PRE = {
    ("digits", "bytes+words"): "smollm",
    ("bytes+words",): "gpt-2",
    (patterns.LLAMA3, "bytes"): "llama-bpe",
    (patterns.QWEN2, "bytes"): "qwen2",
    (patterns.GPT4O, "bytes"): "gpt-4o",
    (patterns.TEKKEN, "bytes"): "tekken",
}


@dataclass
class Vocabulary:
    """Tokens by id with their types; `scores` only for SentencePiece, `merges` only for byte-level BPE."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a model directory, padded to `size` ids; `InputError` for a kind that GGUF cannot hold."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(
            f"{path}: the tokenizer is {model.get('type')}; export writes BPE and SentencePiece ones"
        )
    if model.get("byte_fallback"):
        from export.sentencepiece import read_pieces

        return read_pieces(folder, data, size)
    tokens, types = base_tokens(path, data, size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary(
        "gpt2", pre_tokenizer(path, data), tokens, types, merges=merges, space_prefix=_prefix(folder)
    )


def base_tokens(path: Path, data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and types by id: added special ones are control tokens, other added ones user-defined."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for text, number in data["model"]["vocab"].items():
        _set(path, tokens, types, number, text, NORMAL)
    for added in data.get("added_tokens", []):
        special = added.get("special") or looks_special(added["content"])
        text = added["content"] if special else added["content"].replace("\u2581", " ")
        _set(path, tokens, types, added["id"], text, CONTROL if special else USER_DEFINED)
    return tokens, types


def _set(path: Path, tokens: list[str], types: list[int], number: int, text: str, kind: int) -> None:
    if number >= len(tokens):
        raise InputError(
            f"{path}: token {text!r} has id {number}, but the model has only {len(tokens)} rows in its embedding"
        )
    tokens[number], types[number] = text, kind


def looks_special(text: str) -> bool:
    """Tokens that some models forgot to mark as special; llama.cpp's converter makes them control tokens too."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def pre_tokenizer(path: Path, data: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in `tokenizer.json`."""
    found = data.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found]) if found else []
    signature = tuple(_part(part) for part in parts)
    if signature in PRE:
        return PRE[signature]
    raise InputError(
        f"{path}: pre-tokenizer {' + '.join(s[:60] for s in signature) or 'none'} has no name in llama.cpp that is "
        f"known here; known: {', '.join(sorted(PRE.values()))}"
    )


def _part(part: dict[str, Any]) -> str:
    kind = part.get("type")
    if kind == "ByteLevel":
        return "bytes+words" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split":
        pattern = part.get("pattern", {})
        return str(pattern.get("Regex") or pattern.get("String"))
    return str(kind)


def _prefix(folder: Path) -> bool | None:
    path = folder / "tokenizer_config.json"
    value = json.loads(path.read_text(encoding="utf-8")).get("add_prefix_space") if path.is_file() else None
    return None if value is None else bool(value)


def add_vocabulary(writer: Any, vocabulary: Vocabulary, folder: Path, template: str | None) -> None:
    """Put a vocabulary, its special ids and the chat template into a GGUF writer."""
    import gguf

    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    special = gguf.SpecialVocab(folder, load_merges=False, n_vocab=len(vocabulary.tokens))
    special.chat_template = template
    special.add_to_gguf(writer)
