"""Conversations: the next turn is sent after the answer and the time to think, and each turn's cached share is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.records import RequestRecord
from bench.single import LoadJob, load_run
from bench.target import LoadOptions
from bench.traffic import ServerOptions
from tests.logs import run_here
from tests.raw_server import Script, delta, head, last, raw_server, usage, whole
from unshot.console import Output
from unshot.contracts.report import LoadReport

QUIET = Output(verbosity=-1)


class Chat:
    """A server with a prefix cache of whole messages; a character is a token. It forgets with `places` caches."""

    def __init__(self, places: int = 1, *, silent: int | None = None) -> None:
        self.caches: list[set[str]] = [set() for _ in range(places)]
        self.seen: list[list[dict[str, str]]] = []
        self.silent = silent

    def __call__(self, number: int, body: Any) -> Script:
        messages = body["messages"]
        self.seen.append(messages)
        cache = self.caches[number % len(self.caches)]
        if self.silent is not None and len(messages) == self.silent:
            return whole({"error": "busy"}, 503)
        texts = [m["content"] for m in messages]
        cached = next((n for n in range(len(texts) - 1, 0, -1) if json.dumps(texts[:n]) in cache), 0)
        answer = f"answer {len(messages)} "
        cache.update(json.dumps([*texts, answer][: n + 1]) for n in range(len(texts) + 1))
        tokens, hit = sum(map(len, texts)), sum(map(len, texts[:cached]))
        counts = usage(tokens, 3, prompt_tokens_details={"cached_tokens": hit})
        return [head(), 0.002, delta(content=answer), delta("stop"), last(counts)]


def run(chat: Chat, out: Path, load: str = "closed:2", **options: Any) -> LoadReport:
    with raw_server(chat) as url:
        target = LoadOptions(url, ServerOptions("m", timeout=5.0), **options)
        return load_run(LoadJob(target, out, load, options.pop("requests", 12), warm_up=0), QUIET)


def records(out: Path) -> list[RequestRecord]:
    lines = (out / "records.jsonl").read_text().splitlines()
    return [RequestRecord.from_json(line) for line in lines]


def test_a_turn_holds_the_answer_before_it_and_its_cached_share_is_read(tmp_path: Path) -> None:
    chat = Chat()
    report = run(chat, tmp_path / "r", turns=3)
    assert [len(m) for m in chat.seen].count(5) == 4 and report.figures.requests == 12
    for messages in chat.seen:
        if len(messages) > 1:
            assert messages[1] == {"role": "assistant", "content": "answer 1 "}
            assert messages[:-2] in chat.seen
    shares = [t.tokens.cached_share for t in report.turns]
    truth = []
    for turn in range(3):
        mine = [m for m in chat.seen if len(m) == 2 * turn + 1]
        whole_text = sum(len(x["content"]) for m in mine for x in m)
        truth.append(sum(len(x["content"]) for m in mine for x in m[:-1]) / whole_text)
    assert shares == pytest.approx(truth) and truth[0] == 0 and truth[2] > 0.6
    assert not any("cache" in w for w in report.warnings) and report.conditions.turns == 3
    assert "turn 3" in (tmp_path / "r" / "report.html").read_text()


def test_users_think_between_turns_and_not_before_the_first(tmp_path: Path) -> None:
    run(Chat(), tmp_path / "r", turns=2, think_time="0.2-0.3")
    by: dict[tuple[int, int], dict[str, Any]] = {(r.conversation, r.turn): r for r in records(tmp_path / "r")}
    assert len(by) == 12
    for (number, turn), r in by.items():
        if turn and number is not None:
            before = by[number, 0]
            assert r.scheduled >= before.scheduled + before.elapsed + 0.19


def test_rows_of_several_turns_are_conversations_of_their_own(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    said = ["first", "old answer", "second", "old answer", "third", "old answer"]
    roles = ["user", "assistant"] * 3
    row = {
        "messages": [
            {"role": r, "content": f"{c} of {i}"} for i in (1,) for r, c in zip(roles, said, strict=True)
        ]
    }
    data.write_text(json.dumps(row) + "\n")
    chat = Chat()
    run(chat, tmp_path / "r", "closed:1", data=data, turns=2)
    assert all("old answer" not in json.dumps(m) for m in chat.seen)
    assert {m[-1]["content"] for m in chat.seen if len(m) == 3} == {"second of 1"}
    assert len({m[0]["content"] for m in chat.seen if len(m) == 1}) == 6  # fresh words in front of each


def test_caches_of_two_servers_behind_one_address_are_told(tmp_path: Path) -> None:
    report = run(Chat(places=2), tmp_path / "r", "closed:1", turns=2)
    assert any("move between servers" in w for w in report.warnings), report.warnings


def test_a_conversation_that_cannot_go_on_is_told(tmp_path: Path) -> None:
    chat = Chat(silent=3)
    report = run(chat, tmp_path / "r", turns=3)
    assert not any(len(m) > 3 for m in chat.seen)
    assert report.figures.errors["http 503"] == sum(len(m) == 3 for m in chat.seen)
    assert any("ended at a turn that failed" in w for w in report.warnings)
    assert math.isclose(report.turns[1].error_rate, 1.0)


def test_a_logs_conversations_are_replayed_with_their_own_thoughts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    log, old = tmp_path / "log.jsonl", {"role": "assistant", "content": "old"}
    lines = [
        {"time": 100.0, "e2e_s": 0.1, "messages": [user("a1")]},
        {"time": 100.05, "e2e_s": 0.1, "messages": [user("b1")]},
        {"time": 100.4, "e2e_s": 0.1, "messages": [user("a1"), old, user("a2")]},
    ]  # fmt: skip
    log.write_text("".join(json.dumps(x) + "\n" for x in lines))
    chat = Chat()
    with raw_server(chat) as url:
        command = ["bench", "load", url, "--load", f"trace:{log}", "--warm-up", "0", "-q"]
        done = run_here(capsys, *command, "--turns", "4", "--out", tmp_path / "r")
        assert done.code in (0, 1), done.err
        del lines[0]["e2e_s"]
        log.write_text("".join(json.dumps(x) + "\n" for x in lines))
        unknown = run_here(capsys, *command, "--turns", "4", "--out", tmp_path / "u")
        log.write_text(json.dumps(lines[1]) + "\n")
        alone = run_here(capsys, *command, "--turns", "4", "--out", tmp_path / "v")
        lonely = run_here(capsys, *command, "--think-time", "1", "--out", tmp_path / "w")
    assert [m[-1]["content"] for m in chat.seen] == ["a1", "b1", "a2"]
    assert chat.seen[2][1]["content"] == "answer 1 "
    by = {(r.conversation, r.turn): r for r in records(tmp_path / "r")}
    assert by[1, 0].scheduled - by[0, 0].scheduled == pytest.approx(0.05)
    assert by[0, 1].scheduled >= by[0, 0].scheduled + by[0, 0].elapsed + 0.29
    assert unknown.code == 2 and "give --think-time" in unknown.err
    assert alone.code == 2 and "no request of the log continues another" in alone.err
    assert lonely.code == 2 and "give --turns" in lonely.err
