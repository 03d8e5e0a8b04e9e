"""SentencePiece vocabularies (Llama 2, Mistral, Gemma, Phi-3): from `tokenizer.model`, or from `tokenizer.json`.

`tokenizer.model` is a protobuf message (sentencepiece_model.proto, ModelProto); only the pieces are needed, so it is
read here without the sentencepiece package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary, looks_special
from unshot.errors import InputError

# ModelProto.SentencePiece.Type -> GGUF token type: the numbers are the same.
TYPES = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: UNUSED, 6: BYTE}
# What llama.cpp's converter gives to ids without a piece, and to added tokens.
NO_PIECE, ADDED = -10000.0, -1000.0


def read_pieces(folder: Path, data: dict[str, Any], size: int) -> Vocabulary:
    """The vocabulary of a byte-fallback BPE tokenizer, padded to `size` ids."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types, scores = [UNUSED] * size, [NO_PIECE] * size
    path = folder / "tokenizer.model"
    pieces = proto_pieces(path) if path.is_file() else json_pieces(data)
    for number, (text, score, kind) in enumerate(pieces):
        if number >= size:
            raise InputError(
                f"{path}: {number + 1} pieces, but the model has only {size} rows in its embedding"
            )
        tokens[number], scores[number], types[number] = text, score, kind
    for added in data.get("added_tokens", []):
        number, text = added["id"], added["content"]
        if number >= size:
            raise InputError(
                f"{folder / 'tokenizer.json'}: token {text!r} has id {number}, beyond the model's {size} rows"
            )
        special = added.get("special") or looks_special(text)
        tokens[number] = text if special else text.replace("\u2581", " ")
        types[number], scores[number] = CONTROL if special else USER_DEFINED, ADDED
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=space_prefix(data))


def space_prefix(data: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before the text: a Prepend normalizer, or Metaspace's prepend scheme."""
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    if '"Prepend"' in text:
        return True
    return '"Metaspace"' in text and '"prepend_scheme": "never"' not in text


def json_pieces(data: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Pieces from `tokenizer.json`: a token's score is less the later its first merge comes, as SentencePiece's is."""
    model = data["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"], start=1):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        ranks.setdefault(left + right, rank)
    last = len(model["merges"]) + 1
    pieces: list[tuple[str, float, int]] = [("", NO_PIECE, UNUSED)] * (max(model["vocab"].values()) + 1)
    for text, number in model["vocab"].items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = BYTE
        else:
            kind = UNKNOWN if text == model.get("unk_token") else NORMAL
        pieces[number] = (text, 0.0 if kind in (BYTE, UNKNOWN) else -float(ranks.get(text, last)), kind)
    return pieces


def proto_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Text, score and type of every piece in `tokenizer.model`; `InputError` for a damaged file."""
    data = path.read_bytes()
    try:
        return [_piece(value) for number, value in _fields(data) if number == 1]
    except (IndexError, struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged SentencePiece model ({error}); copy or download it again"
        ) from None


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = TYPES[value]
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and raw values of one protobuf message (wire types 0, 1, 2 and 5)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("truncated")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
