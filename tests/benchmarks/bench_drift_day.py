"""How soon `deploy drift` finds a planted shift, and how often it cries out without one.

    python -m tests.benchmarks.bench_drift_day days --days 150
    python -m tests.benchmarks.bench_drift_day days --days 50 --share 0.5 --seed 2
    python -m tests.benchmarks.bench_drift_day real --out /tmp/day --requests 800
    python -m tests.benchmarks.bench_drift_day real --out /tmp/day --first 1 --requests 400 --shift 200 --share 1
    python -m tests.benchmarks.bench_drift_day redraw --out /tmp/day --runs 20

`days` simulates days without a model: real customer questions (banking77), answers of a made-up classifier that is
right 85% of the time. `real` tunes the embedded model, exports it to GGUF, sends the questions of each day through
`unshot deploy serve`, and runs `unshot deploy drift` on the log that the gateway wrote. `redraw` makes more days out of
such a log. A day's requests are sent one
after the other as fast as they are answered: the clock is not simulated, only compressed, and no test looks at it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from deploy.drift.looks import Schedule, ends, take
from deploy.drift.run import drift_run
from deploy.drift.sample import Inputs, from_texts
from unshot.console import Output
from unshot.contracts.request_log import Request, Writer, read_requests
from unshot.data.rows import write_jsonl
from unshot.engines.embedder import Hashed

BANKING = Path(__file__).parents[3] / "shared" / "data" / "banking77"
# The first of these words in an intent's name is its topic; intents without one are `account`.
TOPICS = ("transfer", "top_up", "cash", "card", "exchange", "refund")
# Topics that the model was not made for: the planted shift.
NEW = ("exchange", "refund")
TRAINING = 320
SCHEDULE = Schedule(window=100, every=25, settle=200, alpha=0.01, looks=100)


@dataclass(frozen=True)
class Questions:
    """Texts with their topics."""

    texts: list[str]
    topics: list[str]

    def take(self, rows: Sequence[int]) -> Questions:
        return Questions([self.texts[i] for i in rows], [self.topics[i] for i in rows])


def topic(intent: str) -> str:
    name = intent.casefold()
    return next((t for t in TOPICS if t in name), "account")


def questions() -> tuple[Questions, Questions, Questions]:
    """Training rows, what customers ask, and what nobody asked before, in a fixed random order."""
    rows: dict[str, str] = {}
    for name in ("train", "test"):
        with (BANKING / f"{name}.csv").open(encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                rows.setdefault(" ".join(row["text"].split()), topic(row["category"]))
    order = sorted(rows, key=lambda text: hashlib.sha256(text.encode()).digest())
    known = [t for t in order if rows[t] not in NEW]
    new = [t for t in order if rows[t] in NEW]

    def of(texts: list[str]) -> Questions:
        return Questions(texts, [rows[t] for t in texts])

    return of(known[:TRAINING]), of(known[TRAINING:]), of(new)


def day(
    generator: np.random.Generator, known: Questions, new: Questions, requests: int, shift: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a day: index and whether it is a new topic's; `share` of what comes from request `shift` on is new."""
    fresh = (np.arange(requests) >= shift) & (generator.random(requests) < share)
    rows = generator.choice(len(known.texts), size=requests, replace=False)
    rows[fresh] = generator.choice(
        len(new.texts), size=int(fresh.sum()), replace=int(fresh.sum()) > len(new.texts)
    )
    return rows, fresh


def answer(generator: np.random.Generator, number: int, true: str, fresh: bool) -> Request:
    """An answer of the made-up classifier: right 85% of the time, less sure and sometimes broken on new topics."""
    labels = [t for t in (*TOPICS, "account") if t not in NEW]
    right = generator.random() < 0.85 and not fresh
    label = true if right else labels[int(generator.integers(len(labels)))]
    return Request(
        id=f"r{number}", time=float(number), arm="candidate", version="1", unit=str(number), assigned="candidate",
        label=label, schema_ok=bool(generator.random() > (0.1 if fresh else 0.02)),
        logprob=float(-generator.gamma(1.0, 0.4 if fresh else 0.2)),
    )  # fmt: skip


def first_alarm(
    lines: list[Request], inputs: Inputs, reference: Inputs, embed: Hashed
) -> tuple[int, list[str]] | None:
    """Request count of the first alarm and its features."""
    for number, end in enumerate(ends(len(lines), SCHEDULE, 0, own_reference=False)):
        look = take(lines, inputs, reference, end, SCHEDULE, embed, number=number)
        if look.alarm:
            return end, [s["feature"] for s in look.shifts if s["drift"]]
    return None


def simulate(
    days: int, requests: int, shift: int, share: float, seed: int
) -> list[tuple[int, list[str]] | None]:
    """The first alarm of each simulated day."""
    training, known, new = questions()
    embed = Hashed()
    reference = from_texts(training.texts, embed)
    every, fresh_inputs = from_texts(known.texts, embed), from_texts(new.texts, embed)
    found = []
    for number in range(days):
        generator = np.random.default_rng([seed, number])
        rows, fresh = day(generator, known, new, requests, shift, share)
        inputs = _mix(every, fresh_inputs, rows, fresh)
        lines = [
            answer(generator, i, (new if f else known).topics[r], bool(f))
            for i, (r, f) in enumerate(zip(rows, fresh, strict=True))
        ]
        found.append(first_alarm(lines, inputs, reference, embed))
    return found


def _mix(known: Inputs, new: Inputs, rows: np.ndarray, fresh: np.ndarray) -> Inputs:
    from scipy import sparse

    order = np.argsort(np.concatenate([np.flatnonzero(~fresh), np.flatnonzero(fresh)]))
    a, b = known.take(rows[~fresh]), new.take(rows[fresh])
    joined = Inputs(
        np.concatenate([a.lengths, b.lengths]),
        [*(a.texts or []), *(b.texts or [])],
        sparse.vstack([a.vectors, b.vectors], format="csr"),
    )
    return joined.take(order)


def redraw(out: Path, first: int, runs: int, requests: int) -> None:
    """Days without a shift out of one real day's log: requests drawn anew from it, in a new order, times made up.

    The runs share requests, so that they are not independent; every answer in them is the real model's.
    """
    lines = [line for line in read_requests(out / f"log-{first}") if line.error is None]
    alarms = 0
    for number in range(runs):
        log = out / "redrawn" / str(number)
        shutil.rmtree(log, ignore_errors=True)
        writer = Writer(log)
        chosen = np.random.default_rng([7, number]).choice(len(lines), size=requests, replace=False)
        for place, row in enumerate(chosen):
            writer.write(lines[row].changed(time=lines[0].time + 60.0 * place))
        report = drift_run(log, Output(verbosity=-1), schedule=SCHEDULE, reference=out / "run")
        alarms += report["verdict"] == "drift"
    print(
        f"{runs} runs of {requests} out of {len(lines)} real requests, {len(report['looks'])} looks each: alarms in "
        f"{rate(alarms, runs)}"
    )


def rate(alarms: int, days: int) -> str:
    """A share with its exact 95% interval (Clopper and Pearson 1934)."""
    interval = stats.binomtest(alarms, days).proportion_ci(method="exact")
    return f"{alarms} of {days} ({alarms / days:.2%} [{interval.low:.2%}, {interval.high:.2%}])"


def report_days(days: int, requests: int, shift: int, share: float, seed: int) -> None:
    """Rate of false alarms, or delays for a shift."""
    found = simulate(days, requests, shift if share else requests, share, seed)
    alarms = [f for f in found if f is not None]
    names = ", ".join(f"{n} {k}" for n, k in Counter(n for _, names in alarms for n in names).most_common())
    if not share:
        print(f"no shift, {requests} requests a day: alarms on {rate(len(alarms), days)}; {names or 'none'}")
        return
    early = sum(end <= shift for end, _ in alarms)
    delays = sorted(end - shift for end, _ in alarms if end > shift)
    quantiles = [delays[round(q * (len(delays) - 1))] for q in (0.5, 0.9, 1.0)] if delays else ["-"] * 3
    print(
        f"{share:.0%} new topics from request {shift} on, {days} days: found after median {quantiles[0]}, 90% within "
        f"{quantiles[1]}, most {quantiles[2]} requests; {days - len(delays) - early} missed, {early} early; {names}"
    )


def prepare(out: Path) -> None:
    """Tune the embedded model on the training questions and export it, as a user would."""
    training, _, _ = questions()
    rows = [
        {"prompt": t, "completion": label} for t, label in zip(training.texts, training.topics, strict=True)
    ]
    write_jsonl(out / "train.jsonl", rows)
    labels = [t for t in (*TOPICS, "account") if t not in NEW]
    text = f"""[task]
name = "topics"
instruction = "Name the topic of the customer's question."
labels = {json.dumps(labels)}
[candidate]
model = "smollm2-135m"
[tune]
epochs = 2
layers = 10
"""
    (out / "case.toml").write_text(text, encoding="utf-8")
    case = ["--case", str(out / "case.toml")]
    unshot("tune", str(out / "train.jsonl"), *case, "--out", str(out / "run"))
    unshot(
        "export", str(out / "run"), "--to", "gguf:q8_0", "--check-rows", "8", "--out", str(out / "artifacts")
    )


def unshot(*arguments: str, answers: tuple[int, ...] = (0,)) -> str:
    """Run the command line; its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "unshot", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in answers:
        raise SystemExit(f"unshot {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


REVIEWERS = secrets.token_hex(16)


@contextlib.contextmanager
def gateway(out: Path, log: Path, port: int) -> Iterator[http.client.HTTPConnection]:
    """A gateway in front of the exported model, and a connection to it."""
    model = f"gguf:{out / 'artifacts' / 'model-q8_0.gguf'}"
    serve = [
        sys.executable, "-m", "unshot", "deploy", "serve", "--case", str(out / "case.toml"), "--candidate", model,
        "--store", str(out / "none"), "--port", str(port), "--threads", "1", "--log", str(log), "--log-texts",
        "--logprobs", "-q", "--reviewer-key-env", "REVIEWERS",
    ]  # fmt: skip
    process = subprocess.Popen(serve, env={**os.environ, "REVIEWERS": REVIEWERS})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        for _ in range(200):
            try:
                connection.request("GET", "/healthz")
                if connection.getresponse().read() and process.poll() is None:
                    break
            except OSError:
                connection.close()
                time.sleep(0.1)
        yield connection
    finally:
        connection.close()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def post(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> str:
    """Send JSON; the request's id."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {REVIEWERS}"}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {text[:200]!r}")
    return answer.headers.get("x-request-id") or ""


def real_day(out: Path, number: int, requests: int, shift: int, share: float, port: int) -> dict[str, Any]:
    """One day through the gateway; what `deploy drift` says of its log. Every third answer gets its feedback."""
    _, known, new = questions()
    generator = np.random.default_rng([9, number])
    rows, fresh = day(generator, known, new, requests, shift, share)
    log = out / f"log-{number}"
    start = time.perf_counter()
    with gateway(out, log, port) as connection:
        for index, (row, is_new) in enumerate(zip(rows, fresh, strict=True)):
            source = new if is_new else known
            body = {
                "messages": [{"role": "user", "content": source.texts[row]}],
                "user": f"user {index}",
                "max_tokens": 6,
            }
            name = post(connection, "/v1/chat/completions", body)
            if index % 3 == 0:
                post(
                    connection,
                    "/v1/feedback",
                    {"id": name, "correction": source.topics[row], "by": "reviewer"},
                )
    options = ["--reference", str(out / "run"), "--settle", str(SCHEDULE.settle), "--restart", "--json", "-q"]
    text = unshot(
        "deploy", "drift", str(log), *options, "--out", str(out / f"drift-{number}"), answers=(0, 1)
    )
    report: dict[str, Any] = json.loads(text)
    report["seconds"] = time.perf_counter() - start
    return report


def real(out: Path, first: int, runs: int, requests: int, shift: int, share: float, port: int) -> None:
    """Days through the gateway, each with its own log; prints what was found."""
    if not (out / "artifacts").is_dir():
        out.mkdir(parents=True, exist_ok=True)
        prepare(out)
    for number in range(first, first + runs):
        report = real_day(out, number, requests, shift if share else requests, share, port)
        found = report["found"]
        what = (
            f"found after request {found['requests']} in {', '.join(found['features'])}"
            if found
            else "no alarm"
        )
        worse = [s["name"] for s in report["slices"] if s["worse"]]
        print(
            f"day {number}, {report['requests']} requests, {len(report['looks'])} looks: {what}; worse slices: "
            f"{', '.join(worse) or 'none'}; {report['seconds']:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    cheap = kinds.add_parser("days")
    cheap.add_argument("--days", type=int, default=500)
    cheap.add_argument("--requests", type=int, default=800)
    cheap.add_argument("--shift", type=int, default=400, help="Request from which on new topics come.")
    cheap.add_argument("--share", type=float, default=0.0, help="Share of them from then on; 0: no shift.")
    cheap.add_argument("--seed", type=int, default=1)
    through = kinds.add_parser("real")
    through.add_argument("--out", type=Path, required=True)
    through.add_argument("--first", type=int, default=0, help="Number of the first day.")
    through.add_argument("--runs", type=int, default=1)
    through.add_argument("--requests", type=int, default=250)
    through.add_argument("--shift", type=int, default=400)
    through.add_argument("--share", type=float, default=0.0)
    through.add_argument("--port", type=int, default=8799)
    again = kinds.add_parser("redraw")
    again.add_argument("--out", type=Path, required=True)
    again.add_argument("--first", type=int, default=0)
    again.add_argument("--runs", type=int, default=20)
    again.add_argument("--requests", type=int, default=400)
    arguments = parser.parse_args()
    if not BANKING.is_dir():
        raise SystemExit(f"{BANKING} is absent; this needs banking77")
    if arguments.kind in ("real", "redraw"):
        given = {k: v for k, v in vars(arguments).items() if k != "kind"}
        (real if arguments.kind == "real" else redraw)(**given)
        return
    report_days(arguments.days, arguments.requests, arguments.shift, arguments.share, arguments.seed)


if __name__ == "__main__":
    main()
