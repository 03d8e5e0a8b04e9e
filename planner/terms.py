"""An option's cost as plain numbers, for the page's script and the workbook: what `planner.options` computes with.

Dollars per month at any rate follow from these alone; the tests compare both with the planner to the cent.
"""

from __future__ import annotations

from msgspec import Struct

from planner.options import Option
from planner.plan import Plan
from unshot.catalog.tables import table


class ApiTerms(Struct, frozen=True):
    """An API option. Prices in $ per million tokens; None if the provider has no such price.

    `held` tokens of the prefix are cached (0: none), for `ttl` seconds without use, or `ttl_long` at `write_long`.
    `recurring` and `once` are dollars per month and once.
    """

    key: str
    name: str
    prefix: int
    varying: float
    answer: float
    reasoning: float
    input: float
    output: float
    cached: float
    write: float | None
    write_long: float | None
    held: int
    ttl: float
    ttl_long: float | None
    recurring: float
    once: float


class ServerTerms(Struct, frozen=True):
    """What `planner.latency.closed_form.capacity` of one replica is computed from, for other lengths than planned."""

    fixed: float
    weights: float
    experts: float
    routed: float
    head: float
    token: float
    move: float
    sampled: float
    sequence: float
    context: float
    pair: float
    chunk_extra: float
    layers: int
    window: int
    windowed: float
    element_bytes: float
    room: float
    slots: int
    chunk: float
    cached: float
    prompt_cv: float
    output_cv: float
    request: float
    wide: float
    gain: float
    prompt: float
    output: float


class HostedTerms(Struct, frozen=True):
    """A self-hosted option. `capacity` requests/s of one replica at the planned lengths, `hour` dollars per GPU.

    `loss` of throughput if the GPUs are shared by `shared_by` tasks. `training_once` and `training_monthly` follow the
    GPU price, the other costs do not.
    """

    key: str
    name: str
    prefix: int
    varying: float
    answer: float
    capacity: float
    gpus: int
    hour: float
    least: int
    shared_by: int
    loss: float
    operations: float
    recurring: float
    once: float
    training_once: float
    server: ServerTerms


def api_terms(option: Option) -> ApiTerms:
    """The terms of an API option."""
    price, usage = option.price, option.usage
    assert price is not None
    into, cached, output = price.input, price.cached, price.output
    if option.mode == "batch":
        assert price.batch_input is not None and price.batch_output is not None
        into, cached, output = price.batch_input, price.batch_cached, price.batch_output
    caching = option.mode != "plain" and option.caches() and cached is not None and price.rule is not None
    rule = price.rule if caching else None
    scale = into / price.input if price.input else 1.0
    long = rule is not None and rule.ttl_long is not None and price.write_long is not None
    return ApiTerms(
        key=option.key,
        name=option.name,
        prefix=usage.prefix,
        varying=usage.varying,
        answer=usage.output.mean,
        reasoning=usage.reasoning,
        input=into,
        output=output,
        cached=cached or 0.0,
        write=None if price.write is None else price.write * scale,
        write_long=price.write_long * scale if long and price.write_long is not None else None,
        held=rule.cacheable(usage.prefix) if rule else 0,
        ttl=rule.ttl if rule else 0.0,
        ttl_long=rule.ttl_long if long and rule else None,
        recurring=sum(option.costs.monthly.values()),
        once=option.costs.total_once,
    )


def hosted_terms(option: Option) -> HostedTerms:
    """The terms of a self-hosted option that fits its device."""
    serving = option.serving
    assert serving is not None
    one, load, cost, monthly = serving.one, serving.load, serving.one.cost, option.costs.monthly
    return HostedTerms(
        key=option.key,
        name=option.name,
        prefix=option.usage.prefix,
        varying=option.usage.varying,
        answer=option.usage.output.mean,
        capacity=serving.capacity,
        gpus=serving.gpus_per_replica,
        hour=serving.machine.dollars_per_hour,
        least=option.min_replicas,
        shared_by=option.shared_by,
        loss=min(float(table("costs")["adapters"]["overhead"]), 0.9) if option.shared_by > 1 else 0.0,
        operations=monthly.get("operations", 0.0) / option.shared_by,
        recurring=sum(v for k, v in monthly.items() if k != "operations"),
        once=option.costs.total_once - option.costs.once.get("training", 0.0),
        training_once=option.costs.once.get("training", 0.0),
        server=ServerTerms(
            fixed=cost.fixed, weights=cost.weights, experts=cost.experts, routed=cost.routed, head=cost.head,
            token=cost.token, move=cost.move, sampled=cost.sampled, sequence=cost.sequence, context=cost.context,
            pair=cost.pair, chunk_extra=cost.chunk, layers=one.arch.layers, window=one.arch.window,
            windowed=one.arch.windowed, element_bytes=one.arch.kv_elements * one.element, room=one.room,
            slots=one.slots, chunk=float(one.chunk), cached=load.cached_tokens, prompt_cv=load.prompt_cv,
            output_cv=load.output_cv, request=one.overhead.request, wide=cost.wide, gain=cost.gain,
            prompt=load.prompt_tokens, output=load.output_tokens,
        ),
    )  # fmt: skip


def terms(plan: Plan) -> tuple[list[ApiTerms], list[HostedTerms]]:
    """The terms of every usable option."""
    usable = [o for o in plan.options if o.usable]
    return (
        [api_terms(o) for o in usable if o.kind == "api"],
        [hosted_terms(o) for o in usable if o.kind == "hosted"],
    )
