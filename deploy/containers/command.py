"""`unshot deploy init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unshot.flags import case_option
from unshot.options import PATH, TEXT, common, whole

if TYPE_CHECKING:
    from unshot.console import Output


@click.command()
@click.argument("folder", type=PATH)
@click.option(
    "--server",
    type=click.Choice(["vllm", "llama-server"]),
    default="vllm",
    show_default=True,
    help="What runs the tuned model.",
)
@click.option(
    "--model", type=TEXT, required=True, help="The model in its volume, or a name for vLLM to fetch."
)
@click.option(
    "--server-image", type=TEXT, help="Image of the model server; default: a tagged one of its project."
)
@click.option(
    "--image", type=TEXT, default="unshot-gateway", show_default=True, help="Name of the gateway's image."
)
@click.option(
    "--baseline", type=TEXT, help="URL of the API that answers today, e.g. https://api.openai.com/v1."
)
@click.option("--baseline-model", type=TEXT, help="Model name to ask it for.")
@click.option("--workers", type=whole(1, 64), default=2, show_default=True, help="Processes of the gateway.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@case_option
@common
def init(
    folder: Path,
    server: str,
    model: str,
    server_image: str | None,
    image: str,
    baseline: str | None,
    baseline_model: str | None,
    workers: int,
    overwrite: bool,
    case_path: Path | None,
    out: Output,
) -> None:
    """Write FOLDER/Dockerfile, compose.yaml and kubernetes.yaml: the gateway before a model server, with probes.

    Keys are read from the environment (compose) or from the Secret `unshot-keys`, to be filled in.
    """
    from deploy.containers.files import Plan, texts_in_files, write_all
    from unshot.case_file import DEFAULT_FILE, load_case
    from unshot.engines.address import parse_url
    from unshot.errors import InputError

    path = case_path or DEFAULT_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such case file; `unshot init` writes one")
    task = load_case(path, out=out).task
    if baseline is not None:
        baseline = parse_url(baseline).base
    plan = Plan(server, model, path, image, server_image, baseline, baseline_model, workers)
    named = [file for file in (task.examples, task.answer_schema) if file is not None]
    named += texts_in_files(path)
    written = write_all(plan, named, folder, out, overwrite=overwrite)
    out.result(
        {"folder": str(folder), "files": written},
        f"wrote {', '.join(written)} to {folder}; `docker compose up`, or `kubectl apply -f kubernetes.yaml` after the "
        "keys and the volumes are yours",
    )
