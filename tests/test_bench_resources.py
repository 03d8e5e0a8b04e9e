"""Memory, power and energy: read where they can be, named as not readable where they cannot."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.records import Record
from bench.resources import Monitor, Rapl, Unreadable, energy_per_request, power_words


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
    assert facts["mean_power_w"] == {}
    assert energy_per_request(monitor, [record("baseline", 0, 0.0, 1.0)], "baseline", "on", 0.0) is None


def test_the_memory_of_a_process_is_watched_while_it_grows() -> None:
    with Monitor({"me": os.getpid()}, interval=0.01, sources=[]) as monitor:
        before = monitor.peaks["me"]
        block = bytearray(os.urandom(1)) * (64 << 20)
        time.sleep(0.1)
        del block
    assert monitor.peaks["me"] - before > 50 << 20


def record(side: str, block: int, scheduled: float, seconds: float) -> Record:
    return Record(side, "on", 0, block, scheduled, scheduled, [seconds], seconds, 1, 1)


class Heater:
    """100 W while the baseline runs, 20 W else; in seconds since `start`."""

    name = "heater"

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def joules(self) -> float:
        passed = time.perf_counter() - self.start
        return 100 * min(passed, 0.2) + 20 * max(0.0, passed - 0.2)


def test_energy_of_alternating_blocks_goes_to_the_side_that_ran() -> None:
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
    assert joules["baseline"]["joules"] == pytest.approx(10, rel=0.15)
    assert joules["candidate"]["joules"] == pytest.approx(2, rel=0.15)
    assert monitor.facts()["mean_power_w"]["heater"] > 20
