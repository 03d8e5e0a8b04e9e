"""Published measurements: reading the two kinds of CSV, and what the roofline says each row should be."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from msgspec import Struct

from planner import queueing
from planner.replica import CHUNK, Load, setup
from planner.roofline import Efficiency, cost_of
from unshot import catalog
from unshot.catalog import Architecture, Gpu, Precision
from unshot.errors import InputError

THROUGHPUT = (
    "model",
    "gpu",
    "precision",
    "tensor_parallel",
    "input_tokens",
    "output_tokens",
    "output_tokens_per_s",
)
SINGLE = (
    "model", "gpu", "precision", "prompt_tokens", "generated_tokens", "prompt_tokens_per_s", "generated_tokens_per_s",
)  # fmt: skip


class Observation(Struct, frozen=True):
    """One measured figure, tokens/s. `quantity` is `throughput` (output tokens of a saturated server), `prefill`
    or `decode` (one stream). `line` is the row's line in the file.
    """

    quantity: str
    arch: Architecture
    gpu: Gpu
    precision: Precision
    tensor_parallel: int
    input_tokens: float
    output_tokens: float
    measured: float
    line: int

    @property
    def engine(self) -> str:
        """The engine the figure was taken with."""
        return "batched" if self.quantity == "throughput" else "llamacpp"


class UnknownName(InputError):
    """A row names a model, a device or a precision that the catalog lacks."""


def read_published(path: Path, *, skipped: list[str] | None = None) -> list[Observation]:
    """Read a CSV of published rows; the header says which kind it is.

    Throughput files have the columns of `THROUGHPUT`, single-stream files those of `SINGLE` (each row gives two
    observations); further columns are ignored. Raises `InputError` with file and line for anything it cannot use; where
    a list is given as `skipped`, rows of models, devices or precisions that the catalog lacks go there as a line each.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error}); give a CSV file in UTF-8") from None
    reader = csv.DictReader(text.splitlines())
    header = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = header
    kinds = [kind for kind in (THROUGHPUT, SINGLE) if set(kind) <= set(header)]
    if not kinds:
        best = max((THROUGHPUT, SINGLE), key=lambda kind: len(set(kind) & set(header)))
        missing = [name for name in best if name not in header]
        raise InputError(f"{path}:1: columns missing: {', '.join(missing)}; needed: {', '.join(best)}")
    found: list[Observation] = []
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise InputError(f"{where}: {'more' if None in row else 'fewer'} fields than the header has")
        try:
            found.extend(_row(row, where, reader.line_num, kinds[0] is THROUGHPUT))
        except UnknownName as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not found and skipped:
        raise InputError(
            f"{path}: the catalog knows no row's model, GPU and precision; the first: {skipped[0]}"
        )
    if not found:
        raise InputError(f"{path}: no rows below the header")
    return found


def _row(row: dict[str, str], where: str, line: int, throughput: bool) -> list[Observation]:
    def number(name: str, *, whole: bool = False) -> float:
        try:
            value = float(row[name])
        except ValueError:
            raise InputError(f"{where}: `{name}` is {row[name]!r}; a number is needed") from None
        if not (math.isfinite(value) and value > 0) or (whole and value != int(value)):
            kind = "whole number" if whole else "number"
            raise InputError(f"{where}: `{name}` is {row[name]!r}; a {kind} above zero is needed")
        return value

    try:
        arch, gpu = catalog.model(row["model"]), catalog.gpu(row["gpu"])
        form = catalog.precision(row["precision"])
    except InputError as error:
        raise UnknownName(f"{where}: {error}") from None
    if throughput:
        observation = Observation(
            "throughput", arch, gpu, form, int(number("tensor_parallel", whole=True)),
            number("input_tokens", whole=True), number("output_tokens", whole=True),
            number("output_tokens_per_s"), line,
        )  # fmt: skip
        return [observation]
    prompt, output = number("prompt_tokens", whole=True), number("generated_tokens", whole=True)
    rates = (("prefill", "prompt_tokens_per_s"), ("decode", "generated_tokens_per_s"))
    return [Observation(q, arch, gpu, form, 1, prompt, output, number(name), line) for q, name in rates]


def predict(row: Observation, eff: Efficiency) -> float:
    """Tokens/s the model expects for a row with these efficiencies; 0 where the model does not fit the device."""
    if row.quantity == "throughput":
        load = Load(1.0, row.input_tokens, row.output_tokens)
        one = setup(
            row.arch,
            row.gpu,
            row.precision,
            load,
            engine="batched",
            tensor_parallel=row.tensor_parallel,
            eff=eff,
        )
        return float(queueing.capacity(one.cost, one.shape(load))) * row.output_tokens
    cost = cost_of(row.arch, row.gpu, row.precision, engine="llamacpp", eff=eff)
    if row.quantity == "decode":
        context = row.arch.cached_tokens(row.input_tokens + row.output_tokens / 2)
        return 1.0 / float(cost.step(0.0, 0.0, 1.0, context))
    chunks = math.ceil(row.input_tokens / CHUNK["llamacpp"])
    pairs = row.input_tokens * (row.input_tokens + 1) / 2
    # The weights are read once per chunk.
    seconds = chunks * float(
        cost.step(row.input_tokens / chunks, pairs / chunks, 0.0, 0.0, prompts=1 / chunks, chunks=1.0)
    )
    return row.input_tokens / seconds
