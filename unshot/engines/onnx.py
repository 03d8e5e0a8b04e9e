"""ONNX decoder graphs with past keys and values (optimum's layout) on ONNX Runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from unshot.contracts.engine import EngineFacts
from unshot.data.files import read_object
from unshot.engines.base import DirectoryEngine, ModelFacts, directory_facts
from unshot.errors import InputError, OutsideError
from unshot.text.chat import Chat, load_tokenizer

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxEngine(DirectoryEngine):
    """A graph `input_ids, attention_mask[, position_ids], past_key_values.* -> logits, present.*`, batch 1, greedy.

    Keys and values stay on the device between steps. The cropped prefix is kept as a snapshot, so that requests
    with one shared prefix do not copy it again.
    """

    kind = "onnx"

    def __init__(self, target: str, *, threads: int | None = None) -> None:
        super().__init__(target, threads=threads)
        path = Path(target).expanduser()
        self.path = path if path.is_file() else _find_graph(path)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads
        # The other system of an A/B run must find the cores free.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = _providers()
        try:
            self._session: Any = ort.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # ONNX Runtime raises its own kinds for damaged graphs
            raise InputError(f"{self.path}: ONNX Runtime cannot load it ({str(error)[:160]})") from None
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._past = [n for n in self._inputs if n.startswith("past_key_values.")]
        if "input_ids" not in self._inputs or not self._past:
            raise InputError(
                f"{self.path}: not a decoder graph with past keys and values (inputs: "
                f"{', '.join(list(self._inputs)[:5])}); export with `unshot export --to onnx:fp32`"
            )
        self._present = [n.replace("past_key_values.", "present.") for n in self._past]
        self._chat = Chat(load_tokenizer(self.path.parent))
        self._config = read_object(self.path.parent / "config.json")
        self._empty = [self._empty_past(name) for name in self._past]
        self._room = int(self._config.get("max_position_embeddings") or 0)
        self._kv: list[Any] = self._empty
        self._snapshot: tuple[list[int], list[Any]] = ([], self._empty)

    def _empty_past(self, name: str) -> Any:
        info = self._inputs[name]
        shape = [d if isinstance(d, int) else 1 if i == 0 else 0 for i, d in enumerate(info.shape)]
        return self._value(np.zeros(shape, dtype=TYPES.get(info.type, np.float32)))

    def _value(self, array: np.ndarray) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def facts(self) -> EngineFacts:
        files = [p for p in self.path.parent.glob(f"{self.path.name}*") if p.is_file()]
        return EngineFacts(
            engine="onnxruntime",
            library=f"onnxruntime {ort.__version__}",
            model=f"{self._config.get('model_type')} {self.path.name}",
            bytes=sum(p.stat().st_size for p in files),
            threads=self.threads,
            device=self.device,
            providers=list(self._session.get_providers()),
        )

    def model_facts(self) -> ModelFacts:
        width = next(o.shape for o in self._session.get_outputs() if o.name == "logits")[-1]
        return directory_facts(self.path.parent, vocabulary=width if isinstance(width, int) else None)

    def _own_ends(self) -> object:
        return self._config.get("eos_token_id")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.reset()
        table = self._forward(list(ids))[0]
        return np.asarray(table, dtype=np.float32)

    def _rewind(self, keep: int) -> int:
        kept = self._ids[:keep]
        snapshot_ids, snapshot = self._snapshot
        if snapshot_ids != kept:
            snapshot = [self._value(_crop(v.numpy(), keep)) for v in self._kv] if keep else self._empty
            self._snapshot = (list(kept), snapshot)
        self._kv, self._ids = snapshot, kept
        return keep

    def _run(self, ids: Sequence[int]) -> int:
        return int(self._forward(list(ids))[0, -1].argmax())

    def _forward(self, ids: list[int]) -> np.ndarray:
        total = len(self._ids) + len(ids)
        binding = self._session.io_binding()
        feeds = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(len(self._ids), total, dtype=np.int64)[None],
        }
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, past in zip(self._past, self._kv, strict=True):
            binding.bind_ortvalue_input(name, past)
        binding.bind_output("logits", "cpu")
        for name in self._present:
            binding.bind_output(name, self.device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            self.reset()
            raise OutsideError(f"{self.path}: ONNX Runtime failed ({str(error)[:160]})") from None
        outputs = binding.get_outputs()
        self._kv = list(outputs[1:])
        self._ids.extend(ids)
        table: np.ndarray = outputs[0].numpy()
        return table

    def reset(self) -> None:
        self._ids, self._kv, self._snapshot = [], self._empty, ([], self._empty)

    def close(self) -> None:
        self._session = None
        self._kv = self._empty = []


def _providers() -> list[str]:
    """CUDA where there is a driver for it, always the CPU."""
    ort.set_default_logger_severity(4)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ["CPUExecutionProvider"]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries as torch's wheels bring them
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return [p for p in wanted if p in ort.get_available_providers()]


def _crop(values: np.ndarray, keep: int) -> np.ndarray:
    """The first `keep` positions of keys or values, shape `(1, heads, positions, width)`."""
    return np.ascontiguousarray(values[:, :, :keep])


def _find_graph(folder: Path) -> Path:
    """The graph in a directory: `model.onnx`, else the only `.onnx` file."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such file or directory; give an ONNX file or its directory")
    graphs = sorted(folder.glob("*.onnx"))
    if folder / "model.onnx" in graphs:
        return folder / "model.onnx"
    if len(graphs) == 1:
        return graphs[0]
    found = ", ".join(g.name for g in graphs[:5]) or "none"
    raise InputError(f"{folder}: no model.onnx there (.onnx files: {found}); name the file")
