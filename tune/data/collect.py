"""`unshot data import`: request logs in, the prompt's versions, their inputs and a case file out."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from unshot.console import Output, dumps
from unshot.contracts.manifest import Manifest, describe_data, staged
from unshot.data.example import Message
from unshot.data.files import write_text
from unshot.data.formats import Columns
from unshot.data.log_formats import Call
from unshot.data.logs import LogSummary, read_calls
from unshot.data.prompts import SLOT
from unshot.data.static_part import WINDOW, Pair, Version, example_pairs, find_versions
from unshot.errors import InputError, UnshotError
from unshot.text.counters import Counter as Tokens

# Requests of a version whose tokens are counted, evenly spread.
COUNTED = 200
HOUR = 3600.0


@dataclass
class Sink:
    """The inputs of one version as they come: a file, and a sample for the counts."""

    version: Version
    path: Path
    handle: IO[str]
    answers: int = 0
    output_tokens: list[int] = field(default_factory=list)
    sample: list[list[Message]] = field(default_factory=list)
    chosen: Counter[Pair] = field(default_factory=Counter)
    chosen_counts: Counter[int] = field(default_factory=Counter)
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def write(self, call: Call, values: list[str]) -> None:
        """One request: its dynamic messages (the template's slots as columns) and its answer."""
        version, size = self.version, len(self.version.head)
        version.requests += 1
        if call.time is not None:
            version.times.append(call.time)
        if call.model:
            version.models[call.model] += 1
        if call.output_tokens is not None:
            self.output_tokens.append(call.output_tokens)
        turns: list[Message] = list(version.turns(call.messages))
        if version.examples:
            pairs = example_pairs(call.messages[size:]) or []
            self.chosen.update(pairs)
            self.chosen_counts[len(pairs)] += 1
        columns: dict[str, str] = {}
        if version.template:
            turns[0] = {"role": turns[0]["role"], "content": "\n\n".join(values)}
            if len(values) > 1:
                columns = dict(zip(version.template.names, values, strict=True))
        if version.system:
            found = version.system.values(call.messages[0]["content"]) or []
            columns |= dict(zip(version.system.names, found, strict=True))
        if call.answer is not None:
            self.answers += 1
            turns.append({"role": "assistant", "content": call.answer})
        self.handle.write(json.dumps({"messages": turns, **columns}, ensure_ascii=False) + "\n")
        if len(self.sample) < COUNTED:
            self.sample.append(call.messages)
        elif (place := self.chance.randrange(version.requests)) < COUNTED:
            self.sample[place] = call.messages


class Collector:
    """Sorts calls by version; what fits none waits until enough wait for a look at what they share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sinks: list[Sink] = []
        self.waiting: list[Call] = []

    def add(self, call: Call) -> None:
        """Take in one call."""
        if not self._place(call):
            self.waiting.append(call)
            if len(self.waiting) >= WINDOW:
                self.look()

    def look(self, *, last: bool = False) -> None:
        """Find the versions among the waiting calls and sort these.

        A version that shares nothing would swallow what comes later: it is for the last look, or where it has all.
        """
        calls, self.waiting = self.waiting, []
        found = find_versions(calls)
        some = [version for version in found if not version.empty]
        for version in found if last or not some else some:
            path = self.folder / f"inputs-{len(self.sinks)}.jsonl"
            self.sinks.append(
                Sink(version, path, path.open("w", encoding="utf-8", errors="backslashreplace"))
            )
        # Versions with more static text are tried first: a version without any takes what is left.
        self.sinks.sort(key=lambda s: -sum(map(len, s.version.static)))
        self.waiting = [call for call in calls if not self._place(call)]

    def _place(self, call: Call) -> bool:
        for sink in self.sinks:
            values = sink.version.match(call.messages)
            if values is not None:
                sink.write(call, values)
                return True
        return False

    def close(self) -> None:
        """Sort what still waits, and close the files."""
        if self.waiting:
            self.look(last=True)
        for sink in self.sinks:
            sink.handle.close()
        self.sinks = sorted((s for s in self.sinks if s.version.requests), key=lambda s: -s.version.requests)


@dataclass(frozen=True)
class Traffic:
    """Arrivals of a version: mean requests a second, the busiest hour over it, and the spread of the gaps.

    None is what the times do not tell: fewer than two, less than a day for the busiest hour, whole seconds for gaps.
    """

    rate: float | None = None
    peak_factor: float | None = None
    arrival_cv: float | None = None
    hours: float = 0.0

    @classmethod
    def of(cls, times: Sequence[float]) -> Traffic:
        """The traffic of arrival times, seconds since 1970."""
        ordered = sorted(times)
        if len(ordered) < 2 or ordered[-1] <= ordered[0]:
            return cls()
        span = ordered[-1] - ordered[0]
        rate = (len(ordered) - 1) / span
        hours = Counter(int(t // HOUR) for t in ordered)
        peak = None
        if span >= 24 * HOUR:
            peak = max(1.0, max(hours.values()) / HOUR / rate)
        return cls(rate, peak, _gap_spread(ordered, hours), span / HOUR)


def _gap_spread(times: Sequence[float], hours: Counter[int]) -> float | None:
    """Standard deviation over mean of the gaps between requests, each hour apart, so that day and night do not count.

    None where the times are whole seconds and requests come faster than one in ten.
    """
    whole = all(t == int(t) for t in times[:1000])
    if whole and len(times) > 1 and (times[-1] - times[0]) / (len(times) - 1) < 10:
        return None
    scaled = []
    for a, b in pairwise(times):
        if a // HOUR == b // HOUR and hours[int(a // HOUR)] >= 30:
            scaled.append((b - a) * hours[int(a // HOUR)] / HOUR)
    if len(scaled) < 100:
        return None
    mean = statistics.fmean(scaled)
    return statistics.pstdev(scaled, mean) / mean if mean > 0 else None


def import_logs(
    paths: Sequence[Path],
    final: Path,
    out: Output,
    *,
    mapping: Mapping[str, str],
    columns: Columns | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read logs and write `final`: the most used version's case, prompt and inputs, the others' in folders beside.

    Raises `InputError` where no request can be read.
    """
    summary = LogSummary()
    with staged(final, overwrite=overwrite) as work:
        collector = Collector(work)
        with out.progress() as progress:
            bar = progress.add_task("requests", total=None, note="")
            for number, call in enumerate(
                read_calls(paths, summary, mapping=mapping, columns=columns), start=1
            ):
                collector.add(call)
                if number % 1000 == 0:
                    progress.update(bar, completed=number)
        collector.close()
        if not collector.sinks:
            why = f" (first: {summary.first_unknown})" if summary.first_unknown else ""
            raise InputError(f"{', '.join(map(str, paths))}: no request that can be read{why}")
        versions = []
        for number, sink in enumerate(collector.sinks, start=1):
            folder = work if number == 1 else work / f"version-{number}"
            folder.mkdir(exist_ok=True)
            sink.path.rename(folder / "inputs.jsonl")
            versions.append(_write(folder, sink, number))
        result: dict[str, Any] = {
            "logs": [str(path) for path in paths],
            "out": str(final),
            "formats": dict(summary.formats),
            "requests": sum(s.version.requests for s in collector.sinks),
            "failed": summary.failed,
            "without_answer": summary.without_answer,
            "unknown": dict(summary.unknown),
            "first_unknown": summary.first_unknown,
            "versions": versions,
        }
        write_text(work / "import.json", dumps(result) + "\n")
        manifest = Manifest(
            "data-import", inputs=[describe_data(path) for path in paths if not path.is_dir()]
        )
        manifest.result = {k: result[k] for k in ("requests", "failed", "unknown")}
        manifest.finish(work)
    return result


def _write(folder: Path, sink: Sink, number: int) -> dict[str, Any]:
    """A version's case file and prompt; what is said of it."""
    version = sink.version
    traffic = Traffic.of(version.times)
    model = version.models.most_common(1)[0][0] if version.models else None
    static, total, counter = _tokens(sink, model)
    head = list(version.head)
    system = head.pop(0)["content"] if head and head[0]["role"] == "system" else None
    prompt: str | None = None
    notes = []
    if version.system:
        notes.append(
            f"the system prompt has slots ({', '.join(version.system.names)}), filled from the inputs' columns; the "
            "case's instruction keeps them: take out what the tuned model can do without"
        )
    if version.examples:
        usual = round(statistics.median(sink.chosen_counts.elements()))
        for (question, answer), _ in sink.chosen.most_common(usual):
            head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        notes.append(
            f"the example turns are chosen for each request, usually {usual} of {len(sink.chosen):,} seen: the case's "
            f"prompt has the {usual} most used ones in all requests, the inputs have none"
        )
    if traffic.rate is None:
        notes.append(
            "the log has no two times that can be read, so that a plan takes its default of 1 request a second; set "
            "[traffic] rate"
        )
    if head:
        prompt = "prompt.jsonl"
        write_text(folder / prompt, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in _pairs(head)))
        if version.template:
            notes.append(
                "the static text round the input stands in the inputs: a prompt has turns or a text, not both"
            )
    elif version.template:
        prompt = "prompt.txt"
        write_text(folder / prompt, version.template.text())
    if head and version.template:
        _put_back(folder / "inputs.jsonl", version)
    kept = (
        [line for line in version.system.text().splitlines() if SLOT.search(line)] if version.system else []
    )
    lines = case_file(system, prompt, traffic, model, bool(sink.answers), sink.output_tokens, "\n".join(kept))
    write_text(folder / "unshot.toml", lines)
    return {
        "version": number,
        "requests": version.requests,
        "folder": "." if number == 1 else folder.name,
        "static_tokens": static,
        "mean_tokens": total,
        "counted_with": counter,
        "messages": len(version.head),
        "template": version.template.text() if version.template else None,
        "answers": sink.answers,
        "model": model,
        "models": dict(version.models),
        "first": min(version.times, default=None),
        "last": max(version.times, default=None),
        "traffic": vars(traffic),
        "notes": notes,
    }


def _pairs(head: Sequence[Message]) -> list[dict[str, Any]]:
    """Few-shot turns as rows: each ends with an assistant's turn; turns behind the last one are a row's beginning."""
    rows: list[dict[str, Any]] = []
    turns: list[Message] = []
    for message in head:
        turns.append(message)
        if message["role"] == "assistant":
            rows.append({"messages": turns})
            turns = []
    return rows


def _put_back(path: Path, version: Version) -> None:
    """Write the static text back into the inputs."""
    assert version.template is not None
    pieces, names = version.template.pieces, version.template.names
    temporary = path.with_suffix(".tmp")
    with (
        path.open(encoding="utf-8") as source,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as target,
    ):
        for line in source:
            row = json.loads(line)
            values = [row.pop(name) for name in names] if len(names) > 1 else [row["messages"][0]["content"]]
            text = pieces[0] + "".join(v + p for v, p in zip(values, pieces[1:], strict=True))
            row["messages"][0]["content"] = text
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _tokens(sink: Sink, model: str | None) -> tuple[int, float, str]:
    """Static tokens, mean tokens of a request, and what counted them: the model's tokenizer, else an approximation."""
    counter = _counter(model)
    static = sum(counter.text(text) for text in sink.version.static)
    totals = [sum(counter.text(m["content"]) for m in messages) for messages in sink.sample]
    return static, statistics.fmean(totals), counter.name


def _counter(model: str | None) -> Tokens:
    from unshot.text.tokenizers import counter_for

    try:
        return counter_for(model or "gpt-4o", api=True, approximate=True)
    except UnshotError:
        return counter_for("gpt-4o", api=True, approximate=True)


def case_file(
    system: str | None,
    prompt: str | None,
    traffic: Traffic,
    model: str | None,
    answers: bool,
    output_tokens: Sequence[int],
    kept: str = "",
) -> str:
    """The case file: what the log told, and as comments what it did not. `kept` is the least of a short prompt."""
    lines = [
        "# Written by `unshot data import` from request logs. What the log does not tell is commented out.",
        "",
    ]
    lines += ["[task]", 'name = "imported"']
    if system is not None:
        lines.append(f"system = {json.dumps(system, ensure_ascii=False)}")
    lines.append(
        f'examples = "{prompt}"'
        if prompt
        else "# No text was found beside the system prompt: examples are none."
    )
    lines.append('inputs = "inputs.jsonl"')
    if kept:
        lines.append(f"instruction = {json.dumps(kept)}  # what changes from request to request; shorten it")
    else:
        lines.append('# instruction = "the tuned model\'s short prompt"')
    lines += ["", "[traffic]"]
    if traffic.rate is not None:
        lines.append(f"rate = {traffic.rate:.6g}  # mean of {traffic.hours:.3g} hours")
    else:
        lines.append("# rate: the log has no two times; requests per second")
    if traffic.peak_factor is not None:
        lines.append(f"peak_factor = {traffic.peak_factor:.3g}  # busiest hour")
    else:
        lines.append("# peak_factor: the log spans less than a day, so that its busiest hour is not known")
    if traffic.arrival_cv is not None:
        lines.append(f"arrival_cv = {max(traffic.arrival_cv, 0.01):.3g}")
    else:
        lines.append("# arrival_cv: the times are too few or too coarse for the gaps between requests")
    if not answers and output_tokens:
        lines.append(f"output_tokens = {statistics.fmean(output_tokens):.4g}  # as the log counts them")
    elif not answers:
        lines.append("# output_tokens: the log has no answers; tokens of a usual one")
    lines += ["", "[baseline]"]
    lines.append(f"api = {json.dumps(model)}" if model else '# api = "the model that answers today"')
    return "\n".join(lines) + "\n"
