"""One chaos run: an undisturbed pass that says what to expect, then faults, then the comparison."""

import asyncio
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedrt.admin_client import AdminClient
from fedrt.spec import ExperimentSpec
from tests.chaos import clip_images, namespace
from tests.chaos.account import process_states, write_account
from tests.chaos.experiments import Expected, alone, clip_spec, digest_of, latest_private, numpy_specs, vault_digest
from tests.chaos.faults import Faults
from tests.chaos.federation import federation
from tests.chaos.layout import COORDINATOR, Layout
from tests.chaos.outcome import Found, leftovers, objections
from tests.chaos.pool import Pool, submit
from tests.chaos.processes import STAYS_DOWN, Daemon, marked, orphans
from tests.chaos.report import make_report
from tests.chaos.schedule import Deck, Fault, Kind
from tests.chaos.watching import History

NUMPY_SILOS = ("north", "south", "west")
CLIP_SILOS = ("clinic-a", "clinic-b")
DEFAULT_SPECS = ("transport", "momentum", "large", "pair", "median")
IN_FLIGHT = 4  # faults at the same time
LONG_RUN = 3.0  # minutes from which on faults also strike alone, to be measured
ALONE_SHARE = 0.3  # of the time, at most, for that
FIRST_PATIENCE = 600.0  # seconds without any event after which the undisturbed run hangs
LEAST_PATIENCE = 120.0  # seconds without any event after which a run hangs, on a machine of any speed
PATIENCE_FACTOR = 15.0  # how many times as long as the whole undisturbed run that is at least
ORPHAN_LIMIT = 60.0  # seconds a child may outlive its daemon before it counts as an orphan


@dataclass(frozen=True)
class Plan:
    """What to do. `with_clip` adds two silos with the real worker."""

    minutes: float
    seed: int
    with_clip: bool = False
    specs: tuple[str, ...] = DEFAULT_SPECS
    keep: bool = False  # the directory with logs and an account, also if nothing is wrong


@dataclass
class Run:
    """A federation under chaos; `problems` is empty if the promise was kept."""

    plan: Plan
    layout: Layout
    has_disks: bool
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    problems: list[str] = field(default_factory=list)
    patience: float = FIRST_PATIENCE  # seconds
    expected: dict[str, Expected] = field(default_factory=dict)
    orphaned: dict[int, float] = field(default_factory=dict)  # since when, by process id
    orphans_seen: int = 0
    equal: int = 0
    compared: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    not_reached: Counter[str] = field(default_factory=Counter)
    states: list[str] = field(default_factory=list)  # of processes, if anything is wrong

    async def perform(self) -> dict[str, Any]:
        """Run; returns the report."""
        begin, chance = time.monotonic(), random.Random(self.plan.seed)
        async with federation(self.layout, self.has_disks, self.mark, chance) as (daemons, proxies, watcher):
            self.watcher, self.daemons = watcher, daemons
            specs = self._specs()
            self.pool = Pool(watcher, specs, random.Random(chance.random()))
            self.faults = Faults(self.layout, daemons, proxies, self.pool, random.Random(chance.random()))
            if await self._undisturbed(specs):
                await self._chaos(random.Random(chance.random()))
                if await self._settle():
                    await self._spools_are_empty()
                    await self._compare()
            await self._end(daemons)
            if self.problems:
                self.states = process_states(self.mark)
        return make_report(self, time.monotonic() - begin)

    # ---- the parts

    def _specs(self) -> dict[str, ExperimentSpec]:
        every = numpy_specs(self.layout.numpy_silos)
        specs = {name: every[name] for name in self.plan.specs}
        if self.layout.clip_silos:
            specs["phrase"] = clip_spec(self.layout.clip_silos, clip_images.CLASSES, clip_images.weights_sha256())
        return specs

    async def _undisturbed(self, specs: dict[str, ExperimentSpec]) -> bool:
        """Find out what to expect, and how fast this machine is; false if not even that works."""
        begin = time.monotonic()
        histories = [await submit(self.watcher, f"undisturbed-{name}", name, spec) for name, spec in specs.items()]
        if not await self.watcher.until(lambda: all(one.has_ended for one in histories), FIRST_PATIENCE):
            self.problems.append("the undisturbed run stands still")
            return False
        await self._spools_are_empty()
        self.patience = max(LEAST_PATIENCE, PATIENCE_FACTOR * (time.monotonic() - begin))
        for history in histories:
            found = await self._found(history)
            rounds = {place: dict(there) for place, there in history.rounds.items()}
            self.expected[history.spec_name] = Expected(found.digest, found.vaults, rounds)
            self.problems += objections(found, self.expected[history.spec_name])
            if history.spec_name != "phrase":
                self._check_alone(history, found.digest)
        return not self.problems

    def _check_alone(self, history: History, digest: str) -> None:
        """The undisturbed run must itself be what one process computes alone."""
        shared, private = alone(history.spec)
        if digest != shared:
            self.problems.append(f"{history.name}: not what one computes alone")
        for silo, wanted in private.items():
            if digest_of(latest_private(self.layout.state(silo) / "vault", history.name)) != wanted:
                self.problems.append(f"{history.name}: the vault of {silo} is not what one computes alone")

    async def _chaos(self, chance: random.Random) -> None:
        """Strike for the planned time, then let everything that is broken come back."""
        deck, over, room = Deck(self.layout, chance, self.has_disks), asyncio.Event(), asyncio.Semaphore(IN_FLIGHT)
        begin = time.monotonic()
        deadline = begin + self.plan.minutes * 60
        keeping = asyncio.create_task(self.pool.keep(over))
        judging = asyncio.create_task(self._judge())
        if self.plan.minutes >= LONG_RUN:
            await self._one_by_one(deck, begin + ALONE_SHARE * (deadline - begin))
        strikes: set[asyncio.Task[None]] = set()
        while time.monotonic() < deadline and not self.problems:
            await room.acquire()
            strike = asyncio.create_task(self._strike(deck, deck.draw(), room))
            strikes.add(strike)
            strike.add_done_callback(strikes.discard)
            await asyncio.sleep(min(deck.gap(), max(0.0, deadline - time.monotonic())))
            self._look()
        over.set()
        judging.cancel()
        await asyncio.wait({judging})
        if strikes:
            await asyncio.wait(strikes, timeout=self.patience)
        await asyncio.wait({keeping}, timeout=self.patience)
        for task in (keeping, judging, *strikes):
            if not task.done():
                self.problems.append("a fault or the creation of an experiment does not come to its end")
                task.cancel()
            elif not task.cancelled() and (error := task.exception()) is not None:
                self.problems.append(f"the runner failed: {type(error).__name__}: {error}")

    async def _one_by_one(self, deck: Deck, deadline: float) -> None:
        """Strike once in each way, each time until every experiment has moved again: so stalls are measured."""
        for fault in deck.one_of_each():
            if not await self.watcher.until(lambda: len(self.pool.active) > 1, self.patience):
                self.problems.append(f"experiments stand still before '{fault}'")
            under_way = {one.name: len(one.event_times) for one in self.pool.active}
            if self.problems or time.monotonic() > deadline:
                return
            struck = await self.faults.strike(fault, alone=True)
            end = struck.end or 0.0

            def has_moved() -> bool:
                there = [self.watcher.histories[name] for name in under_way]  # noqa: B023
                return all(one.has_ended or any(at > end for at in one.event_times[-1:]) for one in there)  # noqa: B023

            if not await self.watcher.until(has_moved, self.patience):
                self.problems.append(f"experiments stand still after '{fault}'")
            self._look()

    async def _judge(self) -> None:
        """Compare what has ended already, as far as that can be done before the silos have their verdicts."""
        judged: set[str] = set()
        while True:
            ended = [one for one in self._to_compare() if one.has_ended and one.name not in judged]
            for history in ended:
                judged.add(history.name)
                found = replace(await self._found(history), vaults={})
                self.problems += objections(found, self.expected[history.spec_name])
            await self.watcher.until(
                lambda: any(one.has_ended and one.name not in judged for one in self._to_compare()), float("inf")
            )

    def _to_compare(self) -> list[History]:
        every = list(self.watcher.histories.values())
        return [one for one in every if not one.is_doomed and not one.name.startswith("undisturbed-")]

    async def _strike(self, deck: Deck, fault: Fault, room: asyncio.Semaphore) -> None:
        try:
            struck = await self.faults.strike(fault)
        except Exception as error:  # a mistake of the suite must show, not hang
            self.problems.append(f"the runner failed at '{fault}': {type(error).__name__}: {error}")
            return
        finally:
            room.release()
        if fault.kind is Kind.CRASH_POINT:
            assert fault.point is not None
            (self.hits if struck.reached else self.not_reached)[f"{fault.point.role.value}: {fault.point.name}"] += 1
            if not struck.reached:
                deck.again(fault)

    def _look(self) -> None:
        """See whether anything is wrong already."""
        if time.monotonic() - self.watcher.last_news > self.patience:
            self.problems.append(f"no experiment has moved for {self.patience:.0f} seconds")
        for name, daemon in self.daemons.items():
            for _, code in daemon.exits:
                if code in STAYS_DOWN or code == 1:
                    self.problems.append(f"{name} ended with exit code {code}: see its log")
        for history in self.watcher.histories.values():
            if history.has_ended and not history.is_doomed and history.state != 0 and history.message:
                self.problems.append(f"{history.name} ended with: {history.message}")
        now = time.monotonic()
        there = {process.pid for process in orphans(self.mark, self.daemons)}
        self.orphaned = {pid: self.orphaned.get(pid, now) for pid in there}
        for pid, since in self.orphaned.items():
            if now - since > ORPHAN_LIMIT:
                self.problems.append(f"process {pid} has outlived its daemon")

    async def _settle(self) -> bool:
        """Wait for the end of all experiments; false if they stand still."""
        if self.problems:
            return False
        if not await self.watcher.until(lambda: not self.pool.active, self.patience):
            names = [history.name for history in self.pool.active]
            self.problems.append(f"experiments stand still: {names}")
            return False
        return True

    async def _spools_are_empty(self) -> bool:
        """Wait until every result has its verdict."""
        deadline = time.monotonic() + self.patience
        left: list[Path] = []
        while time.monotonic() < deadline:
            left = [path for silo in self.layout.silos for path in (self.layout.state(silo) / "spool").glob("*")]
            if not left:
                return True
            await asyncio.sleep(0.1)
        self.problems.append(f"results were never settled: {left}")
        return False

    async def _found(self, history: History) -> Found:
        async def ask(client: AdminClient) -> Any:
            return await client.export(history.name)

        export: Any = await self.watcher.ask(ask)
        vaults = {
            silo: vault_digest(self.layout.state(silo) / "vault", history.name) for silo in history.spec.rounds.silos
        }
        return Found(history, digest_of(export.tensors), vaults)

    async def _compare(self) -> None:
        for history in self._to_compare():
            problems = objections(await self._found(history), self.expected[history.spec_name])
            self.compared += 1
            self.equal += not problems
            self.problems += problems

    async def _end(self, daemons: dict[str, Daemon]) -> None:
        """Stop everything in order: nothing may be left, neither processes nor files."""
        self._look()
        if self.problems:
            return
        for name in [*self.layout.silos, COORDINATOR]:
            code = await daemons[name].stop()
            if code not in (0, -signal.SIGTERM):  # the latter if it had only just been started again
                self.problems.append(f"{name} ended with {code} when it was asked to stop")
        deadline = time.monotonic() + ORPHAN_LIMIT
        while marked(self.mark) and time.monotonic() < deadline:  # noqa: ASYNC110  # no event tells of their end
            await asyncio.sleep(0.1)
        self.orphans_seen = len(marked(self.mark))
        if self.orphans_seen:
            self.problems.append(f"processes are left: {[process.pid for process in marked(self.mark)]}")
        self.problems += [f"left behind: {path}" for path in leftovers(self.layout)]


async def chaos(plan: Plan, has_disks: bool) -> dict[str, Any]:
    """Run in a new temporary directory, which stays, with an account of everything, if anything is wrong."""
    layout = Layout(Path(tempfile.mkdtemp(prefix="chaos-")), NUMPY_SILOS, CLIP_SILOS if plan.with_clip else ())
    run, is_worth_keeping = Run(plan, layout, has_disks), True
    print(f"chaos in {layout.root}", file=sys.stderr)
    try:
        report = await run.perform()
        is_worth_keeping = bool(report["problems"]) or plan.keep
        if is_worth_keeping:
            report["account"] = str(layout.root)
            write_account(run, report)
    except asyncio.CancelledError:
        is_worth_keeping = False
        raise
    finally:
        for name in layout.daemons if has_disks else ():
            namespace.unmount_disk(layout.state(name))
        if not is_worth_keeping:
            shutil.rmtree(layout.root, ignore_errors=True)
    return report
