"""Memory, power and energy: read where they can be, named as not readable where they cannot."""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from bench.records import RequestRecord
from bench.resources import Gpus, Monitor, Rapl, Unreadable, energy_per_request, power_words
from tests.conftest import measured


def package(root: Path, number: int, microjoules: int) -> Path:
    """A CPU package as the kernel's powercap shows it."""
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"package-{number}\n")
    (zone / "max_energy_range_uj").write_text("1000000000\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    part = root / f"intel-rapl:{number}:0"
    part.mkdir()
    (part / "name").write_text("core\n")
    (part / "energy_uj").write_text("77\n")
    return zone / "energy_uj"


def test_packages_add_up_and_a_wrapped_counter_is_put_right(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 5_000_000), package(tmp_path, 1, 999_000_000)
    rapl = Rapl(tmp_path)
    assert rapl.joules() == 0
    first.write_text("7000000\n")
    second.write_text("1000000\n")
    assert rapl.joules() == pytest.approx(2 + 2)
    first.write_text("8000000\n")
    assert rapl.joules() == pytest.approx(5)


def test_what_cannot_be_read_has_its_reason(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="no CPU package"):
        Rapl(tmp_path / "none")
    with Monitor({"me": os.getpid()}, sources=[lambda: Rapl(tmp_path / "none")]) as monitor:
        pass
    facts = monitor.facts()
    assert "no CPU package" in power_words(facts)
    assert facts.mean_power_w == {}
    assert energy_per_request(monitor, [record("baseline", 0, 0.0, 1.0)], "baseline", "on", 0.0) is None


def nvml(*, counter: bool) -> types.ModuleType:
    """What NVML answers on a machine with two GPUs (there is none here): mW, mJ, percent, bytes."""
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    energy = itertools.count(1_000_000, 30_000)

    def total_energy(device: int) -> int:
        if not counter:
            raise module.NVMLError("Not Supported")
        return next(energy)

    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = lambda i: i
    module.nvmlDeviceGetName = lambda i: (b"NVIDIA H100 80GB HBM3", b"NVIDIA T1")[i]
    module.nvmlDeviceGetMemoryInfo = lambda i: types.SimpleNamespace(total=80 << 30, used=(7 + i) << 30)
    module.nvmlDeviceGetPowerUsage = lambda i: 250_000
    module.nvmlDeviceGetUtilizationRates = lambda i: types.SimpleNamespace(gpu=50)
    module.NVML_CLOCK_SM = 1
    module.nvmlDeviceGetEnforcedPowerLimit = lambda i: 700_000
    module.nvmlDeviceGetClockInfo = lambda i, kind: 1500
    module.nvmlDeviceGetMaxClockInfo = lambda i, kind: 1980
    module.nvmlDeviceGetTotalEnergyConsumption = total_energy
    return module


@pytest.mark.parametrize("counter", [True, False])
def test_gpus_by_their_energy_counter_or_by_power_times_time(
    monkeypatch: pytest.MonkeyPatch, counter: bool
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(counter=counter))
    with Monitor({}, interval=0.01, sources=[Gpus]) as monitor:
        time.sleep(0.1)
    facts = monitor.facts()
    assert [g.name for g in facts.gpus] == ["NVIDIA H100 80GB HBM3", "NVIDIA T1"]
    assert [g.catalog for g in facts.gpus] == ["h100-sxm", None]
    assert (facts.gpus[0].clock_mhz, facts.gpus[0].power_limit_w) == (1500, 700)
    assert [g.memory_peak_bytes for g in facts.gpus] == [7 << 30, 8 << 30]
    assert facts.gpus[0].power_mean_w == 250
    assert facts.gpus[0].utilisation_mean == 0.5
    joules = monitor.meters[0].readings[-1][1]
    if counter:  # each of the two counters goes on by two steps of 30 J a look
        assert joules == pytest.approx(120 * facts.samples, abs=121)
    else:  # two boards of 250 W
        assert facts.mean_power_w["GPU"] == pytest.approx(500, rel=0.01)


def test_the_memory_of_a_process_is_watched_while_it_grows() -> None:
    with Monitor({"me": os.getpid()}, interval=0.01, sources=[]) as monitor:
        before = monitor.peaks["me"]
        # Pages of its own: what the process freed before would be used again and grow nothing.
        with mmap.mmap(-1, 64 << 20) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
            end = time.monotonic() + 20
            while monitor.peaks["me"] - before <= 50 << 20 and time.monotonic() < end:
                time.sleep(0.01)
    assert monitor.peaks["me"] - before > 50 << 20


def record(side: str, block: int, scheduled: float, seconds: float) -> RequestRecord:
    return RequestRecord(
        side=side, mode="on", row=0, block=block, scheduled=scheduled, start=scheduled, token_times=[seconds],
        e2e=seconds, prompt_tokens=1, output_tokens=1,
    )  # fmt: skip


class Heater:
    """100 W while the baseline runs, 20 W else; in seconds since `start`."""

    name = "heater"

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def joules(self) -> float:
        passed = time.perf_counter() - self.start
        return 100 * min(passed, 0.2) + 20 * max(0.0, passed - 0.2)


def test_energy_of_alternating_blocks_goes_to_the_side_that_ran() -> None:
    def check() -> None:
        heater = Heater()
        with Monitor({}, interval=0.01, sources=[lambda: heater]) as monitor:
            time.sleep(0.45)
        # Two requests of the baseline in the first 0.2 s, two of the candidate after it.
        records = [record("baseline", 0, 0.0, 0.1), record("baseline", 0, 0.1, 0.1)]
        records += [record("candidate", 0, 0.22, 0.1), record("candidate", 0, 0.32, 0.1)]
        joules = {
            s: energy_per_request(monitor, records, s, "on", heater.start) for s in ("baseline", "candidate")
        }
        assert joules["baseline"] is not None and joules["candidate"] is not None
        assert joules["baseline"].joules == pytest.approx(10, rel=0.15)
        assert joules["candidate"].joules == pytest.approx(2, rel=0.15)
        assert monitor.facts().mean_power_w["heater"] > 20

    measured(check)  # a reading may come late
