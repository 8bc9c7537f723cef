"""Serves operators: translates requests into orders for the orchestrator and reads the store; decides nothing."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc

from coordinator.admin_wire import event_to_pb, experiment_to_pb, silo_to_pb
from coordinator.combining import initial_shared
from coordinator.experiments import Experiment
from coordinator.inbox import CancelOrdered, CreateOrdered
from coordinator.orchestrator import Orchestrator
from coordinator.store import Store
from fedrt.errors import FedrtError, PayloadError, SpecError
from fedrt.payload import Manifest, chunks
from fedrt.spec import NAME
from fedrt.tensors import Scope, needs_clip, of_scope
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import admin_service_pb2_grpc
from fedrt.wire_values import chunk_to_pb, experiment_spec_from_pb, manifest_to_pb

DEFAULT_PAGE, MAX_PAGE = 50, 1000
EVENT_BATCH = 500
MAX_EVENT_NUMBER = 2**63 - 1  # of a signed integer in the store
MAX_TOKEN_DIGITS = 15


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Who may call is decided before: by the Unix socket's mode, or by `authorization`."""

    def __init__(self, orchestrator: Orchestrator, store: Store, max_payload_bytes: int) -> None:
        self._orchestrator = orchestrator
        self._store = store
        self._max_payload_bytes = max_payload_bytes

    async def CreateExperiment(self, request: pb.CreateExperimentRequest, context: Any) -> pb.CreateExperimentResponse:
        """Create and queue; the same again succeeds, another spec under the same name does not."""
        name = request.experiment_id
        if not NAME.fullmatch(name):
            message = f"experiment name {name!r} is not made of 1 to 63 of a-z, 0-9 and -; rename the experiment"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        try:
            spec = experiment_spec_from_pb(request.spec)
            specs = spec.local.tensors()
            if not specs and spec.rounds.count:
                raise SpecError(
                    f"method {spec.local.method_name!r} has nothing to train; set rounds.count to 0 to evaluate it"
                )
            size = sum(4 * math.prod(s.shape) for s in of_scope(specs, Scope.SHARED))
            if size > self._max_payload_bytes:
                raise SpecError(
                    f"the shared tensors of the experiment take {size} bytes; limits.max_payload of the coordinator "
                    f"allows {self._max_payload_bytes}"
                )
            clip = needs_clip(of_scope(specs, Scope.SHARED))
            initial = None if clip else await asyncio.to_thread(initial_shared, spec)
        except (SpecError, PayloadError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        done: asyncio.Future[Experiment] = asyncio.get_running_loop().create_future()
        self._orchestrator.submit(CreateOrdered(name, spec, initial, done))
        try:
            experiment = await done
        except FedrtError as error:
            await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
        if experiment.spec != spec:
            message = f"experiment {name!r} exists with another specification; choose a new name"
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, message)
        return pb.CreateExperimentResponse(experiment=experiment_to_pb(experiment))

    async def GetExperiment(self, request: pb.GetExperimentRequest, context: Any) -> pb.GetExperimentResponse:
        """One experiment."""
        return pb.GetExperimentResponse(experiment=experiment_to_pb(await self._find(request.experiment_id, context)))

    async def ListExperiments(self, request: pb.ListExperimentsRequest, context: Any) -> pb.ListExperimentsResponse:
        """A page of experiments, newest first."""
        limit, offset = await _page(request.page_size, request.page_token, context)
        found = await self._orchestrator.in_store(self._store.experiments, limit + 1, offset)
        more = str(offset + limit) if len(found) > limit else ""
        page = [experiment_to_pb(experiment) for experiment in found[:limit]]
        return pb.ListExperimentsResponse(experiments=page, next_page_token=more)

    async def CancelExperiment(self, request: pb.CancelExperimentRequest, context: Any) -> pb.CancelExperimentResponse:
        """End an experiment; one that has ended stays as it is."""
        done: asyncio.Future[Experiment] = asyncio.get_running_loop().create_future()
        self._orchestrator.submit(CancelOrdered(request.experiment_id, done))
        try:
            return pb.CancelExperimentResponse(experiment=experiment_to_pb(await done))
        except FedrtError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            raise

    async def ExportExperiment(
        self, request: pb.ExportExperimentRequest, context: Any
    ) -> AsyncIterator[pb.ExportExperimentResponse]:
        """The shared tensors of the last committed round."""
        experiment = await self._find(request.experiment_id, context)
        checkpoint = await self._orchestrator.in_store(self._store.checkpoint, experiment.experiment_id)
        if checkpoint is None:
            message = f"experiment {experiment.experiment_id!r} has no shared tensors yet, or its method has none"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
            return
        data = await self._orchestrator.in_store(self._store.blob, checkpoint.shared)
        digest = bytes.fromhex(checkpoint.shared.sha256)
        manifest = Manifest("export", checkpoint.shared.headers, checkpoint.shared.byte_count, digest)
        header = pb.ExportHeader(
            experiment=experiment_to_pb(experiment),
            round_number=checkpoint.round_number,
            shared_tensors=manifest_to_pb(manifest),
        )
        yield pb.ExportExperimentResponse(header=header)
        for chunk in chunks(manifest.payload_id, data):
            yield pb.ExportExperimentResponse(chunk=chunk_to_pb(chunk))

    async def ListSilos(self, request: pb.ListSilosRequest, context: Any) -> pb.ListSilosResponse:
        """A page of silos, by name."""
        limit, offset = await _page(request.page_size, request.page_token, context)
        known = sorted(self._orchestrator.presence.silos.values(), key=lambda silo: silo.silo_id)
        more = str(offset + limit) if len(known) > offset + limit else ""
        page = [silo_to_pb(s, self._orchestrator.active.open_tasks(s.silo_id)) for s in known[offset : offset + limit]]
        return pb.ListSilosResponse(silos=page, next_page_token=more)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        """Stored events, then live ones, until the caller goes."""
        after = min(request.after_event_number, MAX_EVENT_NUMBER)
        while True:
            bell = self._orchestrator.bell  # taken before looking, so that nothing stored meanwhile is missed
            events = await self._orchestrator.in_store(self._store.events, after, request.experiment_id, EVENT_BATCH)
            if not events:
                await bell.wait()
                continue
            for event in events:
                yield pb.WatchEventsResponse(event=event_to_pb(event))
            after = events[-1].number

    async def _find(self, experiment_id: str, context: Any) -> Experiment:
        experiment = await self._orchestrator.find(experiment_id)
        if experiment is None:
            message = f"experiment {experiment_id!r} does not exist; `fedrtctl list` shows those that do"
            await context.abort(grpc.StatusCode.NOT_FOUND, message)
            raise SpecError(message)
        return experiment


async def _page(size: int, token: str, context: Any) -> tuple[int, int]:
    if not 0 <= size <= MAX_PAGE or not (
        (token.isascii() and token.isdigit() and len(token) <= MAX_TOKEN_DIGITS) or not token
    ):
        message = f"page_size must be between 0 and {MAX_PAGE}, page_token that of the previous page"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
    return size or DEFAULT_PAGE, int(token or 0)
