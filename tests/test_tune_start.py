"""What is shown before training (template, end token), which tokens carry loss, and what happens where it diverges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat_templates import TEMPLATES, USUAL
from tests.model_families import model_of
from tests.planner_files import model_folder
from unshot.data.rows import Example, Message
from unshot.errors import InputError
from unshot.models import Source
from unshot.text.chat import Chat, Encoded, load_tokenizer

torch = pytest.importorskip("torch")

from tune.batches import pack  # noqa: E402
from tune.loss import with_virtual  # noqa: E402
from tune.prove import prove_template  # noqa: E402
from tune.train import DIVERGED, START, TrainConfig, Trainer  # noqa: E402

TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "late fee?"},
    {"role": "assistant", "content": "payment"},
    {"role": "user", "content": "end with notice?"},
    {"role": "assistant", "content": "the supplier"},
    {"role": "user", "content": "interest?"},
]


def source_of(folder: Path, template: str, **generation: Any) -> Source:
    model_folder(folder, template=template)
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return Source("base", folder)


def prove(source: Source) -> list[str]:
    row = Example(tuple(TALK[1:2]), "payment", 7)
    long: Message = {"role": "user", "content": "late fee? party pays interest"}
    return prove_template(Chat(load_tokenizer(source.path)), source, [row], [[TALK[0], long]])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content[:15] }}<|im_end|>{% endfor %}", "leaves out the input"),
        ("{% for m in messages %}{% if m.role != 'user' %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endif %}"
         "{% endfor %}", "leaves out the input"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content if m.role == 'assistant' else m.content | upper }}"
         "<|im_end|>{% endfor %}", "leaves out the instruction"),
        ("{% for m in messages %}[{{ m.role }}]{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
         "does not write the assistant's answer"),
    ],
)  # fmt: skip
def test_a_template_that_loses_something_is_refused_with_the_way_out(
    tmp_path: Path, template: str, words: str
) -> None:
    with pytest.raises(InputError, match=rf"{words}.*--chat-template FILE"):
        prove(source_of(tmp_path / "base", template))


@pytest.mark.parametrize("name", ["drops-system", "parts-only", "qwen3-thinking", "gemma2", *USUAL])
def test_a_template_that_can_be_mended_is_and_loses_nothing(tmp_path: Path, name: str) -> None:
    source = source_of(tmp_path / "base", TEMPLATES[name])
    assert isinstance(prove(source), list)


def test_an_end_token_that_the_base_does_not_stop_at_is_said(tmp_path: Path) -> None:
    chat = Chat(load_tokenizer(model_folder(tmp_path / "x")))
    assert prove(source_of(tmp_path / "same", USUAL["yi"], eos_token_id=[5, chat.end])) == []
    (note,) = prove(source_of(tmp_path / "other", USUAL["yi"], eos_token_id=5))
    assert "'<|im_end|>'" in note and "base's own settings stop at" in note


@pytest.mark.parametrize("every", [False, True])
def test_loss_is_on_the_last_answer_or_on_all_token_by_token(tmp_path: Path, every: bool) -> None:
    chat = Chat(load_tokenizer(model_folder(tmp_path / "m", template=USUAL["yi"])))
    row = chat.encode(TALK, "late fees", every=every)
    said = [chat.tokenizer.decode(row.ids[a:b], special=True) for a, b in row.spans]
    answers = ["payment<|im_end|>", "the supplier<|im_end|>", "late fees<|im_end|>"]
    assert said == (answers if every else answers[-1:])
    other = chat.encode(TALK[:2], "late fees", every=every)
    for rows in ([row], [other, row], with_virtual([other, row], 3)):
        packed = pack(rows)
        told = chat.tokenizer.decode(packed.targets.tolist(), special=True)
        assert told == "".join(["late fees<|im_end|>"] * (len(rows) - 1) + said)
        # The token before each target predicts it.
        assert packed.ids[packed.predict + 1].tolist() == packed.targets.tolist()


def test_an_earlier_answer_that_is_written_otherwise_later_carries_no_loss(tmp_path: Path) -> None:
    """A template that leaves the thinking block out of earlier turns: what stands there is not what was said."""
    chat = Chat(load_tokenizer(model_folder(tmp_path / "m", template=USUAL["qwen3"])))
    talk = [dict(m) for m in TALK]
    talk[2]["content"] = "<think>\nhm\n</think>\n\npayment"
    row = chat.encode(talk, "late fees", every=True)
    said = [chat.tokenizer.decode(row.ids[a:b], special=True) for a, b in row.spans]
    assert said == ["the supplier<|im_end|>", "late fees<|im_end|>"]


def trainer_of(work: Path, rate: float) -> Trainer:
    rows = [Encoded([(7 * r + 3 * i) % 90 + 3 for i in range(12)], 6) for r in range(16)]
    net = model_of("llama").requires_grad_(True)
    config = TrainConfig(
        epochs=4, patience=4, batch_rows=2, capacity=64, learning_rate=rate, seed=0, rows=len(rows), fingerprint="x"
    )  # fmt: skip
    return Trainer(net, rows, config, work, "cpu")


def test_a_diverging_loss_stops_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 30.0)
    first = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    state = trainer.run(lambda net: {"score": 0.5, "loss": 1.0}, lambda state, rate: None, save_seconds=1e9)
    assert DIVERGED in state.stopped and "30" in state.stopped and state.epoch < 4
    if state.best_epoch == 0 and state.epoch == 1:
        for name, parameter in trainer.parameters.items():
            torch.testing.assert_close(parameter.detach(), first[name])
    assert (tmp_path / START).is_file() and len(state.history) == state.epoch


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, 1e-3)
    inner, calls = trainer.module.forward, []

    def forward(item: Any) -> Any:
        calls.append(1)
        return inner(item) * (float("nan") if len(calls) == 11 else 1.0)

    monkeypatch.setattr(trainer.module, "forward", forward)
    state = trainer.run(lambda net: {"score": 0.5, "loss": 1.0}, lambda state, rate: None, save_seconds=1e9)
    assert "not a number at step" in state.stopped
    assert all(torch.isfinite(p).all() for p in trainer.parameters.values())
    json.dumps(state.losses, allow_nan=False)


def test_a_loss_that_falls_is_no_divergence(tmp_path: Path) -> None:
    state = trainer_of(tmp_path, 1e-3).run(
        lambda net: {"score": 0.5, "loss": 1.0}, lambda state, rate: None, save_seconds=1e9
    )
    assert DIVERGED not in state.stopped and state.losses[-1] < state.losses[0]
