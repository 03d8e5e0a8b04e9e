"""The options side by side: what each costs per request and per month at any rate, and what it needs.

An option's cost is a function of the rate and of a `World`: the factors by which assumptions may be off. Both may be
numpy arrays that broadcast, so that one formula serves the table, the charts and the uncertainty analysis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec import Struct

from planner.oneoff import Costs
from planner.prices import ApiPrice, RequestCost, hit_rate, request_cost
from planner.usage import Usage
from unshot.catalog.tables import table

if TYPE_CHECKING:
    from planner.serving import Serving

HOURS_PER_MONTH = 8760 / 12
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600

# Seconds without a request after which a replica that may scale to zero stops.
IDLE = 300.0

# Dollars by what they pay for; numbers or numpy arrays.
Parts = Mapping[str, Any]
Kind = Literal["api", "hosted"]
Mode = Literal["plain", "cached", "batch"]


class World(Struct, frozen=True):
    """Factors on the assumptions; 1 is the forecast. Each a number or an array of draws, shape `(draws, 1)`.

    `api_price` and `gpu_price` scale prices, `length` all token counts (the counting error), `varying` the part of the
    input that differs between requests and `answer` the output (sampling error), `capacity` what a replica serves,
    `people` data, evaluation, engineering and operations, `training` training hours, `adapters` the many-adapter loss,
    `hit` the share of requests that find the prompt cache, `reasoning` the tokens thought before an answer, `replicas`
    the replicas kept at least.
    """

    api_price: Any = 1.0
    gpu_price: Any = 1.0
    length: Any = 1.0
    varying: Any = 1.0
    answer: Any = 1.0
    capacity: Any = 1.0
    people: Any = 1.0
    training: Any = 1.0
    adapters: Any = 1.0
    hit: Any = 1.0
    reasoning: Any = 1.0
    replicas: Any = 1.0


AS_FORECAST = World()


class Shape(Struct, frozen=True):
    """The load over a day: `hourly` factors on the mean rate, 24 of them; the largest is the peak factor."""

    peak: float
    hourly: tuple[float, ...]

    @classmethod
    def of(cls, peak: float) -> Shape:
        """A smooth day, proportional to exp(k cos t) with k such that the busiest hour is `peak` times the mean."""

        def day(k: float) -> list[float]:
            raw = [math.exp(k * (math.cos(2 * math.pi * h / 24) - 1)) for h in range(24)]
            mean = sum(raw) / 24
            return [r / mean for r in raw]

        low, high = 0.0, 200.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if day(middle)[0] < min(peak, 23.9) else (low, middle)
        return cls(peak, tuple(day((low + high) / 2)))


class Option(Struct, frozen=True):
    """One way to serve the task. `prompt` says which prompt is sent, `tuned` whether the model was fine-tuned."""

    key: str
    name: str
    kind: Kind
    model: str
    prompt: Literal["long", "short"]
    tuned: bool
    usage: Usage
    costs: Costs
    shape: Shape
    mode: Mode = "plain"
    price: ApiPrice | None = None
    serving: Serving | None = None
    gpu: str | None = None
    precision: str | None = None
    prefix_cache: bool = False
    min_replicas: int = 1
    shared_by: int = 1
    baseline: bool = False
    notes: tuple[str, ...] = ()
    unusable: bool = False

    @property
    def usable(self) -> bool:
        """Whether the option can serve the task at all; if not, the first of its notes says why."""
        return not self.unusable

    def hit(self, rate: Any, *, ttl: float | None = None) -> Any:
        """Share of requests that find the prefix cached, averaged over the day's load."""
        if self.price is None or self.price.rule is None or self.mode == "plain":
            return 0.0 * np.asarray(rate)
        alive = self.price.rule.ttl if ttl is None else ttl
        hits = sum(f * hit_rate_array(np.asarray(rate) * f, alive) for f in self.shape.hourly)
        return hits / sum(self.shape.hourly)

    def caches(self) -> bool:
        """Whether the provider would cache this prompt's prefix at all."""
        return bool(
            self.price is not None
            and self.price.rule
            and self.price.cached is not None
            and self.price.rule.cacheable(self.usage.prefix)
        )

    def tokens(self, world: World) -> tuple[Any, Any]:
        """Mean input and output tokens of a request."""
        inputs = (self.usage.prefix + self.usage.varying * world.varying) * world.length
        thought = self.usage.reasoning * world.reasoning
        return inputs, self.usage.output.mean * world.answer * world.length + thought

    def request_cost(self, rate: Any, world: World | None = None) -> RequestCost:
        """Dollars of one request at an API; zero for a self-hosted option (its cost is per month)."""
        world = world or AS_FORECAST
        if self.price is None:
            return RequestCost(0.0, 0.0, 0.0, 0.0)
        inputs, outputs = self.tokens(world)
        inputs, outputs = inputs * world.api_price, outputs * world.api_price
        prefix = self.usage.prefix if self.mode != "plain" and self.caches() else 0
        scale = world.length * world.api_price

        def cost(hit: Any, *, long_ttl: bool = False) -> RequestCost:
            assert self.price is not None
            plain = request_cost(
                self.price,
                input_tokens=inputs / scale,
                output_tokens=outputs / scale,
                prefix=prefix,
                hit=hit,
                batch=self.mode == "batch",
                long_ttl=long_ttl,
            )
            return RequestCost(
                plain.input * scale, plain.cached * scale, plain.write * scale, plain.output * scale
            )

        short = cost(np.minimum(self.hit(rate) * world.hit, 1.0))
        rule = self.price.rule
        if not prefix or rule is None or rule.ttl_long is None or self.price.write_long is None:
            return short
        # The cheaper of the two lifetimes, as a careful user would choose.
        other = cost(np.minimum(self.hit(rate, ttl=rule.ttl_long) * world.hit, 1.0), long_ttl=True)
        better = np.less(other.total, short.total)
        return RequestCost(
            *(
                np.where(better, b, a)
                for a, b in (
                    (short.input, other.input),
                    (short.cached, other.cached),
                    (short.write, other.write),
                    (short.output, other.output),
                )
            )
        )

    def replicas(self, rate: Any, world: World | None = None) -> Any:
        """Replicas that hold the SLO at the peak, never fewer than kept for availability; 0 for an API.

        A fraction where the GPUs are shared with other tuned tasks.
        """
        if self.serving is None:
            return 0.0 * np.asarray(rate)
        world = world or AS_FORECAST
        capacity = self.serving.capacity * world.capacity
        if world is not AS_FORECAST:
            capacity = capacity * self._length_factor(world)
        if self.shared_by > 1:
            capacity = capacity * self._adapter_share(world)
        need = np.asarray(rate) * self.shape.peak / capacity
        least = np.maximum(np.round(self.min_replicas * world.replicas), 1.0)
        if self.shared_by > 1:
            return np.maximum(need, least / self.shared_by)
        return np.maximum(np.ceil(need - 1e-9), least)

    def _adapter_share(self, world: World) -> Any:
        return 1.0 - np.minimum(table("costs")["adapters"]["overhead"] * world.adapters, 0.9)

    def _length_factor(self, world: World) -> Any:
        """How capacity follows the request's length: that of the drawn lengths over the forecast's."""
        assert self.serving is not None
        inputs, outputs = self.tokens(world)
        cached = self.serving.load.cached_tokens * world.length
        return self.serving.length_factor(inputs, outputs, cached)

    def parts(self, rate: Any, world: World | None = None) -> Parts:
        """Running dollars per month at a mean `rate` (requests per second), by what they pay for."""
        world = world or AS_FORECAST
        monthly = self._recurring(world)
        rate = np.asarray(rate, dtype=float)
        if self.price is not None:
            cost, requests = self.request_cost(rate, world), rate * SECONDS_PER_MONTH
            return {
                "input tokens": cost.input * requests,
                "cached input": cost.cached * requests,
                "cache writes": cost.write * requests,
                "output tokens": cost.output * requests,
                **{k: v + 0.0 * rate for k, v in monthly.items()},
            }
        assert self.serving is not None
        hours = self.replicas(rate, world) * HOURS_PER_MONTH
        gpu = hours * self.serving.gpus_per_replica * self.serving.machine.dollars_per_hour * world.gpu_price
        return {"GPU hours": gpu, **{k: v + 0.0 * rate for k, v in monthly.items()}}

    def _recurring(self, world: World) -> Parts:
        """Monthly costs that do not follow the rate. Shared GPUs share their operations too."""
        found = {}
        for name, value in self.costs.monthly.items():
            share = self.shared_by if name == "operations" else 1
            found[name] = value / share * world.people
        return found

    def monthly(self, rate: Any, world: World | None = None) -> Any:
        """Running dollars per month at a mean `rate`."""
        return sum(self.parts(rate, world).values())

    def once(self, world: World | None = None) -> Any:
        """One-off dollars."""
        world = world or AS_FORECAST
        return sum(
            v * (world.training * world.gpu_price if k == "training" else world.people)
            for k, v in self.costs.once.items()
        )

    def scaled_by_hour(self, rate: float) -> float:
        """Dollars per month for GPUs if replicas followed the day's load hour by hour (never below the minimum)."""
        if self.serving is None or self.shared_by > 1:
            return 0.0
        counts = [
            max(math.ceil(rate * f / self.serving.capacity - 1e-9), self.min_replicas)
            for f in self.shape.hourly
        ]
        mean = sum(counts) / len(counts)
        return mean * HOURS_PER_MONTH * self.serving.gpus_per_replica * self.serving.machine.dollars_per_hour

    def to_zero(self, rate: float, cold: float) -> tuple[float, float]:
        """Dollars per month for GPUs if idle replicas stopped, and the share of requests that wait for a start.

        A replica stops after `IDLE` seconds without a request and answers `cold` seconds after the next one comes. With
        Poisson arrivals at rate λ it then stays up (e^(λ IDLE) - 1)/λ seconds on average (the wait for such a gap), and
        is off for 1/λ. Hours that need more than one replica have whole ones.
        """
        assert self.serving is not None
        up = waiting = 0.0
        for share in self.shape.hourly:
            here = rate * share
            need = math.ceil(here / self.serving.capacity - 1e-9)
            if need > 1 or here * IDLE > 50:
                up += max(need, 1)
                continue
            on = cold + math.expm1(here * IDLE) / here
            up += on * here / (on * here + 1.0)
            waiting += here * (1.0 + here * cold) / (on * here + 1.0)
        hour = self.serving.gpus_per_replica * self.serving.machine.dollars_per_hour
        return up / 24 * HOURS_PER_MONTH * hour, waiting / (24 * rate)

    def utilisation(self, rate: float) -> float | None:
        """Mean share of the kept replicas' capacity that the load uses; the rest is idle. None for an API."""
        if self.serving is None or not self.serving.fits:
            return None
        capacity = self.serving.capacity
        if self.shared_by > 1:
            capacity *= float(self._adapter_share(AS_FORECAST))
        return float(rate / (self.replicas(rate) * capacity))


def hit_rate_array(rate: Any, ttl: float) -> Any:
    """`hit_rate` for arrays."""
    if np.ndim(rate) == 0:
        return hit_rate(float(rate), ttl)
    return -np.expm1(-np.asarray(rate) * ttl)
