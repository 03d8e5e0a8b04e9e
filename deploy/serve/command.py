"""`unshot deploy serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.options import store_options
from unshot.flags import case_flags
from unshot.options import (
    NOT_NEGATIVE,
    PATH,
    PORT,
    POSITIVE,
    PRICE,
    SECONDS,
    Command,
    Number,
    common,
    whole,
)

if TYPE_CHECKING:
    from unshot.case import Case
    from unshot.console import Output

ARM_SETTINGS = ("prompt", "model", "key_env", "price", "hour")
PROMPTS = click.Choice(["long", "short", "none"])


def arm_options(arm: str, prompt: str, what: str) -> Any:
    """The options that say what an arm runs."""

    def add(function: Command) -> Command:
        for name, settings in (
            (f"--{arm}-hour", {"type": NOT_NEGATIVE, "help": "$ per hour of its server."}),
            (
                f"--{arm}-price",
                {"type": PRICE, "help": "$ per million tokens."},
            ),
            (
                f"--{arm}-key-env",
                {"metavar": "VARIABLE", "help": "Environment variable with the key of its URL."},
            ),
            (f"--{arm}-model", {"help": "Model name to ask its URL for."}),
            (
                f"--{arm}-prompt",
                {
                    "type": PROMPTS,
                    "default": prompt,
                    "show_default": True,
                    "help": "The case's few-shot prompt, the tuned model's instruction, or nothing.",
                },
            ),
            (f"--{arm}", {"help": what}),
        ):
            function = click.option(name, **settings)(function)  # type: ignore[arg-type]
        return function

    return add


@click.command()
@arm_options("baseline", "long", "gguf:FILE, http(s)://HOST/v1, or a version or alias of the registry.")
@arm_options(
    "candidate", "short", "The same; default: the registry's champion, where --store has a registry."
)
@click.option(
    "--split",
    type=Number(ge=0, le=100),
    default=100.0,
    show_default=True,
    help="Percent of users that the candidate answers; `unshot deploy split` changes it while serving.",
)
@click.option(
    "--record",
    is_flag=True,
    help="Pass requests on to the baseline as they come, clients' prompts, parameters and keys included, and log them.",
)
@click.option("--shadow", is_flag=True, help="Run the other arm too, behind the answer; only logged.")
@click.option("--timeout", type=SECONDS, default=60.0, show_default=True, help="Seconds an arm has.")
@click.option(
    "--candidate-timeout",
    type=SECONDS,
    help="Seconds until the baseline answers instead; default: --timeout.",
)
@click.option(
    "--cooldown",
    type=SECONDS,
    default=5.0,
    show_default=True,
    help="Seconds an arm rests after five failures in a row, before it is probed.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=PORT, default=8080, show_default=True, help="Port to listen on.")
@click.option(
    "--key-env",
    metavar="VARIABLE",
    help="Environment variable with the key that users must send, or several, separated by commas; default: none.",
)
@click.option(
    "--reviewer-key-env",
    metavar="VARIABLE",
    help="Environment variable with the key of those whose feedback counts above users'; default: nobody.",
)
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="A name that the gateway goes by; repeatable."
)
@click.option(
    "--allow-origin", multiple=True, metavar="ORIGIN", help="A web page's origin that may ask it; repeatable."
)
@click.option(
    "--unknown-parameters",
    type=click.Choice(["refuse", "drop"]),
    default="refuse",
    show_default=True,
    help="Parameters that are not of the OpenAI API: answer 400, or leave them out.",
)
@click.option(
    "--read-timeout",
    type=SECONDS,
    default=10.0,
    show_default=True,
    help="Seconds that a request has to come in.",
)
@click.option("--log", "log_dir", type=PATH, help="Write a request log here, without texts.")
@click.option("--log-texts", is_flag=True, help="Log inputs and answers too, personal data replaced.")
@click.option(
    "--phone-region", default="US", show_default=True, help="Country of national phone numbers, two letters."
)
@click.option("--logprobs", is_flag=True, help="Ask back ends for log-probabilities, for `deploy drift`.")
@click.option(
    "--max-tokens",
    type=whole(1),
    help="Longest answer where a user asks for none; default: the task's.",
)
@click.option("--max-body", type=whole(1), default=1 << 20, show_default=True, help="Bytes of a request.")
@click.option(
    "--concurrency",
    type=whole(1),
    default=64,
    show_default=True,
    help="Requests at once, of all workers; more get 429.",
)
@click.option(
    "--workers",
    type=whole(1, 64),
    default=1,
    show_default=True,
    help="Processes that answer, with one split, one state of the back ends and one log among them.",
)
@click.option(
    "--rate-limit",
    type=POSITIVE,
    help="Requests a minute of each key of --key-env (of each address, without keys); default: no limit.",
)
@click.option("--tls-cert", type=PATH, help="Certificate (PEM) to serve HTTPS with.")
@click.option("--tls-key", type=PATH, help="Its private key (PEM).")
@click.option("--threads", type=whole(1), help="Cores of each local server; default: all usable.")
@click.option(
    "--slots",
    type=whole(1),
    default=1,
    show_default=True,
    help="Requests a local llama-server runs at once.",
)
@click.option("--context", type=whole(64), default=8192, show_default=True, help="Tokens of each slot.")
@click.option(
    "--keep-warm",
    type=NOT_NEGATIVE,
    default=300.0,
    show_default=True,
    help="Seconds a replaced local server stays ready for a rollback.",
)
@store_options
@case_flags()
@common
def serve(case: Case, store: Path, tracking: str | None, out: Output, **options: Any) -> None:
    """Serve the task behind one OpenAI-compatible address, /v1/chat/completions.

    Users send their own message only: the gateway puts the long prompt in front for the baseline, the short one for
    the candidate. Where the candidate fails or breaks the task's labels or schema, the baseline answers.
    """
    if options["workers"] > 1:
        import os

        from deploy.serve.shared import FOLDER, new_state_folder

        os.environ[FOLDER] = new_state_folder()
    try:
        from deploy.serve.options import ArmOptions, ServeOptions
        from deploy.serve.run import run
    except ImportError as error:
        from unshot.errors import OutsideError

        raise OutsideError(f"the gateway needs {error.name}; run `pip install 'unshot[deploy]'`") from None

    arms = {
        arm: ArmOptions(options.pop(arm), **{name: options.pop(f"{arm}_{name}") for name in ARM_SETTINGS})
        for arm in ("baseline", "candidate")
    }
    run(case, store, tracking, out, ServeOptions(arms["baseline"], arms["candidate"], **options))
