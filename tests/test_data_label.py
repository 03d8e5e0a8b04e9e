"""`unshot data label` against a scripted server on a real socket: what is paid, asked again, left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tune.data.label import LabelReport
from unshot.__main__ import main
from unshot.errors import InputError

Reply = tuple[int, dict[str, str], Any]
USAGE = {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 400}}


def said(
    text: str | None, finish: str = "stop", usage: dict[str, Any] | None = USAGE, **message: Any
) -> Reply:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, {"choices": [choice], **({"usage": usage} if usage else {})}


class Teacher:
    """A server whose answers a function makes out of the request's body; it counts what it is asked."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = json.dumps([body["messages"], body.get("seed")])
                with lock:
                    outer.asked[text] += 1
                    number = outer.asked[text]
                    outer.times.append(time.monotonic())
                status, headers, value = answer(body, number)
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, content in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, content)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def teach() -> Iterator[Callable[[Callable[[dict[str, Any], int], Reply]], Teacher]]:
    started: list[Teacher] = []

    def start(answer: Callable[[dict[str, Any], int], Reply]) -> Teacher:
        started.append(Teacher(answer))
        return started[-1]

    yield start
    for teacher in started:
        teacher.server.shutdown()
        teacher.server.server_close()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"clause {n}"}) + "\n" for n in range(24)))
    return path


def arguments(inputs: Path, teacher: Teacher, out: Path, *more: str) -> list[str]:
    line = [
        "data",
        "label",
        str(inputs),
        "--teacher",
        teacher.url,
        "--teacher-model",
        "big",
        "--system",
        "Which risk?",
    ]
    return [*line, "--out", str(out), "-q", *more]


def label(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments(*args))
    return int(stop.value.code or 0), capsys.readouterr().err


def text_of(body: dict[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def test_answers_become_rows_and_usage_becomes_dollars(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teach(lambda body, n: said(f"label of {text_of(body)}"))
    code, err = label(capsys, inputs, teacher, tmp_path / "out", "--price", "input=2,output=8,cached=1")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "labelled.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[5]["messages"][-1]["content"] == "label of clause 5"
    assert rows[5]["labelled_by"] == "teacher" and "Which risk?" not in json.dumps(rows)
    report = LabelReport.read(tmp_path / "out")
    # 24 x (600 x $2 + 400 x $1 + 10 x $8) per million.
    assert report.usage.dollars == pytest.approx(24 * (600 * 2 + 400 + 80) / 1e6)
    assert report.usage.prompt_tokens == 24_000 and report.usage.requests == 24 and not report.left_out


def test_each_failure_is_counted_as_what_it_is(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], n: int) -> Reply:
        number = int(text_of(body).split()[1])
        if number == 0:
            return said("cut o", "length")
        if number == 1:
            return said(None, refusal="I cannot help with that")
        if number == 2:
            return said("", "content_filter")
        if number == 3:
            return 200, {}, b"<html>not json</html>"
        if number == 4:
            return 200, {}, {"choices": [None]}
        if number == 5:
            return 400, {}, {"error": {"message": "bad request"}}
        if number == 6:
            return 200, {}, {"choices": [{"message": {"content": ["a", "list"]}}]}
        return said("ok")

    code, err = label(capsys, inputs, teach(answer), tmp_path / "out")
    assert code == 0, err
    report = LabelReport.read(tmp_path / "out")
    assert (
        report.left_out == {"failed": 1, "malformed": 3, "refused": 2, "truncated": 1}
        and report.labelled == 17
    )
    assert report.usage.dollars is None


def test_a_storm_of_429s_is_waited_out_and_nothing_is_lost(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], n: int) -> Reply:
        if n == 1 and int(text_of(body).split()[1]) % 3 == 0:
            return 429, {"Retry-After": "0.2"}, {"error": {"message": "slow down"}}
        return said("ok")

    teacher = teach(answer)
    code, err = label(capsys, inputs, teacher, tmp_path / "out")
    assert code == 0, err
    assert LabelReport.read(tmp_path / "out").labelled == 24
    assert sorted(Counter(teacher.asked.values()).items()) == [(1, 16), (2, 8)]


def test_the_budget_holds_and_the_same_command_goes_on_with_a_larger_one(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teach(lambda body, n: said("ok"))
    price = ("--price", "input=1000,output=0", "--workers", "2")  # a dollar per request
    code, err = label(capsys, inputs, teacher, tmp_path / "out", *price, "--budget", "7.5")
    assert code == 1 and "the budget of $7.5 is reached" in err and not (tmp_path / "out").exists()
    # One request in flight per worker at most beyond it.
    assert 5 <= sum(teacher.asked.values()) <= 9
    code, err = label(capsys, inputs, teacher, tmp_path / "out", *price, "--budget", "100")
    assert code == 0, err
    assert set(teacher.asked.values()) == {1} and len(teacher.asked) == 24


def test_a_budget_cannot_be_kept_without_usage(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teach(lambda body, n: said("ok", usage=None))
    line = (
        inputs,
        teacher,
        tmp_path / "out",
        "--price",
        "input=1,output=1",
        "--budget",
        "1",
        "--workers",
        "1",
    )
    code, err = label(capsys, *line)
    assert code == 3 and "reports no usage" in err and sum(teacher.asked.values()) == 1


def test_an_answer_that_is_no_label_is_asked_once_more(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], n: int) -> Reply:
        number, again = int(text_of(body).split()[1]), len(body["messages"]) > 2
        if number == 3:
            return said("no idea")
        return said("low" if again or number % 2 else "I think it is low")

    teacher = teach(answer)
    code, err = label(capsys, inputs, teacher, tmp_path / "out", "--labels", "low,high")
    assert code == 0, err
    report = LabelReport.read(tmp_path / "out")
    assert report.left_out == {"invalid": 1} and report.repaired == 12 and report.labelled == 23


def test_votes_give_a_majority_and_its_share(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teach(lambda body, n: said("high" if body["seed"] == 2 else "low"))
    code, err = label(capsys, inputs, teacher, tmp_path / "out", "--votes", "3")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "labelled.jsonl").read_text().splitlines()]
    assert {r["messages"][-1]["content"] for r in rows} == {"low"} and rows[0]["confidence"] == pytest.approx(
        2 / 3
    )
    assert LabelReport.read(tmp_path / "out").agreement == pytest.approx(2 / 3)


def test_a_refused_key_stops_everything(
    teach: Any,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-planted-secret")
    teacher = teach(lambda body, n: (401, {}, {"error": {"message": "no"}}))
    code, err = label(capsys, inputs, teacher, tmp_path / "out", "--key-env", "TEACHER_KEY", "--workers", "2")
    assert code == 3 and "refuses the key" in err and sum(teacher.asked.values()) <= 3
    kept = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"sk-planted-secret" in raw for raw in kept)


def test_a_batch_file_there_and_back(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teach(lambda body, n: said("asked"))
    batch = tmp_path / "batch.jsonl"
    assert label(capsys, inputs, teacher, tmp_path / "out", "--write-batch", str(batch))[0] == 0
    assert not teacher.asked
    lines = [json.loads(line) for line in batch.read_text().splitlines()]
    answered = [
        {"custom_id": r["custom_id"], "response": {"status_code": 200, "body": said("from the batch")[2]}}
        for r in lines[:20]
    ]
    done = tmp_path / "done.jsonl"
    done.write_text("".join(json.dumps(r) + "\n" for r in answered))
    assert label(capsys, inputs, teacher, tmp_path / "out", "--read-batch", str(done))[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "labelled.jsonl").read_text().splitlines()]
    texts = Counter(r["messages"][-1]["content"] for r in rows)
    assert texts == {"from the batch": 20, "asked": 4} and sum(teacher.asked.values()) == 4


@pytest.mark.cli
def test_a_killed_run_asks_nothing_twice_that_was_answered(teach: Any, inputs: Path, tmp_path: Path) -> None:
    gate = threading.Event()

    def answer(body: dict[str, Any], n: int) -> Reply:
        if int(text_of(body).split()[1]) >= 12 and not gate.is_set():
            gate.wait(60)
        return said("ok")

    teacher = teach(answer)
    line = [
        sys.executable,
        "-P",
        "-m",
        "unshot",
        *arguments(inputs, teacher, tmp_path / "out", "--workers", "4"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ledger = tmp_path / ".out.partial" / "ledger.jsonl"
    while not (ledger.is_file() and ledger.read_bytes().count(b"\n") == 12):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with ledger.open("ab") as handle:  # a torn line, as a kill can leave
        handle.write(b'{"key": "to')
    in_flight = sum(teacher.asked.values()) - 12
    gate.set()
    assert subprocess.run(line, env=env, check=False).returncode == 0
    # Only what was on its way when the process died is asked again.
    assert sum(teacher.asked.values()) == 24 + in_flight and in_flight <= 4
    assert LabelReport.read(tmp_path / "out").labelled == 24


def test_a_malformed_answer_without_usage_does_not_end_a_run_with_a_budget(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], n: int) -> Reply:
        odd = int(text_of(body).split()[1]) == 3
        return (200, {}, b"<html>not json</html>") if odd else said("ok")

    # A dollar per request: the malformed one is booked as the dearest other.
    money = ("--price", "input=1000,output=0", "--workers", "1", "--budget")
    code, err = label(capsys, inputs, teach(answer), tmp_path / "out", *money, "30")
    assert code == 0 and LabelReport.read(tmp_path / "out").left_out == {"malformed": 1}, err
    teacher = teach(answer)
    code, err = label(capsys, inputs, teacher, tmp_path / "other", *money, "10.5")
    assert code == 1 and "$9.0000 spent, 1 more at most $1.0000 each" in err
    assert sum(teacher.asked.values()) == 10


def test_only_malformed_answers_with_a_budget_say_what_was_wrong(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teach(lambda body, n: (200, {}, b"<html>proxy login</html>"))
    money = ("--price", "input=1,output=1", "--workers", "1", "--budget", "1")
    code, err = label(capsys, inputs, teacher, tmp_path / "out", *money)
    assert code == 3 and "malformed one" in err and "not JSON" in err and "reports no usage" not in err
    assert sum(teacher.asked.values()) == 2


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said("", "length"), "truncated"),  # reasoning took all tokens
        (said(None, "tool_calls", tool_calls=[{"function": {"name": "f"}}]), "malformed"),
        ((200, {}, {"error": {"message": "upstream down", "code": 502}}), "failed"),
        ((200, {}, {"choices": [], "error": {"message": "upstream down"}}), "failed"),
        ((200, {}, []), "malformed"),
        ((200, {}, {"choices": [{"message": {"content": [{"type": "image_url"}, 3]}}]}), "malformed"),
        ((404, {}, {"detail": "no such model"}), "failed"),
    ],
)
def test_odd_answers_are_counted_as_what_they_are(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply, reason: str
) -> None:
    teacher = teach(lambda body, n: reply if text_of(body) == "clause 0" else said("ok"))
    code, err = label(capsys, inputs, teacher, tmp_path / "out")
    assert code == 0 and LabelReport.read(tmp_path / "out").left_out == {reason: 1}, err


def test_text_parts_are_an_answer_and_a_refused_field_is_left_out(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(body: dict[str, Any], n: int) -> Reply:
        for field, use in (("max_tokens", "Use 'max_completion_tokens' instead"), ("temperature", "")):
            if field in body:
                return 400, {}, {"error": {"message": f"Unsupported parameter: '{field}'. {use}"}}
        choice = {"message": {"content": [{"type": "text", "text": "low"}]}, "finish_reason": "stop"}
        return 200, {}, {"choices": [choice], "usage": USAGE}

    code, err = label(capsys, inputs, teach(answer), tmp_path / "out")
    rows = (tmp_path / "out" / "labelled.jsonl").read_text().splitlines()
    assert code == 0 and len(rows) == 24 and '"low"' in rows[0] and "not greedy" in err


def test_an_empty_account_stops_everything(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = (429, {}, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
    teacher = teach(lambda body, n: gone)
    code, err = label(capsys, inputs, teacher, tmp_path / "out", "--workers", "1")
    assert code == 3 and "no credit left" in err and sum(teacher.asked.values()) == 1


def test_new_inputs_are_labelled_marked_and_kept_apart(
    teach: Any, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune.data.split import Splitting, load_parts
    from unshot.data.rows import read_examples

    fresh = [
        "the rent falls due in advance",
        "no liability whatever",
        "either side may leave",
        "notice by letter",
    ]
    asked: list[str] = []

    def answer(body: dict[str, Any], n: int) -> Reply:
        text = str(body["messages"][-1]["content"])
        if "JSON list" not in text:
            return said("low" if "clause" in text else "high")
        asked.append(text)
        if len(asked) == 2:
            return said("I would rather not")
        return said(
            f"Here: {json.dumps([*fresh, 'Clause 5', 'the goods travel by sea', 'No liability  whatever'])}"
        )

    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "The goods travel by sea."}) + "\n")
    more = ("--variations", "12", "--test", str(test), "--labels", "low,high", "--workers", "1")
    code, err = label(capsys, inputs, teach(answer), tmp_path / "out", *more)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out" / "labelled.jsonl").read_text().splitlines()]
    made = [row for row in rows if row.get("synthetic")]
    assert sorted(row["messages"][0]["content"] for row in made) == sorted(fresh)
    assert {row["messages"][-1]["content"] for row in made} == {"high"} and len(rows) == 28
    counts = LabelReport.read(tmp_path / "out").variations
    assert counts and (counts.asked, counts.taken, counts.near_duplicates, counts.unreadable) == (12, 4, 3, 1)
    assert "'low'" in asked[0] and "'high'" in asked[1]
    # Never tested on, wherever the split falls; refused in a test of one's own.
    loaded = load_parts(tmp_path / "out" / "labelled.jsonl", Splitting(), read_examples)
    for seed in range(4):
        parts = loaded.divide(stratum=lambda row: row.answer, seed=seed)[0].parts
        assert sum(row.synthetic for row in parts.train) == 4
        assert not any(row.synthetic for row in (*parts.validation, *parts.test))
    held = load_parts(
        inputs, Splitting(test=tmp_path / "out" / "labelled.jsonl"), lambda p: read_examples(p, answers=False)
    )
    with pytest.raises(InputError, match="synthetic row"):
        held.divide(stratum=lambda row: "", seed=0)
