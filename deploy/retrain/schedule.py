"""The text that makes a scheduler run `unshot deploy retrain`: cron, GitHub Actions, Airflow."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

# Cron expressions, UTC; quarterly: the first day of a quarter, at night.
EVERY = {
    "weekly": "0 3 * * 1",
    "monthly": "0 3 1 * *",
    "quarterly": "0 3 1 1,4,7,10 *",
}
KINDS = ("cron", "github", "airflow")
STAMP = "$(date -u +%Y%m%d)"


def schedule(kind: str, every: str, arguments: Sequence[str]) -> str:
    """The text for one scheduler; `arguments` are those of `retrain` without --out, which gets the day's date."""
    line = f"unshot deploy retrain {shlex.join(arguments)} --out retrain-{STAMP}"
    return {"cron": _cron, "github": _github, "airflow": _airflow}[kind](EVERY[every], line)


def _cron(when: str, line: str) -> str:
    # A bare % ends the command in a crontab.
    escaped = line.replace("%", "\\%")
    return (
        "# crontab -e; change to the directory that holds the log, the registry and the data.\n"
        "# Exit code 0: proposed, or nothing to do. 1: the champion stays. Nothing is promoted.\n"
        f"{when} cd /path/to/deployment && {escaped} >> retrain.log 2>&1\n"
    )


def _github(when: str, line: str) -> str:
    return f"""\
# .github/workflows/retrain.yml; the runner must see the log, the registry and the data.
name: retrain
on:
  schedule:
    - cron: "{when}"
  workflow_dispatch:
permissions:
  contents: read
concurrency: retrain
jobs:
  retrain:
    runs-on: self-hosted
    timeout-minutes: 1440
    steps:
      - name: Tune on corrections and compare with the champion
        working-directory: /path/to/deployment
        run: {line}
      - name: Show the proposal
        if: always()
        working-directory: /path/to/deployment
        run: cat retrain-{STAMP}/proposal.md >> "$GITHUB_STEP_SUMMARY"
"""


def _airflow(when: str, line: str) -> str:
    return f'''\
# dags/unshot_retrain.py; the worker must see the log, the registry and the data.
from datetime import datetime, timedelta

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

with DAG(
    dag_id="unshot_retrain",
    schedule="{when}",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="retrain",
        cwd="/path/to/deployment",
        bash_command={line!r},
        retries=1,  # a second try goes on from the finished stages
        retry_delay=timedelta(minutes=10),
    )
'''
