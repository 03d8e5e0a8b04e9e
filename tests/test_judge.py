"""LLM-as-judge over a real endpoint, human agreement, intervals, and the review page."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tune.evaluate.agreement import agree
from tune.evaluate.review import draw, from_review, read_sheet, write_sheet
from unshot.console import Output
from unshot.contracts.gates import read_gates
from unshot.contracts.manifest import Manifest
from unshot.contracts.task import Task
from unshot.data.rows import Example
from unshot.errors import InputError, OutsideError
from unshot.metrics.intervals import share
from unshot.metrics.judge import Endpoint, Pair, judge_pairs, open_judge, read_verdict

QUIET = Output(json_mode=True, verbosity=-1)


class Server:
    """An OpenAI-compatible endpoint whose opinion is a function of the two answers; may fail first."""

    def __init__(self, opinion: Callable[[str, str], str]) -> None:
        self.opinion, self.failures, self.asked, self.keys = opinion, 0, 0, set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked += 1
                outer.keys.add(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.failures:
                    outer.failures -= 1
                    self.send_error(503)
                    return
                text = body["messages"][-1]["content"]
                a, b = re.search(
                    r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nWhich", text, re.DOTALL
                ).groups()  # type: ignore[union-attr]
                raw = json.dumps({"choices": [{"message": {"content": outer.opinion(a, b)}}]}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, str], str]], Server]]:
    started: list[Server] = []

    def start(opinion: Callable[[str, str], str]) -> Server:
        started.append(Server(opinion))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()


def longer(a: str, b: str) -> str:
    return "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


PAIRS = [
    Pair("q", "long answer", "short"),
    Pair("q", "x", "yyyy"),
    Pair("q", "same", "same"),
    Pair("q", "ab", "cd"),
]


def test_only_a_preference_that_survives_the_swap_counts(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNSHOT_JUDGE_KEY", "secret-1")
    server = serve(longer)
    server.failures = 1
    summary, verdicts = judge_pairs(Endpoint(server.url, "m"), PAIRS, QUIET)
    assert verdicts == ["first", "second", "tie", "tie"]
    assert (summary.wins, summary.losses, summary.ties, summary.equal_answers) == (1, 1, 2, 1)
    assert summary.win_rate.value == 0.5 and summary.position == 0
    # Two orders of three pairs, one try more for the failure; equal answers are not asked about.
    assert server.asked == 7 and server.keys == {"Bearer secret-1"} and "secret" not in summary.to_json()
    biased, verdicts = judge_pairs(Endpoint(serve(lambda a, b: "A").url, "m"), PAIRS, QUIET)
    assert verdicts == ["tie"] * 4 and biased.position == 1
    mute, _ = judge_pairs(Endpoint(serve(lambda a, b: "I would rather not say.").url, "m"), PAIRS, QUIET)
    assert mute.unreadable == 1 and mute.ties == 4


def test_a_judge_that_is_not_there_is_one_line(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OutsideError, match="no usable answer"):
        judge_pairs(Endpoint("http://127.0.0.1:9/v1", "m"), PAIRS, QUIET)
    server = serve(longer)
    server.failures = 99
    with pytest.raises(OutsideError, match="HTTP 503"):
        judge_pairs(Endpoint(server.url, "m"), PAIRS, QUIET)
    for spec, model in (
        ("http://h/v1", None),
        ("model.gguf", None),
        ("http://key@h/v1", "m"),
        ("gguf:/no/such", None),
    ):
        with pytest.raises(InputError):
            open_judge(spec, model)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"), ("b.", "B"), ("**TIE**", "TIE"), ("Answer B is better, as it names the law.", "B"),
        ("A\nbecause", "A"),
        ("<think>A or B?</think>\n\nB", "B"), ("A good question.", None), ("Both are fine.", None), ("", None),
        ("Answer A is worse than Answer B", None), ("I prefer answer B.", "B"), ("[[C]]", "TIE"),
        ("A, B, or TIE\n\nA is better.", None), ("It is a tie.", "TIE"),
    ],
)  # fmt: skip
def test_verdicts_are_read_from_replies(reply: str, verdict: str | None) -> None:
    assert read_verdict(reply) == verdict


def test_agreement_is_the_known_one() -> None:
    from sklearn.metrics import cohen_kappa_score

    one, other = list("ababbaab" * 5), list("abbbbaaa" * 5)
    found = agree(one, other)
    assert found.agreement.value == 0.75 and found.kappa is not None
    assert found.kappa.value == pytest.approx(cohen_kappa_score(one, other), abs=1e-9)
    assert found.kappa.low < found.kappa.value < found.kappa.high


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (6, 6), (45, 50), (50, 50), (1, 200), (3, 5)])
def test_the_interval_of_a_share_is_the_mid_p_one(hits: int, total: int) -> None:
    from scipy.optimize import brentq
    from scipy.stats import binom

    found = share(hits, total)
    middle = lambda p: binom.cdf(hits, total, p) - binom.pmf(hits, total, p) / 2  # noqa: E731
    low = brentq(lambda p: middle(p) - 0.975, 1e-9, 1 - 1e-9) if hits else 0.0
    high = brentq(lambda p: middle(p) - 0.025, 1e-9, 1 - 1e-9) if hits < total else 1.0
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)
    assert found.high - found.low > 0.01


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, list[dict[str, str]], list[str]]:
    """A run directory, a drawn sheet of 40 rows, and the run's answers (every fourth wrong)."""
    run = tmp_path / "run"
    run.mkdir()
    Manifest("tune").write(run)
    rows = [Example(({"role": "user", "content": f"=question {i}"},), f"right {i}", i) for i in range(40)]
    answers = [f"right {i}" if i % 4 else f"wrong answer {i}" for i in range(40)]
    return run, draw(run, Task(), rows, answers, None, count=40, seed=1), answers


def fill(sheet: list[dict[str, str]], *, flip: int = 0) -> list[dict[str, str]]:
    """A reviewer who accepts what is right and prefers it; `flip` of the verdicts turned round."""
    filled = []
    for n, row in enumerate(sheet):
        good = {k: "yes" if row[f"answer_{k[-1]}"].startswith("right") else "no" for k in ("ok_1", "ok_2")}
        if n < flip:
            good = {k: "no" if v == "yes" else "yes" for k, v in good.items()}
        two = bool(row["answer_2"])
        filled.append(
            {**row, "ok_1": good["ok_1"], "ok_2": good["ok_2"] if two else "",
             "better": ("1" if good["ok_1"] == "yes" else "2") if two else ""}
        )  # fmt: skip
    return filled


def test_the_sheet_is_blind_and_reads_back(
    drawn: tuple[Path, list[dict[str, str]], list[str]], serve: Callable[..., Server], tmp_path: Path
) -> None:
    run, sheet, _ = drawn
    assert len(sheet) == 40 and sum(bool(r["answer_2"]) for r in sheet) == 10
    first = [r["answer_1"].startswith("wrong") for r in sheet if r["answer_2"]]
    assert any(first) and not all(first)  # the order is random
    write_sheet(tmp_path / "blank.csv", sheet, None)
    # No formula for a spreadsheet to run.
    assert ",=question" not in (tmp_path / "blank.csv").read_text(encoding="utf-8-sig")
    write_sheet(tmp_path / "a.csv", fill(sheet), None)
    write_sheet(tmp_path / "b.csv", fill(sheet, flip=4), None)
    assert len(read_sheet(tmp_path / "a.csv")) == 40
    # A judge that likes long answers takes "wrong answer" each time.
    judge = Endpoint(serve(longer).url, "m")
    result = from_review(run, [tmp_path / "a.csv"], judge, QUIET)
    assert result.accepted.value == 0.75 and result.other_accepted.value == 1
    assert result.preference.other == 10 and result.preference.ties == 30
    assert result.metric_human.agreement.value == 1 and result.metric_human.kappa.value == 1
    assert result.judge_human.items == 10 and result.judge_human.agreement.value == 0
    # 0.75 of 40 rows: the interval, 0.60 to 0.86, holds 0.8.
    assert read_gates(run)["review"].passed is None
    assert from_review(run, [tmp_path / "a.csv"], None, QUIET, accept=0.55).gate.passed is True
    both = from_review(run, [tmp_path / "a.csv", tmp_path / "b.csv"], None, QUIET, accept=0.9)
    assert both.reviewers == 2 and both.between_reviewers.cohen_kappa < 1
    assert read_gates(run)["review"].passed is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**rows[0], "ok_1": "maybe"}], "accepted: yes or no"),
        (lambda rows: [{**rows[0], "ok_1": "yes", "better": "3"}], "1, 2 or tie"),
        (lambda rows: [{**rows[0], "ok_1": "yes"}] * 2, "stands there twice"),
        (
            lambda rows: [{**rows[0], "ok_1": "yes", "id": rows[0]["id"][:-3] + "999"}],
            "not a row of this review",
        ),
    ],
)
def test_a_bad_sheet_is_one_line(
    drawn: tuple[Path, list[dict[str, str]], list[str]],
    tmp_path: Path,
    change: Callable[[list[dict[str, str]]], list[dict[str, str]]],
    message: str,
) -> None:
    run, sheet, _ = drawn
    write_sheet(tmp_path / "bad.csv", change(sheet), None)
    with pytest.raises(InputError, match=message):
        from_review(run, [tmp_path / "bad.csv"], None, QUIET)


def test_the_page_stands_alone_and_holds_no_answer_key(
    drawn: tuple[Path, list[dict[str, str]], list[str]], tmp_path: Path
) -> None:
    _, sheet, _ = drawn
    sheet[0]["request"] = "</script><img src=x onerror=alert(1)>"
    write_sheet(tmp_path / "r.html", sheet, "Answer <well>.")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "Answer &lt;well&gt;." in text
    assert (
        not re.search(r"(src|href)=[\"']?(https?:)?//", text)
        and "automatic" not in text
        and '"ours"' not in text
    )
