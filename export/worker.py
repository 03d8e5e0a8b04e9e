"""One exported file in its own engine, in its own process: a C++ abort there must not end the tool.

Reads one JSON request a line on stdin and writes one JSON reply a line on what was stdout (the engines' own chatter
goes to stderr). Logits travel in a .npy file that the request names. Started by `export.engines`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from unshot.text.gguf import read_metadata, special_tokens
from unshot.text.template import Template, load_template


class LlamaEngine:
    """A GGUF file in llama.cpp, through llama-cpp-python, on CPU."""

    def __init__(self, path: str, context: int, threads: int, lora: str | None = None) -> None:
        import llama_cpp

        self.path = Path(path)
        self.llama = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=min(context, 512),
            n_gpu_layers=0,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            lora_path=lora,
            verbose=True,  # its chatter goes to the log, whose last lines explain a failure
        )

    def tokenize(self, text: str) -> list[int]:
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def render(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        fields = read_metadata(self.path)
        template = Template(fields["tokenizer.chat_template"], special_tokens(fields), self.path.name)
        return [template.render(messages) for messages in conversations]

    def logits(self, ids: list[int], start: int) -> np.ndarray:
        self.llama.reset()
        self.llama.eval(ids)
        return np.array(self.llama.scores[start : len(ids)], dtype=np.float32)

    def generate(self, prompt: int, tokens: int, stop: list[int]) -> list[int]:
        """Go on from the first `prompt` tokens of the sequence that `logits` was asked for last."""
        self.llama.n_tokens = prompt
        answer: list[int] = []
        while len(answer) < tokens:
            best = int(np.argmax(self.llama.scores[self.llama.n_tokens - 1]))
            if best in stop:
                break
            answer.append(best)
            if len(answer) < tokens:
                self.llama.eval([best])
        return answer

    def info(self) -> dict[str, Any]:
        model = self.llama._model
        return {
            "eos": self.llama.token_eos(),
            "bos": self.llama.token_bos(),
            "vocab": self.llama.n_vocab(),
            "end": [i for i in range(self.llama.n_vocab()) if _is_end(model, i)],
            "template": (self.llama.metadata or {}).get("tokenizer.chat_template"),
        }


def _is_end(model: Any, token: int) -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(model.model), token))


class OnnxEngine:
    """A folder of optimum's text-generation-with-past graph in onnxruntime, on CPU."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        folder = Path(path)
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.folder = folder
        self.last = np.zeros((0, 0), dtype=np.float32)
        self.past: dict[str, np.ndarray] = {}

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def render(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        template = load_template(self.folder)
        return [template.render(messages) for messages in conversations]

    def _step(self, ids: list[int], past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        seen = next(iter(past.values())).shape[2] if past else 0
        feed = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), dtype=np.int64),
            "position_ids": np.arange(seen, seen + len(ids), dtype=np.int64)[None],
            **(past or self._empty()),
        }
        found = self.session.run(None, {k: v for k, v in feed.items() if k in self.inputs})
        named = dict(zip(self.outputs, found, strict=True))
        grown = {
            k.replace("present", "past_key_values"): v for k, v in named.items() if k.startswith("present")
        }
        return named["logits"][0], grown

    def _empty(self) -> dict[str, np.ndarray]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtype=types[i.type])
            for name, i in self.inputs.items()
            if name.startswith("past_key_values")
        }

    def logits(self, ids: list[int], start: int) -> np.ndarray:
        self.last, self.past = self._step(ids, {})
        return self.last[start:].astype(np.float32)

    def generate(self, prompt: int, tokens: int, stop: list[int]) -> list[int]:
        """Go on from the first `prompt` tokens of the sequence that `logits` was asked for last."""
        logits, past = self.last[:prompt], {k: v[:, :, :prompt] for k, v in self.past.items()}
        answer: list[int] = []
        while len(answer) < tokens:
            best = int(np.argmax(logits[-1]))
            if best in stop:
                break
            answer.append(best)
            if len(answer) < tokens:
                logits, past = self._step([best], past)
        return answer

    def info(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        ends = config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        shape = self.session.get_outputs()[self.outputs.index("logits")].shape
        vocab = shape[-1] if isinstance(shape[-1], int) else None
        return {"eos": ends[0] if ends else None, "bos": config.get("bos_token_id"), "vocab": vocab, "end": ends,
                "template": template_in(self.folder)}  # fmt: skip


class DirectoryEngine:
    """A model directory in the engine that `unshot bench` runs: GenAI (its own tokenizer and template) or torch."""

    kind = ""

    def __init__(self, path: str, context: int, threads: int) -> None:
        from unshot.engines import open_engine

        self.engine = open_engine(f"{self.kind}:{path}", threads=threads)
        self.folder = Path(path)
        self.ids: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        return self.engine.tokenize(text)

    def render(self, conversations: list[list[dict[str, str]]]) -> list[str]:
        return [self.engine.render(messages) for messages in conversations]  # type: ignore[arg-type]

    def logits(self, ids: list[int], start: int) -> np.ndarray:
        self.ids = ids
        return self.engine.logits(ids)[start:]

    def generate(self, prompt: int, tokens: int, stop: list[int]) -> list[int]:
        """Go on from the first `prompt` tokens of the sequence that `logits` was asked for last."""
        answer = self.engine.generate(self.ids[:prompt], max_tokens=tokens, stop_ids=stop)
        return answer.ids[:-1] if answer.finish == "stop" else answer.ids

    def info(self) -> dict[str, Any]:
        ends = sorted(self.engine.stop_ids)
        return {"eos": ends[0] if ends else None, "bos": None, "vocab": None, "end": ends,
                "template": template_in(self.folder)}  # fmt: skip


def template_in(folder: Path) -> str | None:
    """The chat template of a Hugging Face directory, in either place."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text: str | None = settings.get("chat_template")
    return text


class GenaiEngine(DirectoryEngine):
    """A GenAI directory."""

    kind = "genai"


class TorchEngine(DirectoryEngine):
    """A Hugging Face directory in transformers."""

    kind = "torch"


ENGINES: dict[str, Any] = {
    "gguf": LlamaEngine,
    "onnx": OnnxEngine,
    "genai": GenaiEngine,
    "torch": TorchEngine,
}


def main() -> None:
    """Serve requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    kind, path, context, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        engine = ENGINES[kind](path, context, threads, *sys.argv[5:6])
    except Exception as error:  # whatever the engine raises becomes the reason in the parent
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ok": engine.info()})
    for line in sys.stdin:
        request = json.loads(line)
        name, target = request.pop("do"), request.pop("into", None)
        try:
            value: Any
            if name == "tokenize":
                value = [engine.tokenize(text) for text in request["texts"]]
            else:
                value = getattr(engine, name)(**request)
            if target:
                np.save(target, value)
                value = None
            reply({"ok": value})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
