"""`report.json` of `unshot data check`: what a data file holds, and what a reader should act on."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Generic, TypeVar, overload

from msgspec import field

from tune.data.agreement import AnnotatorAgreement
from tune.data.balance import Balance
from tune.data.variety import WARN
from unshot.contracts.record import Record

MINIMUM, COMFORTABLE = 50, 200
# Findings of one kind in the report itself; all of them are in the files beside it.
LISTED = 1000


class Minimum(Record):
    """How many rows are needed at least and usually, and whether there are."""

    at_least: int
    usual: int
    enough: bool


class Malformed(Record):
    """A row that no stage can use."""

    line: int
    problem: str
    where: str = ""


class Spread(Record):
    """Lengths of all rows."""

    min: float
    median: float
    p95: float
    max: float


class LongRow(Record):
    """A row longer than the context, in the report's unit."""

    line: int
    length: int


class LongRows(Record):
    """The rows longer than the context."""

    total: int
    listed: list[LongRow]


class Lengths(Record):
    """Prompt and answer in tokens or words."""

    unit: str
    prompt: Spread
    answer: Spread
    context: int | None
    too_long: LongRows


class Pair(Record):
    """Two rows alike in their inputs, by text or by meaning; texts are cut at 200 characters."""

    lines: list[int]
    similarity: float
    answers: list[str]
    texts: list[str]


class Contradictions(Record):
    """Pairs of near-identical inputs with different answers; in free text they need not be wrong."""

    free_text: bool
    total: int
    listed: list[Pair]


class Duplicate(Record):
    """A row whose input is (nearly) that of an earlier one."""

    line: int
    like_line: int
    similarity: float
    equal: bool


class Duplicates(Record):
    """Rows that repeat an earlier input exactly, and that nearly do."""

    threshold: float
    exact_rows: int
    near_rows: int
    total: int
    listed: list[Duplicate]


class Paraphrases(Record):
    """Pairs of inputs alike in meaning that are not so by their texts."""

    embedder: str
    threshold: float
    pairs: int
    different_answers: int
    total: int
    listed: list[Pair]


class Variety(Record):
    """The share of the prompts' words that is one template, and of rows with the most usual system prompt."""

    template_share: float
    sampled: int
    usual_system_prompt: float | None


class PersonalRow(Record):
    """A row that holds personal data."""

    line: int
    kinds: list[str]


class PersonalData(Record):
    """Findings by kind, and the rows."""

    kinds: dict[str, int]
    total: int
    listed: list[PersonalRow]


class Reading(Record):
    """How the file was read, with an example row as a model (`example_rendered`) or a person sees it."""

    format: str
    formats: dict[str, int]
    unused: dict[str, int]
    notes: dict[str, int]
    example: str | None
    example_rendered: bool


class Prompts(Record):
    """Rows whose old prompt was taken out, system prompts left in, and words that saves."""

    rows: int = field(name="changed")
    kept: int
    words_less: int


class CheckReport(Record, kw_only=True):
    """Everything found; lists hold their first 1,000 entries, but `malformed` all."""

    data: str
    rows: int
    well_formed: int
    minimum: Minimum
    malformed: list[Malformed]
    length: Lengths
    labels: Balance | None
    contradictions: Contradictions
    agreement: AnnotatorAgreement | None
    duplicates: Duplicates
    paraphrases: Paraphrases | None
    variety: Variety
    personal_data: PersonalData
    reading: Reading
    prompts: Prompts
    warnings: list[str] = field(default_factory=list)
    ready: bool

    def advice(self) -> list[str]:
        """What a reader should act on, one sentence each."""
        found = []
        if self.malformed:
            found.append(f"{len(self.malformed)} malformed rows; training refuses them")
        if self.well_formed < COMFORTABLE:
            found.append(
                f"{self.well_formed} usable rows; 50 to 200 good examples are the usual minimum for one task"
            )
        return [*found, *self._about_labels(), *self._about_pairs(), *self._about_texts()]

    def _about_labels(self) -> Iterator[str]:
        labels = self.labels
        if labels is None:
            return
        if labels.below_5:
            yield f"{len(labels.below_5)} of {labels.classes} classes have fewer than 5 rows"
        if labels.alike:
            pairs = ", ".join(f"`{a}` and `{b}`" for a, b in labels.alike[:5])
            yield f"{len(labels.alike)} pairs of labels that may be one: {pairs}"
        if labels.missing:
            yield labels.missing
        if labels.largest > 10 * labels.smallest:
            yield f"the largest class has {labels.largest} rows, the smallest {labels.smallest}"

    def _about_pairs(self) -> Iterator[str]:
        contradictions, duplicates, paraphrases = self.contradictions, self.duplicates, self.paraphrases
        if contradictions.total and not contradictions.free_text:
            yield f"{contradictions.total} pairs of near-identical inputs with different answers"
        if duplicates.exact_rows or duplicates.near_rows:
            yield (
                f"{duplicates.exact_rows} rows repeat an earlier input, {duplicates.near_rows} more nearly do"
            )
        if paraphrases and paraphrases.different_answers and not contradictions.free_text:
            yield (
                f"{paraphrases.different_answers} pairs of inputs close in meaning have different answers; look at them"
            )
        alpha = self.agreement.krippendorff_alpha if self.agreement else None
        if alpha is not None and alpha < 0.8:
            yield f"annotators agree too little (Krippendorff's alpha {alpha:.2f}; 0.8 is the usual bar)"

    def _about_texts(self) -> Iterator[str]:
        if self.variety.template_share > WARN:
            yield (
                f"{self.variety.template_share:.0%} of the prompts' words are one template; the model may learn the "
                "wrapping: vary it (`unshot tune --augment-format`)"
            )
        if self.personal_data.total:
            kinds = ", ".join(f"{n} {k}" for k, n in sorted(self.personal_data.kinds.items()))
            yield f"{self.personal_data.total} rows hold personal data ({kinds}); see --redact"
        if self.length.too_long.total:
            yield f"{self.length.too_long.total} rows are longer than {self.length.context} {self.length.unit}"


T = TypeVar("T", bound=Record)


class Findings(Generic[T]):
    """Findings of one kind: the first `LISTED` in memory, all of them as JSONL where a file is given."""

    def __init__(self, handle: IO[str] | None) -> None:
        self.listed: list[T] = []
        self.total = 0
        self._handle = handle

    def add(self, found: T) -> None:
        """Record one finding."""
        self.total += 1
        if len(self.listed) < LISTED:
            self.listed.append(found)
        if self._handle:
            self._handle.write(found.to_json() + "\n")


class Texts(Sequence[str]):
    """Append-only texts in a temporary file without a name (it goes with the process); read by index."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="unshot-")  # noqa: SIM115
        self._ends = array("Q", [0])
        self._written = True

    def append(self, text: str) -> None:
        """Add a text at the end."""
        raw = text.encode(errors="surrogatepass")
        if not self._written:
            self._file.seek(self._ends[-1])
        self._written = True
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._written = False
        self._file.seek(self._ends[index])
        raw = self._file.read(self._ends[index + 1] - self._ends[index])
        return raw.decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            yield self[index]
