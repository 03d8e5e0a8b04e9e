"""Small files for the planner's tests: a few-shot prompt, inputs, and a tokenizer with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LEGALBENCH = Path(__file__).parent.parent.parent / "shared" / "data" / "legalbench"

needs_legalbench = pytest.mark.skipif(
    not LEGALBENCH.is_dir(),
    reason="../shared/data/legalbench is not there: real prompts are checked where it is",
)

TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def few_shot(path: Path, shots: int = 20) -> Path:
    """A few-shot prompt of varied length; example 3 is by far the longest."""
    rows = [
        {
            "prompt": f"Clause {i}: the supplier may end this agreement with {i * 7} days' notice"
            + (", subject to the schedules and to every annex listed in them" * 9 if i == 2 else "."),
            "completion": "termination" if i % 2 else "notice",
        }
        for i in range(shots)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def inputs(path: Path, rows: int = 30) -> Path:
    """Inputs with answers."""
    lines = [
        {"prompt": f"Clause: party {i} pays {'late fees and ' * (i % 5)}interest.", "completion": "payment"}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    return path


def model_folder(folder: Path, *, template: str = TEMPLATE) -> Path:
    """A model directory with a byte-level BPE tokenizer trained on a few lines, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = ["the supplier may end this agreement with notice", "party pays interest and late fees"] * 20
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<s>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
