"""Keeps the gateway's back ends as the registry wants them: starts the new one, waits for it, switches, drains the old.

The routing is replaced in one step and only when what it names answers; a request keeps the routing that it began
with, so that no answer comes out of two versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TypedDict

import aiohttp

from deploy.serve.backend import Backend, Settings, native_schema, open_session
from deploy.serve.exchange import Routing
from deploy.serve.gateway import Gateway
from deploy.serve.shared import ACTIVE, Shared
from deploy.serve.target import ArmSpec, Resolver, Target
from unshot.console import Output
from unshot.contracts.request_log import Arm
from unshot.errors import OutsideError, UnshotError

POLL = 0.1
RETRY = 15.0
# Seconds between looks whether a server that has nothing to do is there.
HEALTH_EVERY = 2.0
DRAIN_LIMIT = 300.0
ARMS: tuple[Arm, Arm] = ("baseline", "candidate")


class ArmHealth(TypedDict):
    """One arm in /healthz."""

    version: str
    up: bool
    breaker: str
    active: int
    restarts: int


class Health(TypedDict):
    """What /healthz says; `split` in percent."""

    status: str
    model: str
    arms: dict[Arm, ArmHealth]
    split: float
    shadow: bool
    registry: str


class _Changed(Exception):
    """The registry wants another version than the one that is being started."""


@dataclass(frozen=True)
class Desired:
    """What both arms should run, and the candidate's share, 0 to 1; `stamp` is the registry's when it was read.

    `wrong` says why an arm's version cannot be served.
    """

    stamp: object
    targets: dict[Arm, Target | None]
    wrong: dict[Arm, UnshotError]
    share: float

    def identity(self, arm: Arm) -> str | None:
        """What tells the arm's target from another."""
        target = self.targets[arm]
        return target.identity if target is not None else None


@dataclass(eq=False)
class Supervisor:
    """Back ends of one gateway."""

    gateway: Gateway
    resolver: Resolver
    places: dict[Arm, ArmSpec]
    settings: Settings
    timeouts: dict[Arm, float]
    share: float
    warm: float
    out: Output
    shared: Shared | None = None
    session: aiohttp.ClientSession = field(init=False)
    registry_gone: bool = False
    _seen: object = None
    _had_registry: bool = False
    _retry_at: float | None = None
    _kept: dict[str, tuple[Backend, float]] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _busy: set[Backend] = field(default_factory=set)
    _owned: set[Backend] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.wake = asyncio.Event()
        self._unstarted: dict[str, str] = {}

    @property
    def leads(self) -> bool:
        """Whether workers ask the servers that this one starts."""
        return self.shared is not None and self.shared.index is None

    @property
    def follows(self) -> bool:
        """Whether it is a worker's: another process starts servers, and says what happens to them."""
        return self.shared is not None and self.shared.index is not None

    def _publish(self) -> None:
        """Tell the workers where the servers are."""
        if self.shared is None or not self.leads:
            return
        found = {identity: {"error": why} for identity, why in self._unstarted.items()}
        for backend in self._owned:
            if backend.server is not None and backend.running and backend.reachable:
                schema = "openai" if native_schema(list(backend.server.command)) else "other"
                found[backend.target.identity] = {
                    "url": backend.server.address.base,
                    "pid": str(backend.server.process.pid),
                    "schema": schema,
                }
        self.shared.publish(found)

    async def begin(self) -> None:
        """Start everything once. Raises what is wrong: a gateway that cannot serve what it was told must not start."""
        self.session = open_session()
        wanted = await self._wanted()
        for error in wanted.wrong.values():
            raise error
        self._seen = wanted.stamp
        started: dict[Arm, Backend | None] = {}
        for arm in ARMS:
            target = wanted.targets[arm]
            started[arm] = await self._start(arm, target) if target else None
        self.gateway.routing = Routing(started["baseline"], started["candidate"], wanted.share)

    async def run(self) -> None:
        """Follow the registry and mend back ends until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), POLL)
            forced = self.wake.is_set()
            self.wake.clear()
            if forced or self._changed() or (self._retry_at and time.monotonic() >= self._retry_at):
                try:
                    await self._follow()
                except Exception as error:  # the gateway must go on following, whatever a library threw
                    self._later(error)
            self._mend()
            self._publish()

    def _later(self, error: Exception) -> None:
        """Say what went wrong, and try again in a while."""
        self._retry_at = time.monotonic() + RETRY
        if not self.follows:
            self.out.warn(f"{error or type(error).__name__}; what is served stays as it is")

    def _changed(self) -> bool:
        """Whether the registry is another one than last time; one that has vanished is reported and changes nothing."""
        stamp = self.resolver.registry.stamp()
        gone = stamp is None and self._had_registry
        if gone != self.registry_gone:
            self.registry_gone = gone
            place = self.resolver.registry.place
            if self.follows:
                pass
            elif gone:
                self.out.warn(f"{place}: the registry is gone (unmounted?); what is served stays as it is")
            else:
                self.out.log(f"{place}: the registry is there again")
        self._had_registry = self._had_registry or stamp is not None
        return stamp != self._seen and not gone

    async def _wanted(self) -> Desired:
        registry = self.resolver.registry
        # The stamp first: a change that comes while the state is read is then seen as one.
        stamp = registry.stamp()
        if stamp is None and self._had_registry:
            raise OutsideError(f"{registry.place}: the registry is gone")
        self._had_registry = self._had_registry or stamp is not None
        state = await asyncio.to_thread(registry.state)

        targets: dict[Arm, Target | None] = {}
        wrong: dict[Arm, UnshotError] = {}

        def resolve() -> None:
            for arm, other in zip(ARMS, reversed(ARMS), strict=True):
                place, second = self.places.get(arm), self.places.get(other)
                try:
                    targets[arm] = self.resolver.resolve(arm, place, second, state) if place else None
                except UnshotError as error:
                    targets[arm], wrong[arm] = None, error

        # In a thread: hashing a model of some gigabytes takes seconds.
        await asyncio.to_thread(resolve)
        return Desired(stamp, targets, wrong, self.share if state.split is None else state.split / 100)

    async def _follow(self) -> None:
        """Make the routing what the registry wants; an arm whose version does not start stays as it is."""
        self._retry_at = None
        self._seen = self.resolver.registry.stamp()
        wanted = await self._wanted()
        self._seen = wanted.stamp
        before = self.gateway.routing
        after: dict[Arm, Backend | None] = {}
        for arm in ARMS:
            try:
                after[arm] = await self._found(arm, wanted, before.of(arm))
            except UnshotError as error:
                if not self.follows:
                    self.gateway.metrics.switches.labels(arm, "failed").inc()
                self._later(error)
                after[arm] = before.of(arm)
            except _Changed:  # begin again with what the registry wants now
                new = [b for b in after.values() if b not in (before.baseline, before.candidate)]
                self._release(new)
                self._seen = None
                return
        self.gateway.routing = Routing(after["baseline"], after["candidate"], wanted.share)
        for arm in ARMS:
            old, now = before.of(arm), after[arm]
            if old is not now and not self.follows:
                self.gateway.metrics.switches.labels(arm, "done").inc()
                self.out.log(
                    f"{arm}: {old.label if old else 'none'} -> {now.label if now else 'none'}"
                    f"; {old.active if old else 0} requests finish on the old one"
                )
        if before.share != wanted.share:
            self.out.log(f"the candidate's share is {wanted.share:.0%}")
        self._release([b for b in (before.baseline, before.candidate) if b not in after.values()])

    async def _found(self, arm: Arm, wanted: Desired, now: Backend | None) -> Backend | None:
        """The arm's back end as it should be: the one that it has, one kept warm, or a new one that answers."""
        if arm in wanted.wrong:
            raise wanted.wrong[arm]
        target = wanted.targets[arm]
        if target is None or (now is not None and now.target.identity == target.identity):
            return now if target is not None else None
        kept = self._kept.pop(target.identity, None)
        if kept is not None:
            if kept[0].running and kept[0].breaker.passes:
                return kept[0]
            self._spawn(self._drain(kept[0]))
        return await self._start_unless_changed(arm, target)

    async def _start(self, arm: Arm, target: Target) -> Backend:
        self.out.log(f"{arm}: starting {target.label}")
        backend = Backend(target, self.settings, self.session, self.timeouts[arm], self.shared)
        begin = time.monotonic()
        self._owned.add(backend)
        self._unstarted.pop(target.identity, None)
        self._publish()
        try:
            await backend.start()
        except BaseException as error:
            self._owned.discard(backend)
            await backend.close()
            if isinstance(error, UnshotError):
                self._unstarted[target.identity] = str(error)
            self._publish()
            raise
        self._publish()
        if backend.reachable:
            self.out.log(f"{arm}: {target.label} answers after {time.monotonic() - begin:.1f} s")
        else:
            self.out.warn(f"{arm}: {target.label} does not answer; it is asked all the same")
        return backend

    async def _start_unless_changed(self, arm: Arm, target: Target) -> Backend:
        """A started back end. Raises `_Changed` where another is wanted meanwhile: a rollback does not wait."""
        task = asyncio.create_task(self._start(arm, target))
        seen = self._seen
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=POLL)
                stamp = self.resolver.registry.stamp()
                if not task.done() and stamp != seen:
                    seen = stamp
                    if (await self._wanted()).identity(arm) != target.identity:
                        raise _Changed
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, UnshotError):
                    await task

    def _release(self, backends: list[Backend | None]) -> None:
        """Keep what is served no more warm for a rollback, or let it finish and end it."""
        for backend in backends:
            if backend is None:
                continue
            if self.warm > 0 and backend.target.path is not None and backend.running:
                self._kept[backend.target.identity] = (backend, time.monotonic() + self.warm)
            else:
                self._spawn(self._drain(backend))
        # One of each arm is enough to go back to.
        for arm in ARMS:
            held = sorted((e, i) for i, (_, e) in self._kept.items() if i.startswith(f"{arm}:"))
            for _, identity in held[:-1]:
                self._spawn(self._drain(self._kept.pop(identity)[0]))

    async def _drain(self, backend: Backend) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_LIMIT):
                await backend.idle.wait()
                while self.leads and backend.in_use:
                    await asyncio.sleep(POLL)
        await backend.close()
        self._owned.discard(backend)

    def _mend(self) -> None:
        """Restart what died, probe what failed, and end what was kept warm for long enough."""
        routing = self.gateway.routing
        for arm in ARMS:
            backend = routing.of(arm)
            if backend is None or backend in self._busy:
                continue
            if not backend.running or backend.breaker.failed_probes:
                self._hold(backend, self._restart(arm, backend))
            if backend.breaker.due() and backend.running:
                self._hold(backend, backend.probe())
            elif backend.running and backend.health_due(HEALTH_EVERY):
                self._hold(backend, backend.check_health())
        now = time.monotonic()
        for identity, (backend, until) in list(self._kept.items()):
            if now >= until or not backend.running:
                del self._kept[identity]
                self._spawn(self._drain(backend))

    async def _restart(self, arm: Arm, backend: Backend) -> None:
        self._publish()
        try:
            if await backend.watch():
                self.gateway.metrics.restarts.labels(arm).inc()
                self.out.log(f"{arm}: {backend.label} was started again")
        except UnshotError as error:
            self.out.warn(str(error))

    def _hold(self, backend: Backend, work: Coroutine[object, object, None]) -> None:
        self._busy.add(backend)
        self._spawn(work).add_done_callback(lambda _: self._busy.discard(backend))

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def health(self) -> Health:
        """What /healthz says: `ok`, `degraded` (an arm is down, the other answers), or `no back end`."""
        routing = self.gateway.routing
        arms: dict[Arm, ArmHealth] = {
            arm: {
                "version": backend.label,
                "up": backend.up,
                "breaker": backend.breaker.state,
                "active": backend.cell.total(ACTIVE),
                "restarts": backend.restarts,
            }
            for arm in ARMS
            if (backend := routing.of(arm)) is not None
        }
        up = [a["up"] and a["breaker"] == "closed" for a in arms.values()]
        status = "no back end" if not any(a["up"] for a in arms.values()) else "ok"
        if status == "ok" and (not all(up) or self.registry_gone):
            status = "degraded"
        share = round(100 * routing.share, 4) if routing.candidate else 0.0
        return {"status": status, "model": self.gateway.name, "arms": arms, "split": share,
                "shadow": self.gateway.shadow, "registry": "gone" if self.registry_gone else "ok"}  # fmt: skip

    async def close(self) -> None:
        """End every child. Requests are over by then."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(b.close() for b in self._owned), return_exceptions=True)
        await self.session.close()
