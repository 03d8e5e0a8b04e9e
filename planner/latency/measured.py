"""Published measurements: reading the kinds of CSV, and what the model says each figure should be."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
from msgspec import Struct

from planner.latency.closed_form import capacity
from planner.latency.replica import Load, kept_tokens, replica
from planner.latency.simulate import Run, lengths, serve
from planner.latency.step import Efficiency, Overhead, efficiency, overheads
from unshot import catalog
from unshot.catalog import Architecture, Engine, Gpu, Precision
from unshot.errors import InputError

# What every table needs, and the figures a table may hold, each with the columns that say how it was taken.
COMMON = ("model", "gpu", "precision")
FIGURES = {
    "output_tokens_per_s": "throughput",
    "ttft_ms": "ttft",
    "itl_ms": "itl",
    "tpot_ms": "itl",
    "prompt_tokens_per_s": "prefill",
    "generated_tokens_per_s": "decode",
}
# Below these a time in milliseconds was meant in seconds.
FASTEST = {"ttft": 1.0, "itl": 0.1}
UNITS = {"ttft": "ms", "itl": "ms"}  # all others: tokens/s
# A request's columns by the names that tables use for them.
ALIASES = {
    "prompt_tokens": "input_tokens",
    "generated_tokens": "output_tokens",
    "tp": "tensor_parallel",
}
# Requests of each client in a closed loop; where lengths differ, so many that their medians settle.
ROUNDS, ROUNDS_VARIED = 8, 50


class Observation(Struct, frozen=True):
    """One measured figure. `quantity` is `throughput` (output tokens/s), `ttft`, `itl` (ms, medians of a closed loop),
    `prefill` or `decode` (tokens/s of one stream).

    `concurrency` clients in a closed loop, or `prompts` sent all at once, or neither: a queue that never empties. A
    decode figure is that of `batch` sequences in step, over `context` cached tokens each on average.
    `http`: the figure was taken at a server. `line` is the row's line in the file, `source` the file's name.
    """

    quantity: str
    arch: Architecture
    gpu: Gpu
    precision: Precision
    engine: Engine
    tensor_parallel: int
    input_tokens: float
    output_tokens: float
    measured: float
    line: int
    source: str = ""
    concurrency: int | None = None
    prompts: int | None = None
    batch: int = 1
    context: float = 0.0
    http: bool = False
    length_cv: float = 0.0
    weight: float = 1.0


class UnknownName(InputError):
    """A row names a model, a device, a precision or an engine that the catalog lacks."""


class Skipped(Struct, frozen=True):
    """A row that is not forecast, and why."""

    line: int
    reason: str


def read_measured(path: Path, *, skipped: list[Skipped] | None = None) -> list[Observation]:
    """Read a CSV of measured rows, separated by commas or semicolons; each figure of a row is one observation.

    Needed are `model`, `gpu`, `precision` and one of `FIGURES`; `input_tokens` and `output_tokens` (or
    `prompt_tokens`, `generated_tokens`), `engine`, `tensor_parallel`, `concurrency`, `prompts`, `batch` (sequences that
    decode in step, without a server) and `context_tokens` say how it was taken; further columns are ignored. A blank
    cell is a missing figure, and thousands may be parted ("28,312"); in a file with semicolons and decimal commas every
    comma is one.
    Raises `InputError` with file and line for anything it cannot use; with a list given as `skipped`, rows that the
    catalog lacks a name for, or that use speculative decoding, go there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error}); give a CSV file in UTF-8") from None
    first = text.partition("\n")[0]
    semicolons = first.count(";") > first.count(",")
    reader = csv.DictReader(text.splitlines(), delimiter=";" if semicolons else ",")
    # Where one number has a decimal comma, all have: "7,385" is then 7.385.
    commas = semicolons and bool(re.search(r"(?m)(?:^|;)\s*[\d.]*\d,(?:\d{1,2}|\d{4,})\s*(?:;|$)", text))
    header = [ALIASES.get(name, name) for name in (n.strip().lower() for n in reader.fieldnames or [])]
    reader.fieldnames = header
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{path}:1: two columns for `{twice[0]}`; which is meant? leave one out")
    missing = [name for name in COMMON if name not in header]
    if missing or not set(FIGURES) & set(header):
        needed = f"{', '.join(COMMON)} and one of {', '.join(FIGURES)}"
        what = ", ".join(missing) or "a measured figure"
        raise InputError(f"{path}:1: columns missing: {what}; needed: {needed}")
    found: list[Observation] = []
    unknown: list[str] = []
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise InputError(f"{where}: {'more' if None in row else 'fewer'} fields than the header has")
        if not any(value.strip() for value in row.values()):
            continue
        try:
            found.extend(_Row(row, where, reader.line_num, path, commas).observations())
        except UnknownName as error:
            if skipped is None:
                raise
            unknown.append(str(error))
            skipped.append(Skipped(reader.line_num, str(error)))
    if not found and unknown:
        raise InputError(
            f"{path}: the catalog knows no row's model, GPU, precision and engine; the first: {unknown[0]}"
        )
    if not found:
        raise InputError(f"{path}: no rows below the header")
    return found


class _Row:
    """One line of a table."""

    def __init__(self, cells: dict[str, str], where: str, line: int, path: Path, commas: bool) -> None:
        self.commas = commas
        self.cells = {name: value.strip() for name, value in cells.items()}
        self.where, self.line, self.path = where, line, path

    def number(self, name: str, *, whole: bool = False) -> float | None:
        """A cell's number; None if it is blank or there is no such column."""
        text = self.cells.get(name, "")
        if text in ("", "-", "–", "n/a", "NA"):
            return None
        # "28,312": a comma before exactly three digits parts thousands, as in "1,234.5"; others are decimal commas.
        plain = text.replace(" ", "").replace("\u202f", "").replace("'", "")
        if self.commas and "," in plain:
            plain = plain.replace(".", "").replace(",", ".")
        elif re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", plain):
            plain = plain.replace(",", "")
        elif re.fullmatch(r"\d+,\d+", plain):
            plain = plain.replace(",", ".")
        try:
            value = float(plain)
        except ValueError:
            raise InputError(f"{self.where}: `{name}` is {text!r}; a number is needed") from None
        if not (math.isfinite(value) and value > 0) or (whole and value != int(value)):
            kind = "whole number" if whole else "number"
            raise InputError(f"{self.where}: `{name}` is {text!r}; a {kind} above zero is needed")
        return value

    def count(self, name: str) -> int | None:
        """A whole number; None if it is blank."""
        value = self.number(name, whole=True)
        return None if value is None else int(value)

    def observations(self) -> list[Observation]:
        """Every figure the line holds. Raises `UnknownName`."""
        if self.cells.get("speculative"):
            raise UnknownName(f"{self.where}: speculative decoding is not forecast from published rows")
        single = any(self.cells.get(name) for name in ("prompt_tokens_per_s", "generated_tokens_per_s"))
        named = self.cells.get("engine") or ("llamacpp" if single else "trtllm")
        try:
            arch, gpu = catalog.model(self.cells["model"]), catalog.gpu(self.cells["gpu"])
            form, engine = catalog.precision(self.cells["precision"]), catalog.engine(named)
        except InputError as error:
            raise UnknownName(f"{self.where}: {error}") from None
        concurrency, prompts = self.count("concurrency"), self.count("prompts")
        prompt, output = self.number("input_tokens", whole=True), self.number("output_tokens", whole=True)
        if prompt is None or output is None:
            raise InputError(f"{self.where}: `input_tokens` and `output_tokens` are needed")
        batch, context = self.count("batch"), self.number("context_tokens")
        sharegpt = bool(prompts or concurrency) and (prompt, round(output, -1)) in SHAREGPT
        if context is None:
            # llama-bench (prompt and generation speed in one row) generates from an empty context.
            context = output / 2 if single else prompt + output / 2
        found = []
        for column, quantity in FIGURES.items():
            measured = self.number(column)
            if measured is None:
                continue
            if measured < FASTEST.get(quantity, 0.0):
                raise InputError(
                    f"{self.where}: `{column}` is {measured:g}; milliseconds are needed, and nothing is that fast: did "
                    f"you mean {measured * 1e3:g}?"
                )
            quantity = "decode" if batch and quantity == "throughput" else quantity
            found.append(
                Observation(
                    quantity,
                    arch,
                    gpu,
                    form,
                    engine,
                    self.count("tensor_parallel") or 1,
                    prompt,
                    output,
                    measured,
                    self.line,
                    self.path.name,
                    concurrency,
                    prompts,
                    http=self._at_a_server(named),
                    batch=batch or 1,
                    context=context,
                    length_cv=SHAREGPT_CV if sharegpt else 0.0,
                )
            )
        return found

    def _at_a_server(self, named: str) -> bool:
        """Whether the figure was taken through HTTP: served engines were, unless the tool runs in the process."""
        kind = named.lower()
        in_process = ("trtllm", "tensorrt-llm", "lmdeploy", "exllama", "llama", "mlc")
        return "serve" in kind or not kind.startswith(in_process)


# ShareGPT prompts and answers (on average 217 and 202 tokens, or 233 and 221: docs.gpustack.ai, performance-lab, read
# 2026-11-27) spread about as widely as their mean: clients of a closed loop do not fall into step.
SHAREGPT, SHAREGPT_CV = {(217.0, 200.0), (233.0, 220.0)}, 1.0


# A simulated run and its answers' lengths by source and line: the figures of one line share them.
Runs = dict[tuple[str, int], tuple[Run, np.ndarray]]


def predict(
    row: Observation,
    eff: Efficiency | None = None,
    overhead: Overhead | None = None,
    runs: Runs | None = None,
) -> float:
    """What the model expects for a row, in the row's unit; 0 if the model does not fit the device.

    `runs` keeps what was simulated with these numbers, for the other figures of the row's line.
    """
    runs = {} if runs is None else runs
    if (row.source, row.line) in runs:
        return _measured(*runs[row.source, row.line], row)
    answers_vary = row.length_cv if row.output_tokens > 1 else 0.0
    load = Load(1.0, row.input_tokens, row.output_tokens, prompt_cv=row.length_cv, output_cv=answers_vary)
    one = replica(
        row.arch,
        row.gpu,
        row.precision,
        load,
        engine=row.engine,
        tensor_parallel=row.tensor_parallel,
        eff=eff or efficiency(row.gpu, row.engine),
        overhead=overhead or overheads().get(row.engine.name, Overhead()),
    )
    if one.limit < 1:
        return 0.0
    if row.quantity == "decode":
        context = float(kept_tokens(row.arch, row.context))
        return row.batch / float(one.cost.step(0.0, 0.0, row.batch, row.batch * context))
    if row.quantity == "prefill":
        shape = one.shape(load)
        chunks = math.ceil(row.input_tokens / one.chunk)
        # The weights are read once per chunk.
        each = one.cost.step(
            shape.new / chunks, shape.pairs / chunks, 0.0, 0.0, prompts=1 / chunks, chunks=1.0
        )
        return row.input_tokens / (chunks * float(each))
    if row.concurrency is None and row.prompts is None:
        return float(capacity(one.cost, one.shape(load))) * row.output_tokens
    rounds = ROUNDS_VARIED if row.length_cv else ROUNDS
    count = row.prompts or max(row.concurrency or 1, 1) * rounds
    prompts, outputs = lengths(load, count, np.random.default_rng(0))
    run = serve(one, load, np.zeros(count), prompts, outputs, clients=row.concurrency, http=row.http)
    runs[row.source, row.line] = run, outputs
    return _measured(run, outputs, row)


def _measured(run: Run, outputs: np.ndarray, row: Observation) -> float:
    if row.quantity == "ttft":
        return run.at("ttft", 50.0) * 1e3
    if row.quantity == "itl":
        return run.at("tpot", 50.0) * 1e3
    return float(outputs.sum() / (run.arrival + run.e2e).max())
