"""What `unshot deploy init` writes: a Dockerfile, `compose.yaml`, and Kubernetes manifests of gateway and model server.

The gateway's state (registry and request log) lies in a volume, the case in another that is only read. Probes: a model
server is ready when it lists its model, the gateway when a back end answers. A new pod must be ready before an old one
is told to end, and that one finishes its requests.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unshot.case_file import FileText, keys, text_or_file
from unshot.console import Output
from unshot.data.files import read_text, write_text
from unshot.errors import InputError

Yaml = str | int | bool | Mapping[str, "Yaml"] | Sequence["Yaml"]
GATEWAY_PORT = 8080
# Seconds that requests under way have at the end (`serve` gives them 60), and until no new ones are sent to a pod.
GRACE, LEAVE = 75, 5
KEY = "UNSHOT_GATEWAY_KEY"
BASELINE_KEY = "BASELINE_API_KEY"
LARGEST_CONFIG = 1 << 20
CONFIG_NAME = re.compile(r"[-._a-zA-Z0-9]{1,253}")
# What JSON leaves as it is, and YAML takes for a line's end or for nothing that may stand in a file.
UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
DOCKERFILE = """\
# The gateway. Build it beside the wheel (`make wheel`, or `pip download unshot`), or leave the wheel out of both lines.
FROM python:3.12-slim
COPY *.whl /tmp/
RUN pip install --no-cache-dir "$(ls /tmp/*.whl)[deploy]" && useradd --uid 10001 unshot
USER 10001
WORKDIR /state
ENTRYPOINT ["unshot"]
"""


@dataclass(frozen=True)
class Server:
    """A model server's image: its port and arguments, and whether it needs a GPU."""

    image: str
    port: int
    arguments: tuple[str, ...]
    gpu: bool


SERVERS = {
    "vllm": Server("vllm/vllm-openai:v0.11.0", 8000, ("--model", "{model}", "--host", "0.0.0.0"), gpu=True),
    "llama-server": Server(
        "ghcr.io/ggml-org/llama.cpp:server",
        8080,
        ("-m", "{model}", "--host", "0.0.0.0", "--port", "8080"),
        gpu=False,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is to be written. `model` is the model's path in its volume, or a name for vLLM to fetch."""

    server: str
    model: str
    case: Path
    image: str
    server_image: str | None = None
    baseline: str | None = None
    baseline_model: str | None = None
    workers: int = 2

    @property
    def kind(self) -> Server:
        return SERVERS[self.server]

    @property
    def served(self) -> str:
        """Image of the model server."""
        return self.server_image or self.kind.image

    @property
    def model_arguments(self) -> list[str]:
        path = (
            self.model
            if self.server == "vllm" and not self.model.startswith("/")
            else f"/models/{self.model.strip('/')}"
        )
        return [part.replace("{model}", path) for part in self.kind.arguments]

    def gateway_arguments(self) -> list[str]:
        """The command line of the gateway."""
        found = [
            "deploy", "serve", "--case", f"/case/{self.case.name}", "--store", "/state/store", "--log", "/state/log",
            "--host", "0.0.0.0", "--port", str(GATEWAY_PORT), "--workers", str(self.workers), "--key-env", KEY,
            "--candidate", f"http://model:{self.kind.port}/v1", "--candidate-prompt", "short",
        ]  # fmt: skip
        if self.baseline:
            found += ["--baseline", self.baseline, "--baseline-key-env", BASELINE_KEY]
            found += ["--baseline-model", self.baseline_model] if self.baseline_model else []
        return found

    def secret_names(self) -> list[str]:
        """Environment variables of the gateway."""
        return [KEY, *([BASELINE_KEY] if self.baseline else [])]


def compose(plan: Plan) -> Yaml:
    """`compose.yaml`: the gateway waits for the model server; keys come from the environment or `.env`."""
    model: dict[str, Yaml] = {
        "image": plan.served,
        "command": plan.model_arguments,
        "volumes": ["./models:/models:ro"],
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD-SHELL", _fetch(plan, f"http://127.0.0.1:{plan.kind.port}/v1/models")],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "600s",
        },
    }
    if plan.kind.gpu:
        model["ipc"] = "host"
        gpu: Yaml = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        model["deploy"] = {"resources": {"reservations": {"devices": [gpu]}}}
    probe = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{GATEWAY_PORT}/healthz', timeout=4)"
    return {
        "services": {
            "model": model,
            "gateway": {
                "image": plan.image,
                "build": ".",
                "command": plan.gateway_arguments(),
                "environment": {name: f"${{{name}:?set {name}}}" for name in plan.secret_names()},
                "ports": [f"127.0.0.1:{GATEWAY_PORT}:{GATEWAY_PORT}"],
                "volumes": ["./:/case:ro", "state:/state"],
                "depends_on": {"model": {"condition": "service_healthy"}},
                "restart": "unless-stopped",
                "stop_grace_period": f"{GRACE}s",
                "healthcheck": {
                    "test": ["CMD", "python", "-c", probe],
                    "interval": "10s",
                    "timeout": "5s",
                    "retries": 3,
                    "start_period": "60s",
                },
            },
        },
        "volumes": {"state": {}},
    }


def _fetch(plan: Plan, url: str) -> str:
    """A command that fails where `url` does, with what the image has."""
    return (
        f"curl -fsS {url}"
        if plan.server == "llama-server"
        else f"python3 -c \"import urllib.request as u; u.urlopen('{url}')\""
    )


def manifests(plan: Plan, case_files: Mapping[str, str]) -> list[Yaml]:
    """Kubernetes objects: the case, the keys to fill in, volumes, the model server, the gateway, and their services."""
    secret: Yaml = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "unshot-keys"},
        "type": "Opaque",
        "stringData": dict.fromkeys(plan.secret_names(), "REPLACE"),
    }
    case: Yaml = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "unshot-case"},
        "data": dict(case_files),
    }
    model: dict[str, Yaml] = {
        "name": "model",
        "image": plan.served,
        "args": plan.model_arguments,
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        **_probes("/v1/models", "/health", plan.kind.port, start=900),
    }
    volumes: list[Yaml] = [_claimed("models", "unshot-models")]
    if plan.kind.gpu:
        model["resources"] = {"limits": {"nvidia.com/gpu": 1}}
        model["volumeMounts"] = [
            {"name": "models", "mountPath": "/models", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ]
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}})
    gateway: dict[str, Yaml] = {
        "name": "gateway",
        "image": plan.image,
        "args": plan.gateway_arguments(),
        "envFrom": [{"secretRef": {"name": "unshot-keys"}}],
        "volumeMounts": [
            {"name": "case", "mountPath": "/case", "readOnly": True},
            {"name": "state", "mountPath": "/state"},
        ],
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE)]}}},
        **_probes("/healthz", None, GATEWAY_PORT, start=120),
    }
    state: list[Yaml] = [
        {"name": "case", "configMap": {"name": "unshot-case"}},
        _claimed("state", "unshot-state"),
    ]
    return [
        secret, case, _claim("unshot-state", "ReadWriteMany", "5Gi"), _claim("unshot-models", "ReadOnlyMany", "50Gi"),
        _deployment("model", model, volumes), _service("model", plan.kind.port),
        _deployment("gateway", gateway, state), _service("gateway", GATEWAY_PORT),
    ]  # fmt: skip


def _probes(ready: str, alive: str | None, port: int, *, start: int) -> dict[str, Yaml]:
    """Start-up and readiness by one path, liveness by another, or by the open port: the gateway is not ended because
    its back ends are gone. `start` is in seconds."""
    get: Yaml = {"httpGet": {"path": ready, "port": port}, "timeoutSeconds": 5}
    lives: Yaml = {"path": alive, "port": port} if alive else {"port": port}
    kind = "httpGet" if alive else "tcpSocket"
    return {
        "ports": [{"name": "http", "containerPort": port}],
        "startupProbe": {**get, "periodSeconds": 5, "failureThreshold": start // 5},  # type: ignore[dict-item]
        "readinessProbe": {**get, "periodSeconds": 5, "failureThreshold": 2},  # type: ignore[dict-item]
        "livenessProbe": {kind: lives, "periodSeconds": 10, "failureThreshold": 6, "timeoutSeconds": 5},
    }


def _claimed(name: str, claim: str) -> Yaml:
    return {"name": name, "persistentVolumeClaim": {"claimName": claim}}


def _claim(name: str, mode: str, size: str) -> Yaml:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": size}}},
    }


def _deployment(name: str, container: Yaml, volumes: Sequence[Yaml]) -> Yaml:
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "unshot"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": GRACE + LEAVE,
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }


def _service(name: str, port: int) -> Yaml:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "unshot"},
            "ports": [{"name": "http", "port": port, "targetPort": port}],
        },
    }


def to_yaml(value: Yaml, indent: int = 0) -> str:
    """Block YAML; texts are quoted as JSON does, which YAML reads the same way."""
    pad = "  " * indent
    if isinstance(value, Mapping) and value:
        parts = []
        for key, inner in value.items():
            nested = isinstance(inner, Mapping | list | tuple) and len(inner) > 0
            shown = json.dumps(key) if not key.replace("_", "").isalnum() else key
            parts.append(
                f"{pad}{shown}:\n{to_yaml(inner, indent + 1)}"
                if nested
                else f"{pad}{shown}: {to_yaml(inner)}"
            )
        return "\n".join(parts)
    if isinstance(value, list | tuple) and value:
        items = []
        for inner in value:
            text = to_yaml(inner, indent + 1)
            items.append(f"{pad}- {text.lstrip()}")
        return "\n".join(items)
    if isinstance(value, Mapping):
        return "{}"
    text = json.dumps(value, ensure_ascii=False)
    return UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def texts_in_files(case: Path) -> list[Path]:
    """Files that a case gives in place of its texts: without them it is not read."""
    found, raw = [], tomllib.loads(read_text(case))
    for name in (name for name, key in keys().items() if key.text_or_file):
        value: object = raw
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and isinstance(text := text_or_file(value, case.parent), FileText):
            found.append(text.path)
    return found


def files_of(case: Path, named: Sequence[Path]) -> dict[str, str]:
    """The case file and the texts that it names, by the name that they have in its directory.

    Raises `InputError` for one outside it, and where they do not fit into a ConfigMap.
    """
    found = {}
    for path in (case, *named):
        text = read_text(path)
        try:
            name = path.resolve().relative_to(case.resolve().parent).as_posix()
        except ValueError:
            name = ""
        if not CONFIG_NAME.fullmatch(name):
            raise InputError(
                f"{path}: put it beside {case.name}, under a name of letters, digits, `-`, `_` and `.`; a ConfigMap "
                "holds such files only"
            )
        found[name] = text
    if sum(len(text.encode()) for text in found.values()) > LARGEST_CONFIG - 4096:
        raise InputError(
            f"{case}: the case and its files are larger than a ConfigMap (1 MiB); mount them yourself"
        )
    return found


def write_all(plan: Plan, named: Sequence[Path], folder: Path, out: Output, *, overwrite: bool) -> list[str]:
    """Write all files, or none where one is there already; their names. Raises `InputError`."""
    objects = manifests(plan, files_of(plan.case, named))
    head = "# Written by `unshot deploy init`; edit it, or write it anew with --overwrite.\n"
    texts = {
        "Dockerfile": DOCKERFILE,
        "compose.yaml": head + to_yaml(compose(plan)) + "\n",
        "kubernetes.yaml": head + "\n---\n".join(to_yaml(one) for one in objects) + "\n",
    }
    there = [name for name in texts if (folder / name).exists()]
    if there and not overwrite:
        raise InputError(
            f"{folder}: {', '.join(there)} there already; choose another directory or pass --overwrite"
        )
    for name, text in texts.items():
        try:
            write_text(folder / name, text)
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be written ({error.strerror})") from None
    return list(texts)
