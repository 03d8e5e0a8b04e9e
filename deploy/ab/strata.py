"""Parts of the traffic within which the arms may be compared, and whether the arms got what the share says.

While the candidate's share is raised, the traffic changes too: pooled, the arm that had more of the easy hours looks
better (Simpson's paradox). Within one share the draw is independent of the hour, and so the difference is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from deploy.answers import LoggedRequest
from unshot.metrics.thresholds import SAMPLE_RATIO

# Requests of a part by time, where the log does not hold the share. Fixed, so that a longer log keeps its parts.
PART = 250
# Units expected in the smaller arm below which a part's ratio says nothing.
EXPECTED = 5


@dataclass(frozen=True)
class Strata:
    """The part of each request, in the order given, and the parts' names."""

    codes: list[int]
    names: list[str]

    def sentence(self) -> str | None:
        """How the comparison is stratified, None where it is not."""
        if len(self.names) < 2:
            return None
        if self.names[0].startswith("share"):
            shares = ", ".join(name.removeprefix("share ") for name in self.names[:12])
            return f"compared within each share of the candidate ({shares}), and these differences are weighed together"
        return f"compared within {len(self.names)} parts by time, since this log does not hold the candidate's share"


def stratify(asked: Sequence[LoggedRequest]) -> Strata:
    """Parts of equal share; of requests whose share is not known, parts of at least `PART` requests in a row."""
    known = sorted({round(one.share, 6) for one in asked if one.share is not None})
    names = [f"share {100 * share:g}%" for share in known]
    unknown = [i for i, one in enumerate(asked) if one.share is None]
    codes = [known.index(round(one.share, 6)) if one.share is not None else -1 for one in asked]
    for rank, index in enumerate(sorted(unknown, key=lambda i: asked[i].time)):
        codes[index] = len(known) + rank // PART
    parts = -(-len(unknown) // PART)
    return Strata(codes, names + [f"part {n + 1}" for n in range(parts)])


@dataclass(frozen=True)
class Mismatch:
    """Units in both arms against the share that was set: p of a chi-squared test over all shares."""

    baseline: int
    candidate: int
    expected: float
    p: float

    @property
    def found(self) -> bool:
        return self.p < SAMPLE_RATIO.value

    def sentence(self) -> str:
        return (
            f"sample ratio mismatch: {self.baseline:,} baseline and {self.candidate:,} candidate units where the share "
            f"asks for {self.expected:,.0f} candidates (p {self.p:.1g}); lines were lost or the draw is broken, and "
            "no difference between the arms can be told from that"
        )


def sample_ratio(asked: Sequence[LoggedRequest]) -> Mismatch | None:
    """Whether units came into the arms as the share says (Fabijan et al. 2019); None where the log cannot tell."""
    units: dict[float, dict[str, set[str]]] = {}
    for one in asked:
        if one.share is not None:
            arms = units.setdefault(round(one.share, 6), {"baseline": set(), "candidate": set()})
            arms[one.assigned].add(one.unit)
    found = [0, 0]
    expected = statistic = 0.0
    freedom = 0
    for share, arms in units.items():
        baseline, candidate = len(arms["baseline"]), len(arms["candidate"])
        total = baseline + candidate
        if share in (0.0, 1.0):
            continue
        found = [found[0] + baseline, found[1] + candidate]
        expected += share * total
        if min(share, 1 - share) * total >= EXPECTED:
            statistic += (candidate - share * total) ** 2 / (total * share * (1 - share))
            freedom += 1
    if not freedom:
        return None
    return Mismatch(found[0], found[1], expected, float(stats.chi2.sf(statistic, freedom)))
