"""From a case to a plan: count, price, forecast; `planner.judge` compares what is found."""

from __future__ import annotations

from msgspec.structs import replace

from planner import oneoff, prices
from planner.count import Counts, Label
from planner.judge import judge
from planner.options import Option, Shape
from planner.plan import Plan
from planner.serving import Serving, machine, serve
from planner.settings import Settings
from planner.usage import Usage
from unshot import catalog
from unshot.case import Case
from unshot.errors import InputError

PRECISIONS = ("fp16", "fp8", "int8", "int4")
LLAMACPP_PRECISIONS = ("fp16", "q8_0", "q4_k_m")


class Planner:
    """Builds a plan; keeps options and notes while it does."""

    def __init__(self, case: Case, settings: Settings, counts: Counts | None = None) -> None:
        self.case, self.settings = case, settings
        self.counts = counts or Counts(case, settings)
        # One list, so that notes stand in the order in which things were found.
        self.notes, self.warnings = self.counts.notes, self.counts.warnings
        self.shape = Shape.of(case.traffic.peak_factor)
        self.options: list[Option] = []

    # API options

    def api(self, model: str, *, baseline: bool) -> prices.ApiPrice:
        """The plain, cached and batch options of an API model with the long prompt; returns its price."""
        usage = self.counts.usage(model, "long", api=True)
        price = prices.api_price(
            model, input_tokens=usage.input.mean, overrides=self.settings.prices, baseline=baseline
        )
        self.notes.append(price.describe())
        if price.context and usage.input.largest + usage.output.largest > price.context:
            self.warnings.append(
                f"{model}: the longest request ({usage.input.largest:.0f} tokens) is over its context"
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
        )
        cached = replace(
            first, key=f"api:{model}:cached", name=f"{model}, long prompt, cached", mode="cached"
        )
        if price.rule is None:
            cached = replace(cached, notes=("no prompt caching is known for this model",))
        elif not cached.caches():
            cached = replace(
                cached, notes=(f"prefix of {usage.prefix} tokens is below the minimum {price.rule.minimum}",)
            )
        self.options += [first, cached]
        if price.rule is not None:
            self.notes.append(f"prompt cache of {price.provider}: {price.rule.source}, {price.rule.date}")
        if price.batch_input is not None:
            late = () if self.case.traffic.offline else ("answers may take 24 hours: not for live traffic",)
            self.options.append(
                replace(
                    first,
                    key=f"api:{model}:batch",
                    name=f"{model}, long prompt, batch",
                    mode="batch",
                    notes=late,
                )
            )
            self.notes.append(f"batch price of {model}: {price.batch_source}")
        if price.latency is not None:
            self.notes.append(f"latency of {price.provider}: {price.latency.source}; not a forecast")
        return price

    def tuned_api(self, model: str, price: prices.ApiPrice) -> None:
        """The fine-tuned version of an API model with the short prompt, where its provider sells one."""
        tuned = prices.fine_tuned(model, price, self.settings.prices)
        if tuned is None or tuned.training is None:
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
            gpu,
            precision,
            usage,
            prefix_cache=prefix_cache,
            rate=self.case.traffic.rate,
            peak_factor=self.case.traffic.peak_factor,
            arrival_cv=self.case.traffic.arrival_cv,
            slo=self.case.traffic.slo,
            price=self.settings.gpu_prices.get(gpu, self.settings.gpu_prices.get("")),
            calibration=self.settings.calibration,
        )
        what = "tuned" if tuned else "base"
        device = gpu if served.gpus_per_replica == 1 else f"{served.gpus_per_replica} x {gpu}"
        # A tuned option always has the cache on: its short prefix makes little of it.
        cache = ", prefix cache" if prefix_cache and not tuned else ""
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
        )
        self.options.append(option)
        return option

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
            gpu_hour=served.price_hour,
            tuned=tuned,
        )

    def candidates(self) -> None:
        """Base and tuned options of the candidate model on each GPU asked for."""
        wanted = self.case.candidate
        for asked_gpu in wanted.gpu:
            device = catalog.gpu(asked_gpu)
            gpu = device.name
            if self.settings.calibration is not None:
                self.notes.append(
                    f"efficiencies of {gpu} fitted to {self.settings.calibration}"
                    if device.engine == "llamacpp"
                    else f"efficiencies of {gpu} are the catalog's: the bench report was taken with llama.cpp"
                )
            self.notes.append(machine(device, self.gpu_price(gpu))["line"])
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

    # The answer

    def plan(self) -> Plan:
        """Count, price and compare everything."""
        case = self.case
        price: prices.ApiPrice | None = None
        api, model = _baseline(case)
        if api is not None:
            price = self.api(api, baseline=True)
            cheaper = case.plan.cheaper_api or prices.cheaper(api)
            self.tuned_api(api, price)
            if cheaper is not None and cheaper != "none":
                self.tuned_api(cheaper, self.api(cheaper, baseline=False))
        else:
            assert model is not None
            gpu = catalog.gpu(case.baseline.gpu or case.candidate.gpu[0]).name
            precision = catalog.precision(case.baseline.precision or case.candidate.precision).name
            self.counts.usage(model, "long", api=False)
            mine = case.candidate
            if (model, gpu, precision) != (
                mine.model,
                catalog.gpu(mine.gpu[0]).name,
                catalog.precision(mine.precision).name,
            ):
                for cache in (False, True):
                    self.hosted(model, gpu, precision, tuned=False, prefix_cache=cache, baseline=True)
        self.candidates()
        if api is None:
            self.options = [
                replace(o, baseline=True) if o.model == model and not o.tuned and o.kind == "hosted" else o
                for o in self.options
            ]
        self.options.sort(key=lambda o: (not o.baseline, o.tuned, o.kind != "api"))
        return judge(self, price)


def _baseline(case: Case) -> tuple[str | None, str | None]:
    """`(API model, open model)`: which of the two runs today. `--baseline` may name either."""
    if case.baseline.api is not None:
        name = case.baseline.api
        if not prices.known_api(name):
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


def build(case: Case, settings: Settings, counts: Counts | None = None) -> Plan:
    """The plan of a case. Raises `InputError` for what the case lacks, `OutsideError` for tokenizers or packages."""
    return Planner(case, settings, counts).plan()
