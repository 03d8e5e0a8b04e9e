"""The steady state of a load: ramp-up and drain cut off."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records import RequestRecord
from bench.schedule import Load

Window = tuple[list[RequestRecord], list[RequestRecord], float]


def steady_window(records: Sequence[RequestRecord], load: Load) -> Window | None:
    """The steady state, from the first answer of every stream to the last request sent: `(sent, ended, seconds)`.

    Latencies are of the requests sent in it, throughput is of those that ended in it: with those sent, one too many a
    stream would count. In open loop it begins when as many requests have ended as were under way at the first one's
    end. None where fewer ended in it than there are streams.
    """
    if not records:
        return None
    ends = sorted(r.end for r in records)
    under_way = load.concurrency or sum(r.scheduled <= ends[0] for r in records)
    begin = ends[min(under_way, len(ends)) - 1]
    end = max(r.scheduled for r in records)
    chosen = [r for r in records if begin <= r.scheduled <= end]
    flow = [r for r in records if begin < r.end <= end]
    return (chosen, flow, end - begin) if len(flow) >= under_way else None
