"""What the gateway counts, in Prometheus's form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from deploy.serve.shared import FOLDER

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BREAKER = {"closed": 0, "half-open": 1, "open": 2}


class Metrics:
    """Counters of one gateway."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"unshot_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"unshot_{name}", text, ("arm",), buckets=SECONDS, registry=self.registry)

        self.answers = counter("answers", "Answers tried, by outcome (ok or the kind of failure)",
                               "arm", "version", "outcome")  # fmt: skip
        self.fallbacks = counter("fallbacks", "Baseline answers in place of the candidate's", "reason")
        self.failed = counter("failed_requests", "Requests that no arm answered", "reason")
        self.rejected = counter("rejected_requests", "Requests refused before an arm was asked", "reason")
        self.shadows = counter("shadows", "Shadow answers, by outcome; dropped: no room", "arm", "outcome")
        self.tokens = counter("tokens", "Tokens as the back ends count them", "arm", "kind")
        self.cost = counter("cost_usd", "US dollars at the prices given", "arm")
        self.feedback = counter("feedback", "Feedback received", "correct")
        self.switches = counter("switches", "Back ends switched while serving", "arm", "outcome")
        self.restarts = counter("restarts", "Back ends started again after they died or hung", "arm")
        self.log_lines = counter("log_lines", "Lines of the request log", "outcome")
        self.ttft = seconds("ttft_seconds", "Arrival to first token, of answers shown")
        self.e2e = seconds("e2e_seconds", "Arrival to last token, of answers shown")
        self.queue = seconds("queue_seconds", "Arrival until the back end was asked")

    def text(self, gauges: Iterable[Metric]) -> bytes:
        """The exposition: the counters, of all workers where there are several, and what is so at this moment."""
        counters = self.registry
        if FOLDER in os.environ:
            counters = CollectorRegistry()
            MultiProcessCollector(counters)  # type: ignore[no-untyped-call]
        now = CollectorRegistry()
        now.register(_Now(list(gauges)))
        return generate_latest(counters) + generate_latest(now)


class _Now:
    """Gauges that were read just now."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> list[Metric]:
        return self._found


def gauge(name: str, text: str, *samples: tuple[float, Mapping[str, str]]) -> Metric:
    """A gauge with its samples, value and labels each."""
    labels = list(samples[0][1]) if samples else []
    found = GaugeMetricFamily(f"unshot_{name}", text, labels=labels)
    for value, named in samples:
        found.add_metric([named[label] for label in labels], value)
    return found
