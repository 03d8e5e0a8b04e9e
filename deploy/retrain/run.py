"""`unshot deploy retrain` from log directory to proposal: every stage a command line, whatever is there is kept."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.answers import LoggedRequest, choose, gather, right
from deploy.retrain.champion import SCHEMA, Champion
from deploy.retrain.collect import Collected, collect, drop_alike
from unshot.case import Case
from unshot.case_file import load_case
from unshot.console import Output, dumps
from unshot.contracts.evaluation import Evaluation
from unshot.contracts.gates import read_gates
from unshot.contracts.manifest import NAME, Manifest, describe_data, describe_file, read_manifest, staged
from unshot.contracts.report import BenchReport
from unshot.contracts.request_log import Feedback, Unreadable, read_feedback, read_requests
from unshot.data.files import write_text
from unshot.data.load import load_rows
from unshot.data.rows import Example, read_examples, write_jsonl
from unshot.errors import InputError
from unshot.metrics.intervals import share
from unshot.stages import StageRun, run_stage

PROPOSE, KEEP, NOTHING = "propose", "keep the champion", "nothing to do"
# Rows of the fresh test below which it is not read: an interval of fewer says nothing.
FRESH_ROWS = 5
# Answers with feedback below which the log cannot contradict a target that the sealed test met.
JUDGED = 30
FILES = ("model-q8_0.gguf", "model-q4_k_m.gguf", "model-f16.gguf", "model-bf16.gguf", "model-f32.gguf")


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    margin: float
    target: float | None
    least: int
    force: bool
    case: Path | None
    base: str | None
    check_rows: int
    requests: int
    # Only feedback of these sources, all where empty; how many inputs one user may change.
    by: tuple[str, ...] = ()
    per_user: int = 10


def retrain_run(
    folder: Path, champion: Champion, data: Path, final: Path, settings: Settings, out: Output
) -> dict[str, Any]:
    """Collect, check, tune, compare, export, bench and propose; the proposal. Raises `InputError` or `OutsideError`.

    A run that was interrupted goes on from its finished stages with the rows it had collected.
    """
    unreadable = Unreadable()
    asked = gather(read_requests(folder, unreadable))
    feedback = choose(read_feedback(folder, unreadable), settings.by)
    if skipped := unreadable.sentence():
        out.warn(skipped)
    live = live_quality(asked, feedback, champion)
    enough = good_enough(champion, settings.target, live)
    collected_dir = final / "data"
    if enough and not settings.force and not collected_dir.exists():
        return _nothing(champion, live, enough)
    look = final / "look"
    stages: list[StageRun] = []
    if not collected_dir.exists():
        collected = collect(
            _original(data, champion, settings.case, out),
            read_examples(champion.sealed),
            asked,
            feedback,
            champion.task,
            per_user=settings.per_user,
        )
        if collected.contested:
            out.warn(
                f"{len(collected.contested)} users' corrections contradict original rows, which an expert wrote; those "
                "stay as they are (changes.json lists them), a reviewer's correction would replace them"
            )
        if collected.new < settings.least and not settings.force:
            few = f"{collected.new} new rows in the log, fewer than --min-rows {settings.least}"
            return _nothing(champion, live, few)
        pool = final / "pool.jsonl"
        write_jsonl(pool, [*collected.sealed, *collected.fresh, *collected.train])
        stages.append(run_stage("look", ["data", "check", str(pool)], look, out, overwrite=look.exists()))
        drop_alike(collected, look / "duplicates.jsonl")
        _write(collected_dir, collected, champion, settings.target, folder, data)
    else:
        out.log(f"{collected_dir} is there: going on with the rows collected then")
    changes = json.loads((collected_dir / "changes.json").read_text(encoding="utf-8"))
    for name, arguments in plan(champion, final, settings, changes):
        stages.append(run_stage(name, arguments, final / name, out, overwrite=False))
        if name == "check":
            _ready(final / "check")
    result = propose(champion, final, settings, changes, live)
    result["stages"] = [stage.plain() for stage in stages]
    return result


def _original(data: Path, champion: Champion, case_path: Path | None, out: Output) -> list[Example]:
    """The rows that the champion was tuned on, read as `tune` read them: by the case, without the old prompt."""
    case = load_case(case_path) if case_path is not None else Case()
    long = case.long_prompt()
    return load_rows(
        data, case.rows_as(), out, prompt=long if long.given else None, instruction=champion.task.instruction
    )


def plan(
    champion: Champion, final: Path, settings: Settings, changes: Mapping[str, Any]
) -> list[tuple[str, list[str]]]:
    """Each stage's directory name and command line (without `unshot` and --out)."""
    rows = str(final / "data" / "data.jsonl")
    own = str(final / "data" / "champion.toml")
    case = ["--case", str(settings.case) if settings.case else own]
    base = ["--base", settings.base or champion.base]
    run, artifacts = final / "run", final / "artifacts"
    both = ["eval", str(champion.run), "--compare", str(run), *base]
    stages = [
        ("check", ["data", "check", rows]),
        ("run", ["tune", rows, *base, *case]),
        ("eval", [*both, "--data", str(champion.sealed)]),
    ]
    if changes["counts"]["fresh"] >= FRESH_ROWS:
        stages.append(("eval-fresh", [*both, "--data", str(final / "data" / "fresh.jsonl")]))
    export = ["export", str(run), *case, "--check-rows", str(settings.check_rows), *base]
    file = champion_file(champion)
    if file is not None:
        kind = file.stem.removeprefix("model-")
        export += ["--to", f"gguf:{kind}"]
    stages.append(("artifacts", export))
    if file is not None:
        instruction = champion.task.instruction or ""
        systems = ["--baseline", f"gguf:{file}", "--candidate", f"gguf:{artifacts / file.name}"]
        short = ["--instruction", instruction, "--baseline-system", instruction] if instruction else []
        amount = ["--requests", str(settings.requests), "--cold-requests", "4", "--claim", "0.9-1"]
        amount += ["--margin", f"{settings.margin:g}"]
        stages.append(
            (
                "bench",
                [
                    "bench", "--case", own, *systems, "--data", str(champion.sealed),
                    "--task", str(run / "task.json"), *short, *amount,
                ],
            )
        )  # fmt: skip
    return stages


def champion_file(champion: Champion) -> Path | None:
    """The champion's GGUF file, None where it has none at hand."""
    if champion.artifact is None:
        return None
    return next((champion.artifact / n for n in FILES if (champion.artifact / n).is_file()), None)


def live_quality(
    asked: Sequence[LoggedRequest], feedback: Mapping[str, Feedback], champion: Champion
) -> dict[str, Any]:
    """Share right of the answers that somebody judged, with its 95% interval."""
    said = [right(one, feedback[one.id], champion.task) for one in asked if one.id in feedback]
    known = [s for s in said if s is not None]
    if not known:
        return {"judged": 0, "share_right": None, "low": None, "high": None}
    found = share(sum(known), len(known))
    return {"judged": len(known), "share_right": found.value, "low": found.low, "high": found.high}


def good_enough(champion: Champion, target: float | None, live: Mapping[str, Any]) -> str | None:
    """Why there is nothing to do; None where there is no target, it is missed, or the log contradicts it."""
    if target is None:
        return None
    metric, score = champion.score()
    if score < target:
        return None
    if live["judged"] >= JUDGED and live["high"] < target:
        return None
    return f"the champion meets the target {target:g} already: {metric} {score:.3f} on its sealed test"


def _nothing(champion: Champion, live: Mapping[str, Any], why: str) -> dict[str, Any]:
    return {"verdict": NOTHING, "reason": why, "champion": champion.name, "live": dict(live)}


def _write(
    folder: Path, collected: Collected, champion: Champion, target: float | None, log: Path, data: Path
) -> None:
    manifest = Manifest("deploy-retrain", inputs=[describe_data(data), describe_file(champion.sealed)])
    manifest.inputs += [describe_file(p) for p in sorted(log.glob("*.jsonl"))]
    names = ("added", "replaced", "contested", "disputed", "unusable", "held_back")
    with staged(folder) as work:
        write_jsonl(work / "data.jsonl", collected.train)
        write_jsonl(work / "fresh.jsonl", collected.fresh)
        write_jsonl(work / "to_label.jsonl", collected.to_label)
        changes = {"counts": collected.counts(), **{n: getattr(collected, n) for n in names}}
        write_text(work / "changes.json", dumps(changes) + "\n")
        write_text(work / "champion.toml", champion.case_text(target))
        if champion.task.answer_schema is not None:
            write_text(work / SCHEMA, json.dumps(champion.task.answer_schema, ensure_ascii=False) + "\n")
        manifest.result = collected.counts()
        manifest.finish(work)


def _ready(check: Path) -> None:
    report = json.loads((check / "report.json").read_text(encoding="utf-8"))
    if not report["ready"]:
        raise InputError(
            f"{check}: the collected rows are not fit for training ({'; '.join(report['warnings'][:2])}); mend the "
            "original data and run with another --out"
        )


def propose(
    champion: Champion, final: Path, settings: Settings, changes: Mapping[str, Any], live: Mapping[str, Any]
) -> dict[str, Any]:
    """Weigh what the stages left: scores of both on the same rows, and gates."""
    sealed = comparison(final / "eval")
    fresh = comparison(final / "eval-fresh")
    gates = {
        f"{stage}: {gate.name}": {
            "passed": gate.passed,
            "detail": gate.detail,
            "blocks": blocks(stage, gate.name, champion),
        }
        for stage in ("run", "artifacts", "bench")
        if (final / stage / NAME).is_file()
        for gate in read_gates(final / stage).values()
    }
    parity = read_manifest(final / "artifacts", stage="export").result.get("parity") or []
    if parity and not any(name.endswith(": parity") for name in gates):
        gates["artifacts: parity"] = {
            "passed": all(p["passed"] for p in parity),
            "detail": f"{len(parity)} file(s) against the tuned model",
            "blocks": True,
        }
    assert sealed is not None
    verdict, reason = weigh(sealed, fresh, gates, settings.margin)
    return {
        "verdict": verdict,
        "reason": reason,
        "champion": champion.name,
        "margin": settings.margin,
        "rows": changes["counts"],
        "live": dict(live),
        "sealed": sealed,
        "fresh": fresh,
        "gates": gates,
        "bench": _bench(final / "bench"),
        "promote": promote_lines(final),
    }


def blocks(stage: str, gate: str, champion: Champion) -> bool:
    """Whether a failed gate keeps the champion.

    What its own run did not pass either (say forgetting, waived where only one task is answered) is no reason to keep
    it, and neither is the claim: between two models of one size it tells the noise.
    """
    if gate == "claim":
        return False
    if stage != "run":
        return True
    own = read_gates(champion.run).get(gate)
    return own is not None and own.passed is True


def comparison(folder: Path) -> dict[str, Any] | None:
    """Both scores and the paired difference (new minus champion) that `unshot eval` wrote; None where it did not."""
    if not (folder / Evaluation.FILE).is_file():
        return None
    scores = Evaluation.read(folder)
    both, new = scores.comparison, scores.other
    if both is None or new is None:
        return None
    return {
        "rows": scores.rows,
        "metric": scores.metric,
        "champion": vars(scores.score),
        "new": vars(new.score),
        "difference": vars(both.score.difference),
        "only_champion_right": both.only_first_right,
        "only_new_right": both.only_second_right,
        "mcnemar_p": both.mcnemar_p,
        "reading": scores.reading.reading,
    }


def weigh(
    sealed: Mapping[str, Any], fresh: Mapping[str, Any] | None, gates: Mapping[str, Any], margin: float
) -> tuple[str, str]:
    """Propose or keep, and why. The sealed test decides; where it is too small to, mended mistakes may.

    The fresh test holds mistakes of the champion, so that it says what was mended and not how good either is.
    """
    broken = [name for name, gate in gates.items() if gate["passed"] is False and gate["blocks"]]
    if broken:
        details = "; ".join(f"{name} failed ({gates[name]['detail']})" for name in broken)
        return KEEP, details
    d = sealed["difference"]
    text = (
        f"{sealed['metric']} on {sealed['rows']} sealed rows, new minus champion: {d['value']:+.3f} "
        f"[{d['low']:+.3f}, {d['high']:+.3f}]"
    )
    if d["low"] > 0:
        return PROPOSE, f"better: {text}"
    if d["low"] > -margin:
        return PROPOSE, f"not worse within the margin of {margin:g}: {text}"
    if d["high"] < 0:
        return KEEP, f"worse: {text}"
    if fresh is not None and fresh["difference"]["low"] > 0 and d["value"] >= -margin:
        f = fresh["difference"]
        return PROPOSE, (
            f"mistakes are mended ({fresh['metric']} on {fresh['rows']} fresh corrections {f['value']:+.3f} "
            f"[{f['low']:+.3f}, {f['high']:+.3f}]), but the sealed test is too small to prove that nothing else "
            f"became worse: {text}"
        )
    return KEEP, f"not proven to be as good: {text}, margin {margin:g}"


def _bench(folder: Path) -> dict[str, Any] | None:
    if not (folder / BenchReport.FILE).is_file():
        return None
    return {
        mode: {
            "faster": facts.claim.speed.plain(),
            "cheaper": facts.claim.cost.plain() if facts.claim.cost else None,
        }
        for mode, facts in BenchReport.read(folder).modes.items()
    }


def promote_lines(final: Path) -> list[str]:
    """What a person would run to promote it; this program does not."""
    add = ["unshot", "deploy", "registry", "add", str(final / "artifacts"), "--run", str(final / "run")]
    if (final / "bench" / NAME).is_file():
        add += ["--bench", str(final / "bench")]
    return [shlex.join(add), "unshot deploy promote VERSION"]
