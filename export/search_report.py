"""What `unshot export search` found, as a record and as a page: the pick, the trade-offs, what was measured how."""

from __future__ import annotations

from export.loss import Loss
from unshot.contracts.parity import FileReport
from unshot.contracts.record import Record
from unshot.report.charts import Mark, Span, intervals
from unshot.report.page import cards, charts, facts, page, section, table, text, verdict
from unshot.report.scatter import Dot, scatter

WORDS = {
    "holds": "holds",
    "unproven": "holds, not proven",
    "loses": "loses too much",
    "damaged": "fails the parity gate",
    "passed over": "larger than the pick",
}


class Row(Record):
    """One format in `search.json`; speeds are tokens per second, medians over the rounds, None where not timed."""

    target: str
    bytes: int
    prefill: float | None
    prefill_rounds: list[float]
    decode: float | None
    decode_rounds: list[float]
    memory: int
    loss: Loss | None
    parity: FileReport
    verdict: str
    why: str


class Found(Record):
    """`search.json`: what was measured on which machine, the pick, and the command that writes it."""

    source: str
    base: str
    metric: str
    limit: float
    rows: int
    rows_needed: int
    picked: str | None
    proven: bool
    command: str | None
    candidates: list[Row]
    cpu: str
    cores: int
    timings: dict[str, float]
    evaluations: int = 0  # rows answered by all formats together
    out: str = ""


def search_page(result: Found) -> str:
    """The whole report as HTML."""
    rows = sorted(result.candidates, key=lambda r: -r.bytes)
    picked = next((r for r in rows if r.target == result.picked), None)
    return page(
        f"Which quantisation of {result.source}",
        headline(result, picked),
        *([figures(result, picked, rows)] if picked else []),
        section("What is traded for what", charts(*plots(result, rows))),
        section("Every format", whole_table(result, rows)),
        section("How it was measured", how(result)),
        subtitle=f"{result.base}, {result.rows} rows, measured on {result.cpu}, {result.cores} cores",
        footer="Written by unshot export search. Speeds hold for this machine.",
    )


def headline(result: Found, picked: Row | None) -> str:
    """The answer in one line."""
    limit = f"{result.limit:g}"
    if picked is None:
        return verdict(f"No format keeps the score within {limit}", [], kind="bad")
    size, commands = megabytes(picked.bytes), [result.command] if result.command else []
    if result.proven:
        return verdict(
            f"{picked.target} ({size}) is the smallest that keeps the score within {limit}",
            [picked.why, *commands],
            kind="good",
        )
    return verdict(
        f"{picked.target} ({size}) is the smallest that lost no more than {limit} on these rows",
        [
            f"{result.rows} rows cannot show so small a loss: {picked.why}. At least "
            f"{result.rows_needed} labelled rows are needed, and more where answers change.",
            *commands,
        ],
        kind="warn",
    )


def figures(result: Found, picked: Row, rows: list[Row]) -> str:
    """The pick's figures as cards."""
    loss, logits = picked.loss, picked.parity.figures.logits
    part = f"{picked.bytes / rows[0].bytes:.0%} of {rows[0].target}"
    metric = result.metric.replace("_", " ")
    scores = [
        ("score lost", f"{loss.loss:.3f}", f"95% interval {loss.low:.3f} to {loss.high:.3f}"),
        (metric, f"{loss.score:.3f}", f"the evaluated model: {loss.reference:.3f}"),
    ] if loss else []  # fmt: skip
    return cards(
        [
            ("size", megabytes(picked.bytes), part),
            *scores,
            ("KL divergence", f"{logits.kl:.2g}" if logits else "–", "mean, nats per token"),
            ("decode", per_second(picked.decode), span(picked.decode_rounds)),
            ("prefill", per_second(picked.prefill), span(picked.prefill_rounds)),
        ]
    )  # fmt: skip


def plots(result: Found, rows: list[Row]) -> list[str]:
    """Size against score, size against speed, and the losses with their intervals."""
    losses = {r.target: r.loss for r in rows if r.loss}
    scored = [r for r in rows if r.target in losses]
    if not scored:
        return []
    reference = losses[scored[0].target].reference
    floor = reference - result.limit
    # What is far below would press the others into one line.
    deep = max(0.15, 5 * result.limit)
    near = [r for r in scored if losses[r.target].loss <= deep]
    score = {target: loss.score for target, loss in losses.items()}
    below = ", ".join(f"{r.target} ({score[r.target]:.3f})" for r in scored if r not in near)
    speed = {r.target: r.decode for r in scored if r.decode is not None}
    return [
        scatter(
            "Size and score",
            [_dot(r, score, scored, result, r.loss) for r in near],
            x_label="MB on disk",
            y_label=result.metric.replace("_", " "),
            y_marks=[Mark(floor, f"limit {floor:.3f}; evaluated model {reference:.3f}")],
            note="Bars: 95% interval of the loss, paired with the evaluated model's answers. Blue and dotted: the "
            "Pareto front, formats than which no other is both smaller and better; green: the pick."
            + (f" Below the chart: {below}." if below else ""),
        ),
        scatter(
            "Size and speed",
            [_dot(r, speed, scored, result) for r in scored if r.target in speed],
            x_label="MB on disk",
            y_label="decode, tokens/s",
            from_zero=True,
            note="One request at a time. Blue and dotted: no other is both smaller and faster; green: the pick.",
        ),
        intervals(
            "Score lost against the evaluated model",
            [Span(target, loss.loss, loss.low, loss.high) for target, loss in losses.items()],
            x_label="loss (95% interval)",
            x_format=lambda v: f"{v:.3f}",
            marks=[Mark(result.limit, f"limit {result.limit:g}")],
        ),
    ]


def _dot(
    row: Row,
    heights: dict[str, float],
    rows: list[Row],
    result: Found,
    loss: Loss | None = None,
) -> Dot:
    """A format in a chart of `heights` over size; it is on the front where none is smaller and at least as
    high.
    """
    y = heights[row.target]
    others = [(r.bytes, heights[r.target]) for r in rows if r is not row and r.target in heights]
    front = not any(b <= row.bytes and h >= y and (b, h) != (row.bytes, y) for b, h in others)
    return Dot(
        row.target.removeprefix("gguf:"),
        row.bytes / 1e6,
        y,
        loss.reference - loss.high if loss else None,
        loss.reference - loss.low if loss else None,
        front,
        row.target == result.picked,
    )


def whole_table(result: Found, rows: list[Row]) -> str:
    """Every figure of every format."""
    lines = []
    for row in rows:
        loss, logits = row.loss, row.parity.figures.logits
        timed = bool(row.memory)
        lines.append(
            [
                row.target,
                WORDS[row.verdict].replace(" ", "\u00a0"),
                megabytes(row.bytes) if row.bytes else "–",
                f"{loss.score:.3f}" if loss else "–",
                f"{loss.loss:.3f} [{loss.low:.3f}, {loss.high:.3f}]" if loss else "–",
                f"{loss.broken} / {loss.mended}" if loss else "–",
                f"{logits.kl:.2g}" if logits else "–",
                f"{row.decode:.1f}" if timed else "–",
                f"{row.prefill:.0f}" if timed else "–",
            ]
        )
    names = [r.target for r in rows]
    strong = [names.index(result.picked)] if result.picked in names else []
    faint = [n for n, r in enumerate(rows) if r.verdict in ("loses", "damaged", "passed over")]
    headers = (
        "format", "verdict", "size", result.metric.replace("_", " "), "lost [95%]", "rows −/+", "KL, nats",
        "decode/s", "prefill/s",
    )  # fmt: skip
    return table(headers, lines, left=(0, 1), strong=strong, faint=faint)


def how(result: Found) -> str:
    """What each figure is."""
    rounds = max(len(r.decode_rounds) for r in result.candidates)
    return "".join(
        [
            text(
                "Lost: the evaluated model's score (fp32, adapter unmerged) less the format's, on the same rows. The "
                "interval is paired by rows; rows that did not change widen it, so that few equal rows are no proof. "
                "A format holds if the whole interval is within the limit. Rows −/+: "
                "right before and wrong now, and the other way round."
            ),
            text(
                "Rows: the run's test and validation splits. Both versions of the model answer the same rows, so that "
                "rows by which the checkpoint was picked favour neither."
            ),
            text(
                "Rows are spent in rounds: every format answers a few, the smallest quarter of those that have not "
                "lost too much goes on to four times as many. The pick was measured on all rows; a larger format that "
                "was passed over on the rows that its interval says. `--every-row` measures all on all."
            ),
            text(
                f"Speed: medians of {rounds} rounds over all formats in turn, each in a process of its own; prefill is "
                "the prompt's tokens over the time to the first token, decode one over the median time between "
                "tokens, batch 1, nothing cached. search.json has each round and the peak memory."
            ),
            facts(
                {
                    "machine": f"{result.cpu}, {result.cores} cores",
                    "rows": str(result.rows),
                    "rows answered": f"{result.evaluations} by {len(result.candidates)} formats",
                    "limit": f"{result.limit:g}",
                    "seconds": f"{sum(result.timings.values()):.0f}",
                }
            ),
        ]
    )


def per_second(value: float | None) -> str:
    """A speed, or a dash where it was not timed."""
    return "–" if value is None else f"{value:.0f} tokens/s"


def megabytes(count: float) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def span(values: list[float]) -> str:
    """The range over the rounds."""
    return f"{min(values):.0f} to {max(values):.0f} over {len(values)} rounds" if values else ""
