"""From a case to its options: count, price, forecast; `planner.judge` compares them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from planner import oneoff, price_data, prices
from planner.count import Counts, Label
from planner.latency.replica import Replica
from planner.options import HOURS_PER_MONTH, IDLE, Option, Shape
from planner.serving import (
    Serving,
    calibrated,
    calibration_note,
    describe,
    draft_of,
    exchanged,
    machine,
    serve,
)
from planner.settings import Settings
from planner.usage import Usage
from unshot import catalog
from unshot.case import Case, Slo
from unshot.catalog.gpu import GIB, Gpu
from unshot.errors import InputError, nearest

PRECISIONS = ("fp16", "fp8", "int4")
DAYS_PER_MONTH = 365.25 / 12
LLAMACPP_PRECISIONS = ("fp16", "q8_0", "q4_k_m")


# Prices of machines before this month were not read again.
OLD_PRICE = "2026"


class Builder:
    """Builds the options of a plan; keeps them, notes and warnings while it does."""

    def __init__(self, case: Case, settings: Settings, counts: Counts | None = None) -> None:
        self.case, self.settings = case, settings
        self.counts = counts or Counts(case, settings)
        # One list, so that notes stand in the order in which things were found.
        self.notes, self.warnings = self.counts.notes, self.counts.warnings
        self.alarms: list[str] = []  # warnings that go first
        self.doubts: dict[
            str, str
        ] = {}  # catalog figures that no source that was read confirms, by what they are of
        self.shape = Shape.of(case.traffic.peak_factor)
        self.options: list[Option] = []
        self.slo = case.traffic.slo
        self.slo_source = "your targets"
        self.price: prices.ApiPrice | None = None
        self.devices = _devices(case)
        self.now = datetime.now(UTC)

    # API options

    def api(self, model: str, *, baseline: bool) -> prices.ApiPrice:
        """The plain, cached and batch options of an API model with the long prompt; returns its price.

        Raises `InputError` for a model that has been shut down.
        """
        usage = self.counts.usage(model, "long", api=True)
        price = prices.api_price(
            model,
            input_tokens=usage.input.mean,
            samples=usage.samples,
            overrides=self.settings.prices,
            baseline=baseline,
        )
        self._lifetime(price, baseline=baseline)
        self.notes.append(price.describe())
        self.warnings += price.notes
        longest = usage.input.largest + usage.output.largest + usage.reasoning
        unsure = ("its reasoning is not counted: it costs more",) if model in self.counts.uncounted else ()
        over = (
            (f"the longest request has {longest:,.0f} tokens; {model} takes {price.context:,}",)
            if price.context and longest > price.context
            else ()
        )
        first = Option(
            key=f"api:{model}:plain",
            name=f"{model}, long prompt",
            kind="api",
            model=model,
            prompt="long",
            tuned=False,
            usage=usage,
            costs=oneoff.Costs({}, {}, {}),
            shape=self.shape,
            price=price,
            baseline=baseline,
            unusable=bool(over),
            notes=(*over, *unsure),
        )
        self.options += [first, self._cached(first, price)]
        if price.batch_input is not None:
            late = () if self.case.traffic.offline else ("answers may take 24 hours: not for live traffic",)
            if price.batch_cached is not None and self.options[-1].caches():
                late = (
                    *late,
                    "its prefix is taken to be cached as often as in live traffic, which no batch promises",
                )
            self.options.append(
                replace(
                    first,
                    key=f"api:{model}:batch",
                    name=f"{model}, long prompt, batch",
                    mode="batch",
                    notes=(*first.notes, *late),
                )
            )
            self.notes.append(f"batch price of {model}: {price.batch_source}")
        if price.latency is not None:
            self.notes.append(f"latency of {price.provider}: {price.latency.source}; not a forecast")
        return price

    def _cached(self, first: Option, price: prices.ApiPrice) -> Option:
        """The option with prompt caching, and what is to be known of its rule."""
        model, rule = first.model, price.rule
        cached = replace(
            first, key=f"api:{model}:cached", name=f"{model}, long prompt, cached", mode="cached"
        )
        if rule is None:
            return replace(cached, notes=(*first.notes, "no cached price is known"))
        self.notes.append(f"prompt cache of {model}: {rule.describe()}; {rule.source}, {rule.date}")
        self.doubts[model] = rule.doubt
        if rule.assumed:
            self.warnings.append(
                f"{model}: cached input has a price but the catalog has no caching rule; taken: {rule.describe()}. "
                f"Set it with --price {model}:cache_min=..,cache_step=..,cache_ttl=SECONDS,write_factor=.."
            )
        if cached.caches():
            return cached
        short = f"prefix of {first.usage.prefix:,} tokens is below the minimum of {rule.minimum:,}"
        return replace(cached, notes=(*first.notes, short))

    def _lifetime(self, price: prices.ApiPrice, *, baseline: bool) -> None:
        """Refuse a model that has been shut down; warn of one that ends within the horizon."""
        named = next((n for n in (price.model, price.id) if n and price_data.known(n)), None)
        found = price_data.look_up(named, self.now) if named else None
        if found is None:
            return
        end = price_data.retirement(found, price.model)
        if found.deprecated and end is None:
            self.warnings.append(
                f"{price.model}: the price data marks it as deprecated; its last day is not known"
            )
        lines = self.alarms if baseline else self.warnings
        if end is None:
            maker = price_data.maker_retirement(found)
            if maker is not None:
                lines.append(
                    f"{price.model}: its maker shuts it down on {maker.date} ({maker.source}, read {maker.read}); when "
                    f"{found.provider} does is not in the catalog: ask there"
                )
            return
        if end.date <= f"{self.now:%Y-%m-%d}":
            raise InputError(f"{price.model}: {end.gone()}")
        horizon = self.case.plan.horizon_months
        if end.date > f"{self.now + timedelta(days=horizon * DAYS_PER_MONTH):%Y-%m-%d}":
            return
        line = f"{price.model} is shut down on {end.date}, within the {horizon:g} months planned; successor: "
        line += end.successor + (", where requests go then, at its prices" if end.routed else "")
        if end.fine_tunes:
            line += "; models tuned from it end with it"
            line += f", and no new tuning starts after {end.new_jobs}" if end.new_jobs else ""
        lines.append(f"{line} ({end.source}, read {end.read})")

    def tuned_api(self, model: str, price: prices.ApiPrice) -> None:
        """The fine-tuned version of an API model with the short prompt, where its provider sells one."""
        tuned = prices.fine_tuned(price, self.settings.prices)
        if tuned is None or tuned.training is None:
            return
        known = price_data.known(model)
        end = price_data.retirement(price_data.look_up(model, self.now), model) if known else None
        if end is not None and end.new_jobs and end.new_jobs < f"{self.now:%Y-%m-%d}":
            return
        usage = self.counts.usage(model, "short", api=True)
        costs = oneoff.fine_tuned_api(
            self.case.plan,
            examples_at_hand=self.case.task.examples_at_hand or 0,
            tokens_per_example=usage.input.mean + usage.output.mean,
            epochs=self.case.tune.epochs,
            fee_per_mtok=tuned.training,
        )
        self.notes.append(tuned.describe())
        if tuned.date < OLD_PRICE:
            self.doubts[f"{model} fine-tuned"] = f"its prices, of {tuned.date}"
        self.options.append(
            Option(
                key=f"api:{model}:tuned",
                name=f"{model} fine-tuned, short prompt",
                kind="api",
                model=model,
                prompt="short",
                tuned=True,
                usage=usage,
                costs=costs,
                shape=self.shape,
                mode="cached",
                price=tuned,
            )
        )

    # Self-hosted options

    def hosted(
        self,
        model: str,
        gpu: str,
        precision: str,
        *,
        tuned: bool,
        prefix_cache: bool = False,
        baseline: bool = False,
    ) -> Option:
        """A self-hosted option: the base model with the long prompt, or the tuned one with the short prompt."""
        label: Label = "short" if tuned else "long"
        usage = self.counts.usage(model, label, api=False)
        served = serve(
            model,
            self.devices[gpu],
            precision,
            usage,
            prefix_cache=prefix_cache,
            traffic=self.case.traffic,
            slo=self.slo,
            price=self.gpu_price(gpu),
            setup=self.case.candidate,
            calibration=self.settings.calibration,
        )
        what = "tuned" if tuned else "base"
        device = gpu if served.gpus_per_replica == 1 else f"{served.gpus_per_replica} x {gpu}"
        # A tuned option always has the cache on: its short prefix makes little of it.
        cache = ", prefix cache" if prefix_cache and not tuned else ""
        self._efficiency(served)
        option = Option(
            key=f"{gpu}:{model}:{precision}:{what}{':cache' if prefix_cache else ''}",
            name=f"{model} {what}, {label} prompt{cache}, {precision} on {device}",
            kind="hosted",
            model=model,
            prompt="short" if tuned else "long",
            tuned=tuned,
            usage=usage,
            costs=self._hosted_costs(model, served, usage, tuned=tuned),
            shape=self.shape,
            serving=served,
            gpu=gpu,
            precision=precision,
            prefix_cache=prefix_cache,
            min_replicas=self.case.plan.min_replicas,
            baseline=baseline,
            notes=() if served.fits else (served.why,),
            unusable=not served.fits,
        )
        option = self._zero(option)
        self.options.append(option)
        return option

    def _zero(self, option: Option) -> Option:
        """Say what scaling to zero would cost and do to latency, where the case gives a cold start."""
        cold = self.case.plan.cold_start_s
        if cold is None or not option.usable:
            return option
        rate = self.case.traffic.rate
        dollars, waiting = option.to_zero(rate, cold)
        always = float(option.parts(rate)["GPU hours"])
        late = (
            ""
            if waiting < 1 - self.slo.percentile / 100
            else f", more than its p{self.slo.percentile:g} allows"
        )
        told = f"GPUs scaled to zero after {IDLE / 60:g} idle minutes: ${dollars:,.0f} a month instead of "
        told += f"${always:,.0f}; {waiting:.1%} of requests wait up to {cold:g} s for a start{late}"
        return replace(option, notes=(*option.notes, told))

    def _efficiency(self, served: Serving) -> None:
        """Say what the forecast of an engine on a device family rests on."""
        one, (low, high) = served.one, served.capacity_interval
        self.doubts[one.arch.name] = one.arch.unconfirmed
        self.doubts[one.gpu.name] = one.gpu.unconfirmed
        self.doubts[one.engine.name] = one.engine.unconfirmed
        if served.machine.date and served.machine.date < OLD_PRICE:
            self.doubts[f"{one.gpu.name}'s price"] = (
                f"${served.machine.dollars_per_hour:g} of {served.machine.date}"
            )
        self.notes += data_sheets(one)
        form = one.precision
        if form.compute != "fp16" and form.compute not in one.gpu.flops and one.engine.kernels == "batched":
            self.notes.append(
                f"{form.name} on {one.gpu.name}: it has no {form.compute} units, so only the weights are smaller and "
                "products are in fp16"
            )
        if form.note == "GGUF" and one.engine.kernels == "batched":
            self.warnings.append(
                f"no measured rows of {form.name} with {one.engine.title}, which calls its GGUF kernels experimental "
                "(docs.vllm.ai, features/quantization/gguf): forecast like other weight-only formats"
            )
        overhead = one.overhead
        measured = one.gpu.family in overhead.families if overhead.rows else one.eff.rows > 0
        rows = overhead.rows or one.eff.rows
        what = f"{one.engine.title} on {one.gpu.family}"
        band = f"90% band of its speed {low:.2f} to {high:.2f} times the forecast"
        if calibrated(self.settings.calibration, one.gpu):
            what, measured = f"{one.engine.title} on {one.gpu.name} (your report)", True
            rows = one.eff.rows
        if measured:
            self.notes.append(f"speed of {what}: {rows} measured rows; {band}")
        else:
            self.warnings.append(
                f"no measured rows of {what}: its speed is taken over from other devices; {band}"
            )

    def _hosted_costs(self, model: str, served: Serving, usage: Usage, *, tuned: bool) -> oneoff.Costs:
        architecture = catalog.model(model)
        return oneoff.self_hosted(
            self.case.plan,
            examples_at_hand=self.case.task.examples_at_hand or 0,
            tokens_per_example=usage.input.mean + usage.output.mean,
            epochs=self.case.tune.epochs,
            method=self.case.tune.method,
            params=float(architecture.params),
            peak_flops=served.train_flops,
            gpu_hour=served.machine.dollars_per_hour,
            tuned=tuned,
        )

    def candidates(self) -> None:
        """Base and tuned options of the candidate model on each GPU asked for."""
        wanted = self.case.candidate
        if draft := draft_of(wanted):
            self.notes.append(
                f"speculative decoding: {draft.tokens} tokens drafted per iteration, {draft.acceptance:.0%} accepted "
                f"as you gave it; a drafted token takes {draft.share:.0%} of an iteration (`candidate.draft_share`)"
            )
        stored = catalog.model(wanted.model).stored
        if stored and catalog.precision(wanted.precision).weight >= 2.0:
            self.warnings.append(
                f"{wanted.model}: its config.json says that its weights are stored as {stored}, and "
                f"{wanted.precision} is planned: give --precision"
            )
        for gpu in dict.fromkeys(catalog.gpu(name).name for name in wanted.gpu):
            device = self.devices[gpu]
            if told := exchanged(device, wanted.engine):
                self.warnings.append(told)
            if self.settings.calibration is not None:
                self.notes.append(calibration_note(self.settings.calibration, device))
            self.notes.append(describe(machine(device, self.gpu_price(gpu), wanted.price_factor)))
            asked = catalog.precision(wanted.precision).name
            for cache in (False, True):
                self.hosted(wanted.model, gpu, asked, tuned=False, prefix_cache=cache)
            best: Option | None = None
            for precision in self._precisions(gpu, asked):
                option = self.hosted(wanted.model, gpu, precision, tuned=True, prefix_cache=True)
                if precision == asked:
                    best = option
            if best is not None and self.case.plan.adapters > 1 and best.serving and best.serving.fits:
                count = self.case.plan.adapters
                place = best.name.rpartition(", ")[2]
                self.options.append(
                    replace(
                        best,
                        key=f"{best.key}:adapters",
                        name=f"{wanted.model} + LoRA adapter ({count} tasks share a base), {place}",
                        shared_by=count,
                        notes=(f"only where {count} tasks share the GPUs",),
                    )
                )

    def _instance(self, device: Gpu) -> None:
        """Say what a cloud instance's price does not say."""
        own = self.gpu_price(device.name)
        if device.instance and own is None and device.instance not in device.price_source:
            self.warnings.append(
                f"the catalog has no price of {device.instance}: another provider's for {device.name} is taken "
                f"({device.price_source}); set it with --gpu-price {device.instance}=DOLLARS for the whole instance"
            )
        if device.per_instance > 1:
            hour = machine(device, own, self.case.candidate.price_factor).dollars_per_hour
            self.warnings.append(
                f"{device.instance} is rented whole, with {device.per_instance} GPUs, and a replica is charged for "
                f"those it uses: where nothing else runs on the rest, each instance costs "
                f"${hour * device.per_instance * HOURS_PER_MONTH:,.0f} a month"
            )

    def gpu_price(self, gpu: str) -> float | None:
        """The user's dollars per hour of a GPU, None where there is none."""
        found = self.settings.gpu_prices
        return found.get(gpu, found.get(""))

    def _precisions(self, gpu: str, asked: str) -> list[str]:
        device = catalog.gpu(gpu)
        if device.engine == "llamacpp":
            names = list(LLAMACPP_PRECISIONS)
        else:
            names = [p for p in PRECISIONS if p in ("fp16", "int4") or p in device.flops]
        return names if asked in names else [asked, *names]

    def unconfirmed(self) -> list[str]:
        """One line on the catalog figures in this plan that no source that was read confirms."""
        about: dict[str, list[str]] = {}
        for name, what in self.doubts.items():
            about.setdefault(what, []).append(name)
        found = [f"{', '.join(names)}: {what}" for what, names in about.items() if what]
        return [f"not confirmed by any page that was read: {'; '.join(found)}"] if found else []

    # All of them

    def build(self) -> None:
        """Count, price and forecast every option."""
        for device in self.devices.values():
            self._instance(device)
        api, model = _baseline(self.case)
        if api is not None:
            self.price = self.api(api, baseline=True)
            self.tuned_api(api, self.price)
            self._default_slo(self.options[0])
            for sibling in self._siblings(self.price):
                self.tuned_api(sibling, self.api(sibling, baseline=False))
            self.candidates()
        else:
            assert model is not None
            self._hosted_baseline(model)
        self.options.sort(key=lambda o: (not o.baseline, o.tuned, o.kind != "api"))
        self.settings.prices.check_used([o.model for o in self.options if o.kind == "api"])
        gpus = sorted({o.gpu for o in self.options if o.gpu})
        for name in self.settings.gpu_prices:
            if name and name not in gpus:
                raise InputError(
                    f"--gpu-price for '{name}', which is not in this plan; {nearest(name, gpus)}"
                )

    def _hosted_baseline(self, model: str) -> None:
        """Options where an open model runs today: it sets the default SLO rather than being held to it."""
        mine = self.case.candidate
        gpu = catalog.gpu(self.case.baseline.gpu or mine.gpu[0]).name
        precision = catalog.precision(self.case.baseline.precision or mine.precision).name
        self.counts.usage(model, "long", api=False)
        today = [
            self.hosted(model, gpu, precision, tuned=False, prefix_cache=cache, baseline=True)
            for cache in (False, True)
        ]
        self._default_slo(today[0])
        keys = {option.key for option in today}
        self.candidates()
        others = [option for option in self.options if option.key not in keys]
        self.options = today + [replace(o, baseline=o.model == model and not o.tuned) for o in others]

    def _default_slo(self, today: Option) -> None:
        """Without an SLO, what the baseline gives today is the target: no option may be slower than that."""
        if any(v is not None for v in (self.slo.ttft_ms, self.slo.tpot_ms, self.slo.e2e_ms)):
            return
        percentile = self.slo.percentile
        if today.price is not None:
            known = today.price.latency
            if known is None:
                self.warnings.append(
                    f"no SLO was given and no latency of {today.model} is known: replicas are sized to "
                    "90% of their capacity, however slow that is (--slo-ttft, --slo-e2e)"
                )
                return
            usage = today.usage
            ttft = (known.ttft_ms + usage.reasoning * known.tpot_ms) * known.factor
            e2e = ttft + max(usage.output.mean - 1, 0) * known.tpot_ms * known.factor
            how = f"{known.factor:g} times its provider's typical median"
        elif today.serving is not None and today.serving.fits:
            found = today.serving.latency(replica_rate(today, self.case.traffic.rate))
            ttft, e2e = (found[name].at[95.0] * 1e3 for name in ("ttft", "e2e"))
            percentile, how = 95.0, "simulated"
        else:
            why = next(iter(today.notes), "it is not forecast")
            self.warnings.append(
                f"no SLO was given, and {today.name} gives none ({why}): replicas are sized to 90% of their capacity, "
                "however slow that is (--slo-ttft, --slo-e2e)"
            )
            return
        self.slo = Slo(ttft_ms=ttft, e2e_ms=e2e, percentile=percentile)
        self.slo_source = f"what {today.name} gives today, {how}"
        self.notes.append(
            f"SLO: none was given, so it is {self.slo_source}: p{percentile:g} TTFT {ttft:,.0f} ms, end to end "
            f"{e2e:,.0f} ms (--slo-ttft, --slo-e2e, [traffic.slo])"
        )

    def _siblings(self, price: prices.ApiPrice) -> list[str]:
        """Cheaper API models to compare with: the user's, else the price data's; said if there are none."""
        asked = self.case.plan.cheaper_api
        if asked is not None:
            names = dict.fromkeys(name.strip() for name in asked.split(",") if name.strip())
            if price.model in names:
                raise InputError(
                    f"--cheaper-api names {price.model}, which runs today; name cheaper ones, or none"
                )
            return [] if asked == "none" else list(names)
        found: list[price_data.Sibling] = []
        if price_data.known(price.model):
            found = price_data.siblings(price_data.look_up(price.model, self.now), self.now)
        if not found:
            self.warnings.append(
                f"no cheaper sibling of {price.model} is in the price data; name one to compare with: --cheaper-api"
            )
        named = "/" in price.model or price.provider == "aws"
        return [f"{price.provider}/{s.id}" if named else s.id for s in found]


def _devices(case: Case) -> dict[str, Gpu]:
    """The case's devices by the catalog's names, at the price of the cloud instance where one was named."""
    found: dict[str, Gpu] = {}
    for name in filter(None, [*case.candidate.gpu, case.baseline.gpu]):
        device = catalog.gpu(name)
        if found.setdefault(device.name, device) != device:
            raise InputError(
                f"{name} and {found[device.name].instance or device.name} are one device at two prices: plan one at a "
                "time"
            )
    return found


def data_sheets(one: Replica) -> list[str]:
    """Where device, model and engine limits are from, a line each."""
    gpu, arch, engine = one.gpu, one.arch, one.engine
    read = f", read {gpu.read}" if gpu.read else ""
    lines = [
        f"data sheet of {gpu.name}: {gpu.memory / GIB:.4g} GiB, {gpu.bandwidth / 1e9:,.4g} GB/s, "
        f"{gpu.served('fp16') / 1e12:,.4g} TFLOPS fp16 dense; {gpu.source}{read}",
        f"limits of {engine.title}: {one.slots:,} sequences, {one.chunk:,} prefill tokens an iteration; "
        f"{engine.source}",
    ]
    host = one.overhead
    if host.request:
        lines.append(
            f"host of {engine.title}: {host.request * 1e3:.3g} ms per request, one after the other (at most "
            f"{1 / host.request:,.0f} requests/s a replica), and {host.accept * 1e3:.3g} ms beside them, as fitted"
        )
    if not arch.context:
        lines.append(f"context of {arch.name}: its config.json gives no limit, so none is held to")
    if arch.source:
        lines.append(f"shape of {arch.name}: {arch.params / 1e9:.3g}e9 weights; {arch.source}")
    return lines


def replica_rate(option: Option, rate: float) -> float:
    """Requests/s of one replica at the busiest hour."""
    share = rate * option.shape.peak / float(max(option.replicas(rate), 1e-9))
    if option.shared_by > 1 and option.serving is not None:
        share = min(share, option.serving.capacity)
    return share


def _baseline(case: Case) -> tuple[str | None, str | None]:
    """`(API model, open model)`: which of the two runs today. `--baseline` may name either."""
    if case.baseline.api is not None:
        name = case.baseline.api
        if case.baseline.model is not None:
            raise InputError(
                f"what runs today, {name} or {case.baseline.model}? both stand in [baseline]: leave one out"
            )
        if not price_data.known(name):
            try:
                return None, catalog.model(name).name
            except InputError:
                return name, None
        return name, None
    if case.baseline.model is not None:
        return None, case.baseline.model
    raise InputError(
        "what runs today? give --baseline API_MODEL or --baseline-model OPEN_MODEL ([baseline] api or model)"
    )
