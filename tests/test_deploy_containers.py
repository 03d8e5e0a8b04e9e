"""`unshot deploy init`: compose and Kubernetes files that their schemas take, and that start what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.logs import run_here

yaml = pytest.importorskip("yaml")
Capture = pytest.CaptureFixture[str]
CASE = '[task]\nname = "t"\nexamples = "few.jsonl"\ninstruction = "short.txt"\n'


@pytest.fixture()
def case(tmp_path: Path) -> Path:
    (tmp_path / "few.jsonl").write_text('{"prompt": "a: \\"b\\"", "completion": "low"}\n')
    (tmp_path / "short.txt").write_text("Brief. # no comment\n")
    (tmp_path / "unshot.toml").write_text(CASE)
    return tmp_path / "unshot.toml"


def written(capsys: Capture, case: Path, *more: str) -> tuple[Any, list[Any]]:
    folder = case.parent / "out"
    done = run_here(capsys, "deploy", "init", folder, "--case", case, "--overwrite", *more)
    assert done.code == 0, done.err
    return yaml.safe_load((folder / "compose.yaml").read_text()), list(
        yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    )


SERVERS = (
    (
        "--server",
        "vllm",
        "--model",
        "org/model",
        "--baseline",
        "https://api.openai.com/v1/",
        "--baseline-model",
        "gpt-4o",
    ),
    ("--server", "llama-server", "--model", "model.gguf", "--image", "me/gateway:1", "--workers", "4"),
)


@pytest.mark.parametrize("more", SERVERS)
def test_the_files_say_what_was_asked(capsys: Capture, case: Path, more: tuple[str, ...]) -> None:
    compose, objects = written(capsys, case, *more)
    assert set(compose["services"]) == {"gateway", "model"}
    by_kind = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    assert by_kind["ConfigMap", "unshot-case"]["data"] == {
        name: (case.parent / name).read_text() for name in ("unshot.toml", "few.jsonl", "short.txt")
    }
    command = compose["services"]["gateway"]["command"]
    containers = {
        n: by_kind["Deployment", n]["spec"]["template"]["spec"]["containers"][0] for n in ("gateway", "model")
    }
    assert containers["gateway"]["args"] == command
    # The command line is one that the gateway takes.
    from unshot.cli import cli

    words = iter(command)
    group: Any = cli
    for word in words:
        group = group.get_command(None, word)
        if word == "serve":
            break
    parsed = group.make_context("serve", list(words))
    port = containers["model"]["ports"][0]["containerPort"]
    assert parsed.params["candidate"] == f"http://model:{port}/v1"
    assert by_kind["Service", "model"]["spec"]["ports"][0]["port"] == port
    for name, ready in (("gateway", "/healthz"), ("model", "/v1/models")):
        assert containers[name]["readinessProbe"]["httpGet"] == {
            "path": ready,
            "port": containers[name]["ports"][0]["containerPort"],
        }
        rolling = by_kind["Deployment", name]["spec"]["strategy"]["rollingUpdate"]
        assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    secret = by_kind["Secret", "unshot-keys"]["stringData"]
    assert set(secret) == set(compose["services"]["gateway"]["environment"]) and set(secret.values()) == {
        "REPLACE"
    }
    assert ("nvidia.com/gpu" in json.dumps(objects)) is ("vllm" in more)


@pytest.mark.parametrize("more", SERVERS)
def test_kubernetes_schemas_take_the_manifests(capsys: Capture, case: Path, more: tuple[str, ...]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for one in written(capsys, case, *more)[1]:
        validator.validate(one, "1.33", strict=True)


@pytest.mark.parametrize("more", SERVERS)
def test_the_compose_specification_takes_the_file(capsys: Capture, case: Path, more: tuple[str, ...]) -> None:
    schema = os.environ.get("COMPOSE_SPEC")
    if not schema:
        pytest.skip("COMPOSE_SPEC does not name compose-spec.json (github.com/compose-spec/compose-spec)")
    import jsonschema

    jsonschema.validate(written(capsys, case, *more)[0], json.loads(Path(schema).read_text()))


ODD = "a\x7f\x85b\u2028\ufeff\U0001f600 c: # d\n---\n\te"


def test_every_text_of_the_case_gets_there_as_it_is(capsys: Capture, case: Path) -> None:
    (case.parent / "long.txt").write_text(ODD, encoding="utf-8", newline="")
    (case.parent / "slots.txt").write_text("{{prompt}}")
    case.write_bytes(
        b"\xef\xbb\xbf"
        + f'{CASE}system = "@long.txt"\n[rows]\ninput_template = "./slots.txt"\n# {ODD!r}\n'.encode()
    )
    _, objects = written(capsys, case, "--model", "m")
    (found,) = (o["data"] for o in objects if o["kind"] == "ConfigMap")
    assert set(found) == {"unshot.toml", "few.jsonl", "short.txt", "long.txt", "slots.txt"}
    assert found["long.txt"] == ODD


def test_a_long_text_of_any_script_is_a_text(capsys: Capture, case: Path) -> None:
    case.write_text(CASE + 'system = "' + "\u8bf7" * 200 + '"\n', encoding="utf-8")
    assert written(capsys, case, "--model", "m")


def test_a_name_that_no_config_map_holds_is_refused(capsys: Capture, case: Path) -> None:
    (case.parent / "few.jsonl").rename(case.parent / "w\u00f6rter.jsonl")
    case.write_text(CASE.replace("few", "w\u00f6rter"), encoding="utf-8")
    done = run_here(capsys, "deploy", "init", case.parent / "out", "--case", case, "--model", "m")
    assert done.code == 2 and "ConfigMap" in done.err and not (case.parent / "out").exists()


def test_what_cannot_be_written_is_said(capsys: Capture, case: Path) -> None:
    def said(*more: object) -> str:
        done = run_here(capsys, "deploy", "init", case.parent / "x", "--model", "m", *map(str, more))
        assert done.code == 2, done.err
        return done.err

    assert "no such case file" in said("--case", case.parent / "no.toml")
    assert "http" in said("--case", case, "--baseline", "nonsense")
    (case.parent / "x").mkdir()
    (case.parent / "x" / "compose.yaml").write_text("mine")
    assert "there already" in said("--case", case)
    assert (case.parent / "x" / "compose.yaml").read_text() == "mine"
    assert not (case.parent / "x" / "kubernetes.yaml").exists()
    (case.parent / "few.jsonl").write_text("x" * (1 << 20))
    assert "larger than a ConfigMap" in said("--case", case, "--overwrite")
    case.write_text(CASE.replace("few.jsonl", f"{ROOT}/unshot/demo/few_shot.jsonl"))
    assert "beside" in said("--case", case, "--overwrite")


def test_a_file_that_is_a_link_to_itself_is_one_line(capsys: Capture, case: Path) -> None:
    examples = case.parent / "few.jsonl"
    examples.unlink(missing_ok=True)
    examples.symlink_to("few.jsonl")
    case.write_text('[task]\nexamples = "few.jsonl"\n')
    done = run_here(capsys, "deploy", "init", case.parent / "out", "--case", case, "--model", "m")
    assert done.code == 2 and "few.jsonl: cannot be read" in done.err
