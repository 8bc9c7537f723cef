"""Workers that need no CLIP: they answer at once, or as a test tells them."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedrt.errors import WorkError
from fedrt.task import TaskKind
from fedrt.tensors import Scope, of_scope
from silo.work import OnProgress, WorkerReport, WorkOrder, WorkOutcome

WEIGHTS = "ab" * 32


def report(context_dim: int = 512, feature_dim: int = 512, weights: str = WEIGHTS, examples: int = 100) -> WorkerReport:
    counts = {"train": {"cat": examples}, "test": {"cat": 10}}
    return WorkerReport("ViT-B-16", weights, context_dim, feature_dim, "cpu", 0, counts, 0, ("promptfl", "zeroshot"))


def add_one(order: WorkOrder) -> WorkOutcome:
    """A delta of ones: after r rounds the shared tensors are the initial ones plus r."""
    shared = {}
    if order.kind is TaskKind.TRAIN:
        shared = {spec.name: np.ones(spec.shape, np.float32) for spec in of_scope(order.local.tensors(), Scope.SHARED)}
    return WorkOutcome(shared, {}, 10, {"accuracy": 0.5, "loss": 1.0}, 0.0)


def giving(
    delta: float, examples: int = 10, metrics: Mapping[str, float] | None = None
) -> Callable[[WorkOrder], WorkOutcome]:
    """A delta (TRAIN) or a value (INITIALIZE) that is the same everywhere."""

    def behave(order: WorkOrder) -> WorkOutcome:
        shared = {}
        if order.kind is not TaskKind.EVALUATE:
            specs = of_scope(order.local.tensors(), Scope.SHARED)
            shared = {spec.name: np.full(spec.shape, delta, np.float32) for spec in specs}
        return WorkOutcome(shared, {}, examples, metrics or {}, 1.5)

    return behave


@dataclass
class FakeWorker:
    """Calls `behave` for each order, after `gate` is set; records the orders it got and those stopped half-way."""

    behave: Callable[[WorkOrder], WorkOutcome] = add_one
    description: WorkerReport = field(default_factory=report)
    gate: asyncio.Event | None = None
    orders: list[WorkOrder] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)  # set with each order; a test may clear it

    @property
    def report(self) -> WorkerReport:
        return self.description

    async def describe(self) -> WorkerReport:
        return self.description

    async def run(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        self.orders.append(order)
        self.began.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.abandoned.append(order.task_id)
            raise
        on_progress(1, 1)
        return self.behave(order)

    async def stop(self) -> None:
        return None


def failing(error: WorkError) -> Callable[[WorkOrder], WorkOutcome]:
    def behave(order: WorkOrder) -> WorkOutcome:
        raise error

    return behave
