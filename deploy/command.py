"""`unshot deploy`: the group; each subcommand's module is imported when the subcommand is used."""

from __future__ import annotations

import click

from unshot.lazy import LazyGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "registry": ("deploy.registry.command:registry", "Versions of artifacts with their gates and history."),
    "promote": ("deploy.registry.command:promote", "Make a version the champion, where its gates allow it."),
    "rollback": ("deploy.registry.command:rollback", "Put the champion before this one back."),
    "init": ("deploy.containers.command:init", "Files that run gateway and model server in containers."),
    "serve": (
        "deploy.serve.command:serve",
        "OpenAI-compatible gateway between the baseline and the candidate.",
    ),
    "split": ("deploy.serve.split:split", "Change the candidate's share of a running gateway."),
    "rollout": ("deploy.rollout.command:rollout", "Bring a version to all users step by step, or back."),
    "ab": ("deploy.ab.command:ab", "Baseline against candidate out of the request log, at any time."),
    "drift": ("deploy.drift.command:drift", "Live requests against the training data."),
    "retrain": ("deploy.retrain.command:retrain", "Tune anew on corrections, and propose a version."),
}


@click.group(cls=LazyGroup, table=COMMANDS)
def deploy() -> None:
    """Serve the tuned model beside the old prompt, watch it, and take it back when it is worse."""
