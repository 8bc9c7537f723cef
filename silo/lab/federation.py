"""Runs the cells of one federation with real daemons: a coordinator and a host, started, watched and ended here.

A cell is one experiment. Both daemons keep their state, so a cell that was under way when everything was killed goes on
in the same experiment.

A daemon that dies is started again once in a cell; the second time the cell has failed. One that complains of its
configuration or identity is not: all cells of the federation have failed.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import fedrt
from fedrt.admin_client import AdminClient, LocalSocket, connect
from fedrt.ctl_follow import follow
from fedrt.ctl_progress import ENDED, WatchState, state_name
from fedrt.errors import ExitCode, FedrtError
from fedrt.experiment_file import experiment_file, experiment_spec
from fedrt.spec import ExperimentSpec
from fedrt.wire_values import experiment_spec_from_pb
from silo.demo.directory import free_port
from silo.demo.processes import DaemonEnded, DemoError, Processes, script
from silo.lab.attempts import attempt_at, forget_attempts, is_of, read_attempt, write_attempt
from silo.lab.grid import Cell, Dealt, FederationPlan, experiment_of
from silo.lab.progress import CellAudience, Progress
from silo.lab.records import FORMAT, CellRecord, rounds_of, write_cell
from silo.lab.sections import LabFile
from silo.lab.workplace import Workplace, workplace_of, write_certificates, write_daemon_files
from silo.partition.collection import CollectionSection

READY_WAITS = 15  # times two minutes until the host must be ready: it looks at every image
STARTS = 2  # of daemons that die, until the cell counts as failed
FINAL = frozenset({ExitCode.CONFIGURATION, ExitCode.IDENTITY_REFUSED})  # a daemon that ends so will do so again


class CellFailed(FedrtError):
    """An experiment did not end as planned; the message is the coordinator's."""


@dataclass(frozen=True)
class Given:
    """What a federation works on: images, what each silo got of them, weights by digest, and the methods' code."""

    images: CollectionSection
    dealt: Dealt
    weights: str
    method_digests: Mapping[str, str]  # by the name of a method
    cell_ids: frozenset[str]  # of all cells that lab.yaml has for this setting and seed, asked for or not


class Federation:
    """One setting with one seed. `run` ends with no process left."""

    def __init__(self, lab: LabFile, plan: FederationPlan, given: Given) -> None:
        self._lab = lab
        self._plan = plan
        self._given = given
        self._dealt = given.dealt
        self._weights = given.weights
        self._was_ready = False
        self._given_up: set[str] = set()

    async def run(self, progress: Progress) -> None:
        """Run every cell of the plan, write what finishes and tell what fails, whatever `FedrtError` is the reason."""
        waiting, deaths = list(self._plan.cells), 0
        try:
            while waiting:
                count, self._was_ready = len(waiting), False
                try:
                    await self._serve(waiting, progress)
                except (FedrtError, OSError) as error:
                    deaths = deaths + 1 if len(waiting) == count else 1
                    is_final = isinstance(error, DaemonEnded) and error.status in FINAL
                    if isinstance(error, DemoError) and deaths < STARTS and not is_final:
                        continue
                    # without daemons no cell of this federation can run
                    for _ in range(1 if self._was_ready and not is_final else len(waiting)):
                        self._given_up.add(waiting[0].cell_id)
                        progress.fails(waiting.pop(0), str(error))
                    deaths = 0
        finally:
            progress.ends(self._plan)

    async def _serve(self, waiting: list[Cell], progress: Progress) -> None:
        """Start both daemons and take cells off the list as they end. Raises `FedrtError` if that cannot go on."""
        progress.begins(self._plan, tuple(waiting))
        place = await asyncio.to_thread(workplace_of, self._lab, self._plan, self._dealt, self._weights)
        async with Processes(place.logs, place.sockets) as processes:
            await processes.guarding(self._start(processes, place, progress))
            progress.ready(self._plan)
            self._was_ready = True
            async with connect(LocalSocket(place.admin_socket)) as client:
                while waiting:
                    progress.works(self._plan, waiting[0])
                    try:
                        await processes.guarding(self._cell(client, place, waiting[0], progress))
                    except CellFailed as error:
                        self._given_up.add(waiting[0].cell_id)
                        progress.fails(waiting[0], str(error))
                    waiting.pop(0)

    async def _start(self, processes: Processes, place: Workplace, progress: Progress) -> None:
        progress.says(self._plan, "makes certificates")
        await asyncio.to_thread(write_certificates, place, self._dealt)
        await asyncio.to_thread(write_daemon_files, place, self._lab, self._plan, self._given.images, free_port())
        progress.says(self._plan, "starts its daemons")
        coordinator, host = str(place.yaml("coordinator")), str(place.yaml("host"))
        await processes.start("coordinator", script("fedrt-coordinator"), "run", "--config", coordinator)
        # at once, since most of its start is loading the model; it dials until the coordinator is there
        await processes.start("host", script("fedrt-silo"), "host", "--config", host)
        await processes.ready("coordinator")
        for wait in range(READY_WAITS):
            try:
                await processes.ready("host")
                return
            except DemoError:
                if wait == READY_WAITS - 1:
                    raise

    async def _cell(self, client: AdminClient, place: Workplace, cell: Cell, progress: Progress) -> None:
        """Run one experiment to its end and write the cell. Raises `CellFailed`."""
        file = experiment_of(cell, self._plan.partition, self._dealt, self._lab.model.architecture, self._weights)
        try:
            spec = experiment_spec(file)
            experiment_id = await self._choose(client, place, cell)
            spec = await _created(client, experiment_id, spec)
            state = await follow(client, experiment_id, CellAudience(progress, self._plan))
        except FedrtError as error:
            raise CellFailed(str(error)) from error
        if not state.succeeded:
            raise CellFailed(f"experiment {experiment_id!r} ended as {state.state}: {state.message}")
        record = self._record(cell, experiment_id, spec, state)
        if reasons := record.unmeasured():
            await asyncio.to_thread(forget_attempts, [place.root], cell.cell_id)
            raise CellFailed(_without(experiment_id, reasons, len(self._dealt.holdings)))
        await asyncio.to_thread(write_cell, self._lab.directory, cell, record)
        progress.finishes(cell, record)

    def _record(self, cell: Cell, experiment_id: str, spec: ExperimentSpec, state: WatchState) -> CellRecord:
        return CellRecord(
            format=FORMAT,
            setting=cell.setting,
            method=cell.label,
            seed=cell.seed,
            digest=cell.digest,
            weights_sha256=self._weights,
            partition_digest=self._dealt.digest,
            holdings=self._dealt.holdings,
            experiment=experiment_file(experiment_id, spec).model_dump(mode="json"),
            wall_seconds=round(sum(closed.duration for closed in state.rounds), 3),
            method_digest=self._given.method_digests[cell.method.name],
            software=fedrt.__version__,
            rounds=rounds_of(state),
        )

    async def _choose(self, client: AdminClient, place: Workplace, cell: Cell) -> str:
        """The name of the cell's experiment, noted on disk: that of the one under way or done, else a new one.

        Others that are under way are cancelled if they belong to cells that have just failed or that lab.yaml no longer
        has, or are earlier attempts at this one.
        """
        kept = self._given.cell_ids - self._given_up - {cell.cell_id}
        standing = {found.experiment_id: state_name(found.state) for found in await client.list_all()}
        last = await asyncio.to_thread(read_attempt, place.root, cell.cell_id)
        attempt = attempt_at(cell, standing, last, self._given.method_digests[cell.method.name])
        for experiment_id, state in standing.items():
            if state not in ENDED and experiment_id != attempt.experiment and not is_of(experiment_id, kept):
                await client.cancel(experiment_id)
        if attempt != last:
            await asyncio.to_thread(write_attempt, place.root, cell.cell_id, attempt)
        return attempt.experiment


async def _created(client: AdminClient, experiment_id: str, spec: ExperimentSpec) -> ExperimentSpec:
    """What the experiment was created with, just now or earlier: perhaps with another time limit, which it keeps."""
    for found in await client.list_all():
        if found.experiment_id == experiment_id:
            return experiment_spec_from_pb(found.spec)
    await client.create(experiment_id, spec)
    return spec


def _without(experiment_id: str, reasons: Mapping[str, str], silos: int) -> str:
    """That silos were not measured, in a sentence; `reasons` tells why, by silo."""
    silo, reason = next(iter(reasons.items()))
    return (
        f"experiment {experiment_id!r} lacks {len(reasons)} of {silos} silos in its last evaluation "
        f"({silo}: {reason}); the next run tries the cell again"
    )
