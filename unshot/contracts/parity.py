"""`parity.json`: how equal each exported file is to the model that was evaluated, figure by figure, with the limits."""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import field

from unshot.contracts.document import Document
from unshot.contracts.record import Record


class Limits(Record):
    """A figure beyond its limit fails; `tie` is the logit gap below which two tokens count as equal."""

    kl: float
    top1: float
    cosine: float
    perplexity: float
    greedy: float
    task: float
    tie: float
    why: str


class TokenFigures(Record):
    """Texts whose token ids were compared, and how many came out otherwise."""

    strings: int
    mismatches: int


class SpecialFigures(Record):
    """Added tokens looked at, those that the file holds as ordinary text, and the end-of-turn token."""

    checked: int
    wrong: int
    end: int


class TemplateFigures(Record):
    """Conversations rendered by the engine with the file's own template, and how many came out otherwise."""

    conversations: int
    mismatches: int


class ServedFigures(Record):
    """Prompts whose ids were taken from the server's own path (template, start-of-text), and those that differ."""

    prompts: int
    mismatches: int
    add_bos: bool | None = None


class WeightFigures(Record):
    """The file's tensors against the full-precision file it was made from: relative root-mean-square error."""

    tensors: int
    worst: str
    worst_error: float


class LogitFigures(Record):
    """Next-token distributions at the same positions of the same tokens, the reference's and the file's.

    Divergences in nats, shares in 0..1. `largest_difference` is None where the file's logits are not finite,
    the perplexities where no position has a following token.
    """

    positions: int
    kl: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_strict: float
    largest_gap: float
    cosine: float
    cosine_min: float
    largest_difference: float | None = None
    perplexity_reference: float | None = None
    perplexity: float | None = None


class GreedyFigures(Record):
    """Greedy answers: how many are equal, and how many leave the reference's only at a near-tie."""

    rows: int
    equal: float
    equal_or_tied: float


class TaskFigures(Record):
    """The task's score of the evaluated model's answers and of the file's, on the same rows."""

    metric: str
    rows: int
    reference: float
    export: float
    loss: float


class Figures(Record):
    """What was measured; None where a step did not run."""

    tokens: TokenFigures | None = None
    normalizer: str | None = None
    special_tokens: SpecialFigures | None = None
    template: TemplateFigures | None = None
    served: ServedFigures | None = None
    weights: WeightFigures | None = None
    logits: LogitFigures | None = None
    # Of the longest sequences alone, which reach past every window that the configuration names.
    long_logits: LogitFigures | None = None
    longest: int | None = None
    # Of one sequence of tokens that occur in no row; exact files alone.
    unseen_logits: LogitFigures | None = None
    greedy: GreedyFigures | None = None
    task: TaskFigures | None = None


class Probe(Record):
    """What the checked file itself said to one built-in prompt, for `unshot export verify` on another machine.

    `messages` are (role, content), `answer` its greedy answer; `top` its likeliest next tokens with their
    log-probabilities (natural).
    """

    messages: list[tuple[str, str]]
    ids: list[int]
    answer: list[int]
    top: list[int]
    log_probabilities: list[float]


class FileReport(Record):
    """One artifact. `against` names what it was compared with, `made_by` what wrote it.

    `right_up_to` is the longest sequence in tokens for which the file is the model, with the reason in `notes`; None
    where the whole context is right.
    """

    target: str
    passed: bool
    failures: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    limits: Limits | None = None
    against: str = "the evaluated model"
    made_by: str = ""
    right_up_to: int | None = None
    notes: list[str] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    # False where nothing here can run the file: its tensors alone were compared, which proves no equality.
    proven: bool = True

    @property
    def verdict(self) -> str:
        """Equal (up to how many tokens), drifts, or not proven here."""
        if not self.passed:
            return "drifts"
        if not self.proven:
            return "not proven here"
        return "equal" if self.right_up_to is None else f"equal up to {self.right_up_to} tokens"


class Parity(Document):
    """Every artifact of one export, and the full-precision files that only served as their source."""

    FILE: ClassVar[str] = "parity.json"
    VERSION: ClassVar[int] = 1
    WRITTEN_BY: ClassVar[str] = "`unshot export`"

    source: str
    reports: list[FileReport]
    sources: list[FileReport] = field(default_factory=list)

    @classmethod
    def upgrade(cls, raw: dict[str, Any], version: int) -> dict[str, Any] | None:
        """Files before versions had the same figures, and `limits: {}` where an engine died."""
        reports = [{**r, "limits": r.get("limits") or None} for r in raw.get("reports", [])]
        return {"source": raw.get("source"), "reports": reports}
