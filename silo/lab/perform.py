"""Runs a lab on a terminal: images, partitions, federations side by side, signals, exit codes, and the report."""

import asyncio
import contextlib
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedrt.daemon import report
from fedrt.errors import ExitCode, FedrtError
from silo.demo.performance import KILLED, SIGNALS, Interrupted
from silo.demo.processes import Processes
from silo.lab.attempts import forget_attempts
from silo.lab.check import checked_plans, dealt_of, weights_sha256
from silo.lab.directory import claim, locked
from silo.lab.federation import Federation, Given
from silo.lab.figures import check_drawing
from silo.lab.grid import Cell, Dealt, FederationPlan, cells_of, chosen, expand
from silo.lab.images import data_of, images_of
from silo.lab.method_code import method_digest
from silo.lab.progress import Progress
from silo.lab.records import CellRecord, read_cells, remove_cell
from silo.lab.report import write_report, write_tables
from silo.lab.sections import LabData, LabFile, load_lab
from silo.lab.workplace import workplaces
from silo.partition.collection import Collection, CollectionSection, read_collection
from silo.partition.dealing import deal


@dataclass(frozen=True)
class Order:
    """What `fedrt-lab run` was asked for."""

    path: Path
    jobs: int = 1
    only: tuple[str, ...] = ()
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What all federations need: where images lie, what each got of them, and the weights' digest."""

    images: Mapping[str, CollectionSection]  # by the name of a plan
    dealt: Mapping[str, Dealt]
    weights: str
    method_digests: Mapping[str, str]  # by the name of a method
    grid: Sequence[FederationPlan]  # whole, whatever is asked for

    def given(self, plan: FederationPlan) -> Given:
        """What a federation works on."""
        cell_ids = frozenset(cell.cell_id for each in self.grid if each.name == plan.name for cell in each.cells)
        return Given(self.images[plan.name], self.dealt[plan.name], self.weights, self.method_digests, cell_ids)

    def is_current(self, plan: FederationPlan, cell: Cell, record: CellRecord) -> bool:
        """Whether a finished cell had these very images and weights, this code of its method, and lacks no silo.

        A record that does not tell its method's code is taken for current.
        """
        had, has = (record.partition_digest, record.weights_sha256), (self.dealt[plan.name].digest, self.weights)
        same_code = record.method_digest in ("", self.method_digests[cell.method.name])
        return had == has and same_code and not record.unmeasured()


def perform(order: Order) -> int:
    """Run what is not finished, and write the report; the exit code: 1 if a cell failed, 128 and a signal's number."""
    console = Console(highlight=False)
    try:
        check_drawing()
        lab = load_lab(order.path)
        plans, wanted = plans_of(lab, order)
        again = chosen(wanted, order.again, "--again") if order.again else ()
        claim(lab)
        lock = locked(lab.directory)
        forget(lab.directory, again)
        try:
            failed = asyncio.run(_supervise(_run(order, lab, plans, wanted, console)))
        finally:
            with contextlib.suppress(FedrtError):  # the reason why it ended is told, not this
                write_tables(lab, plans, read_cells(lab.directory, cells_of(plans)))
        _finish(console, lab, plans)
        lock.release()
    except FedrtError as error:
        return report(error)
    except Interrupted as interrupted:
        console.print(f"{interrupted}; no process is left, and the same command goes on where this one was")
        return KILLED + interrupted.number
    for cell in cells_of(plans):
        if cell.cell_id in failed:
            print(f"error: cell {cell.cell_id!r} failed: {failed[cell.cell_id]}", file=sys.stderr)  # noqa: T201
    return ExitCode.INTERNAL if failed else ExitCode.DONE


def plans_of(lab: LabFile, order: Order) -> tuple[Sequence[FederationPlan], Sequence[FederationPlan]]:
    """The lab's whole grid, and what of it is asked for; only that, and the data that it needs, is looked at.

    Raises `FedrtError`.
    """
    if not order.only:
        plans = checked_plans(lab, order.path)
        return plans, plans
    plans = expand(lab, order.path.absolute().parent)
    wanted = chosen(plans, order.only)
    settings = {plan.setting: lab.settings[plan.setting] for plan in wanted}
    checked_plans(lab.model_copy(update={"settings": settings}), order.path)
    return plans, wanted


def forget(directory: Path, plans: Sequence[FederationPlan]) -> None:
    """Have these cells run anew, in new experiments, however often the run is interrupted. Raises `StorageError`."""
    for plan in plans:
        for cell in plan.cells:
            forget_attempts(workplaces(directory, plan), cell.cell_id)
            remove_cell(directory, cell)


def _finish(console: Console, lab: LabFile, plans: Sequence[FederationPlan]) -> None:
    """Write everything, and say where it is."""
    written, complaints = write_report(lab, plans, read_cells(lab.directory, cells_of(plans)))
    for line in [*complaints, *map(str, written)]:
        console.print(line, soft_wrap=True)


async def _supervise(work: Coroutine[Any, Any, dict[str, str]]) -> dict[str, str]:
    """Do the work; the first signal ends it in order, another one at once. Raises `Interrupted`."""
    task = asyncio.ensure_future(work)
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        # a second signal also cancels those that are waiting for daemons to end, which are killed then
        for one in [task] if len(received) == 1 else asyncio.all_tasks():
            one.cancel()

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise


async def _run(
    order: Order, lab: LabFile, grid: Sequence[FederationPlan], plans: Sequence[FederationPlan], console: Console
) -> dict[str, str]:
    """Run the cells that are not finished; the reasons of those that failed, by cell id. Raises `FedrtError`."""
    with console.status("images, weights and partitions") if console.is_terminal else contextlib.nullcontext():
        prepared = await _prepare(order, lab, grid, plans)
    finished = {
        cell.cell_id: record
        for plan in plans
        for cell in plan.cells
        for record in read_cells(lab.directory, [cell]).values()
        if prepared.is_current(plan, cell, record)
    }
    waiting = [
        replace(plan, cells=tuple(cell for cell in plan.cells if cell.cell_id not in finished)) for plan in plans
    ]
    waiting = [plan for plan in waiting if plan.cells]
    with Progress(waiting, finished, order.jobs, console) as progress:
        queue = iter(waiting)

        async def work() -> None:
            for plan in queue:
                await Federation(lab, plan, prepared.given(plan)).run(progress)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(order.jobs, len(waiting))):
                group.create_task(work())
        return progress.failed


async def _prepare(
    order: Order, lab: LabFile, grid: Sequence[FederationPlan], plans: Sequence[FederationPlan]
) -> Prepared:
    """Bring images onto disk where need be, and deal them out. Raises `FedrtError`."""
    settings = list(dict.fromkeys(plan.setting for plan in plans))
    if any(data.layout is None for data in data_of(lab, settings)):
        work = lab.directory / "work"
        async with Processes(work, work / "sockets") as processes:
            await processes.call(sys.executable, "-P", "-m", "silo.lab.images", str(order.path.absolute()), *settings)
    weights = await asyncio.to_thread(weights_sha256, lab.model)
    collections: list[tuple[LabData, Collection]] = []
    images, dealt = {}, {}
    for plan in plans:
        section = images_of(plan.data, lab.directory)
        collection = next((found for data, found in collections if data == plan.data), None)
        if collection is None:
            collection = await asyncio.to_thread(read_collection, section)
            collections.append((plan.data, collection))
        partition = await asyncio.to_thread(deal, collection, plan.partition, plan.seed)
        images[plan.name], dealt[plan.name] = section, dealt_of(partition)
    names = {cell.method.name for cell in cells_of(plans)}
    digests = {name: await asyncio.to_thread(method_digest, name) for name in names}
    return Prepared(images, dealt, weights, digests, grid)
