"""What a run takes of the machine: memory of processes, memory, power and load of GPUs, energy of the CPU package.

A thread looks a few times a second. What cannot be read is in the report as such, with the reason, and not as zero.
Energy counters count everything on the package or board, idle power included.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bench.records import RequestRecord
from unshot.contracts.figures import Energy, Gpu, Resources
from unshot.errors import InputError

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 0.2


class Unreadable(Exception):
    """Why a figure cannot be read here, in words for the report."""


class Rapl:
    """Energy of the CPU packages by the kernel's powercap files (Intel RAPL; AMD has the same names)."""

    name = "CPU package"

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        # `intel-rapl:0` is a package, `intel-rapl:0:0` a part of it.
        zones = [z for z in zones if z.name.count(":") == 1 and _read(z / "name").startswith("package")]
        if not zones:
            raise Unreadable(f"no CPU package under {root} (a virtual machine or container hides it)")
        self._files = [z / "energy_uj" for z in zones]
        self._ranges = [int(_read(z / "max_energy_range_uj") or 0) for z in zones]
        self._before = [self._counter(f) for f in self._files]
        self._total = 0.0

    @staticmethod
    def _counter(path: Path) -> int:
        try:
            return int(path.read_text())
        except PermissionError:
            raise Unreadable(f"{path} may only be read by root") from None
        except (OSError, ValueError) as error:
            raise Unreadable(f"{path} cannot be read ({error})") from None

    def joules(self) -> float:
        """Energy since the start, all packages; a counter that wrapped round is put right."""
        for i, path in enumerate(self._files):
            now = self._counter(path)
            step = now - self._before[i]
            self._total += (step + self._ranges[i] if step < 0 else step) / 1e6
            self._before[i] = now
        return self._total


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


class Gpus:
    """NVIDIA GPUs by NVML (nvidia-ml-py). Energy is the boards' own counters, else power times time."""

    name = "GPU"

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise Unreadable("nvidia-ml-py is not installed") from None
        self._lib = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise Unreadable(f"no NVIDIA driver ({error})") from None
        if not count:
            raise Unreadable("the driver lists no GPU")
        self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        self.names = [_text(pynvml.nvmlDeviceGetName(d)) for d in self._devices]
        self.totals = [int(pynvml.nvmlDeviceGetMemoryInfo(d).total) for d in self._devices]
        self.samples: list[tuple[float, list[tuple[int, float, float]]]] = []
        self._counted = self._ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._devices[0]) is not None
        self._start = self._energy() if self._counted else 0.0
        self._total = 0.0

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._lib.NVMLError:
            return None

    def _energy(self) -> float:
        ask, call = self._ask, self._lib.nvmlDeviceGetTotalEnergyConsumption
        return sum(ask(call, d) or 0 for d in self._devices) / 1000

    def joules(self) -> float:
        """Energy since the start, all GPUs; memory, power and utilisation are noted on the way."""
        lib, now, row = self._lib, time.perf_counter(), []
        for device in self._devices:
            memory = self._ask(lib.nvmlDeviceGetMemoryInfo, device)
            power = self._ask(lib.nvmlDeviceGetPowerUsage, device)
            busy = self._ask(lib.nvmlDeviceGetUtilizationRates, device)
            row.append(
                (
                    int(memory.used) if memory else 0,
                    power / 1000 if power is not None else float("nan"),
                    float(busy.gpu) if busy else float("nan"),
                )
            )
        if self._counted:
            self._total = self._energy() - self._start
        elif self.samples:
            then, before = self.samples[-1]
            watts = [(a[1] + b[1]) / 2 for a, b in zip(before, row, strict=True)]
            self._total += float(np.nansum(watts)) * (now - then)
        self.samples.append((now, row))
        return self._total

    def facts(self) -> list[Gpu]:
        """One entry a GPU: memory, power, utilisation and clocks; None for what NVML does not say."""
        lib, result = self._lib, []
        for i, (device, name, total) in enumerate(zip(self._devices, self.names, self.totals, strict=True)):
            table = np.array([row[i] for _, row in self.samples], dtype=float).reshape(-1, 3)
            watts, busy = (column[np.isfinite(column)] for column in (table[:, 1], table[:, 2]))
            limit = self._ask(lib.nvmlDeviceGetEnforcedPowerLimit, device)
            result.append(
                Gpu(
                    name=name,
                    catalog=catalog_name(name),
                    memory_bytes=total,
                    memory_peak_bytes=int(table[:, 0].max()) if len(table) else None,
                    power_mean_w=float(watts.mean()) if len(watts) else None,
                    power_peak_w=float(watts.max()) if len(watts) else None,
                    power_limit_w=limit / 1000 if limit is not None else None,
                    utilisation_mean=float(busy.mean()) / 100 if len(busy) else None,
                    clock_mhz=self._ask(lib.nvmlDeviceGetClockInfo, device, lib.NVML_CLOCK_SM),
                    clock_max_mhz=self._ask(lib.nvmlDeviceGetMaxClockInfo, device, lib.NVML_CLOCK_SM),
                )
            )
        return result


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@dataclass
class Meter:
    """An energy source with its readings: `(time.perf_counter(), joules since the start)`."""

    source: Any
    readings: list[tuple[float, float]] = field(default_factory=list)

    def between(self, begin: float, end: float) -> float:
        """Joules between two times, linear between readings."""
        times, values = zip(*self.readings, strict=True)
        return float(np.interp(end, times, values) - np.interp(begin, times, values))


class Monitor:
    """Watches while its `with` block runs; `processes` are names and process ids."""

    def __init__(
        self,
        processes: Mapping[str, int],
        *,
        interval: float = INTERVAL,
        sources: Sequence[Callable[[], Any]] = (Rapl, Gpus),
    ) -> None:
        self.interval = interval
        self.meters: list[Meter] = []
        self.unreadable: dict[str, str] = {}
        for source in sources:
            name = getattr(source, "name", "energy")
            try:
                self.meters.append(Meter(source()))
            except Unreadable as reason:
                self.unreadable[name] = str(reason)
        self._processes: dict[str, Any] = {}
        self.peaks: dict[str, int] = {}
        try:
            import psutil

            self._gone: type[Exception] = psutil.Error
            for name, pid in processes.items():
                self._processes[name] = psutil.Process(pid)
        except ImportError:
            self.unreadable["memory"] = "psutil is not installed"
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._samples = 0
        self._cpu = 0.0

    def __enter__(self) -> Monitor:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self.look()

    def look(self) -> None:
        """Take one reading now; also called between blocks, so that a block's energy has its own bounds."""
        with self._lock:
            began = time.thread_time()
            for meter in list(self.meters):
                try:
                    meter.readings.append((time.perf_counter(), meter.source.joules()))
                except Unreadable as reason:
                    self.meters.remove(meter)
                    self.unreadable[meter.source.name] = str(reason)
            for name, process in self._processes.items():
                with contextlib.suppress(self._gone):
                    self.peaks[name] = max(self.peaks.get(name, 0), process.memory_info().rss)
            self._samples += 1
            self._cpu += time.thread_time() - began

    def joules(self, spans: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Energy of each readable source over stretches of time."""
        return {m.source.name: sum(m.between(a, b) for a, b in spans) for m in self.meters if m.readings}

    def facts(self) -> Resources:
        """What the report says."""
        gpus = next((m.source.facts() for m in self.meters if isinstance(m.source, Gpus)), [])
        power = {}
        for meter in self.meters:
            (begin, first), (end, last) = meter.readings[0], meter.readings[-1]
            if end > begin:
                power[meter.source.name] = (last - first) / (end - begin)
        return Resources(
            memory_peak_bytes=dict(self.peaks),
            gpus=gpus,
            mean_power_w=power,
            not_readable=dict(self.unreadable),
            samples=self._samples,
            sampling_cpu_seconds=self._cpu,
        )


def catalog_name(device: str) -> str | None:
    """The catalog's name of a GPU that NVML or torch calls `device`; None where it knows none, or several."""
    from unshot.catalog import gpu

    try:
        return gpu(device).name
    except InputError:
        return None


def catalog_gpu(devices: Sequence[str], seen: Sequence[Gpu]) -> str | None:
    """What the sides ran on in the catalog's words: `cpu`, a GPU's name, or None where that is not known."""
    if set(devices) == {"cpu"}:
        return "cpu"
    if any(d in ("of the server", "cpu") for d in devices):
        return None
    names = {g.catalog for g in seen}
    return names.pop() if len(names) == 1 else None


def energy_per_request(
    monitor: Monitor, records: Sequence[RequestRecord], side: str, mode: str, clock: float
) -> Energy | None:
    """Joules per answered request of one side and mode, by source and in all; None where nothing is readable.

    Each block counts from its first scheduled request to its last answer; `clock` is the mode's start. Blocks of
    the two sides alternate, so their energy is told apart by time.
    """
    blocks: dict[int, list[RequestRecord]] = {}
    for record in records:
        if record.side == side and record.mode == mode:
            blocks.setdefault(record.block, []).append(record)
    answered = sum(r.ok for group in blocks.values() for r in group)
    spans = [
        (clock + min(r.scheduled for r in group), clock + max(r.end for r in group))
        for group in blocks.values()
    ]
    joules = monitor.joules(spans)
    if not joules or not answered:
        return None
    each = {name: value / answered for name, value in joules.items()}
    return Energy(each, sum(each.values()))


def memory_words(facts: Resources) -> str:
    """Peak memory of the watched processes and GPUs in words."""
    parts = [f"{name} {size / 2**20:,.0f} MiB" for name, size in facts.memory_peak_bytes.items()]
    parts += [
        f"{g.name} {(g.memory_peak_bytes or 0) / 2**20:,.0f} of {g.memory_bytes / 2**20:,.0f} MiB"
        for g in facts.gpus
    ]
    return ", ".join(parts) or f"not readable: {facts.not_readable.get('memory', 'no process')}"


def power_words(facts: Resources) -> str:
    """Mean power by source in words, and why the others have none."""
    parts = [f"{name} {watts:,.1f} W on average" for name, watts in facts.mean_power_w.items()]
    parts += [f"{g.name} {g.utilisation_mean:.0%} busy" for g in facts.gpus if g.utilisation_mean is not None]
    parts += [f"{name} not readable: {why}" for name, why in facts.not_readable.items() if name != "memory"]
    return "; ".join(parts)
