"""The gateway in front of scripted servers: arms, fallback, checks, limits, log, and the official OpenAI client."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")

from deploy.serve.breaker import Breaker
from deploy.serve.check import Checker
from deploy.serve.exchange import Routing, position_of
from deploy.serve.target import Price, price_of
from tests.conftest import Run
from tests.gateways import Running, gateway, scripted, until
from unshot.__main__ import main
from unshot.contracts.request_log import read_feedback, read_requests
from unshot.contracts.task import Task
from unshot.engines.server import free_port
from unshot.errors import InputError
from unshot.prices import parse_prices

pytestmark = pytest.mark.cli

CASE = """
[task]
name = "risk"
system = "Say low or high."
examples = "few.jsonl"
instruction = "Risk?"
labels = ["low", "high"]
"""
FREE = '[task]\nname = "chat"\nsystem = "Be brief."\nexamples = "few.jsonl"\ninstruction = "Brief."\n'


def write_case(folder: Path, text: str = CASE) -> Path:
    rows = [("no cap", "high"), ("mutual cap", "low")]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
    (folder / "few.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "case.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[str, str]]:
    with scripted("baseline") as one, scripted("candidate") as two:
        yield one, two


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, servers: tuple[str, str]) -> Iterator[Running]:
    """All users on the candidate; texts are logged."""
    folder = tmp_path_factory.mktemp("labelled")
    arms = [
        "--baseline",
        servers[0],
        "--candidate",
        servers[1],
        "--baseline-model",
        "old",
        "--candidate-model",
        "new",
    ]
    more = ["--timeout", 5, "--candidate-timeout", 0.4, "--log", folder / "log", "--log-texts"]
    more += ["--max-body", 4000, "--reviewer-key-env", "REVIEWERS"]
    case = write_case(folder)
    with gateway(folder, "--case", case, *arms, *more, REVIEWERS="reviewers-own-key") as running:
        yield running


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory, servers: tuple[str, str]) -> Iterator[Running]:
    """A task without labels, so that streams pass as they come."""
    folder = tmp_path_factory.mktemp("free")
    arms = ["--baseline", servers[0], "--candidate", servers[1]]
    price = ["--baseline-price", "2,10,1", "--candidate-hour", 3600, "--logprobs"]
    more = ["--candidate-timeout", 0.4, "--log", folder / "log", *price]
    with gateway(folder, "--case", write_case(folder, FREE), *arms, *more) as running:
        yield running


def written(running: Running) -> Any:
    """A condition: the log has all that was counted."""

    def all_there() -> bool:
        counted = running.metric("unshot_answers_total") + running.metric("unshot_feedback_total")
        return running.metric("unshot_log_lines_total", outcome="written") == counted

    return all_there


def lines(running: Running) -> dict[str, list[dict]]:
    """The log's lines by request id, once they are written."""
    assert until(written(running))
    found: dict[str, list[dict]] = {}
    for entry in read_requests(running.output.parent / "log"):
        found.setdefault(entry.id, []).append(asdict(entry))
    return found


def test_each_arm_gets_its_own_prompt(labelled: Running) -> None:
    got = labelled.ask("candidate=say low")
    assert (got.arm, got.headers["x-unshot-version"], got.text) == ("candidate", "new", "low")
    assert [m["content"] for m in got.body["messages"]] == ["Risk?", "candidate=say low"]
    assert got.body["seen"] == {"model": "new", "temperature": 0}
    assert got.body["model"] == "risk" and got.body["id"].startswith("chatcmpl-")
    fell = labelled.ask("candidate=http 500; baseline=say high", temperature=0.5, max_tokens=3)
    assert (fell.arm, fell.headers["x-unshot-version"]) == ("baseline", "old")
    assert [m["content"] for m in fell.body["messages"]][:-1] == [
        "Say low or high.", "no cap", "high", "mutual cap", "low",
    ]  # fmt: skip
    assert fell.body["seen"] == {"model": "old", "temperature": 0.5, "max_tokens": 3}


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("http 500", "http 500"),
        ("http 400", "http 400"),
        ("http 429", "http 429"),
        ("hang", "timeout"),
        ("reset", "reset"),
        ("cut", "cut short"),
        ("garbage", "bad answer"),
        ("say medium", "schema"),
        ('say {"risk": "low"', "schema"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_candidate_breaks_the_baseline_answers(
    labelled: Running, action: str, reason: str, stream: bool
) -> None:
    labelled.ask("candidate=say low")  # the breaker counts failures in a row
    before = labelled.metric("unshot_fallbacks_total", reason=reason)
    got = labelled.ask(f"candidate={action};baseline=say high", stream=stream)
    assert got.status == 200 and got.arm == "baseline"
    if stream:
        events = [e.removeprefix("data: ") for e in got.body.split("\n\n") if e]
        assert events[-1] == "[DONE]"
        first = json.loads(events[0])
        text, number = first["choices"][0]["delta"]["content"], first["id"]
    else:
        text, number = got.text, got.body["id"]
    assert text == "high"
    assert labelled.metric("unshot_fallbacks_total", reason=reason) == before + 1
    failed, shown = lines(labelled)[number]
    assert (failed["arm"], failed["error"], failed["fallback"]) == ("candidate", reason, False)
    assert (shown["arm"], shown["assigned"], shown["fallback"]) == ("baseline", "candidate", True)
    assert (shown["label"], shown["schema_ok"], shown["error"]) == ("high", True, None)
    assert failed["schema_ok"] is (False if reason == "schema" else None)


def test_where_both_fail_the_user_is_told(labelled: Running) -> None:
    labelled.ask("candidate=say low")
    got = labelled.ask("candidate=reset;baseline=http 503")
    assert got.status == 503 and got.body["error"]["message"] == "scripted 503"
    got = labelled.ask("candidate=reset;baseline=garbage")
    assert got.status == 502 and got.body["error"]["code"] == "bad_answer"
    labelled.ask("candidate=say low")
    got = labelled.ask("candidate=say no;baseline=say neither")  # an answer is better than none
    assert got.status == 200 and got.text == "neither"
    shown = lines(labelled)[got.body["id"]][-1]
    assert shown["schema_ok"] is False and shown["error"] is None


def test_bad_requests_are_refused_in_the_apis_words(labelled: Running) -> None:
    for body, status, part in (
        (b"{", 400, "not JSON"),
        ([], 400, "not a JSON object"),
        ({}, 400, "`messages`"),
        ({"messages": []}, 400, "`messages`"),
        ({"messages": [{"role": "me", "content": "x"}]}, 400, "`messages[0].role`"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "`messages[0].content`"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "user's own messages only"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 2}, 400, "`n`"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "gpt-4o"}, 404, "ask for `risk`"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 5000 + b'"}]}', 413, "more than 4000"),
    ):
        got = labelled.call("/v1/chat/completions", body)
        assert got.status == status and part in got.body["error"]["message"]
    assert labelled.call("/v2/x").status == 404 and labelled.call("/v1/chat/completions").status == 405
    assert labelled.health()["arms"]["candidate"]["active"] == 0
    assert labelled.metric("unshot_active_requests") == 0


def test_the_breaker_opens_and_a_probe_closes_it(tmp_path: Path, servers: tuple[str, str]) -> None:
    """After five failures in a row users get the baseline's answer at once; a probe of the gateway's own mends it."""
    arms = ["--baseline", servers[0], "--candidate", servers[1]]
    more = ["--candidate-timeout", 0.3, "--cooldown", 0.5]
    with gateway(tmp_path, "--case", write_case(tmp_path), *arms, *more) as running:
        for _ in range(5):
            assert running.ask("candidate=hang;baseline=say low").text == "low"
        assert running.health()["arms"]["candidate"]["breaker"] == "open"
        assert running.metric("unshot_breaker_state", arm="candidate") == 2
        asked = running.metric("unshot_answers_total", arm="candidate", outcome="timeout")
        assert running.ask("candidate=hang;baseline=say low").arm == "baseline"
        assert (
            running.metric("unshot_answers_total", arm="candidate", outcome="timeout") == asked
        )  # it was not tried
        assert running.metric("unshot_fallbacks_total", reason="breaker open") == 1
        # The probe's own text makes the scripted server answer, so that it succeeds.
        assert until(lambda: running.health()["arms"]["candidate"]["breaker"] == "closed", 15)
        assert running.ask("candidate=say high").arm == "candidate"


def test_texts_are_logged_only_when_asked_and_redacted(labelled: Running, free: Running) -> None:
    got = labelled.ask(
        "candidate=say low;mail ada@example.com or +1 415 555 2671", user="wilhelmina", slice="mail"
    )
    (line,) = lines(labelled)[got.body["id"]]
    assert line["input"] == "candidate=say low;mail [EMAIL] or [PHONE]" and line["answer"] == "low"
    again = labelled.ask("candidate=say low", user="wilhelmina")
    assert lines(labelled)[again.body["id"]][0]["unit"] == line["unit"] != position_of("wilhelmina")
    assert line["slice"] == "mail" and line["input_words"] == 8 and line["share"] == 1.0
    assert line["prompt_tokens"] and line["e2e_s"] >= line["queue_s"] >= 0
    got = free.ask("candidate=say my number is 415 555 2671")
    (line,) = lines(free)[got.body["id"]]
    assert line["input"] is None and line["answer"] is None and line["input_words"] == 7
    everything = "".join(p.read_text() for p in (labelled.output.parent / "log").iterdir())
    assert "ada@" not in everything and "wilhelmina" not in everything
    # Not its last four digits alone: some figure of some line may hold them.
    assert not re.search(r"555\D{0,3}2671", everything)


def test_cost_cached_tokens_and_logprob(free: Running) -> None:
    got = free.ask("candidate=http 500;baseline=say one two")
    assert "logprobs" not in got.body["choices"][0]
    _, line = lines(free)[got.body["id"]]
    assert line["logprob"] == -1.0 and line["cached_tokens"] == 1
    assert line["cost_usd"] == pytest.approx(((line["prompt_tokens"] - 1) * 2 + 1 * 1 + 2 * 10) / 1e6)
    got = free.ask("candidate=say x", logprobs=True)
    assert got.body["choices"][0]["logprobs"]
    (line,) = lines(free)[got.body["id"]]
    assert line["cost_usd"] == pytest.approx(line["e2e_s"] - line["queue_s"], abs=2e-6)  # $1 a second


def test_feedback_reaches_the_log(labelled: Running) -> None:
    got = labelled.ask("candidate=say low")
    number, token = got.body["id"], got.headers["x-unshot-feedback-token"]
    given = {"id": number, "correct": False, "correction": "high, says bob@example.com", "token": token}
    assert labelled.call("/v1/feedback", given).body == {"id": number, "recorded": True}
    assert until(written(labelled))
    found = read_feedback(labelled.output.parent / "log")[number]
    assert (found.correct, found.correction, found.by) == (False, "high, says [EMAIL]", "user")
    for bad in ({"id": number}, {"correct": True}, {"id": number, "correct": True, "score": 3}, []):
        assert labelled.call("/v1/feedback", bad).status == 400
    other = labelled.ask("candidate=say low").headers["x-unshot-feedback-token"]
    for bad in ({"token": ""}, {"token": other}, {"token": "\u00e9"}, {"token": token, "by": "reviewer"}):
        refused = labelled.call("/v1/feedback", {"id": number, "correct": True, **bad})
        assert refused.status == 403, bad
    reviewer = {"Authorization": "Bearer reviewers-own-key"}
    given = {"id": number, "correction": "low", "by": "expert"}
    assert labelled.call("/v1/feedback", given, **reviewer).status == 200
    assert labelled.call("/v1/feedback", {"id": number, "correct": True, "token": token}).status == 200
    assert until(written(labelled))
    found = read_feedback(labelled.output.parent / "log")[number]
    assert (found.correction, found.by) == ("low", "expert")  # a user's later word does not undo an expert's


def test_streams_of_free_text_pass_as_they_come(free: Running) -> None:
    got = free.ask("candidate=say one two three", stream=True)
    events = [json.loads(e.removeprefix("data: ")) for e in got.body.split("\n\n") if e and "[DONE]" not in e]
    words = [e["choices"][0]["delta"].get("content") for e in events if e["choices"]]
    assert [w for w in words if w] == ["one", " two", " three"] and got.arm == "candidate"
    assert not any("usage" in e for e in events) and {e["model"] for e in events} == {"chat"}
    (line,) = lines(free)[events[0]["id"]]
    assert line["completion_tokens"] == 3 and line["ttft_s"] <= line["e2e_s"]
    got = free.ask("candidate=hang;baseline=say four", stream=True)
    assert got.arm == "baseline" and "four" in got.body
    got = free.ask("candidate=cut one two three four", stream=True)  # too late for the baseline
    assert got.arm == "candidate" and '"cut_short"' in got.body and got.body.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_frees_its_place(free: Running) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", free.port)
    body = json.dumps(
        {"messages": [{"role": "user", "content": "baseline=hang;candidate=hang"}], "stream": True}
    )
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    connection.close()
    assert until(lambda: free.metric("unshot_answers_total", outcome="client gone") >= 1, 10)
    assert free.metric("unshot_active_requests") == 0
    assert {a["active"] for a in free.health()["arms"].values()} == {0}


def test_any_openai_client_works(labelled: Running, free: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=labelled.url, api_key="not needed", max_retries=0)
    assert [m.id for m in client.models.list()] == ["risk"]
    assert client.models.retrieve("risk").id == "risk"
    ask = [{"role": "user", "content": "candidate=say low"}]
    whole = client.chat.completions.create(model="risk", messages=ask, user="ada")
    assert whole.choices[0].message.content == "low" and whole.usage.completion_tokens == 1
    parts = [{"role": "user", "content": [{"type": "text", "text": "candidate=say low"}]}]
    assert client.chat.completions.create(model="risk", messages=parts).choices
    for running, name in ((labelled, "risk"), (free, "chat")):
        client = openai.OpenAI(base_url=running.url, api_key="not needed", max_retries=0)
        chunks = list(
            client.chat.completions.create(
                model=name, messages=ask, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "low"
        assert chunks[-1].usage.completion_tokens == 1 and not chunks[-1].choices
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=ask)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "candidate=reset;baseline=reset"}]
        )


def test_units_stay_in_their_arm_and_the_share_moves_them_one_way(
    tmp_path: Path, servers: tuple[str, str], unshot: Run
) -> None:
    store = tmp_path / "store"
    assert unshot("deploy", "registry", "init", "--store", store).returncode == 0
    assert unshot("deploy", "split", "30", "--store", store).returncode == 0
    arms = ["--baseline", servers[0], "--candidate", servers[1], "--store", store]
    with gateway(tmp_path, *arms, "--key-env", "MY_KEY", MY_KEY="s3cret-key") as running:

        def drawn() -> dict[str, str]:
            key = {"Authorization": "Bearer s3cret-key"}
            return {
                f"u{n}": running.call(
                    "/v1/chat/completions",
                    {"messages": [{"role": "user", "content": "hi"}], "user": f"u{n}"},
                    **key,
                ).arm
                for n in range(80)
            }

        assert running.ask("hi").status == 401
        assert running.health()["split"] == 30
        first = drawn()
        assert first == drawn() and 10 <= Counter(first.values())["candidate"] <= 40
        assert unshot("deploy", "split", "60", "--store", store).returncode == 0
        assert until(lambda: running.health()["split"] == 60, 10)
        more = drawn()
        assert all(more[u] == "candidate" for u, arm in first.items() if arm == "candidate")
        assert Counter(more.values())["candidate"] > Counter(first.values())["candidate"]
        assert running.stop() == 0
        assert "s3cret" not in running.output.read_text()


def test_a_shadow_is_logged_and_never_waited_for(tmp_path: Path, servers: tuple[str, str]) -> None:
    arms = ["--baseline", servers[0], "--candidate", servers[1], "--split", "0", "--shadow"]
    more = ["--log", tmp_path / "log", "--candidate-timeout", "1"]
    with gateway(tmp_path, "--case", write_case(tmp_path), *arms, *more) as running:
        took = []
        for _ in range(3):
            start = time.perf_counter()
            got = running.ask("baseline=say low;candidate=hang")
            took.append(time.perf_counter() - start)
            assert got.arm == "baseline"
        assert min(took) < 0.9  # each would be a second long
        slow = got.body["id"]
        got = running.ask("baseline=say low;candidate=say high")
        assert until(lambda: len(lines(running).get(got.body["id"], [])) == 2, 10)
        shown, shadow = lines(running)[got.body["id"]]
        assert (shown["arm"], shown["label"], shown["shadow"]) == ("baseline", "low", False)
        assert (shadow["arm"], shadow["label"], shadow["shadow"]) == ("candidate", "high", True)
        assert lines(running)[slow][1]["error"] == "timeout" and not shadow["fallback"]
        assert running.metric("unshot_shadows_total", outcome="ok") == 1
        assert running.metric("unshot_fallbacks_total") == 0


def test_more_than_it_can_take_is_refused_with_retry_after(tmp_path: Path, servers: tuple[str, str]) -> None:
    arms = ["--baseline", servers[0], "--timeout", "2", "--concurrency", "3"]
    with gateway(tmp_path, *arms) as running:
        slow = [threading.Thread(target=running.ask, args=("baseline=hang",)) for _ in range(3)]
        for thread in slow:
            thread.start()
        assert until(lambda: running.metric("unshot_active_requests") == 3, 5)
        got = running.ask("baseline=say low")
        assert got.status == 429 and got.headers["retry-after"] == "1"
        for thread in slow:
            thread.join()
        assert running.ask("baseline=say low").status == 200
        assert running.metric("unshot_rejected_requests_total", reason="busy") == 1


def test_stopping_finishes_what_is_under_way(tmp_path: Path, servers: tuple[str, str]) -> None:
    with gateway(tmp_path, "--baseline", servers[0], "--timeout", "1.5") as running:
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(running.ask("baseline=hang").status))
        thread.start()
        assert until(lambda: running.metric("unshot_active_requests") == 1, 5)
        assert running.stop() == 0
        thread.join()
        assert results == [504]


def test_what_cannot_be_served_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], servers: tuple[str, str]
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, it says")
    (tmp_path / "no.gguf").write_bytes(b"no")
    case = write_case(tmp_path, '[task]\nanswer_schema = "schema.json"\n')
    (tmp_path / "schema.json").write_text('{"type": "nonsense"}')
    for arguments, code, part in (
        (["--store", tmp_path / "none"], 2, "nothing to serve"),
        (["--candidate", "champion", "--store", tmp_path / "none"], 2, "no registry in --store"),
        (["--baseline", f"gguf:{tmp_path}/missing.gguf"], 2, "no such file"),
        (["--baseline", f"gguf:{tmp_path}/no.gguf"], 2, "not a GGUF file"),
        (["--baseline", f"gguf:{tmp_path}/bad.gguf"], 3, "its server ended"),
        (["--baseline", "http://me:secret@host/v1"], 2, "credentials"),
        (["--baseline", servers[0], "--baseline-key-env", "NOT_SET_HERE"], 2, "NOT_SET_HERE"),
        (["--baseline", servers[0], "--baseline-price", "cheap"], 2, "a price is `cheap`"),
        (["--baseline", servers[0], "--log-texts"], 2, "--log"),
        (["--baseline", servers[0], "--case", case], 2, "schema.json: not a JSON schema"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["deploy", "serve", "--port", str(free_port()), *map(str, arguments)])
        err = capsys.readouterr().err
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert stop.value.code == code and len(errors) == 1 and part in errors[0], err
        assert "secret" not in err and "Traceback" not in err


def test_breaker_waits_longer_after_each_failed_probe() -> None:
    breaker = Breaker(failures=2, cooldown=0.02)
    breaker.failure()
    assert breaker.passes
    breaker.failure()
    assert not breaker.passes and breaker.state == "open" and not breaker.due()
    time.sleep(0.03)
    assert breaker.due()
    breaker.probe()
    assert breaker.state == "half-open" and not breaker.due() and not breaker.passes
    breaker.probe_failed()
    time.sleep(0.03)
    assert not breaker.due()
    time.sleep(0.02)
    assert breaker.due()
    breaker.success()
    assert breaker.passes and breaker.state == "closed"


def test_the_draw_follows_the_share() -> None:
    backend = object()
    routing = Routing(backend, backend, 0.25)  # type: ignore[arg-type]
    drawn = Counter(routing.draw(position_of(f"user {n}")) for n in range(20_000))
    assert 0.24 < drawn["candidate"] / 20_000 < 0.26
    assert Routing(backend, backend, 0.0).draw("f" * 16) == "baseline"  # type: ignore[arg-type]
    assert Routing(backend, backend, 1.0).draw("f" * 16) == "candidate"  # type: ignore[arg-type]
    assert Routing(backend, None, 1.0).draw("0" * 16) == "baseline"  # type: ignore[arg-type]


def test_checks_of_labels_fields_and_schemas() -> None:
    assert Checker(Task()).check("anything") == (None, None) and not Checker(Task()).active
    labels = Checker(Task(labels=["low", "high"]))
    assert labels.check(" Low ") == (True, "low") and labels.check("lowish") == (False, None)
    schema = {"type": "object", "required": ["risk", "reason"], "additionalProperties": False,
              "properties": {"risk": {"enum": ["low", "high"]}, "reason": {"type": "string"}}}  # fmt: skip
    both = Checker(Task(labels=["low", "high"], answer_field="risk"), schema)
    assert both.check('{"risk": "low", "reason": "capped"}') == (True, "low")
    assert both.check('```json\n{"risk": "low", "reason": "capped"}\n```') == (True, "low")
    assert both.check('{"risk": "low"}') == (False, "low")
    assert both.check('{"risk": "none", "reason": "x"}') == (False, None)
    assert Checker(None, schema).check("{") == (False, None)


def test_prices() -> None:
    assert price_of(parse_prices("1,4"), None, None) == Price(1, 4)
    assert price_of(None, 2.0, None) == Price(hour=2.0)
    assert Price(1, 4, 0.5).of(1_000_000, 400_000, 500_000, 9) == pytest.approx(0.6 + 0.2 + 2.0)
    assert Price(hour=3.6).of(None, None, None, 1000) == pytest.approx(1.0)
    for bad in ("1", "1,2,3,4", "a,b", "-1,2"):
        with pytest.raises(InputError, match="a price is"):
            parse_prices(bad)
