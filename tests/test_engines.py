"""Engines agree with each other on ids, templates and logits, and the prefix cache changes time, not answers."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unshot import embedded
from unshot.engines import Engine, open_engine, parse_spec
from unshot.engines.base import common_prefix
from unshot.errors import InputError

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Name the capital of France. 2024 😀"}]
LONG = [
    {"role": "user", "content": "The tenant pays the rent on the first day of every month. " * 12 + "Why?"}
]
OTHER = [
    {"role": "user", "content": "The tenant pays the rent on the first day of every month. " * 12 + "When?"}
]


@pytest.fixture(scope="module")
def gguf() -> Iterator[Engine]:
    with open_engine(f"gguf:{embedded.gguf_path()}", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def torch_engine() -> Iterator[Engine]:
    pytest.importorskip("torch")
    with open_engine(f"torch:{embedded.NAME}", threads=1) as engine:
        yield engine


def test_prompts_are_the_same_ids_in_both_engines(gguf: Engine, torch_engine: Engine) -> None:
    for messages in (MESSAGES, LONG, [{"role": "system", "content": "Be brief."}, *MESSAGES]):
        assert gguf.render(messages) == torch_engine.render(messages)
        assert gguf.prompt_ids(messages) == torch_engine.prompt_ids(messages)


def test_logits_agree_between_llama_cpp_and_torch(gguf: Engine, torch_engine: Engine) -> None:
    ids = gguf.prompt_ids(MESSAGES)
    ours, theirs = gguf.logits(ids), torch_engine.logits(ids)
    assert ours.shape == theirs.shape == (len(ids), 49152)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    # llama.cpp rounds activations to 8 bits, in kernels that differ by processor: one position may be further off
    # (0.973 with AVX2, over 0.99 with AVX-512), the others may not.
    assert np.median(cosine) > 0.998
    assert np.mean(cosine > 0.99) >= 0.95
    assert cosine.min() > 0.95


def test_generation_takes_the_largest_logit_at_each_step(gguf: Engine) -> None:
    ids = gguf.prompt_ids(MESSAGES)
    gguf.reset()
    answer = gguf.generate(ids, max_tokens=5)
    table = gguf.logits([*ids, *answer.ids[:-1]])[len(ids) - 1 :]
    chosen = table[np.arange(len(answer.ids)), answer.ids]
    # Batched and stepwise sums differ in the last bits, so a near-tie may fall either way.
    assert (chosen >= table.max(axis=1) - 0.05).all()


@pytest.mark.parametrize("which", ["gguf", "torch_engine"])
def test_the_prefix_cache_keeps_the_answer_and_saves_the_prefix(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = request.getfixturevalue(which)
    real, computed = engine._run, []
    monkeypatch.setattr(engine, "_run", lambda ids: computed.append(len(ids)) or real(ids))
    first, second = engine.prompt_ids(LONG), engine.prompt_ids(OTHER)
    cold = engine.generate(second, max_tokens=8, prefix_cache=False)
    assert cold.cached == 0 and max(computed) == len(second)
    engine.generate(first, max_tokens=8, prefix_cache=False)
    computed.clear()
    warm = engine.generate(second, max_tokens=8)
    assert warm.cached == common_prefix(first, second) > 100
    assert warm.text == cold.text
    assert max(computed) == len(second) - warm.cached
    again = engine.generate(second, max_tokens=8)
    assert again.cached == len(second) - 1
    engine.reset()
    assert engine.generate(second, max_tokens=1).cached == 0


def test_each_token_has_its_time_and_the_limit_holds(gguf: Engine) -> None:
    answer = gguf.generate(gguf.prompt_ids(MESSAGES), max_tokens=6, stop_ids=())
    assert len(answer.ids) == len(answer.token_times) == 6
    assert answer.finish == "length"
    assert answer.start < answer.token_times[0]
    assert all(np.diff(answer.token_times) > 0)
    assert answer.e2e > answer.ttft > 0


def test_a_stop_id_ends_the_answer_and_is_not_in_its_text(gguf: Engine) -> None:
    ids = gguf.prompt_ids(MESSAGES)
    free = gguf.generate(ids, max_tokens=6, stop_ids=())
    stopped = gguf.generate(ids, max_tokens=6, stop_ids={free.ids[3]})
    assert stopped.finish == "stop"
    assert stopped.ids == free.ids[: free.ids.index(free.ids[3]) + 1]
    assert stopped.text == gguf.detokenize(stopped.ids[:-1])


def test_tokens_round_trip(gguf: Engine) -> None:
    for text in ("plain", "12345", "naïve — 😀 汉字", "  two  spaces\n\ttab", "x = {'a': [1, 2]}"):
        assert gguf.detokenize(gguf.tokenize(text)) == text


def test_the_model_limit_is_an_error_of_one_line(gguf: Engine) -> None:
    with pytest.raises(InputError, match="the model holds"):
        gguf.generate([1] * 10, max_tokens=10**6)
    with pytest.raises(InputError, match="empty prompt"):
        gguf.generate([], max_tokens=1)


@pytest.mark.parametrize("spec", ["model.gguf", "ggfu:x", "gguf:"])
def test_bad_specs(spec: str) -> None:
    with pytest.raises(InputError):
        parse_spec(spec)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_engine(f"gguf:{tmp_path / 'none.gguf'}")
    other = tmp_path / "text.gguf"
    other.write_text("hello")
    with pytest.raises(InputError, match="not a GGUF"):
        open_engine(f"gguf:{other}")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + struct.pack("<I", 3) + b"\xff" * 64)
    with pytest.raises(InputError, match="cannot load"):
        open_engine(f"gguf:{damaged}")


@pytest.mark.parametrize("family", ["lfm2", "gemma3_vision"])
def test_a_state_that_cannot_be_cut_back_is_computed_anew_and_counted_so(tmp_path: Path, family: str) -> None:
    """LFM2's convolutions have a state beside attention; a model that takes images has its sizes in its text part."""
    pytest.importorskip("torch")
    from tests.tiny_models import make

    ids = list(range(5, 45))
    with open_engine(f"torch:{make(family, tmp_path / family)}", threads=1) as engine:
        first = engine.generate(ids, max_tokens=6)
        engine.generate([*ids[:20], 99, 98, 97, 96], max_tokens=5)
        again = engine.generate(ids, max_tokens=6)
        assert again.ids == first.ids and again.cached == (0 if family == "lfm2" else 20)
        longer = [*ids, *first.ids[:-1], 7]
        on = engine.generate(longer, max_tokens=3)
        assert on.cached == len(longer) - 1
        assert on.ids == engine.generate(longer, max_tokens=3, prefix_cache=False).ids
