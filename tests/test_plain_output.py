"""Data on its way to a terminal, a sheet or a file: never markup, never an escape, never a formula, never a secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.registry.store import Registry
from tests.conftest import Run
from tests.deploy_cases import make_artifact, make_tuned
from tests.gateways import scripted
from tests.logs import run_here
from tune.evaluate.review import write_sheet
from unshot import secret
from unshot.console import CONTROLS, Output, printable
from unshot.contracts.manifest import Manifest
from unshot.data.files import write_text
from unshot.report.formats import sheet_cell

HOSTILE = "approved [/done] [bold]x[/bold] :smile: \x1b[31mred\x1b]0;title\x07 \x9b2J \u202egpj.exe"


@pytest.fixture()
def full(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "store")
    run = make_tuned(tmp_path / "run", quality=True, forgetting=True, review=True)
    registry.add(make_artifact(tmp_path / "art", run=run), note=HOSTILE, by="[/red]")
    return registry


def test_a_reason_with_markup_and_escapes_is_shown_as_it_is(
    full: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", full.folder]
    for arguments in (
        ("promote", "v1", "--why", HOSTILE, "--by", "[/x]"),
        ("registry", "show", "v1"),
        ("registry", "list"),
        ("split", "10", "--why", HOSTILE),
        ("rollback", "--why", HOSTILE),
    ):
        done = run_here(capsys, "deploy", *arguments, *store)
        assert done.code == 0, (arguments, done.err)
        for text in (done.out, done.err):
            assert not CONTROLS.search(text), arguments
    shown = " ".join(run_here(capsys, "deploy", "registry", "show", "v1", *store).out.split())
    assert "approved [/done] [bold]x[/bold] :smile:" in shown
    payload = run_here(capsys, "deploy", "registry", "show", "v1", *store, "--json").out
    assert not CONTROLS.search(payload)
    assert json.loads(payload)["history"][-1]["why"] == HOSTILE  # nothing is lost to a program


def test_an_error_about_hostile_input_is_one_plain_line(
    full: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (HOSTILE, "a\nb", "\udcff"):
        done = run_here(capsys, "deploy", "registry", "show", name, "--store", full.folder)
        assert done.code == 2 and done.err.count("\n") == 1 and not CONTROLS.search(done.err)


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_what_a_terminal_gets_holds_no_controls(text: str) -> None:
    plain = printable(text)
    assert not CONTROLS.search(plain)
    plain.encode()


def test_warnings_take_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.warn(HOSTILE)
    out.result({}, HOSTILE)
    text = capsys.readouterr()
    assert "[/done] [bold]x[/bold]" in text.err and "[/done] [bold]x[/bold]" in text.out
    assert "\x1b" not in text.err + text.out


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1", "|x", "%x"]
)
def test_a_cell_that_looks_like_a_formula_is_neutral(text: str, tmp_path: Path) -> None:
    assert sheet_cell(text) == f"'{text}" and sheet_cell("plain = text") == "plain = text"
    row = dict.fromkeys(("id", "request", "answer_1", "answer_2", "ok_1", "ok_2", "better", "comment"), "")
    write_sheet(tmp_path / "sheet.csv", [{**row, "id": "1", "request": text, "answer_1": text}], None)
    body = (tmp_path / "sheet.csv").read_bytes().decode("utf-8-sig").split("\n", 1)[1]
    assert body.count("'") == 2


PLANTED = "sk-planted-0123456789abcdef"


def test_a_secret_reaches_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret.remember(PLANTED)
    write_text(tmp_path / "a.txt", f"key {PLANTED} http://me:hunter2pass@host/v1?api_key=K123&x=1")
    config = {"request_extra": {"api_key": "shorty", "x": {"Authorization": "zq-auth"}, "top_k": 1},
              "url": "https://u:p@host/", "stop_token": "</s>"}  # fmt: skip
    folder = tmp_path / "d"
    folder.mkdir()
    Manifest("bench", config=config).finish(folder)
    Output().warn(f"the server said {PLANTED}")
    text = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file()) + "".join(capsys.readouterr())
    for planted in (PLANTED, "hunter2pass", "K123", "shorty", "zq-auth", "u:p@"):
        assert planted not in text, planted
    assert "x=1" in text and "</s>" in text and "top_k" in text


@pytest.mark.cli
def test_secrets_planted_in_a_benchmark_reach_none_of_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys by environment, in a request's extra fields, in URLs: every file of the run is looked through."""
    key, extra = "planted-KEY-0123456789", "planted-EXTRA-987654321"
    monkeypatch.setenv("PLANTED", key)
    rows = [
        {"prompt": f"candidate=say {x};baseline=say {x};{n}", "completion": x}
        for n, x in enumerate(["low", "high"] * 6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with scripted("baseline") as one, scripted("candidate") as two:
        line = ["bench", "--baseline", one, "--candidate", two, "--data", tmp_path / "data.jsonl", "--requests", "4",
                "--cold-requests", "2", "--warm-up", "1", "--labels", "low,high", "--out", tmp_path / "out",
                "--api-key-env", "PLANTED", "--request-extra",
                json.dumps({"api_key": extra, "metadata": {"authorization": f"Bearer {extra}"}})]  # fmt: skip
        done = run_here(capsys, *line)
        assert done.code in (0, 1), done.err
        for url in (f"{one}?api_key={key}", one.replace("http://", f"http://me:{key}@")):
            bad = run_here(capsys, "bench", "--baseline", url, "--candidate", two, "--data", tmp_path / "data.jsonl",
                           "--out", tmp_path / "out2")  # fmt: skip
            assert bad.code == 2 and key not in bad.err + bad.out
    assert (tmp_path / "out" / "report.json").is_file()
    everything = done.out + done.err
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        everything += path.read_bytes().decode("utf-8", "replace")
    assert key not in everything and extra not in everything


@pytest.mark.parametrize(
    "line",
    [("plan", "--prompt"), ("plan", "--case"), ("data", "check"), ("deploy", "ab")],
)
@pytest.mark.parametrize(
    "url", ["https://ada:hunter2secret@h/p.txt", "https://h/p.txt?api_key=hunter2secret"]
)
def test_a_url_in_place_of_a_path_shows_no_secret(line: tuple[str, ...], url: str, unshot: Run) -> None:
    done = unshot(*line, url)
    assert done.returncode == 2 and "[SECRET]" in done.stderr
    assert "hunter2secret" not in done.stdout + done.stderr
