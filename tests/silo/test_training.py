"""Local training, recomputed by hand on losses so simple that every step can be written down."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import towers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedrt.errors import FailureReason, WorkError
from fedrt.spec import OptimizerName, OptimizerSpec, Precision, Schedule, TrainingSpec
from fedrt.tensors import Scope, TensorSpec
from silo.examples import Examples
from silo.method import Batch, Classifier, ImageFeatures, LocalMethod, Params, Prepare
from silo.training import Plan, RoundPosition, Start, Trained, descend, learning_rate, train

SPECS = (TensorSpec("context", (2,), Scope.SHARED), TensorSpec("own", (2,), Scope.PRIVATE))
Loss = Callable[[Params, Params, Batch], Tensor]


def classify(params: Params) -> Classifier:
    raise AssertionError("training asks for the loss only")


def method(loss: Loss) -> LocalMethod:
    return LocalMethod(classify, loss)


def quadratic(params: Params, received: Params, batch: Batch) -> Tensor:
    """½‖context − mean of the batch‖² + 2·own₀: gradients are context − mean and (2, 0)."""
    return 0.5 * (params["context"] - batch.images.pooled.mean(0)).square().sum() + 2 * params["own"][0]


def numbered(count: int) -> Examples:
    """Image i has the features (i, 1) and the label i."""
    index = torch.arange(count)
    return Examples(ImageFeatures(torch.stack([index.float(), torch.ones(count)], 1), None), index, index)


def start(value: float = 1.0) -> Start:
    return Start({"context": torch.full((2,), value)}, {"own": torch.full((2,), value)})


def plan(seed: int = 1, position: tuple[int, int] = (1, 1), **settings: object) -> Plan:
    optimizer = settings.pop("optimizer", OptimizerSpec(learning_rate=0.1, momentum=0.0, weight_decay=0.0))
    return Plan(TrainingSpec(optimizer=optimizer, **settings), RoundPosition(*position), seed)  # type: ignore[arg-type]


def silent(done: int, planned: int) -> None:
    """Nobody watches."""


def run(loss: Loss, examples: Examples, how: Plan, begin: Start | None = None) -> Trained:
    return train(method(loss), SPECS, begin or start(), examples, how, silent)


def test_one_step_by_hand() -> None:
    trained = run(quadratic, numbered(3), plan())
    # gradient (1 − 1, 1 − 1) for context, (2, 0) for own; rate 0.1
    assert trained.shared["context"].tolist() == pytest.approx([1.0, 1.0])
    assert trained.private["own"].tolist() == pytest.approx([0.8, 1.0])
    assert trained.metrics == {"loss": pytest.approx(0.5 * 0 + 2 * 1.0)}
    assert not trained.shared["context"].requires_grad


def test_two_steps_with_momentum_and_decay_by_hand() -> None:
    sgd = OptimizerSpec(OptimizerName.SGD, learning_rate=0.1, momentum=0.5, weight_decay=0.01)
    trained = run(quadratic, numbered(5), plan(optimizer=sgd, local_epochs=2), start(3.0))
    p, v = 3.0, 0.0
    for _ in range(2):
        v = 0.5 * v + (p - 2.0) + 0.01 * p  # the mean of 0..4 is 2; PyTorch's first step has v = g, the same here
        p -= 0.1 * v
    assert float(trained.shared["context"][0]) == pytest.approx(p, rel=1e-6)


def test_adamw_first_step_has_the_size_of_the_rate() -> None:
    adam = OptimizerSpec(OptimizerName.ADAMW, learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    trained = run(quadratic, numbered(5), plan(optimizer=adam), start(3.0))
    assert float(trained.shared["context"][0]) == pytest.approx(3.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-5)


def test_optimiser_state_is_fresh_in_every_call() -> None:
    sgd = OptimizerSpec(OptimizerName.SGD, learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    once = run(quadratic, numbered(5), plan(optimizer=sgd), start(3.0))
    again = run(quadratic, numbered(5), plan(optimizer=sgd), Start(once.shared, once.private))
    assert float(again.shared["context"][0]) == pytest.approx(2.9 - 0.1 * 0.9, rel=1e-6)  # without a carried velocity


@pytest.mark.parametrize("name", list(OptimizerName))
def test_optimiser_state_that_is_carried_on_makes_two_calls_of_one(name: OptimizerName) -> None:
    how = OptimizerSpec(name, learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    both = run(quadratic, numbered(5), plan(optimizer=how, local_epochs=2), start(3.0))
    once = run(quadratic, numbered(5), plan(optimizer=how), start(3.0))
    carried = Start(once.shared, once.private, once.optimizer)
    again = run(quadratic, numbered(5), plan(optimizer=how), carried)
    assert torch.equal(again.shared["context"], both.shared["context"])
    assert torch.equal(again.private["own"], both.private["own"])
    fresh = run(quadratic, numbered(5), plan(optimizer=how), Start(once.shared, once.private))
    assert not torch.equal(fresh.shared["context"], both.shared["context"])


def test_a_carried_state_brings_its_momentum_but_no_learning_rate() -> None:
    def slope(params: Params, received: Params, batch: Batch) -> Tensor:
        return params["context"].sum() + params["own"].sum()

    sgd = OptimizerSpec(OptimizerName.SGD, learning_rate=0.1, momentum=0.5, weight_decay=0.0)
    once = run(slope, numbered(3), plan(optimizer=sgd))
    slower = OptimizerSpec(OptimizerName.SGD, learning_rate=0.01, momentum=0.5, weight_decay=0.0)
    again = run(slope, numbered(3), plan(optimizer=slower), Start(once.shared, once.private, once.optimizer))
    moved = once.shared["context"] - again.shared["context"]
    assert moved.tolist() == pytest.approx([0.01 * (0.5 * 1 + 1)] * 2, rel=1e-5)


def test_a_carried_state_is_not_changed() -> None:
    sgd = OptimizerSpec(OptimizerName.SGD, learning_rate=0.1, momentum=0.5, weight_decay=0.0)
    once = run(quadratic, numbered(3), plan(optimizer=sgd), start(3.0))
    before = [entry["momentum_buffer"].clone() for entry in once.optimizer["state"].values()]
    assert len(before) == 2
    run(quadratic, numbered(3), plan(optimizer=sgd), Start(once.shared, once.private, once.optimizer))
    after = [entry["momentum_buffer"] for entry in once.optimizer["state"].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_received_tensors_are_the_anchor_and_are_not_changed() -> None:
    begin = start(3.0)
    seen: list[float] = []

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        seen.append(float(received["context"][0]))
        return (params["context"] - received["context"] - 1).square().sum() + params["own"].sum()

    run(loss, numbered(4), plan(local_epochs=3), begin)
    assert seen == [3.0] * 3
    assert begin.received["context"].tolist() == [3.0, 3.0]
    assert begin.private["own"].tolist() == [3.0, 3.0]


def batches_of(examples: Examples, how: Plan) -> list[list[int]]:
    seen: list[list[int]] = []

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        assert torch.equal(batch.images.pooled[:, 0], batch.labels.float())  # images and labels stay together
        seen.append(batch.labels.tolist())
        return params["context"].sum() + params["own"].sum()

    run(loss, examples, how)
    return seen


def test_every_example_once_per_epoch_and_the_last_batch_is_smaller() -> None:
    seen = batches_of(numbered(7), plan(batch_size=3, local_epochs=2))
    assert [len(batch) for batch in seen] == [3, 3, 1, 3, 3, 1]
    epochs = [[i for batch in seen[at : at + 3] for i in batch] for at in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]


def test_batch_larger_than_the_data_and_a_single_image() -> None:
    assert [sorted(batch) for batch in batches_of(numbered(3), plan(batch_size=32))] == [[0, 1, 2]]
    assert batches_of(numbered(1), plan(batch_size=32)) == [[0]]


def test_shuffling_depends_on_the_seed_only() -> None:
    first = batches_of(numbered(20), plan(seed=5, batch_size=4))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert batches_of(numbered(20), plan(seed=5, batch_size=4)) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert batches_of(numbered(20), plan(seed=6, batch_size=4)) != first
    batches_of(numbered(2), plan(seed=2**63 - 1))


def test_patches_travel_with_their_images() -> None:
    count = 5
    patches = torch.arange(count).float()[:, None, None].expand(count, 3, 2)
    index = torch.arange(count)
    examples = Examples(ImageFeatures(numbered(count).table.pooled, patches), index, index)

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        assert batch.images.patches is not None
        assert torch.equal(batch.images.patches[:, 2, 1], batch.labels.float())
        return params["context"].sum() + params["own"].sum()

    run(loss, examples, plan(batch_size=2))


def test_examples_are_rows_of_a_table_that_others_use_too() -> None:
    """Of a table of ten images, the fourth, the ninth and again the fourth."""
    table = numbered(10).table._replace(patches=torch.arange(10).float()[:, None, None])
    examples = Examples(table, torch.tensor([3, 8, 3]), torch.tensor([1, 0, 2]))
    assert len(examples) == 3
    for chosen in (slice(1, 3), torch.tensor([1, 2])):
        batch = examples.batch(chosen)
        assert batch.images.pooled.tolist() == [[8.0, 1.0], [3.0, 1.0]]
        assert batch.images.patches is not None
        assert batch.images.patches.flatten().tolist() == [8.0, 3.0]
        assert batch.labels.tolist() == [0, 2]


def test_only_the_examples_rows_are_trained_on() -> None:
    seen: list[float] = []

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        seen.extend(batch.images.pooled[:, 0].tolist())
        return params["context"].sum() + params["own"].sum()

    run(loss, Examples(numbered(10).table, torch.tensor([7, 2, 5]), torch.tensor([0, 1, 0])), plan(batch_size=2))
    assert sorted(seen) == [2.0, 5.0, 7.0]


def test_same_arguments_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    images = ImageFeatures(torch.randn(50, 2, generator=generator), None)
    examples = Examples(images, torch.arange(50), torch.arange(50))

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        return (batch.images.pooled @ params["context"]).exp().mean() + (params["own"] * params["context"]).sum()

    runs = [run(loss, examples, plan(seed=3, batch_size=8, local_epochs=3)) for _ in range(2)]
    assert torch.equal(runs[0].shared["context"], runs[1].shared["context"])
    assert torch.equal(runs[0].private["own"], runs[1].private["own"])
    assert runs[0].metrics == runs[1].metrics


def test_loss_is_the_mean_over_the_examples_of_the_last_epoch() -> None:
    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        return batch.labels.float().mean() + 0 * (params["context"].sum() + params["own"].sum())

    trained = run(loss, numbered(7), plan(batch_size=3, local_epochs=2))
    assert trained.metrics["loss"] == pytest.approx(3.0)  # not the mean of the three batch means


# Views


def viewed(count: int = 3, views: int = 3) -> Examples:
    """Image i in view v has the features (10·v + i, 1): a table of all views, the second view first."""
    numbers = torch.arange(views)[:, None] * 10 + torch.arange(count)
    table = torch.cat([numbers[1:].flatten(), numbers[0]]).float()
    rows = torch.cat([torch.arange(count * views)[-count:], torch.arange(count * (views - 1))]).view(views, count)
    return Examples(ImageFeatures(torch.stack([table, torch.ones(len(table))], 1), None), rows, torch.arange(count))


def views_of_round(position: tuple[int, int], local_epochs: int, views: int) -> list[int]:
    seen: list[int] = []

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        numbers = batch.images.pooled[:, 0].long()
        assert (numbers % 10).tolist() == batch.labels.tolist()  # a view is one of the same image
        seen.extend((numbers // 10).tolist())
        return params["context"].sum() + params["own"].sum()

    run(loss, viewed(3, views), plan(position=position, local_epochs=local_epochs, views=views, batch_size=2))
    epochs = [seen[at : at + 3] for at in range(0, len(seen), 3)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


def test_epochs_of_the_whole_experiment_cycle_through_the_views() -> None:
    assert [views_of_round((number, 3), 2, 3) for number in (1, 2, 3)] == [[0, 1], [2, 0], [1, 2]]
    assert views_of_round((2, 3), 2, 1) == [0, 0]


def test_as_many_views_as_epochs_in_all_rounds_are_each_used_once() -> None:
    seen = [view for number in (1, 2, 3) for view in views_of_round((number, 3), 2, 6)]
    assert seen == [0, 1, 2, 3, 4, 5]


def test_views_do_not_change_the_order_of_the_images() -> None:
    def order_of(examples: Examples, how: Plan) -> list[int]:
        seen: list[int] = []

        def loss(params: Params, received: Params, batch: Batch) -> Tensor:
            seen.extend(batch.labels.tolist())
            return params["context"].sum() + params["own"].sum()

        run(loss, examples, how)
        return seen

    plain = order_of(numbered(9), plan(seed=4, local_epochs=2))
    assert order_of(viewed(9), plan(seed=4, local_epochs=2, views=3)) == plain


def test_views_of_one_image_each_with_their_own_features_are_trained_on() -> None:
    trained = run(quadratic, viewed(3), plan(position=(2, 3), views=3), start(5.0))
    # epoch 1 of the experiment: view 1 has the mean 11, gradient 5 − 11, rate 0.1
    assert float(trained.shared["context"][0]) == pytest.approx(5.0 + 0.6)


@pytest.mark.parametrize(("examples", "views"), [(numbered(3), 3), (viewed(3), 2), (viewed(3), 0)])
def test_the_examples_must_have_the_views_of_the_settings(examples: Examples, views: int) -> None:
    with pytest.raises(ValueError, match=f"have {examples.view_count} views, but training.views is {views}"):
        run(quadratic, examples, plan(views=views))


def test_a_preparation_sees_the_view_of_the_first_epoch() -> None:
    seen: list[list[float]] = []

    def prepare(params: Params, batch: Batch) -> Params:
        seen.append(batch.images.pooled[:, 0].tolist())
        return {"share": params["share"]}

    begin = Start(start().received, {**start().private, "share": torch.tensor([5.0, 6.0])})
    how = plan(position=(2, 3), local_epochs=2, views=3)
    train(LocalMethod(classify, quadratic, prepare), (*SPECS, SHARE), begin, viewed(3), how, silent)
    assert seen == [[20.0, 21.0, 22.0]]


# Waiting for the device


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device: its value decides what comes next."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [index for index in args[1] if index is not None] if name in ("index", "index_put", "index_put_") else []
        )
        self.count += name in self.WAITING or any(index.dtype is torch.bool for index in masks)
        return func(*args, **(kwargs or {}))


def host_reads(compute: Callable[[], object]) -> int:
    with HostReads() as reads:
        compute()
    return reads.count


def test_host_reads_are_seen() -> None:
    assert host_reads(lambda: float(torch.ones(()))) == 1
    assert host_reads(lambda: torch.ones(3)[torch.ones(3) > 0]) == 1
    assert host_reads(lambda: torch.ones(3)[torch.tensor([0, 2])] + 1) == 0


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("name", ["promptfl", "fedprox", "coop", "fedpgp", "promptfolio"])
def test_no_step_makes_the_host_wait(name: str, precision: Precision) -> None:
    declared = towers.make(name)

    def reads(count: int) -> int:
        data = towers.examples(count)
        return host_reads(lambda: towers.trained(declared, data, batch_size=2, precision=precision))

    assert reads(20) == reads(2)  # ten batches in an epoch, and one


def test_progress_counts_steps() -> None:
    seen: list[tuple[int, int]] = []
    train(method(quadratic), SPECS, start(), numbered(5), plan(batch_size=2, local_epochs=2), lambda *a: seen.append(a))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_cosine_falls_over_the_whole_experiment() -> None:
    settings = TrainingSpec(local_epochs=2, schedule=Schedule.COSINE, optimizer=OptimizerSpec(learning_rate=0.4))
    rates = [learning_rate(settings, RoundPosition(r, 3), e) for r in (1, 2, 3) for e in (0, 1)]
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])
    assert (rates[0], rates[3]) == (0.4, pytest.approx(0.2))


def test_rate_of_each_epoch_is_used() -> None:
    def slope(params: Params, received: Params, batch: Batch) -> Tensor:
        return params["context"].sum() + params["own"].sum()  # every step moves by the rate

    how = plan(position=(2, 3), local_epochs=2, schedule=Schedule.COSINE)
    moved = 1.0 - float(run(slope, numbered(3), how).shared["context"][0])
    assert moved == pytest.approx(0.05 * sum(1 + math.cos(math.pi * k / 6) for k in (2, 3)), rel=1e-6)
    constant = plan(position=(3, 3), local_epochs=2)
    assert 1.0 - float(run(slope, numbered(3), constant).shared["context"][0]) == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("position", [(0, 3), (4, 3)])
def test_rounds_are_counted_from_one(position: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        RoundPosition(*position)


def test_bf16_computes_in_half_and_keeps_float32() -> None:
    seen: list[torch.dtype] = []

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        product = batch.images.pooled @ params["context"][:, None]
        seen.append(product.dtype)
        return product.float().mean() + params["own"].sum()

    trained = run(loss, numbered(4), plan(precision=Precision.BF16))
    assert (seen[0], trained.shared["context"].dtype) == (torch.bfloat16, torch.float32)
    assert float(trained.shared["context"][0]) == pytest.approx(1 - 0.1 * 1.5, rel=1e-2)


def failure(loss: Loss, examples: Examples, how: Plan, begin: Start | None = None) -> WorkError:
    with pytest.raises(WorkError) as caught:
        run(loss, examples, how, begin)
    return caught.value


def test_a_step_that_overflows_in_fp16_is_tried_again_on_the_same_batch() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=True)  # begins at a scale of 65536, at which 1000 overflows
    calls: list[float] = []

    def compute() -> Tensor:
        calls.append(scaler.get_scale())
        return (weight.half() * 1000).float().sum()

    loss = descend(compute, nullcontext(), optimizer, scaler)
    assert calls == [65536, 32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64][: len(calls)]
    assert len(calls) > 1
    assert (float(loss), weight.item()) == (1000.0, 1.0 - 0.5 * 1000)


def test_gradients_that_overflow_at_any_scale_end_the_task() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    with pytest.raises(WorkError, match="overflow in fp16 at any scale; use fp32 or bf16") as caught:
        descend(lambda: weight.sum() * math.inf, nullcontext(), torch.optim.SGD([weight], lr=1.0), scaler)
    assert caught.value.reason is FailureReason.NOT_FINITE
    assert weight.item() == 1.0


def test_fp16_needs_cuda() -> None:
    error = failure(quadratic, numbered(4), plan(precision=Precision.FP16))
    assert "fp16, which needs CUDA" in str(error)
    assert "use fp32 or bf16" in str(error)


def test_no_examples() -> None:
    assert failure(quadratic, numbered(0), plan()).reason is FailureReason.DATA_UNAVAILABLE


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_or_loss_not_finite(value: float) -> None:
    examples = Examples(ImageFeatures(torch.full((3, 2), value), None), torch.arange(3), torch.arange(3))
    error = failure(quadratic, examples, plan())
    assert error.reason is FailureReason.NOT_FINITE
    assert "local epoch 1" in str(error)
    assert "learning_rate" in str(error)


def test_tensor_not_finite_after_a_finite_loss() -> None:
    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        return (params["context"] - 1).sqrt().sum() + params["own"].sum()  # at 1: value 0, gradient infinite

    error = failure(loss, numbered(3), plan())
    assert error.reason is FailureReason.NOT_FINITE
    assert "'context' is not finite" in str(error)


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (Start({}, {"own": torch.zeros(2)}), r"shared tensors \[\]"),
        (Start({"context": torch.zeros(2)}, {}), r"private tensors \[\]"),
        (Start({"context": torch.zeros(3)}, {"own": torch.zeros(2)}), "shared tensors"),
        (Start({"context": torch.zeros(2), "own": torch.zeros(2)}, {"own": torch.zeros(2)}), "shared tensors"),
    ],
)
def test_tensors_must_be_the_declared_ones(begin: Start, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(quadratic, numbered(3), plan(), begin)


def test_method_without_tensors_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="declares no tensors"):
        train(method(quadratic), (), Start({}, {}), numbered(3), plan(), silent)


# Tensors that a method sets itself

SHARE = TensorSpec("share", (2,), Scope.PRIVATE, trained=False)


def settled(prepare: Prepare | None, loss: Loss = quadratic, begin: Start | None = None) -> Trained:
    begin = begin or Start(start().received, {**start().private, "share": torch.tensor([5.0, 6.0])})
    return train(LocalMethod(classify, loss, prepare), (*SPECS, SHARE), begin, numbered(7), plan(batch_size=3), silent)


def test_a_method_sets_what_is_not_trained_before_the_first_step() -> None:
    calls: list[list[int]] = []
    used: list[list[float]] = []

    def prepare(params: Params, batch: Batch) -> Params:
        assert not torch.is_grad_enabled()
        assert params["share"].tolist() == [5.0, 6.0]  # as the round before left it
        assert params["context"].tolist() == [1.0, 1.0]
        calls.append(batch.labels.tolist())
        return {"share": params["share"] + batch.labels.sum()}

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        used.append(params["share"].tolist())
        assert not params["share"].requires_grad
        return quadratic(params, received, batch) + (params["context"] * params["share"]).sum()

    trained = settled(prepare, loss)
    assert calls == [list(range(7))]  # once, with all training examples, in their order
    assert used == [[26.0, 27.0]] * 3
    assert trained.private["share"].tolist() == [26.0, 27.0]
    assert set(trained.private) == {"own", "share"}
    assert trained.private["own"].tolist() != [1.0, 1.0]


def test_without_a_preparation_it_stays_as_it_was() -> None:
    assert settled(None).private["share"].tolist() == [5.0, 6.0]


def test_weight_decay_does_not_reach_what_is_not_trained() -> None:
    decay = plan(optimizer=OptimizerSpec(learning_rate=0.1, momentum=0.9, weight_decay=0.5))
    begin = Start(start().received, {**start().private, "share": torch.tensor([5.0, 6.0])})
    trained = train(method(quadratic), (*SPECS, SHARE), begin, numbered(7), decay, silent)
    assert trained.private["share"].tolist() == [5.0, 6.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"the method prepared \[\], not exactly the tensors that are not trained"),
        ({"share": torch.zeros(2), "own": torch.zeros(2)}, r"the method prepared \['own', 'share'\], not exactly"),
        ({"context": torch.zeros(2)}, r"the method prepared \['context'\], not exactly"),
    ],
)
def test_a_method_may_set_nothing_else(given: Params, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settled(lambda params, batch: given)


def test_what_a_method_sets_must_be_finite() -> None:
    with pytest.raises(WorkError, match="'share' is not finite after training") as caught:
        settled(lambda params, batch: {"share": torch.full((2,), math.nan)})
    assert caught.value.reason is FailureReason.NOT_FINITE


def test_a_method_that_only_sets_tensors_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="declares no tensors to train"):
        train(method(quadratic), (SHARE,), Start({}, {"share": torch.zeros(2)}), numbered(3), plan(), silent)
