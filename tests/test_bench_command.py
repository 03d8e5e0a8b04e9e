"""`unshot bench` as a process: two real models, a report that says what was measured, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from tests.conftest import run_unshot
from tests.golden import golden_server
from unshot import embedded
from unshot.contracts.gates import read_gates
from unshot.data.rows import read_text

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

EXAMPLES = [
    ("The battery died after one day.", "negative"),
    ("Best purchase of the year.", "positive"),
    ("It arrived broken and nobody answered.", "negative"),
    ("A joy to use every morning.", "positive"),
    ("The screen is too dark to read.", "negative"),
    ("Fast delivery and a friendly note.", "positive"),
    ("The zip broke at once.", "negative"),
    ("My daughter loves it.", "positive"),
]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = run_unshot("bench", *map(str, arguments))
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("bench")
    data = write_rows(folder / "test.jsonl", EXAMPLES[:4])
    shots = write_rows(folder / "shots.jsonl", EXAMPLES[4:])
    spec = f"gguf:{embedded.gguf_path()}"
    done = bench(
        "--baseline", spec, "--candidate", spec, "--data", data, "--baseline-prompt", shots,
        "--baseline-system", "Is the review positive or negative? One word.", "--instruction", "Judge the review.",
        "--requests", 12, "--cold-requests", 3, "--max-tokens", 4, "--threads", 1, "--price-per-hour", 3.6,
        "--out", folder / "report", "--json", "-q",
        "--junit", folder / "junit.xml", "--markdown", folder / "report.md",
    )  # fmt: skip
    return folder, done


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(read_text(folder / "report" / "report.json"))
    return loaded


def test_a_claim_that_does_not_hold_exits_1_with_the_report_written(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = measured
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert report(folder)["verdict"] == "not met"
    names = {p.name for p in (folder / "report").iterdir()}
    assert names == {"report.json", "report.html", "records.jsonl", "manifest.json"}


def test_requests_are_interleaved_and_paired(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    records = [json.loads(x) for x in read_text(measured[0] / "report" / "records.jsonl").splitlines()]
    warm = [r for r in records if r["mode"] == "cache on" and r["block"] >= 0]
    assert len(warm) == 24
    order = [r["side"] for r in sorted(warm, key=lambda r: r["start"])]
    assert order[:12] == ["baseline"] * 4 + ["candidate"] * 4 + ["candidate"] * 4
    for side in ("baseline", "candidate"):
        assert sorted(r["request"] for r in warm if r["side"] == side) == list(range(12))


def test_the_cache_axis_is_real(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    modes = report(measured[0])["modes"]
    on, off = (modes[m]["baseline"] for m in ("cache on", "cache off"))
    assert on["tokens"]["cached"] > 0.6 * on["tokens"]["prompt"]
    assert off["tokens"]["cached"] == 0
    assert off["ttft_ms"]["p50"]["value"] > 2 * on["ttft_ms"]["p50"]["value"]


def test_cost_is_price_times_machine_time(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    facts = report(measured[0])
    for mode in facts["modes"].values():
        for side in ("baseline", "candidate"):
            mean = mode[side]["e2e_ms"]["mean"] / 1000
            # 3.6 dollars an hour: a tenth of a cent a second, a dollar for a thousand seconds.
            assert mode[side]["cost"]["per_1000_requests"] == pytest.approx(mean, rel=1e-6)
        assert mode["claim"]["speed"]["value"] == pytest.approx(
            mode["baseline"]["e2e_ms"]["mean"] / mode["candidate"]["e2e_ms"]["mean"], rel=1e-6
        )


def test_stdout_is_json_first_and_the_page_is_self_contained(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = measured
    payload, _ = json.JSONDecoder().raw_decode(done.stdout)
    assert payload["quality"]["rows"] == 4
    html = read_text(folder / "report" / "report.html")
    assert "NOT MET" in html and "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html


def test_outputs_for_ci(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = measured
    suite = ElementTree.fromstring(read_text(folder / "junit.xml"))
    assert suite.attrib["tests"] == "3"
    assert int(suite.attrib["failures"]) >= 1
    assert read_text(folder / "report.md").startswith("### 5-10x faster and cheaper: not met")


def test_a_promotion_can_read_the_gates(measured: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    found = read_gates(measured[0] / "report")
    assert found["claim"].passed is False
    facts = report(measured[0])
    assert (
        found["claim"].figures["cache on"]["speed"]["value"]
        == facts["modes"]["cache on"]["claim"]["speed"]["value"]
    )
    assert found["quality"].passed is {"passed": True, "failed": False}.get(facts["quality"]["gate"])


def test_memory_is_measured_and_power_is_measured_or_said_to_be_unreadable(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    facts = report(measured[0])
    resources = facts["resources"]
    (peak,) = resources["memory_peak_bytes"].values()
    assert 100 << 20 < peak < 8 << 30
    for source in ("CPU package", "GPU"):
        assert (source in resources["mean_power_w"]) != (source in resources["not_readable"])
    if not resources["mean_power_w"]:
        assert facts["modes"]["cache on"]["baseline"]["energy"] is None


def test_compare_of_a_report_with_itself_shows_no_change(
    measured: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    same = measured[0] / "report"
    done = bench("compare", same, same, "--json")
    assert done.returncode == 0, done.stderr
    assert {row["verdict"] for row in json.loads(done.stdout)["rows"]} <= {
        "no change shown",
        "not comparable",
    }


def test_compare_finds_a_slowdown(tmp_path: Path) -> None:
    for name, delay in (("old", 10), ("new", 150)):
        with golden_server(ttft_ms=delay, itl_ms=2, tokens=4) as url:
            bench("load", url, "--requests", 40, "--out", tmp_path / name, "-q")
    done = bench("compare", tmp_path / "old", tmp_path / "new", "--junit", tmp_path / "j.xml", "--json")
    assert done.returncode == 1
    payload, _ = json.JSONDecoder().raw_decode(done.stdout)
    verdicts = {row["name"]: row["verdict"] for row in payload["rows"]}
    assert verdicts["end to end, closed:1"] == verdicts["TTFT, closed:1"] == "regression"
    assert int(ElementTree.fromstring(read_text(tmp_path / "j.xml")).attrib["failures"]) >= 2


def test_a_claim_that_holds_exits_0(tmp_path: Path) -> None:
    """Two servers, one ten times as fast, with the same answers; so the verdict can also be yes."""
    words = ("red kite flies", "blue boat sails", "green door opens")
    data = write_rows(tmp_path / "d.jsonl", [(f"row {i} {words[i % 3]}", words[i % 3]) for i in range(16)])
    with (
        golden_server(ttft_ms=100, itl_ms=50, tokens=3, echo=True) as slow,
        golden_server(ttft_ms=10, itl_ms=5, tokens=3, echo=True) as fast,
    ):
        for attempt in range(3):
            done = bench(
                "--baseline", slow, "--candidate", fast, "--data", data, "--requests", 16, "--margin", 0.4,
                "--price-per-hour", 1, "--claim", "4-12", "--out", tmp_path / f"r{attempt}", "--json", "-q",
            )  # fmt: skip
            payload, _ = json.JSONDecoder().raw_decode(done.stdout)
            # Whoever else uses the cores can make a run invalid, and it says so; that is no verdict on the claim.
            if payload["valid"]:
                break
    assert payload["verdict"] == "met", payload["reason"]
    assert done.returncode == 0
    for mode in payload["modes"].values():
        assert 4 < mode["claim"]["speed"]["value"] < 12


def test_faster_and_worse_fails_the_gate(tmp_path: Path) -> None:
    words = ("red kite flies", "blue boat sails", "green door opens")
    data = write_rows(tmp_path / "d.jsonl", [(f"row {i} {words[i % 3]}", words[i % 3]) for i in range(12)])
    with (
        golden_server(ttft_ms=80, itl_ms=40, tokens=3, echo=True) as slow,
        golden_server(ttft_ms=5, itl_ms=2, tokens=2, echo=True) as fast,
    ):
        done = bench(
            "--baseline", slow, "--candidate", fast, "--data", data, "--requests", 12, "--cold-requests", 4,
            "--out", tmp_path / "r", "--json", "-q",
        )  # fmt: skip
    payload, _ = json.JSONDecoder().raw_decode(done.stdout)
    assert done.returncode == 1
    assert payload["verdict"] == "not met"
    assert payload["quality"]["gate"] == "failed"
    # Fast enough, so that the gate alone is what stands in the way.
    assert all(m["claim"]["speed"]["value"] > 5 for m in payload["modes"].values())


BAD = [
    (["--baseline", "gguf:none.gguf"], 2, "no such file"),
    (["--baseline", "ggml:x"], 2, "did you mean gguf"),
    (["--data", "none.jsonl"], 2, "no such file"),
    (["--requests", "0"], 2, "--requests"),
    (["--claim", "10-5"], 2, "--claim"),
    (["--price-per-hour", "-1"], 2, "--price-per-hour"),
    (["--margin", "nan"], 2, "margin"),
    (["--plan", "none"], 2, "no such file"),
    (["--baseline", "serve:onnx:x"], 2, "no server of the kind"),
    (["--baseline-token-price", "1"], 2, "IN:OUT"),
]


@pytest.mark.parametrize(("change", "code", "words"), BAD)
def test_bad_input_is_one_line(tmp_path: Path, change: list[str], code: int, words: str) -> None:
    data = write_rows(tmp_path / "d.jsonl", EXAMPLES[:4])
    spec = f"gguf:{embedded.gguf_path()}"
    options = {"--baseline": spec, "--candidate": spec, "--data": str(data), "--out": str(tmp_path / "out")}
    options |= {"--requests": "4", "--max-tokens": "1", "--threads": "1", "--cold-requests": "2"}
    options |= dict([change])  # type: ignore[list-item]
    done = bench(*(part for pair in options.items() for part in pair), "-q")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    # That these rows were read before (by another test) may be said first.
    lines = [
        line for line in done.stderr.strip().splitlines() if not line.startswith("warning: these test rows")
    ]
    assert len(lines) == 1
    assert not (tmp_path / "out").exists()


def test_help_does_not_need_the_heavy_libraries() -> None:
    code = "import sys; from unshot.cli import cli; cli(['bench', '--help'], standalone_mode=False)\n"
    code += "print([m for m in ('torch', 'transformers', 'onnxruntime', 'llama_cpp', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert "golden" not in done.stdout


def test_a_served_file_answers_like_the_file_in_process(tmp_path: Path) -> None:
    for needed in ("uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(needed, reason="no llama.cpp server is installed (llama-cpp-python[server])")
    data = write_rows(tmp_path / "d.jsonl", EXAMPLES)
    path = embedded.gguf_path()
    done = bench(
        "--baseline", f"serve:gguf:{path}", "--candidate", f"gguf:{path}", "--data", data, "--requests", 8,
        "--cold-requests", 2, "--max-tokens", 4, "--threads", 1, "--out", tmp_path / "r", "--json", "-q",
    )  # fmt: skip
    payload, _ = json.JSONDecoder().raw_decode(done.stdout)
    answers: dict[int, dict[str, str]] = {}
    for line in read_text(tmp_path / "r" / "records.jsonl").splitlines():
        record = json.loads(line)
        assert record["error"] is None, record["detail"]
        if record["mode"] == "cache on":
            answers.setdefault(record["row"], {})[record["side"]] = record["text"].strip()
    # Near-ties may fall either way, since the server batches the prompt otherwise.
    assert sum(a["baseline"] == a["candidate"] for a in answers.values()) >= 6
    on = payload["modes"]["cache on"]
    assert on["baseline"]["tokens"]["prompt"] == pytest.approx(on["candidate"]["tokens"]["prompt"])
    assert on["baseline"]["tokens"]["output"] == pytest.approx(on["candidate"]["tokens"]["output"], abs=0.6)
    left = (p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
    assert not [c for c in left if "llama_cpp.server" in c and str(path) in c]


def test_extra_fields_reach_the_server(tmp_path: Path) -> None:
    with golden_server(ttft_ms=1, itl_ms=1, tokens=9) as url:
        extra = json.dumps({"golden": {"tokens": 2}})
        done = bench(
            "load", url, "--requests", 3, "--request-extra", extra, "--out", tmp_path / "r", "--json", "-q"
        )
        bad = bench("load", url, "--request-extra", "[1]", "--out", tmp_path / "s", "-q")
    assert json.loads(done.stdout)["figures"]["tokens"]["output"] == 2
    assert bad.returncode == 2
    assert "JSON object" in bad.stderr
