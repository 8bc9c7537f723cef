"""Local training: a method's loss, an optimiser of its own per call, and batches shuffled by a seed.

The optimiser starts fresh in every call, unless a caller carries its state on (the papers' code does, between silos):
no momentum leaks from round to round. The learning rate and the views of the images follow the whole experiment, not
the call: a cosine really ends at the last round, and as many views as local epochs in all rounds are each used once.
The last, smaller batch of an epoch is used. But for fp16, nothing in an epoch waits for the device.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from fedrt.spec import OptimizerName, OptimizerSpec, Precision, Schedule, TrainingSpec
from fedrt.tensors import Scope, TensorSpec
from silo.batches import shuffled
from silo.examples import Examples
from silo.method import LocalMethod, Params
from silo.snapshots import Checkpointer, NoCheckpoints, Snapshot
from silo.work import OnProgress


@dataclass(frozen=True)
class RoundPosition:
    """Where in the experiment this round stands; rounds are counted from 1."""

    round_number: int
    round_count: int

    def __post_init__(self) -> None:
        if not 1 <= self.round_number <= self.round_count:
            raise ValueError(f"round {self.round_number} of {self.round_count} does not exist")


OptimizerState = Mapping[str, Any]  # as torch.optim gives it


@dataclass(frozen=True)
class Plan:
    """How to train: the experiment's settings, the position of the round, and the seed of the shuffling."""

    training: TrainingSpec
    position: RoundPosition
    seed: int


@dataclass(frozen=True)
class Start:
    """The tensors to start from: shared as received this round, private as held by this silo.

    `optimizer` is the state that an earlier call ended with; None, as in every task of a federation, starts it fresh.
    `checkpoints`: what a call with the same arguments that was cut off has left.
    """

    received: Params
    private: Params
    optimizer: OptimizerState | None = None
    checkpoints: Checkpointer = field(default_factory=NoCheckpoints)


@dataclass(frozen=True)
class Trained:
    """The tensors after training, detached; `loss` of `metrics` is the mean over the examples of the last epoch."""

    shared: dict[str, Tensor]
    private: dict[str, Tensor]
    metrics: dict[str, float]
    optimizer: OptimizerState


def train(
    method: LocalMethod,
    specs: tuple[TensorSpec, ...],
    start: Start,
    examples: Examples,
    plan: Plan,
    on_progress: OnProgress,
) -> Trained:
    """Train for one round. The same arguments on the same device give the same bits; no global seed is touched.

    That holds for any checkpoint to go on from, too, as long as it was made with the same arguments.

    Raises `WorkError` without examples, if the precision cannot be had here, or if the loss or a trained tensor is not
    finite; `ValueError` if the tensors are not those that the method declares, or the views not those of the settings.
    """
    if not len(examples):
        raise WorkError(FailureReason.DATA_UNAVAILABLE, "there are no training examples")
    if examples.view_count != max(1, plan.training.views):
        raise ValueError(f"the examples have {examples.view_count} views, but training.views is {plan.training.views}")
    params = _prepared(method, specs, start, examples, _view(plan, 0))
    device = examples.labels.device
    arithmetic = autocast(plan.training.precision, device)
    optimizer = make_optimizer(plan.training.optimizer, [params[spec.name] for spec in specs if spec.trained])
    if start.optimizer is not None:
        optimizer.load_state_dict(copy.deepcopy(dict(start.optimizer)))
    scaler = torch.amp.GradScaler(device.type, enabled=plan.training.precision is Precision.FP16)
    run = _Run(params, optimizer, scaler, torch.Generator().manual_seed(plan.seed))
    batches = -(-len(examples) // plan.training.batch_size)
    begun, mean_loss = run.resume(start.checkpoints.load())
    steps = begun * batches
    with deterministic(device):
        for epoch in range(begun, plan.training.local_epochs):
            optimizer.param_groups[0]["lr"] = learning_rate(plan.training, plan.position, epoch)
            total = torch.zeros((), device=device)
            for batch in shuffled(examples, _view(plan, epoch), plan.training.batch_size, run.shuffle):
                compute = partial(method.loss, params, start.received, batch)
                total += descend(compute, arithmetic, optimizer, scaler) * len(batch.labels)
                steps += 1
                on_progress(steps, batches * plan.training.local_epochs)
            mean_loss = float(total) / len(examples)  # the only wait for the device in an epoch, but for fp16
            _check_finite(mean_loss, epoch)
            if epoch + 1 < plan.training.local_epochs and start.checkpoints.is_due():
                start.checkpoints.save(run.snapshot(epoch + 1, mean_loss))
    return _finish(specs, params, mean_loss, optimizer.state_dict())


@dataclass(frozen=True)
class _Run:
    """What changes from step to step."""

    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    shuffle: torch.Generator

    def snapshot(self, epochs_done: int, mean_loss: float) -> Snapshot:
        """Shares its tensors with the run: to be written before the next step."""
        kept = self.optimizer.state_dict()["state"]
        tensors = {
            index: {key: value for key, value in state.items() if isinstance(value, Tensor)}  # or None, before it moves
            for index, state in kept.items()
        }
        params = {name: tensor.detach() for name, tensor in self.params.items()}
        return Snapshot(epochs_done, mean_loss, params, tensors, self.scaler.state_dict(), self.shuffle.get_state())

    def resume(self, snapshot: Snapshot | None) -> tuple[int, float]:
        """Go back to where a snapshot was taken; returns the epochs done and the mean loss of the last one."""
        if snapshot is None:
            return 0, 0.0
        with torch.no_grad():
            for name, tensor in self.params.items():
                tensor.copy_(snapshot.params[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(snapshot.optimizer), "param_groups": groups})
        self.scaler.load_state_dict(dict(snapshot.scaler))
        self.shuffle.set_state(snapshot.shuffle)
        return snapshot.epochs_done, snapshot.mean_loss


def learning_rate(training: TrainingSpec, position: RoundPosition, epoch: int) -> float:
    """The rate of local epoch `epoch` (from 0); a cosine falls from full to 0 over all epochs of all rounds."""
    rate = training.optimizer.learning_rate
    if training.schedule is Schedule.CONSTANT:
        return rate
    done = _epoch_number(training, position, epoch)
    return rate * 0.5 * (1 + math.cos(math.pi * done / (position.round_count * training.local_epochs)))


def _epoch_number(training: TrainingSpec, position: RoundPosition, epoch: int) -> int:
    """Which epoch of the whole experiment local epoch `epoch` of this round is, both from 0."""
    return (position.round_number - 1) * training.local_epochs + epoch


def _view(plan: Plan, epoch: int) -> int:
    """The view of the images in local epoch `epoch`, both from 0."""
    return _epoch_number(plan.training, plan.position, epoch) % max(1, plan.training.views)


def make_optimizer(spec: OptimizerSpec, tensors: list[Tensor]) -> torch.optim.Optimizer:
    """A fresh optimiser. SGD is PyTorch's (decay into the gradient, no Nesterov); AdamW takes `momentum` as beta 1."""
    match spec.name:
        case OptimizerName.SGD:
            return torch.optim.SGD(
                tensors, lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
            )
        case OptimizerName.ADAMW:
            return torch.optim.AdamW(
                tensors, lr=spec.learning_rate, betas=(spec.momentum, 0.999), weight_decay=spec.weight_decay
            )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The arithmetic of the forward pass; tensors stay in float32. Raises `WorkError` for fp16 on a CPU."""
    match precision:
        case Precision.FP32:
            return nullcontext()
        case Precision.BF16:
            return torch.autocast(device.type, torch.bfloat16)
        case Precision.FP16:
            if device.type != "cuda":
                raise WorkError(
                    FailureReason.INTERNAL,
                    "training.precision is fp16, which needs CUDA, but this silo computes on its CPU; use fp32 or bf16",
                )
            return torch.autocast(device.type, torch.float16)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, ask for kernels that add in a fixed order; on a CPU they do so anyway and the switch would cost time."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose attribute mypy cannot see
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # else every tensor is written once in vain
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills


def descend(
    compute: Callable[[], Tensor],
    arithmetic: AbstractContextManager[object],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """One step down the loss that `compute` gives; returns the loss, detached, in float32.

    The scaler does nothing but in fp16, where it keeps small gradients. There a step that overflows is not made; it is
    tried again on the same batch with half the scale, because a task may have few steps and none to lose. Raises
    `WorkError` if no scale will do.
    """
    while True:
        optimizer.zero_grad(set_to_none=True)
        with arithmetic:
            loss = compute()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        if not scaler.is_enabled() or scaler.get_scale() >= scale:
            return loss.detach().float()
        if scale < 1:
            raise WorkError(FailureReason.NOT_FINITE, "gradients overflow in fp16 at any scale; use fp32 or bf16")


def _prepared(
    method: LocalMethod, specs: tuple[TensorSpec, ...], start: Start, examples: Examples, view: int
) -> dict[str, Tensor]:
    """Copies to train, and what the method itself sets before it trains, on the images in this view."""
    held = {Scope.SHARED: start.received, Scope.PRIVATE: start.private}
    for scope, tensors in held.items():
        declared = {spec.name: spec.shape for spec in specs if spec.scope is scope}
        if declared != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise ValueError(f"{scope.value} tensors {sorted(tensors)} are not the declared ones {sorted(declared)}")
    if not any(spec.trained for spec in specs):
        raise ValueError("a method that declares no tensors to train cannot be trained")
    params = {spec.name: held[spec.scope][spec.name].detach().clone() for spec in specs}
    if method.prepare is not None:
        with torch.no_grad():
            settled = method.prepare(params, examples.batch(slice(None), view))
        if set(settled) != {spec.name for spec in specs if not spec.trained}:
            raise ValueError(f"the method prepared {sorted(settled)}, not exactly the tensors that are not trained")
        params |= settled
    return {spec.name: params[spec.name].requires_grad_(spec.trained) for spec in specs}


def _finish(specs: tuple[TensorSpec, ...], params: Params, mean_loss: float, optimizer: OptimizerState) -> Trained:
    trained = {name: tensor.detach() for name, tensor in params.items()}
    for spec in specs:
        name, tensor = spec.name, trained[spec.name]
        remedy = "lower training.optimizer.learning_rate" if spec.trained else "the method set it so"
        if not bool(torch.isfinite(tensor).all()):
            raise WorkError(FailureReason.NOT_FINITE, f"tensor {name!r} is not finite after training; {remedy}")
    scopes = {
        scope: {spec.name: trained[spec.name] for spec in specs if spec.scope is scope}
        for scope in (Scope.SHARED, Scope.PRIVATE)
    }
    return Trained(scopes[Scope.SHARED], scopes[Scope.PRIVATE], {"loss": mean_loss}, optimizer)


def _check_finite(mean_loss: float, epoch: int) -> None:
    if not math.isfinite(mean_loss):
        raise WorkError(
            FailureReason.NOT_FINITE,
            f"the loss is not finite in local epoch {epoch + 1}; lower training.optimizer.learning_rate or use fp32",
        )
