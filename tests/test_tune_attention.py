"""Packed rows apart and answers without padding: the same numbers as the masked and padded ways."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import tune.generate
import tune.loss
from tune.attention import rows_apart, separable
from tune.batches import pack
from tune.generate import _greedy, _without_padding
from tune.loss import pack_loss
from unshot.text.chat import Chat, Encoded, load_tokenizer

pytestmark = pytest.mark.slow


def model_of(path: Path) -> torch.nn.Module:
    """A model in fp32 with torch's attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")


def rows(count: int) -> list[Encoded]:
    """Rows of different lengths."""
    return [Encoded([(7 * r + 3 * i) % 200 + 5 for i in range(4 + 3 * r)], 2 + r) for r in range(count)]


def test_rows_apart_have_the_loss_and_gradients_of_the_masked_square(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, one = model_of(tiny_model), pack(rows(6))
    found = []
    for apart in (rows_apart, lambda *_: nullcontext()):
        monkeypatch.setattr(tune.loss, "rows_apart", apart)
        net.zero_grad()
        loss = pack_loss(net, one, "cpu")
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in net.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_rows_apart_leave_the_model_as_it_was(tiny_model: Path) -> None:
    net, one = model_of(tiny_model), pack(rows(3))
    with pytest.raises(RuntimeError, match="stop"), rows_apart(net, one.positions):
        assert net.config._attn_implementation != "sdpa"
        raise RuntimeError("stop")
    assert net.config._attn_implementation == "sdpa"


def test_a_sliding_window_and_recomputed_layers_keep_the_mask(tiny_model: Path) -> None:
    net = model_of(tiny_model)
    assert separable(net, 100)
    net.config.sliding_window = 50
    assert separable(net, 50)
    assert not separable(net, 51)
    net.config.sliding_window = None
    net.train()
    net.gradient_checkpointing_enable()
    assert not separable(net, 10)


def test_answers_without_padding_are_those_of_generate(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many lengths, read in several groups; some rows end early, for the end is a token that some say."""
    net, chat = model_of(tiny_model).eval(), Chat(load_tokenizer(tiny_model))
    for parameter in net.parameters():  # a fresh model says one token for ever
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    words = ("notice", "fee", "data", "late", "party", "law", "term", "use", "risk")
    prompts = [
        chat.prompt_ids([{"role": "user", "content": " ".join(words[n:] * (n + 1))}])
        for n in range(len(words))
    ]
    monkeypatch.setattr(tune.generate, "READ", 40)
    with torch.no_grad():
        free = _without_padding(net, prompts, 12, -1)
        assert len({tuple(reply) for reply in free}) > 1
        monkeypatch.setattr(chat, "end", free[0][5])
        ours = [until(reply, chat.end) for reply in _without_padding(net, prompts, 12, chat.end)]
        theirs = [until(reply, chat.end) for reply in _greedy(net, chat, prompts, 12, synced=False)]
    assert ours == theirs == [until(reply, chat.end) for reply in free]
    assert min(map(len, ours)) < 12


def until(reply: list[int], end: int) -> list[int]:
    """The reply before its end token."""
    return reply[: reply.index(end)] if end in reply else reply
