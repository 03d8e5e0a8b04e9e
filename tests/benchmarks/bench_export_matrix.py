"""Which family comes out equal in which format: `docs/families.md`, from tiny random models of every family.

    python -m tests.benchmarks.bench_export_matrix run cells-4.jsonl [FAMILY ...]   # in each environment
    python -m tests.benchmarks.bench_export_matrix write cells-4.jsonl cells-5.jsonl > docs/families.md

Every cell is a whole export (random LoRA, written, run in its own engine, held to the evaluated model). `FORMS=hf,ONNX`
in the environment asks for those columns alone. The engines run in this process (a process each would spend most of
the time on imports), so an engine that aborts ends the run; cells that are there are not run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from export import gguf_file, parity
from export.run import Settings, export_run
from export.vocab import NotStreamed
from export.worker import Worker
from tests.export_cases import make_run
from tests.tiny_models import FAMILIES, OTHERS, make
from unshot.catalog.formats import parse_targets
from unshot.console import Output
from unshot.errors import GateError, UnshotError

FORMS = {
    "GGUF streamed": ["gguf:f32", "gguf:q4_k_m"],
    "GGUF by converter": ["gguf:f32", "gguf:q4_k_m"],
    "LoRA-GGUF": ["lora:f32"],
    "hf": ["hf:f32", "hf:bf16"],
    "ONNX": ["onnx:fp32"],
    "GenAI": ["genai:fp32"],
}
NAMES = {
    "llama": "Llama, SmolLM2", "llama3": "Llama 3.1 (scaled RoPE)", "mistral": "Mistral", "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3", "gemma2": "Gemma 2", "gemma3": "Gemma 3, text", "phi3": "Phi-3", "granite": "Granite",
    "cohere": "Cohere (Command R)", "olmo2": "OLMo 2", "glm4": "GLM-4", "stablelm": "StableLM", "falcon": "Falcon",
    "gpt_neox": "GPT-NeoX", "mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "qwen2_moe": "Qwen2-MoE",
    "gpt_oss": "gpt-oss", "phi4_mini": "Phi-4-mini", "ministral3": "Ministral 3", "gemma": "Gemma",
    "gemma3_vision": "Gemma 3 with images (12B), its text part", "gemma3n": "Gemma 3n, text", "smollm3": "SmolLM3",
    "cohere2": "Cohere 2 (Command R7B)", "gpt2": "GPT-2", "olmoe": "OLMoE", "lfm2": "LFM2",
    "starcoder2": "StarCoder2", "phi": "Phi-2",
}  # fmt: skip
EXPERTS = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "olmoe", "gemma3n")


@contextlib.contextmanager
def only(form: str) -> Iterator[None]:
    """Hold the export to one of the two GGUF paths."""
    if form == "GGUF by converter":
        with mock.patch.object(gguf_file, "refuse", side_effect=NotStreamed("the converter is asked for")):
            yield
    elif form == "GGUF streamed":
        with mock.patch("export.converter.find", side_effect=lambda why, *_: _refused(why)):
            yield
    else:
        yield


def _refused(why: str) -> None:
    raise NotStreamed(why)


class InProcess:
    """`export.engines.Engine` without its process: the same requests to `export.worker.Worker`."""

    def __init__(
        self, kind: str, path: Path, *, context: int = 2048, lora: Path | None = None, exact: bool = False
    ) -> None:
        self.kind = kind
        try:
            self.worker = Worker(kind, str(path), 1, context, exact, str(lora) if lora else None)
            self.info = self.worker.engine.model_facts()
        except Exception as error:
            raise GateError(f"{path.name}: {kind} engine: {error}") from error
        for name in ("tokenize", "served", "render", "logits", "generate"):
            setattr(self, name, getattr(self.worker, name))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.engine.close()


def cell(run: Path, form: str, final: Path) -> dict[str, object]:
    """What became of one family in one format."""
    begin = time.perf_counter()
    try:
        with only(form), mock.patch.object(parity, "Engine", InProcess):
            done = export_run(
                str(run), parse_targets(FORMS[form]), final, Output(verbosity=-1), Settings(check_rows=4)
            )
    except GateError as error:
        return {"verdict": "differs", "why": str(error)}
    except UnshotError as error:
        return {"verdict": "refused", "why": str(error)}
    except Exception as error:
        return {"verdict": "INTERNAL ERROR", "why": f"{type(error).__name__}: {error}"}
    kl = [r.figures.logits.kl if r.figures.logits else None for r in done.parity]
    upto = [r.right_up_to for r in done.parity if r.right_up_to is not None]
    seconds = round(time.perf_counter() - begin, 1)
    return {"verdict": "equal", "kl": kl, "up_to": min(upto, default=None), "seconds": seconds}


def run(path: Path, families: list[str], forms: list[str]) -> None:
    """Try the families, one line a cell."""
    import transformers

    version = transformers.__version__
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    there = {(one["family"], one["form"], one["transformers"]) for one in map(json.loads, lines)}
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch, path.open("a", encoding="utf-8") as out:
        for family in families:
            wanted = [form for form in forms if (family, form, version) not in there]
            if not wanted:
                continue
            root = Path(scratch, family)
            adapter = (
                {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} if family in EXPERTS else {}
            )
            if family == "gemma3_vision":
                adapter = {"target_modules": r".*language_model.*\.(q_proj|o_proj|up_proj)"}
            made: Path | None = None
            try:
                made = make_run(make(family, root / "base"), root / "run", **adapter)
                failed = ""
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"
            for form in wanted:
                if made:
                    found = cell(made, form, root / form.replace(" ", "-"))
                else:
                    found = {"verdict": "not in this transformers", "why": failed}
                found = {"family": family, "form": form, "transformers": version, **found}
                out.write(json.dumps(found) + "\n")
                out.flush()
                print(
                    family, form, found["verdict"], str(found.get("why", found.get("kl")))[:200], flush=True
                )


def write(paths: list[Path]) -> str:
    """The page, from the cells of each environment; the last line of a cell counts."""
    cells: dict[tuple[str, str, str], dict[str, object]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            cells[one["family"], one["form"], one["transformers"]] = one
    versions = sorted({v for _, _, v in cells})
    families = [f for f in NAMES if any(f == k[0] for k in cells)]
    lines = [
        "# Families by format", "",
        "Generated by `tests/benchmarks/bench_export_matrix.py` from tiny random models with a random LoRA,",
        f"with transformers {' and '.join(versions)}; each cell is a whole export through the gate. *Equal*: KL to",
        "the evaluated model below the limit (f32 and q4_k_m; f32 and bf16 for `hf`). A number in brackets",
        "refers to the reasons below. A tiny model shows that the computation is the same, not how a real one",
        "rounds.", "",
    ]  # fmt: skip
    reasons: dict[str, int] = {}
    for version in versions:
        lines += [f"## transformers {version}", "", f"| family | {' | '.join(FORMS)} |", "|---" * 7 + "|"]
        for family in families:
            row = [_words(cells.get((family, form, version)), reasons) for form in FORMS]
            lines.append(f"| {NAMES[family]} | {' | '.join(row)} |")
        lines.append("")
    lines += ["## Reasons", ""]
    for reason, number in reasons.items():
        text = f"{number}. {reason}"
        while text:
            cut = len(text) if len(text) <= 100 else text.rfind(" ", 0, 100)
            lines.append(text[: cut if cut > 0 else 100])
            text = text[cut if cut > 0 else 100 :].strip()
            text = f"   {text}" if text else ""
    return "\n".join(lines) + "\n"


def _words(one: dict[str, object] | None, reasons: dict[str, int]) -> str:
    if one is None:
        return "not run"
    if one["verdict"] == "equal":
        return "equal" if one["up_to"] is None else f"equal up to {one['up_to']} tokens"
    why = " ".join(str(one["why"]).split())
    for temporary in {p for p in why.replace(";", " ").replace(":", " ").split() if "/matrix-" in p}:
        why = why.replace(temporary, Path(temporary).name)
    # One reason for all families of which it is one.
    why = re.sub(r"(architecture|model type) \w+ (is not|has no)", r"this \1 \2", why)
    return f"{one['verdict']} [{reasons.setdefault(why, len(reasons) + 1)}]"


def main() -> None:
    """See the module's text."""
    verb, first, *rest = sys.argv[1:]
    if verb == "write":
        print(write([Path(first), *map(Path, rest)]), end="")
        return
    forms = os.environ.get("FORMS", "").split(",") if os.environ.get("FORMS") else list(FORMS)
    run(Path(first), rest or [f for f in NAMES if f in {**FAMILIES, **OTHERS}], forms)


if __name__ == "__main__":
    main()
