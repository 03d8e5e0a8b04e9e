"""llama.cpp's converter with a name for tokenizers that it does not know by their hash.

Run by its path as `python converter_child.py FOLDER SETTINGS ARGUMENTS...` or `... FOLDER --supports ARCHITECTURE`;
exit 2: the architecture is unknown. SETTINGS is JSON: `pre`, the pre-tokenizer's name; `template`, the chat template;
`ends`, the tokens that end an answer. Nothing of unshot is imported: the converter brings its own `gguf`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def main() -> int:
    """Run the converter in this process."""
    folder, given, *arguments = sys.argv[1:]
    sys.path[:0] = [str(Path(folder, "gguf-py")), folder]
    _name_what_is_missing(folder)
    import convert_hf_to_gguf as script

    try:
        from conversion import base
    except ImportError:  # older checkouts have everything in one file
        base = script
    kind = getattr(base, "TextModel", None) or base.Model
    if given == "--supports":
        return 0 if _knows(script, base, arguments[0]) else 2
    settings = json.loads(given)
    _special_tokens(settings)
    _older_keys(getattr(base, "ModelBase", None) or base.Model)
    usual = kind.get_vocab_base_pre

    def named(self, tokenizer):  # type: ignore[no-untyped-def]
        try:
            return usual(self, tokenizer)
        except NotImplementedError:
            if not settings["pre"]:
                raise
            return settings["pre"]

    kind.get_vocab_base_pre = named
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    script.main()
    return 0


def _name_what_is_missing(folder: str) -> None:
    """The wheel's models may be newer than its `gguf`: names of tensors it lacks, of models that are not asked for,
    must not keep a whole module from being loaded.
    """
    import gguf

    for path in Path(folder).glob("conversion/*.py"):
        for kind, name in re.findall(
            r"gguf\.(MODEL_ARCH|MODEL_TENSOR)\.(\w+)", path.read_text(encoding="utf-8")
        ):
            if not hasattr(getattr(gguf, kind), name):
                setattr(getattr(gguf, kind), name, None)


def _older_keys(kind) -> None:  # type: ignore[no-untyped-def]
    """Keys of config.json that transformers 5 has renamed and no longer says (GPT-NeoX's `rotary_pct`)."""
    usual = kind.load_hparams

    def load(folder, *more, **named):  # type: ignore[no-untyped-def]
        written = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return {**written, **usual(folder, *more, **named)}

    kind.load_hparams = staticmethod(load)


def _special_tokens(settings) -> None:  # type: ignore[no-untyped-def]
    """No token before or after the prompt, which the chat template writes whole; every end token where it is looked
    for.
    """
    import gguf

    usual = gguf.SpecialVocab.add_to_gguf

    def added(self, writer, quiet=False):  # type: ignore[no-untyped-def]
        self.chat_template = settings["template"]
        self.add_special_token = {"bos": False, "eos": False}
        ids = self.special_token_ids
        if settings["ends"]:
            ids.setdefault("eos", settings["ends"][0])
        for kind in (
            "eot",
            "eom",
        ):  # GLM-4's converter names a turn that ends no answer of every model of its kind
            if ids.get(kind) not in settings["ends"]:
                ids.pop(kind, None)
        more = [token for token in settings["ends"] if token != ids.get("eos")]
        ids.update(zip(("eot", "eom"), more, strict=False))
        usual(self, writer, quiet)

    gguf.SpecialVocab.add_to_gguf = added


def _knows(script, base, name: str) -> bool:  # type: ignore[no-untyped-def]
    table = getattr(sys.modules.get("conversion"), "TEXT_MODEL_MAP", None)
    if table is not None:
        return name in table
    holder = getattr(base, "ModelBase", None) or script.ModelBase
    try:
        holder.from_model_architecture(name)
    except NotImplementedError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
