"""Context distillation: the loss against plain torch, the teacher's answers against generation without sharing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import bench_distil
from tune.batches import SoftTargets, Taught, pack
from tune.distil import ask, divergence, load_answers, save_answers
from tune.loss import pack_logits, pack_loss, soft_divergence
from unshot.__main__ import main
from unshot.text.chat import Chat, Encoded, load_tokenizer


@pytest.fixture(scope="module")
def net(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32).eval()


def topk(logits: torch.Tensor, kept: int) -> SoftTargets:
    values, ids = torch.log_softmax(logits, -1).topk(kept, -1)
    return SoftTargets(ids.numpy().astype(np.int32), values.numpy())


@pytest.mark.parametrize("kept", [1, 3, 40])
def test_the_divergence_and_its_gradient_are_those_of_a_plain_computation(kept: int) -> None:
    torch.manual_seed(kept)
    teacher, student = torch.randn(7, 40), torch.randn(7, 40, requires_grad=True)
    soft_divergence(student, topk(teacher, kept)).sum().backward()
    mine = student.grad.clone()
    student.grad = None
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    coarse = [torch.cat([x[:, :kept], x[:, kept:].sum(1, keepdim=True)], 1) for x in (p, q)]
    if kept == 40:
        coarse = [p, q]
    (coarse[0] * (coarse[0].log() - coarse[1].log())).sum().backward()
    assert torch.allclose(mine, student.grad, atol=1e-5)


def test_a_teacher_that_is_certain_gives_cross_entropy(net: Any) -> None:
    plain = Encoded([5, 6, 7, 8, 9], 2)
    certain = SoftTargets(np.array([[7], [8], [9]], dtype=np.int32), np.zeros((3, 1), dtype=np.float32))
    taught = Taught(plain.ids, plain.prompt_length, certain)
    with torch.no_grad():
        expected = pack_loss(net, pack([plain, plain]), "cpu")
        assert torch.allclose(pack_loss(net, pack([taught, taught]), "cpu"), expected, rtol=1e-5)
        # Rows with and without a teacher share a pack.
        assert torch.allclose(pack_loss(net, pack([taught, plain]), "cpu"), expected, rtol=1e-5)


def test_the_teacher_answers_as_it_would_without_a_shared_beginning(net: Any, tmp_path: Path) -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 10 + n, *range(20, 20 + 2 * n)] for n in range(5)]
    answers = ask(net, prompts, end=2, max_tokens=6, kept=8, batch=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                logits = net(input_ids=torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
        row = Taught(ids, len(prompt), answer.soft)
        # The distributions are the teacher's own, so that it diverges from itself by nothing.
        assert divergence(net, [row], "cpu")[0] == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            full = torch.log_softmax(pack_logits(net, pack([row]), "cpu"), -1)
        expected = full.gather(1, torch.from_numpy(answer.soft.ids.astype(np.int64)))
        assert np.allclose(expected.numpy(), answer.soft.logprobs, atol=1e-4)
    save_answers(tmp_path / "a.safetensors", answers)
    for kept, answer in zip(load_answers(tmp_path / "a.safetensors"), answers, strict=True):
        assert kept.ids == answer.ids and np.array_equal(kept.soft.logprobs, answer.soft.logprobs)


def tune(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["tune", *map(str, args), "-q"])
    return int(stop.value.code or 0), capsys.readouterr().err


def test_a_teacher_without_its_prompt_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inputs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q {n}"}) + "\n" for n in range(12))
    )
    line = (tmp_path / "inputs.jsonl", "--base", tiny_model, "--teacher", "self", "--out", tmp_path / "run")
    code, said = tune(capsys, *line)
    assert code == 2 and "needs the long prompt" in said and not (tmp_path / "run").exists()


def test_a_teacher_that_tune_does_not_take_names_the_way_there(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inputs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q {n}"}) + "\n" for n in range(12))
    )
    line = (
        tmp_path / "inputs.jsonl",
        "--base",
        tiny_model,
        "--teacher",
        "gguf:big.gguf",
        "--out",
        tmp_path / "run",
    )
    code, said = tune(capsys, *line)
    assert code == 2 and "unshot data label INPUTS --teacher gguf:big.gguf" in said


def test_answers_that_the_teacher_does_not_finish_are_left_out_and_counted(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.teach.MAX_ANSWER", 3)
    monkeypatch.setenv("UNSHOT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "inputs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q {n}"}) + "\n" for n in range(12))
    )
    (tmp_path / "unshot.toml").write_text('[task]\nsystem = "Say yes."\ndata = "inputs.jsonl"\n')
    line = (
        "--case",
        tmp_path / "unshot.toml",
        "--base",
        tiny_model,
        "--teacher",
        "self",
        "--out",
        tmp_path / "run",
    )
    code, said = tune(capsys, *line)
    assert code == 2 and "12 of 12 inputs left out: no end of the answer within 3 tokens" in said


@pytest.mark.slow
def test_the_prompt_moves_into_the_weights_without_a_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    for name, count in (("few_shot", 8), ("inputs", 40)):
        rows = [bench_distil.row(draw) for _ in range(count)]
        kept = [r if name == "few_shot" else {"prompt": r["prompt"]} for r in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    (tmp_path / "unshot.toml").write_text(bench_distil.CASE.replace("epochs = 4", "epochs = 2"))
    code, said = tune(capsys, "--case", tmp_path / "unshot.toml", "--out", tmp_path / "run")
    assert code == 0, said
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    bare, teacher, tuned = metrics["prompt_worth"]["systems"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "agreement with the teacher, not accuracy" in card
    assert metrics["gates"][0]["detail"].startswith("agreement with the teacher on")
    assert tuned["divergence"][0] < 0.5 * bare["divergence"][0] and metrics["gap_closed"] > 0.5
    assert metrics["reference"] == "teacher" and teacher["prompt_tokens"] > 5 * tuned["prompt_tokens"]


def test_rehearsal_rows_are_the_bases_own_words_and_distributions(
    tiny_model: Path, tiny_run: Path, net: Any
) -> None:
    from tune.assess import rehearsal
    from tune.mix import known, read_general, rehearsal_share
    from unshot.case import TuneSettings
    from unshot.contracts.manifest import read_manifest

    assert read_manifest(tiny_run).config is not None
    record = read_manifest(tiny_run).config["rows"]["rehearsal"]
    # 48 training rows: three more are a twentieth and a bit of all.
    assert record == {"share": 0.05, "rows": 3, "prompts": 3}
    assert (
        rehearsal_share(TuneSettings(mix=Path("m"))) == rehearsal_share(TuneSettings(forgetting=False)) == 0
    )
    assert rehearsal_share(TuneSettings(forgetting=False, rehearsal=0.2)) == 0.2
    texts = rehearsal.prompts(TuneSettings(), 500)
    assert len(texts) == 500 and len(set(texts)) > 130
    assert not known([row.text for row in read_general(None)], list(set(texts)))
    job: Any = SimpleNamespace(
        chat=Chat(load_tokenizer(tiny_model)), case=SimpleNamespace(tune=TuneSettings()), bf16=False, device="cpu",
        shape=SimpleNamespace(context=2048), config=SimpleNamespace(capacity=256), world=None,
    )  # fmt: skip
    found = rehearsal.own_answers(job, net, texts[:5])
    for text, answer in zip(texts, found, strict=False):
        prompt = job.chat.prompt_ids(rehearsal.message(text))
        row = rehearsal.taught(prompt, answer)
        with torch.inference_mode():
            logits = net(input_ids=torch.tensor([row.ids])).logits[0, len(prompt) - 1 : -1]
        plain = torch.log_softmax(logits, dim=-1).gather(1, torch.from_numpy(answer.soft.ids).long())
        assert np.abs(plain.numpy() - answer.soft.logprobs).max() < 1e-4


@pytest.mark.parametrize("kept", [3, 40])
def test_the_reverse_divergence_and_its_gradient_are_those_of_a_plain_computation(kept: int) -> None:
    torch.manual_seed(kept)
    teacher, student = torch.randn(6, 40), torch.randn(6, 40, requires_grad=True)
    own = np.array([True, False] * 3)
    soft_divergence(student, topk(teacher, kept), own).sum().backward()
    mine = student.grad.clone()
    student.grad = None
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    if kept < 40:
        p, q = (torch.cat([x[:, :kept], x[:, kept:].sum(1, keepdim=True)], 1) for x in (p, q))
    forward, back = p * (p.log() - q.log()), q * (q.log() - p.log())
    torch.where(torch.from_numpy(own)[:, None], back, forward).sum().backward()
    assert torch.allclose(mine, student.grad, atol=1e-5)


def test_on_policy_rows_are_the_students_samples_with_the_prompted_bases_distributions(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tune.distil import key
    from tune.on_policy import OnPolicy
    from unshot.contracts.task import Task
    from unshot.data.prompts import Prompt
    from unshot.data.rows import Example

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model), dtype=torch.float32).eval()
    student = get_peft_model(
        base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    chat = Chat(load_tokenizer(tiny_model))
    rows = [Example(({"role": "user", "content": f"question {'and ' * n}"},), "x", n + 1) for n in range(6)]
    long = Prompt(system="Say yes to everything that anybody asks.")
    prompts = {key(row): chat.prompt_ids(long.request(row)) for row in rows}
    task = Task(instruction="Yes?", max_answer_tokens=5)
    before = [Encoded([1, 2, 3], 2) for _ in range(8)]
    job: Any = SimpleNamespace(
        chat=chat, task=task, train_rows=before, extras=SimpleNamespace(train=rows),
        config=SimpleNamespace(seed=3, fingerprint="f" * 32), teaching=SimpleNamespace(prompts=prompts),
    )  # fmt: skip
    plan = OnPolicy(job, student, tmp_path)
    assert plan.rows(0) == before
    found = plan.rows(1)
    own = [i for i, row in enumerate(found) if isinstance(row, Taught)]
    assert (
        len(found) == 8
        and len(own) == 3
        and max(own) < 6
        and own != [i for i, row in enumerate(plan.rows(2)) if isinstance(row, Taught)]
    )
    for i in own:
        row = found[i]
        short, ids = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
        assert (
            short == chat.prompt_ids(Prompt(system="Yes?").request(rows[i]))
            and 0 < len(ids) <= 5
            and row.reverse
        )
        asked = prompts[key(rows[i])]
        with torch.no_grad(), student.disable_adapter():
            logits = student(input_ids=torch.tensor([[*asked, *ids]])).logits[0, len(asked) - 1 : -1]
        plain = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(row.soft.ids).long())
        assert np.abs(plain.numpy() - row.soft.logprobs).max() < 1e-4
    # A resumed run trains on the same samples, wherever the student stands by then.
    again = OnPolicy(job, None, tmp_path).rows(1)
    assert [row.ids for row in again] == [row.ids for row in found]
    one = found[own[0]]
    mixed = pack([one, before[0]])
    assert mixed.reverse is not None and mixed.reverse.tolist() == [True] * one.answer_length + [False]


def test_on_policy_needs_a_teacher_and_a_second_epoch(
    tmp_path: Path, tiny_model: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (small_data, "--base", tiny_model, "--out", tmp_path / "run", "--on-policy")
    code, said = tune(capsys, *line)
    assert code == 2 and "goes with --teacher self" in said
    code, said = tune(capsys, *line, "--teacher", "self", "--epochs", "1", "--instruction", "x")
    assert code == 2 and "second one on" in said
