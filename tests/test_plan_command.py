"""`unshot plan` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, run_unshot
from tests.planner_files import LEGALBENCH, few_shot, inputs, model_folder, needs_legalbench
from unshot.contracts.manifest import read_manifest
from unshot.contracts.plan import PlanFile

PRICE = "some-api:input=2.5,cached=1.25,output=10"


def run(*arguments: object, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "UNSHOT_OFFLINE": "1", "COLUMNS": "160", **extra}
    return run_unshot("plan", *map(str, arguments), cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plan")
    prompt, rows = few_shot(folder / "few_shot.jsonl", 40), inputs(folder / "inputs.jsonl")
    model = model_folder(folder / "model")
    flags = [
        "--prompt", prompt, "--inputs", rows, "--rate", 20, "--baseline", "gpt-4o", "--approximate",
        "--tokenizer", f"llama-3.1-8b={model}", "--model", "llama-3.1-8b", "--gpu", "h100-sxm",
    ]  # fmt: skip
    return {"folder": folder, "flags": flags, "model": model, "prompt": prompt, "inputs": rows}


@pytest.fixture(scope="module")
def planned(files: dict[str, Any]) -> dict[str, Any]:
    out = files["folder"] / "plan"
    done = run(*files["flags"], "--out", out, "--json", "-q")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    return {"data": printed, "out": out}


def test_flags_alone_give_every_option(planned: dict[str, Any]) -> None:
    data = planned["data"]
    assert data["version"] == PlanFile.VERSION
    assert data["verdict"]["answer"] in ("tune", "try first", "keep the prompt", "not for money")
    names = [o["name"] for o in data["options"]]
    for part in (
        "gpt-4o, long prompt", "cached", "batch", "gpt-6-luna, long prompt", "fine-tuned", "base, long prompt, fp16",
        "base, long prompt, prefix cache", "tuned, short prompt, fp16", "fp8", "int4", "LoRA adapter",
    ):  # fmt: skip
        assert any(part in name for name in names), part
    for option in data["options"]:
        if option["usable"]:
            assert option["per_month"] > 0 and option["per_request"] > 0
            low, high = option["per_month_interval"]
            assert low < option["per_month"] < high
            assert sum(option["parts_per_month"].values()) == pytest.approx(option["per_month"])
    hosted = next(o for o in data["options"] if o["tuned"] and o["kind"] == "hosted")
    assert (
        hosted["latency_ms"]["method"] == "simulation"
        and hosted["latency_ms"]["ttft"]["p50"] <= hosted["latency_ms"]["ttft"]["p99"]
    )


def test_prices_for_the_bench(planned: dict[str, Any]) -> None:
    data = planned["data"]
    api, machine = data["prices"]["api"], data["prices"]["machine"]
    assert api["input_per_token"] == pytest.approx(2.5e-6)
    assert api["cached_input_per_token"] == pytest.approx(1.25e-6)
    assert api["output_per_token"] == pytest.approx(10e-6)
    assert api["source"] and api["date"] and machine["source"]
    assert machine["name"] == "h100-sxm" and machine["dollars_per_hour"] == data["price_per_hour"] > 0


def test_the_directory_is_whole_and_verified(planned: dict[str, Any]) -> None:
    manifest = read_manifest(planned["out"], stage="plan")
    assert set(manifest.outputs) == {"plan.json", "plan.csv", "plan.xlsx", "report.html"}
    assert len(manifest.inputs) == 2
    held = json.loads((planned["out"] / "plan.json").read_text(encoding="utf-8"))
    assert held["options"] == planned["data"]["options"]
    assert json.loads(PlanFile.read(planned["out"]).to_json()) == held


def test_the_page_is_self_contained(planned: dict[str, Any]) -> None:
    page = (planned["out"] / "report.html").read_text(encoding="utf-8")
    # Sources are links for a reader; nothing is loaded.
    assert not re.search(r"src\s*=|<link|@import|url\(", page)
    assert all(target.startswith(("#", "https://")) for target in re.findall(r'href\s*=\s*"([^"]*)', page))
    # The page's own script alone may run, and the page reads without it.
    assert (
        page.count("<script") == 1 and "script-src 'sha256-" in page and '<section id="live" hidden>' in page
    )
    for wanted in (
        "Cost per month against request rate",
        "Time to first token",
        "What 1,000 requests cost",
        "assumption",
    ):
        assert wanted in page
    assert "break-even" in page and "genai-prices" in page
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", page.lower())


def test_the_terminal_shows_assumptions_and_caching(files: dict[str, Any]) -> None:
    done = run(*files["flags"], "-q", "--slo-ttft", 400)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    text = " ".join(done.stdout.split())
    assert "cached" in text and "Assumptions" in text and "genai-prices" in text and "per hour" in text
    assert "approximate" in text and "90%" in text


def test_a_narrow_terminal_loses_no_column(files: dict[str, Any]) -> None:
    done = run(*files["flags"], "-q", COLUMNS="80")
    assert done.returncode == 0
    heads = [line for line in done.stdout.splitlines() if line.strip().startswith("option ")]
    assert "payback" in heads[0] and "GPUs" in heads[0] and "end to end" in heads[1]
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert "…" not in done.stdout


@pytest.mark.cli
def test_no_torch_and_no_hub_client(files: dict[str, Any]) -> None:
    probe = (
        "import sys\nfrom unshot.__main__ import main\n"
        f"sys.argv = ['unshot', 'plan', '--json', *{[str(f) for f in files['flags']]!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "bad = {'torch', 'transformers', 'onnxruntime', 'huggingface_hub', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "UNSHOT_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-400:]


def test_the_same_input_gives_the_same_plan(files: dict[str, Any]) -> None:
    first, second = (json.loads(run(*files["flags"], "--json", "-q").stdout) for _ in range(2))
    assert first == second


def test_a_case_file_and_flags_over_it(files: dict[str, Any]) -> None:
    case = files["folder"] / "case.toml"
    case.write_text(
        '[task]\nexamples = "few_shot.jsonl"\ninputs = "inputs.jsonl"\nfails = ["facts"]\n[traffic]\nrate = 3\n'
        '[baseline]\nmodel = "smollm2-135m"\n[candidate]\nmodel = "smollm2-135m"\ngpu = "cpu"\n'
        'precision = "q8_0"\n',
        encoding="utf-8",
    )
    flags = ("--case", case, "--tokenizer", f"smollm2-135m={files['model']}", "--json", "-q")
    data = json.loads(run(*flags).stdout)
    assert data["rate"] == 3 and data["prices"]["api"] is None and data["prices"]["machine"]["kind"] == "cpu"
    assert "retrieval" in data["verdict"]["headline"]
    assert json.loads(run(*flags, "--rate", 7).stdout)["rate"] == 7


def test_short_requests_are_cheaper_than_long_ones_on_the_same_machine(files: dict[str, Any]) -> None:
    data = json.loads(run(*files["flags"], "--json", "-q").stdout)
    base = next(o for o in data["options"] if "base, long prompt, fp16" in o["name"])
    tuned = next(o for o in data["options"] if "tuned, short prompt, fp16" in o["name"])
    assert tuned["capacity_per_replica"] > 2 * base["capacity_per_replica"]
    assert tuned["latency_ms"]["ttft"]["p50"] < base["latency_ms"]["ttft"]["p50"]


def test_your_prices_win(files: dict[str, Any]) -> None:
    plain = json.loads(run(*files["flags"], "--json", "-q").stdout)
    flags = ("--price", "input=1,cached=0.5,output=4", "--gpu-price", "h100-sxm=1.00", "--json", "-q")
    data = json.loads(run(*files["flags"], *flags).stdout)
    assert data["prices"]["api"]["input_per_token"] == pytest.approx(1e-6)
    assert data["price_per_hour"] == 1.0
    assert any("your price" in a for a in data["assumptions"])
    assert data["options"][0]["per_month"] < plain["options"][0]["per_month"]


def test_an_api_nobody_lists_works_with_its_price(files: dict[str, Any]) -> None:
    flags = [f if f != "gpt-4o" else "some-api" for f in files["flags"]]
    done = run(*flags, "--price", PRICE, "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prices"]["api"]["input_per_token"] == pytest.approx(2.5e-6)


@pytest.mark.slow
@needs_legalbench
def test_a_folder_of_prompts_is_one_table(files: dict[str, Any]) -> None:
    out = files["folder"] / "folder"
    flags = (
        "--prompt", LEGALBENCH, "--rate", 5, "--baseline", "gpt-4o", "--approximate", "--model", "smollm2-135m",
        "--tokenizer", f"smollm2-135m={files['model']}", "--gpu", "l4", "--out", out,
    )  # fmt: skip
    done = run(*flags, "-q")
    assert done.returncode == 0, done.stderr
    for folder in LEGALBENCH.iterdir():
        assert folder.name in done.stdout
    data = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert len(data["prompts"]) == 12
    # Only prompts of 1,024 tokens and more are cached at OpenAI.
    for plan in data["prompts"].values():
        plain, cached = plan["options"][:2]
        assert (cached["per_month"] < plain["per_month"]) == (plain["prefix_tokens"] >= 1024)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--rate", "0"], 2, "traffic.rate"),
        (["--rate", "nan"], 2, "traffic.rate"),
        (["--rate", "-3"], 2, "traffic.rate"),
        (["--peak-factor", "0.5"], 2, "traffic.peak_factor"),
        (["--baseline", "gpt-4oo"], 2, "did you mean gpt-4o"),
        (["--model", "llama-3.1-9b"], 2, "llama-3.1-8b"),
        (["--gpu", "h100-smx"], 2, "h100-sxm"),
        (["--precision", "fp5"], 2, "fp"),
        (["--price", "input=abc"], 2, "dollars per million"),
        (["--gpu-price", "lots"], 2, "--gpu-price"),
        (["--prompt", "/nowhere.jsonl"], 2, "no such file"),
        (["--inputs", "/nowhere.jsonl"], 2, "no such file"),
        (["--fails", "speling"], 2, "accepted: facts"),
        (["--tokenizer", "/nowhere"], 2, "no such file"),
        (["--target", "1.5"], 2, "task.target"),
        (["--calibrate", "/nowhere.json", "--gpu", "cpu"], 2, "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(files: dict[str, Any], change: list[str], code: int, words: str) -> None:
    done = run(*files["flags"], *change, "-q")
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_runs_today_and_what_is_asked_must_be_said(files: dict[str, Any], tmp_path: Path) -> None:
    done = run("--prompt", files["prompt"], "--inputs", files["inputs"], "--rate", 1, cwd=tmp_path)
    assert done.returncode == 2 and "what runs today" in done.stderr
    text = tmp_path / "prompt.txt"
    text.write_text("Classify: {{text}}", encoding="utf-8")
    done = run("--prompt", text, "--baseline", "gpt-4o", "--approximate", "--rate", 1, cwd=tmp_path)
    assert done.returncode == 2 and "--inputs" in done.stderr


def test_a_missing_tokenizer_is_exit_3_and_says_the_way_out(files: dict[str, Any]) -> None:
    flags = [f for f in files["flags"] if f != "--approximate"]
    flags = [f for f in flags if "=" not in str(f) and f != "--tokenizer"]
    done = run(
        *["--baseline-model" if f == "--baseline" else "llama-3.1-8b" if f == "gpt-4o" else f for f in flags]
    )
    assert done.returncode == 3 and "--tokenizer" in done.stderr and "--approximate" in done.stderr


def test_json_mode_reports_errors_as_json(files: dict[str, Any]) -> None:
    done = run(*files["flags"], "--gpu", "nothing", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["exit_code"] == 2


def test_an_existing_directory_is_kept(planned: dict[str, Any], files: dict[str, Any]) -> None:
    done = run(*files["flags"], "--out", planned["out"], "-q")
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert read_manifest(planned["out"], stage="plan").stage == "plan"
