"""A GGUF file's metadata, vocabulary, chat template and tensors.

Read here and not by the `gguf` package's reader, which takes seconds for a vocabulary of 50,000 tokens.

Format: GGUF v2/v3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (header, then typed key-value pairs).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unshot.errors import InputError, OutsideError
from unshot.text.template import Template

if TYPE_CHECKING:
    import numpy as np

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED = 3, 4

# Pre-tokenizer regexes by `tokenizer.ggml.pre`, from llama.cpp src/llama-vocab.cpp (llm_tokenizer_bpe).
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "gpt-2": GPT2,
    "tekken": TEKKEN,
    "gpt-4o": GPT4O,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: its shape as the file has it (fastest dimension first), ggml type, place in bytes."""

    path: Path
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def type_name(self) -> str:
        """The ggml type's name, such as `Q8_0`."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.kind).name

    def rows(self) -> np.ndarray:
        """The encoded rows, memory-mapped: uint8, (rows, bytes of a row)."""
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        row = self.shape[0] // block * size
        count = int(np.prod(self.shape[1:], dtype=np.int64))
        try:
            return np.memmap(self.path, np.uint8, "r", self.offset, (count, row))
        except ValueError:
            raise InputError(
                f"{self.path}: the file ends before the tensor at byte {self.offset} does"
            ) from None

    def values(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The decoded rows from `begin` to `end`: fp32, (rows, values of a row)."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = np.ascontiguousarray(self.rows()[begin:end])
        return dequantize(rows, GGMLQuantizationType(self.kind)).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Contents:
    """A GGUF file's key-value pairs, the bytes that each takes (type and value), and its tensors by name."""

    fields: dict[str, Any]
    raw: dict[str, bytes]
    tensors: dict[str, Tensor]


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file. Raises `InputError` where it is not one, or is cut short."""
    return read(path, tensors=False).fields


def read(path: Path, *, tensors: bool = True) -> Contents:
    """What a GGUF file holds; `tensors` False reads no further than its metadata.

    Raises `InputError` where it is not one, or is cut short.
    """
    try:
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file")
            version, n_tensors, count = struct.unpack("<IQQ", handle.read(20))
            if version not in (2, 3):
                raise InputError(f"{path}: GGUF version {version}; versions 2 and 3 are read")
            fields, spans = {}, {}
            for _ in range(count):
                name, begin = _string(handle), handle.tell()
                fields[name] = _value(handle, struct.unpack("<I", handle.read(4))[0])
                spans[name] = (begin, handle.tell())
            if not tensors:
                return Contents(fields, {}, {})
            found = dict(_tensor(handle, path) for _ in range(n_tensors))
            alignment = fields.get("general.alignment", 32)
            start = -(-handle.tell() // alignment) * alignment
            raw = {name: _bytes(handle, *span) for name, span in spans.items()}
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError, RecursionError):
        raise InputError(f"{path}: the GGUF's metadata is damaged or cut short") from None
    return Contents(
        fields, raw, {n: Tensor(path, t.shape, t.kind, start + t.offset) for n, t in found.items()}
    )


def _tensor(handle: BinaryIO, path: Path) -> tuple[str, Tensor]:
    """A tensor's entry; its offset is from the start of the data."""
    name = _string(handle)
    (dimensions,) = struct.unpack("<I", handle.read(4))
    shape = struct.unpack(f"<{dimensions}Q", handle.read(8 * dimensions))
    kind, offset = struct.unpack("<IQ", handle.read(12))
    return name, Tensor(path, shape, kind, offset)


def _bytes(handle: BinaryIO, begin: int, end: int) -> bytes:
    handle.seek(begin)
    return handle.read(end - begin)


def _string(handle: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", handle.read(8))
    raw = handle.read(length)
    if len(raw) != length:
        raise struct.error
    return raw.decode("utf-8", errors="replace")


def _value(handle: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(handle)
    if kind == ARRAY:
        inner, length = struct.unpack("<IQ", handle.read(12))
        if inner in SCALARS:
            form = SCALARS[inner][1]
            return list(struct.unpack(f"<{length}{form}", handle.read(length * struct.calcsize(form))))
        return [_value(handle, inner) for _ in range(length)]
    form = SCALARS[kind]
    return struct.unpack(form, handle.read(struct.calcsize(form)))[0]


def build_tokenizer(fields: dict[str, Any], path: Path) -> Any:
    """A `tokenizers.Tokenizer` equal to the GGUF's byte-level BPE vocabulary.

    Raises `OutsideError` for vocabularies that are not rebuilt here (SentencePiece and unknown pre-tokenizers).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or (pre not in PRE and pre != "smollm"):
        raise OutsideError(
            f"{path}: its vocabulary is {kind}/{pre}, not read here; give the model's tokenizer.json directory "
            "with --tokenizer"
        )
    lists = [fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")]
    if not all(isinstance(values, list) for values in lists) or len(lists[0]) != len(lists[1]):  # type: ignore[arg-type]
        raise InputError(f"{path}: its vocabulary is damaged (tokens, types or merges are missing)")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    model = models.BPE(
        vocab={t: i for i, t in enumerate(tokens)},
        merges=merges,
        ignore_merges=pre in ("llama-bpe", "llama3", "llama-v3", "tekken", "gpt-4o"),
    )
    tokenizer = Tokenizer(model)
    if pre == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = pre_tokenizers.Split(Regex(PRE[str(pre)]), behavior="isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(text, special=kind == CONTROL, normalized=False)
        for text, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def template(fields: dict[str, Any], path: Path) -> Template:
    """The file's chat template; `InputError` where it has none."""
    source = fields.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source:
        raise InputError(f"{path}: the file has no chat template; use an instruct model's file")
    return Template(source, special_tokens(fields), str(path))


def added_tokens(fields: dict[str, Any]) -> list[str]:
    """The control and user-defined tokens."""
    pairs = zip(
        fields.get("tokenizer.ggml.tokens") or [], fields.get("tokenizer.ggml.token_type") or [], strict=False
    )
    return [text for text, kind in pairs if kind in (CONTROL, USER_DEFINED)]


def special_tokens(fields: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, `unk_token`, `pad_token`, of those the file names."""
    tokens = fields.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return {
        name: tokens[number]
        for key, name in names.items()
        if isinstance(number := fields.get(f"tokenizer.ggml.{key}_token_id"), int)
        and 0 <= number < len(tokens)
    }
