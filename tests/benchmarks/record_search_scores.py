"""Record which inputs each format of a model answers as its f32 file does, for the test of `export search`'s rounds.

    python -m tests.benchmarks.record_search_scores > tests/search_scores.json

A random Llama of 256 columns (so that every K-quant is what its name says), the first token of its greedy answer to
200 of the demo's inputs, every format of `export search`; `right` holds one digit an input.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from export.gguf_file import Facts, write_gguf
from export.kquants import quantise
from export.merge import Merged
from export.search import LADDER
from export.source import open_source
from tests.tiny_models import make
from unshot.catalog.formats import STREAMED, parse_targets
from unshot.console import Output
from unshot.engines import open_engine

DEMO = Path(__file__).parents[2] / "unshot" / "demo" / "data.jsonl"
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}


def firsts(path: Path, prompts: list[list[int]]) -> list[int]:
    """The first token of each greedy answer."""
    with open_engine(f"gguf:{path}", threads=1) as engine:
        return [int(engine.logits(ids)[-1].argmax()) for ids in prompts]


def main() -> None:
    """See the module's text."""
    with tempfile.TemporaryDirectory() as scratch:
        base = make("llama", Path(scratch, "base"), **SHAPE)
        model = open_source(str(base), None, Output(verbosity=-1), DEMO)
        prompts = [model.chat.prompt_ids(messages) for messages in model.requests()[:200]]
        merged = Merged(model.base.weight_files(), model.config)
        facts = Facts("base", "base", None, model.chat.tokenizer.template.source, model.chat.end)
        formats: dict[str, dict[str, object]] = {}
        full = Path(scratch, "f32.gguf")
        write_gguf(full, merged, base, "f32", facts)
        truth = firsts(full, prompts)
        for target in parse_targets(LADDER):
            path = Path(scratch, target.name)
            if target.precision in STREAMED:
                write_gguf(path, merged, base, target.precision, facts)
            else:
                quantise(full, path, target.precision)
            given = firsts(path, prompts)
            right = "".join(str(int(a == b)) for a, b in zip(truth, given, strict=True))
            formats[str(target)] = {"bytes": path.stat().st_size, "right": right}
            print(target, right.count("1") / len(right), file=sys.stderr, flush=True)
    print(
        json.dumps({"rows": len(prompts), "metric": "same first token as f32", "formats": formats}, indent=1)
    )


if __name__ == "__main__":
    main()
