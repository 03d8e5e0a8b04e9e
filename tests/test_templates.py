"""One renderer: what transformers writes, an end to what a template may cost, and what is added where it is certain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chat_templates import AWKWARD, TALKS, TEMPLATES, USUAL
from tests.planner_files import model_folder
from tune.prove import prove_template, rows_to_prove
from unshot.data.rows import Example
from unshot.errors import InputError
from unshot.models import Source
from unshot.text.chat import Chat, load_tokenizer
from unshot.text.repair import repaired, thinks
from unshot.text.sandbox import MAX_MADE, MAX_STEPS
from unshot.text.template import Template, load_template
from unshot.text.tokenizers import open_counter

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ASK = [{"role": "user", "content": "hello"}]


def theirs(source: str, messages: list[dict[str, Any]], *, generate: bool, **variables: Any) -> str:
    """What transformers renders; jinja's and Python's errors come out as they are."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=generate, **TOKENS, **variables
    )
    return str(texts[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
def test_every_template_renders_as_transformers_does(name: str, generate: bool) -> None:
    pytest.importorskip("transformers")
    ours = Template(TEMPLATES[name], TOKENS, "model")
    for messages in TALKS:
        try:
            expected = theirs(TEMPLATES[name], messages, generate=generate)
        except Exception:
            with pytest.raises(InputError, match="refuses these messages"):
                ours.render(messages, generate=generate)
            continue
        assert ours.render(messages, generate=generate) == expected


def test_variables_tools_and_documents_reach_the_template() -> None:
    pytest.importorskip("transformers")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    source = USUAL["qwen2.5"]
    expected = theirs(source, TALKS[1], generate=True, tools=tools)
    assert Template(source, TOKENS, "m").render(TALKS[1], tools=tools) == expected
    quiet = {"enable_thinking": False}
    expected = theirs(USUAL["qwen3"], TALKS[1], generate=True, **quiet)
    assert Template(USUAL["qwen3"], TOKENS, "m").render(TALKS[1], variables=quiet) == expected
    shouted = Template("{{ bos_token }}", TOKENS, "m").render(ASK, variables={"bos_token": "<S>"})
    assert shouted == theirs("{{ bos_token }}", ASK, generate=True).upper()


def test_thirty_templates_or_more() -> None:
    assert len(USUAL) >= 20 and len(TEMPLATES) >= 30


GROW = "{{% set ns = namespace(s={start}) %}}{{% for i in range(60) %}}{{% set ns.s = {step} %}}{{% endfor %}}{end}"
BOMBS = {
    "endless loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "endless in a filter": "{% for i in range(100000) if range(100000)|list|length < 0 %}{% endfor %}",
    "template text": "{% for i in range(100000) %}{% for j in range(100) %}"
    + "y" * 9000
    + "{% endfor %}{% endfor %}",
    "times": "{{ 'x' * 10**9 }}",
    "times, in one constant": "{{ 1000000000 * 'x' }}",
    "power": "{{ 99999 ** 99999 }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format by map": "{{ ['{:1000000000}'] | map('format', 1) | list }}{{ '{:1000000000}'['format'](1) }}",
    "indent": "{{ 'x\ny' | indent(1000000000) }}",
    "json indent": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 5 | round(-1000000000) }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "wrap": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='x' * 100000) }}",
    "doubling": GROW.format(start="'x'", step="ns.s + ns.s", end="{{ ns.s }}"),
    "doubling by tilde": GROW.format(start="'x'", step="ns.s ~ ns.s", end="{{ ns.s }}"),
    "doubling by replace": GROW.format(start="'xx'", step="ns.s.replace('x', 'xx')", end="{{ ns.s }}"),
    "doubling by the filter": GROW.format(start="'xx'", step="ns.s | replace('x', 'xx')", end="{{ ns.s }}"),
    "doubling by join": GROW.format(start="'xx'", step="ns.s.join('xxx')", end="{{ ns.s }}"),
    "doubling lists": GROW.format(start="[1]", step="ns.s + ns.s", end="{{ ns.s | length }}"),
    "shared lists written": GROW.format(start="[1]", step="[ns.s, ns.s]", end="{{ ns.s }}"),
    "shared lists as JSON": GROW.format(start="[1]", step="[ns.s, ns.s]", end="{{ ns.s | tojson }}"),
    "shared lists compared": GROW.format(start="[1]", step="[ns.s, ns.s]", end="{{ ns.s == (ns.s | list) }}"),
    "shared tuples hashed": GROW.format(start="(1,)", step="(ns.s, ns.s)", end="{{ {ns.s: 1} | length }}"),
    "shared tuples as key": GROW.format(start="(1,)", step="(ns.s, ns.s)", end="{{ {1: 2}[ns.s] }}"),
    "set block": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = t %}{% endfor %}{{ ns.s }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macro without end": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "deep": "{% set ns = namespace(s=[1]) %}{% for i in range(5000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    "own namespace": "{% set ns = namespace() %}{% set ns.s = ns %}{{ ns }}",
    "brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "nested ifs": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "long source": "x" * 300_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_end_or_measure_is_one_clear_error(name: str) -> None:
    import resource
    import threading

    threads, memory = threading.active_count(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        Template(BOMBS[name], TOKENS, "the model").render(ASK)
    assert str(caught.value).startswith("the model: the chat template") and "\n" not in str(caught.value)
    assert threading.active_count() == threads
    unit = 1 if __import__("sys").platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * unit < 500e6


def test_long_conversations_are_within_the_limits() -> None:
    """A thousand turns in a template that adds text to text, which copies what it has each time."""
    source = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + '<|user|>' + m.content %}"
        "{% endfor %}{{ ns.t }}"
    )
    talk = [{"role": "user", "content": "x" * 500}] * 1000
    assert len(Template(source, TOKENS, "m").render(talk)) > 500_000
    long = [{"role": "user", "content": "y" * 5_000_000}]
    assert len(Template(USUAL["llama3"], TOKENS, "m").render(long)) > 5_000_000
    assert MAX_STEPS >= 1_000_000 and MAX_MADE >= 10_000_000


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ lipsum.__globals__ }}",
     "{% include '/etc/passwd' %}", "{{ self.__init__.__globals__ }}", "{{ '{0.__class__}'.format(1) + missing.x }}",
     "{{ ''|attr('__class__')|attr('__mro__') + 1 }}", "{{ cycler.__init__.__globals__.os }}"],
)  # fmt: skip
def test_a_template_cannot_reach_out(source: str) -> None:
    with pytest.raises(InputError):
        Template(source, TOKENS, "m").render(ASK)


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="{}%-# mn()[]'.|+*~=0123456789eforidsabctxgp_\n", max_size=80))
def test_any_source_renders_or_is_an_input_error(text: str) -> None:
    try:
        Template(text, TOKENS, "m").render(ASK)
    except InputError as error:
        assert "\n" not in str(error)


def test_named_templates_in_the_config(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))

    def named(**templates: str) -> None:
        pairs = [{"name": n, "template": t} for n, t in templates.items()]
        path.write_text(json.dumps(config | {"chat_template": pairs}), encoding="utf-8")

    named(rag="R", default="D{{ messages[0].content }}")
    assert load_template(folder).render(ASK) == "Dhello"
    assert load_template(folder, "rag").render(ASK) == "R"
    named(rag="R", tool_use="T")
    with pytest.raises(InputError, match=r"rag, tool_use.*--chat-template"):
        load_template(folder)
    assert load_template(folder, "tool_use").render(ASK) == "T"
    own = tmp_path / "own.jinja"
    own.write_text("O", encoding="utf-8")
    assert load_template(folder, str(own)).render(ASK) == "O"
    with pytest.raises(InputError, match="no such file; the model has rag, tool_use"):
        load_template(folder, "tools")
    for odd in (5, [1], [{"name": "default"}], {"default": 3}):
        path.write_text(json.dumps(config | {"chat_template": odd}), encoding="utf-8")
        with pytest.raises(InputError, match="chat_template"):
            load_template(folder)


def chat_of(folder: Path, source: str, *tokens: str) -> Chat:
    """A model folder with a template and more special tokens, opened."""
    from tokenizers import AddedToken, Tokenizer

    model_folder(folder, template=source)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    tokenizer.save(path)
    return Chat(load_tokenizer(folder))


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")


@pytest.mark.parametrize(
    ("name", "tokens", "note", "prompt", "end"),
    [
        ("drops-system", (), "before the first question",
         "<|im_start|>user\nbrief\n\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        ("gemma2", ("<start_of_turn>", "<end_of_turn>"), "before the first question",
         "<s><start_of_turn>user\nbrief\n\nhi<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
        ("parts-only", (), "as parts",
         "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        ("qwen3-thinking", (), "closed before the answer",
         "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
         "<|im_end|>"),
        ("gpt-oss", HARMONY, "header", None, "<|return|>"),
        ("qwen2.5", (), None, None, "<|im_end|>"),
        ("qwen3", (), None, None, "<|im_end|>"),
    ],
)  # fmt: skip
def test_what_a_template_lacks_is_added_and_said(
    tmp_path: Path, name: str, tokens: tuple[str, ...], note: str | None, prompt: str | None, end: str
) -> None:
    chat = chat_of(tmp_path / "model", TEMPLATES[name], *tokens)
    text = chat.render([{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}])
    assert "brief" in text and "hi" in text
    if prompt is not None:
        assert text == prompt
    if name == "gpt-oss":
        assert text.endswith("<|start|>assistant<|channel|>final<|message|>")
    assert len(chat.tokenizer.repairs) == (note is not None)
    assert note is None or note in chat.tokenizer.repairs[0]
    assert chat.tokenizer.token(chat.end) == end


def test_a_repaired_template_is_plain_jinja_for_any_engine() -> None:
    """transformers renders the text that is written into a run's files as we do."""
    pytest.importorskip("transformers")
    for name, source in TEMPLATES.items():
        fixed, notes = repaired(Template(source, TOKENS, name), list(HARMONY))
        for messages in TALKS[:2] if notes else []:
            assert fixed.render(messages) == theirs(fixed.source, messages, generate=True), name


def test_an_end_token_written_out_in_an_answer_is_refused(tmp_path: Path) -> None:
    chat = chat_of(tmp_path / "model", USUAL["yi"])
    with pytest.raises(InputError, match="end-of-turn token '<|im_end|>' written out".replace("|", r"\|")):
        chat.encode(ASK, "late fee <|im_end|> payment")


def test_spaces_before_punctuation_stay(tmp_path: Path) -> None:
    chat = chat_of(tmp_path / "model", USUAL["yi"])
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}), encoding="utf-8")
    chat = Chat(load_tokenizer(tmp_path / "model"))
    for text in ("Pourquoi ?", "a , b .", "it 's n't", "  two  spaces "):
        assert chat.decode(chat.tokenizer.ids(text)) == text


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("refuses", "type-error", "undefined")])
def test_the_counter_and_the_chat_give_the_same_ids(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model", template=TEMPLATES[name])
    counter, tokenizer = open_counter(folder), load_tokenizer(folder)
    for messages in TALKS:
        found = []
        for ask in (counter.prompt_ids, lambda m: tokenizer.ids(tokenizer.template.render(m))):
            try:
                found.append(ask(messages))
            except InputError as error:
                found.append(str(error))
        assert found[0] == found[1]
        if isinstance(found[0], list):
            assert counter.prompt(messages) == len(found[0])


def test_awkward_templates_are_many() -> None:
    assert {"generation", "none-or-defined", "tojson", "type-error"} <= set(AWKWARD)


@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<think>\n", "</think>"),
        ("<thought>\n", "</thought>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
    ],
)
def test_a_thinking_block_of_any_family_is_closed_before_the_answer(opens: str, closes: str) -> None:
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>" + opens.replace("\n", "\\n") + "' }}{% endif %}"
    )
    mended, notes = repaired(Template(source, TOKENS, "m"), ["</s>"])
    assert mended.render(ASK).rstrip().endswith(closes) and closes in notes[0]
    if opens != "<think>\n":  # what a user writes opens nothing
        asked = [{"role": "user", "content": f"what is {opens}?"}]
        assert not thinks(Template(USUAL["phi4"], TOKENS, "m").render(asked))


def test_what_only_some_rows_show_of_a_template_is_proved_too(tmp_path: Path) -> None:
    def row(line: int, *turns: str) -> Example:
        roles = ("user", "assistant")
        return Example(tuple({"role": roles[i % 2], "content": t} for i, t in enumerate(turns)), "yes", line)

    def proved(source: str, rows: list[Example]) -> list[str]:
        folder = model_folder(tmp_path / str(len(source)), template=source)
        chosen = rows_to_prove(rows)
        chat = Chat(load_tokenizer(folder))
        return prove_template(chat, Source("m", folder), chosen, [list(r.messages) for r in chosen])

    many = [row(i, f"question {i}") for i in range(20)]
    whole = USUAL["phi4"]
    assert proved(whole, [*many, row(21, "x" * 500), row(22, "first", "no", "second")]) == []
    with pytest.raises(InputError, match="line 21: the chat template leaves out the input"):
        proved(whole.replace("m['content']", "m['content'][:200]"), [*many, row(21, "x" * 500)])
    with pytest.raises(InputError, match="line 22: the chat template leaves out the earlier turns"):
        proved(
            whole.replace("for m in messages", "for m in messages[-1:]"),
            [*many, row(22, "first", "no", "second")],
        )
    result = Example(
        (
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": "found it"},
        ),
        "yes",
        23,
    )
    deaf = whole.replace("{{ '<|im_start|>'", "{% if m['role'] != 'tool' %}{{ '<|im_start|>'", 1).replace(
        "'<|im_end|>' }}{% endfor %}", "'<|im_end|>' }}{% endif %}{% endfor %}"
    )
    assert "tools' results" in proved(deaf, [*many, result])[0]
