"""The part of `hf:w4a16` that needs llm-compressor: `python compressor_child.py SOURCE FOLDER IDS.json`.

Run by its path, with llm-compressor alone, so that it can live in another environment than unshot: it holds
transformers to a range of its own. Exit 3: llm-compressor cannot be imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: str, folder: str, ids: str) -> int:
    """Round a Hugging Face directory's linear layers to 4 bits by GPTQ on the rows of token ids."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    rows = json.loads(Path(ids).read_text(encoding="utf-8"))
    longest = max(map(len, rows))
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    net = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=False)
    head = next(name for name, part in net.named_modules() if part is net.get_output_embeddings())
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=[head])
    oneshot(
        model=net, dataset=data, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=longest,
        shuffle_calibration_samples=False, log_dir=None,
    )  # fmt: skip
    net.save_pretrained(folder, save_compressed=True)
    return 0


if __name__ == "__main__":
    try:
        import llmcompressor  # noqa: F401
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    sys.exit(main(*sys.argv[1:]))
