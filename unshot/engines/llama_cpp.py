"""GGUF files on llama.cpp, by the C interface that llama-cpp-python ships.

The C interface and not the package's `Llama` class: what is cached, when it is dropped and when a token is known
are then exactly what this file says.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

from unshot.contracts.engine import EngineFacts, ModelConfig
from unshot.data.rows import Message
from unshot.engines.base import Engine, ModelFacts
from unshot.errors import InputError, OutsideError
from unshot.text import gguf
from unshot.text.repair import repaired
from unshot.text.template import Template

BATCH = 2048
MICRO_BATCH = 512
CONTEXT_STEP = 1024
MAGIC = b"GGUF"


WARNING = 3
# The last warnings and errors of llama.cpp, for a message that says why something failed.
_complaints: deque[str] = deque(maxlen=3)


@lib.llama_log_callback
def _keep_complaints(level: int, text: bytes, data: object) -> None:
    """llama.cpp writes nothing on stderr, which is unshot's own; what it complains of is kept."""
    line = text.decode(errors="replace").strip()
    if level in (WARNING, WARNING + 1) and line:
        _complaints.append(line)


def _why() -> str:
    return f" ({' | '.join(_complaints)[-200:]})" if _complaints else ""


_started = False


def _start_library() -> None:
    global _started
    if not _started:
        lib.llama_log_set(_keep_complaints, ctypes.c_void_p(0))
        lib.llama_backend_init()
        _started = True


def precision_of(description: str) -> str:
    """The number format in llama.cpp's description of a model: `llama 8B Q4_K - Medium` is `q4_k_m`."""
    text = description.lower()
    for word in ("small", "medium", "large"):
        text = text.replace(f" - {word}", f"_{word[0]}")
    return text.rsplit(" ", 1)[-1]


class GgufEngine(Engine):
    """A GGUF model with one sequence of KV cache, greedy decoding, with a LoRA `adapter` (GGUF) where one is given."""

    kind = "gguf"
    # Keys and values in fp32 and not in llama.cpp's fp16, to tell a file's own error from the cache's.
    exact_cache = False

    def __init__(
        self,
        target: str,
        *,
        threads: int | None = None,
        adapter: Path | None = None,
        context: int | None = None,
    ) -> None:
        super().__init__(target, threads=threads)
        self._fixed = context
        self.path = Path(target).expanduser()
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; give a .gguf file")
        with self.path.open("rb") as handle:
            if handle.read(4) != MAGIC:
                raise InputError(f"{self.path}: not a GGUF file (it does not start with GGUF)")
        _start_library()
        _complaints.clear()
        self._model: Any = lib.llama_model_load_from_file(
            str(self.path).encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise InputError(
                f"{self.path}: llama.cpp cannot load it; the file is damaged or of an unknown kind{_why()}"
            )
        self._adapter = self._load_adapter(adapter)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))
        self._room = int(lib.llama_model_n_ctx_train(self._model))
        self._context: Any = None
        self.context_size = 0

    def _load_adapter(self, path: Path | None) -> Any:
        """The adapter's handle, freed with the model; None without one."""
        if path is None:
            return None
        handle = lib.llama_adapter_lora_init(self._model, str(path).encode())
        if not handle:
            raise InputError(f"{path}: llama.cpp cannot load this adapter for {self.path}{_why()}")
        return handle

    def _apply_adapter(self) -> None:
        if hasattr(lib, "llama_set_adapters_lora"):  # llama-cpp-python 0.3.17 and later
            adapters = (lib.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            status = lib.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))
        else:
            status = lib.llama_set_adapter_lora(self._context, self._adapter, 1.0)
        if status != 0:
            raise OutsideError(f"{self.path}: llama.cpp could not apply the adapter{_why()}")

    def facts(self) -> EngineFacts:
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, buffer, 256)
        model = buffer.value.decode(errors="replace")
        return EngineFacts(
            engine="llama.cpp",
            library=f"llama-cpp-python {metadata.version('llama-cpp-python')}",
            model=model,
            precision=precision_of(model),
            config=self.config(),
            parameters=int(lib.llama_model_n_params(self._model)),
            bytes=self.path.stat().st_size,
            threads=self.threads,
            device="gpu" if lib.llama_supports_gpu_offload() else "cpu",
        )

    def model_facts(self) -> ModelFacts:
        source = lib.llama_model_chat_template(self._model, None)
        eos, bos = int(lib.llama_vocab_eos(self._vocab)), int(lib.llama_vocab_bos(self._vocab))
        return ModelFacts(
            eos=eos if eos >= 0 else None,
            bos=bos if bos >= 0 else None,
            vocabulary=self.vocabulary,
            end=sorted(self.stop_ids),
            template=source.decode() if source else None,
            add_bos=bool(lib.llama_vocab_get_add_bos(self._vocab)),
        )

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        size = lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if size >= 0 else None

    def config(self) -> ModelConfig:
        """The architecture in `config.json` form, from the file's metadata."""
        kind = self._metadata("general.architecture") or "llama"
        hidden, heads = int(lib.llama_model_n_embd(self._model)), int(lib.llama_model_n_head(self._model))
        head_dim = int(self._metadata(f"{kind}.attention.key_length") or hidden // max(heads, 1))
        shared_heads = int(lib.llama_model_n_head_kv(self._model))
        layers = int(lib.llama_model_n_layer(self._model))
        config: ModelConfig = {
            "model_type": kind,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self._room,
            "head_dim": head_dim,
        }
        dense = self._metadata(f"{kind}.feed_forward_length")
        if dense and dense.isdigit():
            config["intermediate_size"] = int(dense)
            width = head_dim * (2 * heads + 2 * shared_heads)
            in_layers = layers * hidden * (width + 3 * int(dense))
            spare = int(lib.llama_model_n_params(self._model)) - in_layers
            # One table of embeddings is left over, or a second one for the output.
            config["tie_word_embeddings"] = spare < 1.5 * self.vocabulary * hidden
        return config

    def served_ids(self, messages: Sequence[Message]) -> list[int]:
        """As llama-server does: its start-of-text token once, whether the template writes it too or not."""
        text = self.render(messages)
        bos = lib.llama_vocab_bos(self._vocab)
        if bos >= 0 and lib.llama_vocab_get_add_bos(self._vocab):
            text = text.removeprefix(self._piece(bos, special=True).decode(errors="replace"))
        return self._tokenize(text, special=True)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenize(text, special=False)

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; `special` adds the tokens that the file wants before and after it."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, special, True)
        if count < 0:
            raise OutsideError(f"{self.path}: llama.cpp could not tokenize a text of {len(raw)} bytes")
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int]) -> str:
        return b"".join(self._piece(i, special=False) for i in ids).decode(errors="replace")

    def _piece(self, token: int, *, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        size = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return bytes(buffer.raw[:size])

    @cached_property
    def _template(self) -> Template:
        fields = gguf.read_metadata(self.path)
        return repaired(gguf.template(fields, self.path), gguf.added_tokens(fields))[0]

    def render(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages)

    @cached_property
    def stop_ids(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset(i for i in range(self.vocabulary) if lib.llama_vocab_is_eog(self._vocab, i))

    def _make_room(self, tokens: int) -> None:
        if self._context is not None and tokens <= self.context_size:
            return
        super()._make_room(tokens)
        self._free_context()
        size = min(-(-tokens // CONTEXT_STEP) * CONTEXT_STEP, self._room)
        if self._fixed and tokens <= self._fixed:
            size = self._fixed
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = size, BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        if not lib.llama_supports_gpu_offload():
            # On a CPU it takes twice as long for a short text behind a long cached prefix, which would flatter every
            # tuned model (docs/bench.md); llama-cpp-python's server leaves it off too.
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if self.exact_cache:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.no_perf = False  # its own timers cost two clock reads a call, and check ours
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise OutsideError(f"{self.path}: llama.cpp could not make a context of {size} tokens{_why()}")
        if self._adapter is not None:
            self._apply_adapter()
        self.context_size = int(lib.llama_n_ctx(self._context))
        self._memory = lib.llama_get_memory(self._context)
        self._ids = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self._make_room(len(ids))
        self.reset()
        rows = np.empty((len(ids), self.vocabulary), dtype=np.float32)
        batch = lib.llama_batch_init(MICRO_BATCH, 0, 1)
        try:
            for begin in range(0, len(ids), MICRO_BATCH):
                chunk = ids[begin : begin + MICRO_BATCH]
                batch.n_tokens = len(chunk)
                for i, token in enumerate(chunk):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, begin + i, 1
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                self._decode(batch)
                self._ids += chunk
                table = lib.llama_get_logits(self._context)
                rows[begin : begin + len(chunk)] = np.ctypeslib.as_array(
                    table, shape=(len(chunk), self.vocabulary)
                )
        finally:
            lib.llama_batch_free(batch)
        return rows

    def _rewind(self, keep: int) -> int:
        if not lib.llama_memory_seq_rm(self._memory, 0, keep, -1):
            # A recurrent memory cannot drop its tail: nothing of it can be kept.
            self.reset()
            return 0
        self._ids = self._ids[:keep]
        return keep

    def _prefill(self, ids: Sequence[int]) -> int:
        token = -1
        for begin in range(0, len(ids), BATCH):
            token = self._run(ids[begin : begin + BATCH])
        return token

    def _run(self, ids: Sequence[int]) -> int:
        array = (lib.llama_token * len(ids))(*ids)
        self._decode(lib.llama_batch_get_one(array, len(ids)))
        self._ids.extend(ids)
        last = lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(last, shape=(self.vocabulary,)).argmax())

    def _decode(self, batch: Any) -> None:
        status = lib.llama_decode(self._context, batch)
        if status != 0:
            self.reset()
            raise OutsideError(f"{self.path}: llama.cpp's decode failed with status {status}{_why()}")

    def reset(self) -> None:
        if self._context is not None:
            lib.llama_memory_clear(self._memory, True)
        self._ids = []

    def _free_context(self) -> None:
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None
            self._ids = []

    def close(self) -> None:
        self._free_context()
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
