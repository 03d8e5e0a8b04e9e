"""The tokenizer as GGUF metadata: tokens, types, scores, merges, pre-tokenizer, special ids, chat template.

Byte-level BPE comes from `tokenizer.json`, SentencePiece (Llama 2, Mistral, Gemma, Phi-3) from `tokenizer.model` or
from a byte-fallback `tokenizer.json`. `tokenizer.model` is a protobuf message (sentencepiece_model.proto, ModelProto);
only the pieces are needed, so it is read here without the sentencepiece package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from unshot.data.files import optional_object
from unshot.errors import InputError
from unshot.text import gguf as patterns


class NotStreamed(InputError):
    """The model is outside what is streamed into GGUF here; llama.cpp's own converter may still write it."""


class AddedToken(TypedDict, total=False):
    """One entry of `added_tokens` in `tokenizer.json`."""

    id: int
    content: str
    special: bool


class BpeModel(TypedDict, total=False):
    """The `model` of `tokenizer.json`: `vocab` maps a text to its id, a merge is a pair or two texts with a space."""

    type: str
    vocab: dict[str, int]
    merges: list[str | list[str]]
    byte_fallback: bool
    unk_token: str | None


class Step(TypedDict, total=False):
    """A normalizer or pre-tokenizer of `tokenizer.json`."""

    type: str
    use_regex: bool
    individual_digits: bool
    pattern: dict[str, str]
    pretokenizers: list[Step]


class TokenizerFile(TypedDict, total=False):
    """The parts of `tokenizer.json` that a vocabulary is made of."""

    model: BpeModel
    added_tokens: list[AddedToken]
    normalizer: Step | None
    pre_tokenizer: Step | None


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# ModelProto.SentencePiece.Type -> GGUF token type: the numbers are the same.
TYPES = {1: NORMAL, 2: UNKNOWN, 3: CONTROL, 4: USER_DEFINED, 5: UNUSED, 6: BYTE}
# What llama.cpp's converter gives to ids without a piece, and to added tokens.
NO_PIECE, ADDED = -10000.0, -1000.0

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
    data: TokenizerFile = json.loads(path.read_text(encoding="utf-8"))
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise NotStreamed(
            f"{path}: the tokenizer is {model.get('type')}; the streamed GGUF holds BPE and SentencePiece ones"
        )
    if model.get("byte_fallback"):
        return read_pieces(folder, data, size)
    tokens, types = base_tokens(path, data, size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary(
        "gpt2", pre_tokenizer(path, data), tokens, types, merges=merges, space_prefix=_prefix(folder)
    )


def base_tokens(path: Path, data: TokenizerFile, size: int) -> tuple[list[str], list[int]]:
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


def pre_tokenizer(path: Path, data: TokenizerFile) -> str:
    """llama.cpp's name of the pre-tokenizer in `tokenizer.json`."""
    found: Step = data.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found]) if found else []
    signature = tuple(_part(part) for part in parts)
    if signature in PRE:
        return PRE[signature]
    raise NotStreamed(
        f"{path}: pre-tokenizer {' + '.join(s[:60] for s in signature) or 'none'} has no name in llama.cpp that is "
        f"known here; known: {', '.join(sorted(PRE.values()))}"
    )


def _part(part: Step) -> str:
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
    value = optional_object(path).get("add_prefix_space")
    return None if value is None else bool(value)


def read_pieces(folder: Path, data: TokenizerFile, size: int) -> Vocabulary:
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


def space_prefix(data: TokenizerFile) -> bool:
    """Whether the tokenizer puts a space before the text: a Prepend normalizer, or Metaspace's prepend scheme."""
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    if '"Prepend"' in text:
        return True
    return '"Metaspace"' in text and '"prepend_scheme": "never"' not in text


def json_pieces(data: TokenizerFile) -> list[tuple[str, float, int]]:
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


def add_vocabulary(
    writer: Any,
    vocabulary: Vocabulary,
    folder: Path,
    template: str | None,
    ends: Sequence[int] = (),
) -> None:
    """Put a vocabulary, its special ids and the chat template into a GGUF writer.

    `ends` are the tokens that end an answer, the template's end of turn first: those beside eos go where llama.cpp
    looks for more of them (`eot`, `eom`), for it knows only a few by their text. Whether a server puts a token before
    the prompt or after it is always written, and it never does: the chat template's text is the whole prompt, as the
    model was tuned, and llama.cpp's own defaults differ by pre-tokenizer.
    """
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
    special.add_special_token = {"bos": False, "eos": False}
    ids = special.special_token_ids
    if ends:
        ids.setdefault("eos", ends[0])
    more = [token for token in dict.fromkeys(ends) if token != ids.get("eos")]
    ids.update(zip(("eot", "eom"), more, strict=False))
    special.add_to_gguf(writer)
