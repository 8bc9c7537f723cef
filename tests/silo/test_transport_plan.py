"""Transport plans by sweeps, and what holds for all: by hand, sums, limits, tiny entropies, and a plain solver."""

import dataclasses
import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from silo.transport import Transport, transport_plan

EXACT = 1e-300  # a threshold that only a fixed point meets
UNBALANCED, BALANCED = Transport(0.1, 0.8), Transport(0.1, None)


def kernel(problem: Tensor, transport: Transport) -> Tensor:
    return torch.exp((problem.double() - 1) / transport.entropy)


def scalings(problem: Tensor, transport: Transport, sweeps: int) -> tuple[Tensor, Tensor]:
    """u [M] and v [N] of one problem [M, N] with the formulas as FedOTP's authors wrote them, in float64."""
    scaled, (patches, prompts) = kernel(problem, transport), problem.shape
    u, v = torch.ones(patches).double(), torch.ones(prompts).double()
    for _ in range(sweeps):
        u = 1 / patches / (scaled @ v)
        if transport.mass is not None:
            u = u.clamp(max=1)
        v = (transport.mass or 1) / prompts / (scaled.T @ u)
    return u, v


def plain(problem: Tensor, transport: Transport) -> Tensor:
    """The plan of one problem after `max_sweeps` sweeps."""
    u, v = scalings(problem, transport, transport.max_sweeps)
    return u[:, None] * kernel(problem, transport) * v


def cosines(*shape: int, spread: float = 0.2, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(spread).add(0.2).clamp(-1, 1)


@st.composite
def problems(draw: st.DrawFn) -> Tensor:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 4)))
    elements = st.floats(-1, 1, width=32, allow_subnormal=False)
    return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=elements)))


@st.composite
def transports(draw: st.DrawFn) -> Transport:
    mass = draw(st.none() | st.floats(0.05, 1.0))
    return Transport(draw(st.floats(0.05, 2.0)), mass, EXACT, draw(st.integers(1, 40)))


@given(problems(), transports())
def test_every_sweep_is_the_plain_one(similarity: Tensor, transport: Transport) -> None:
    if similarity.shape[-1] == 2:  # of two prompts only the authors' rule finds plans by sweeps
        transport = dataclasses.replace(transport, stopping="stack")
    expected = torch.stack([plain(problem, transport) for problem in similarity])
    torch.testing.assert_close(transport_plan(similarity.double(), transport), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(transport_plan(similarity, transport).double(), expected, rtol=1e-3, atol=1e-6)


@given(problems(), st.floats(0.1, 2.0), st.floats(0.05, 0.9), st.sampled_from([1e-2, 1e-3, 1e-4]))
def test_sums_of_an_unbalanced_plan(similarity: Tensor, entropy: float, mass: float, threshold: float) -> None:
    plan = transport_plan(similarity.double(), Transport(entropy, mass, threshold, 100_000))
    patches, prompts = plan.shape[1:]
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], mass / prompts))
    torch.testing.assert_close(plan.sum((1, 2)), torch.full_like(plan[:, 0, 0], mass))
    rows = plan.sum(2) * patches
    assert bool((plan > 0).all())
    assert float(rows.max()) <= math.exp(threshold) * (1 + 1e-12)
    # a row is scaled down only if it is at its cap; not all are, or they would carry more than the mass
    scaling = plan.log() - (similarity.double() - 1) / entropy  # log u + log v
    scaling = (scaling - scaling.amax(1, keepdim=True))[:, :, 0]  # log u
    assert bool((rows[scaling < -1e-9] >= math.exp(-threshold) * (1 - 1e-12)).all())


@given(problems(), st.floats(0.1, 2.0), st.sampled_from([1e-2, 1e-3, 1e-4]))
def test_sums_of_a_balanced_plan(similarity: Tensor, entropy: float, threshold: float) -> None:
    plan = transport_plan(similarity.double(), Transport(entropy, None, threshold, 100_000))
    patches, prompts = plan.shape[1:]
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], 1 / prompts))
    assert float((plan.sum(2) * patches).log().abs().max()) <= threshold + 1e-12


def test_two_by_two_balanced_by_hand() -> None:
    """T = [[t, ½ − t], [½ − t, t]] with t² / (½ − t)² = K₀₀·K₁₁ / (K₀₁·K₁₀), here 9: t = 3/8."""
    similarity = torch.tensor([[0.25 * math.log(9), 0.1], [0.2, 0.3]], dtype=torch.float64)
    plan = transport_plan(similarity, Transport(0.25, None, 1e-14, 1000))
    expected = [[3 / 8, 1 / 8], [1 / 8, 3 / 8]]
    # the last three entries of S only scale a row or a column, but for their ratio e^{(0.1 + 0.2 − 0.3) / ε} = 1
    torch.testing.assert_close(plan, torch.tensor(expected).double())


def test_one_prompt_by_hand() -> None:
    """With kernels 4:1 and γ = 3/4, softmax gives 0.6 and 0.15; the cap of ½ leaves ¼ for the second patch."""
    similarity = torch.tensor([[0.1 * math.log(4)], [0.0]], dtype=torch.float64)
    for mass, expected in ((0.75, [0.5, 0.25]), (0.5, [0.4, 0.1]), (1.0, [0.5, 0.5])):
        plan = transport_plan(similarity, Transport(0.1, mass, EXACT, 1000))
        assert plan.flatten().tolist() == pytest.approx(expected)


def test_all_mass_for_one_prompt_uses_every_patch_alike() -> None:
    plan = transport_plan(cosines(2, 5, 1).double(), Transport(0.1, 1.0, 1e-12, 10_000))
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 5))


def test_all_mass_tends_to_the_balanced_plan() -> None:
    similarity = cosines(3, 6, 3).double()
    capped, balanced = (transport_plan(similarity, Transport(0.1, mass, 1e-12, 100_000)) for mass in (1.0, None))
    torch.testing.assert_close(capped, balanced, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("entropy", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_a_mass_so_small_that_no_patch_is_full(entropy: float, prompts: int) -> None:
    similarity, mass = cosines(3, 9, prompts).double(), 1 / 9
    expected = mass / prompts * (similarity / entropy).softmax(-2)
    plan = transport_plan(similarity, Transport(entropy, mass, EXACT, 1000))
    torch.testing.assert_close(plan, expected, rtol=1e-10, atol=1e-14)
    if entropy <= 0.05:  # then even the first v is too small to fill a patch, and one sweep finds the plan
        one = transport_plan(similarity, Transport(entropy, mass, max_sweeps=1))
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-14)


def test_a_tiny_entropy_fills_the_best_patches_one_after_the_other() -> None:
    similarity = torch.tensor([0.22, 0.30, 0.20, 0.28, 0.26])[:, None]
    plan = transport_plan(similarity, Transport(0.001, 0.6, 1e-4, 1000))
    assert plan.flatten().tolist() == pytest.approx([0, 0.2, 0, 0.2, 0.2], abs=1e-4)


@pytest.mark.parametrize("entropy", [0.01, 0.001])
@pytest.mark.parametrize("mass", [0.8, None])
@pytest.mark.parametrize("prompts", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_entropies_do_not_overflow(entropy: float, mass: float | None, prompts: int, dtype: torch.dtype) -> None:
    similarity = cosines(4, 49, prompts, spread=0.05).to(dtype)
    transport = Transport(entropy, mass, threshold=EXACT)
    plan = transport_plan(similarity, transport)
    assert plan.dtype is torch.float32
    assert bool(plan.isfinite().all())
    torch.testing.assert_close(plan.sum(1), torch.full((4, prompts), (mass or 1) / prompts), rtol=1e-5, atol=0)
    twin = transport_plan(similarity.double(), transport)
    torch.testing.assert_close(plan.double(), twin, rtol=0.02, atol=1e-5)
    with np.errstate(all="ignore"):
        naive = torch.exp((similarity.to(torch.float16) - 1) / entropy)  # what the plain formulas start from
    assert bool((naive.sum(1) == 0).any())


@pytest.mark.parametrize("mass", [0.8, None])
def test_extreme_similarities_at_a_tiny_entropy(mass: float | None) -> None:
    similarity = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]])
    for transport in (Transport(0.001, mass), Transport(0.001, mass, stopping="stack")):
        plan = transport_plan(similarity, transport)
        assert bool(plan.isfinite().all())
        torch.testing.assert_close(plan.sum(0), torch.full((2,), (mass or 1) / 2))


def test_a_stack_whose_scaling_vectors_overflow_goes_on_to_the_last_sweep() -> None:
    similarity = cosines(3, 20, 3)
    stack = transport_plan(similarity, Transport(0.001, 0.8, 1e3, stopping="stack"))
    assert torch.equal(stack, transport_plan(similarity, Transport(0.001, 0.8, EXACT)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    similarity = cosines(3, 8, 2)
    half = similarity.to(dtype)
    assert torch.equal(transport_plan(half, UNBALANCED), transport_plan(half.float(), UNBALANCED))
    with torch.autocast("cpu", dtype):
        under = transport_plan(similarity, UNBALANCED)
    assert torch.equal(under, transport_plan(similarity, UNBALANCED))
    assert transport_plan(similarity.double(), UNBALANCED).dtype is torch.float64


def stacked(prompts: int = 2) -> Tensor:
    """Problems that stop at very different sweeps: nearly equal patches, and very unequal ones."""
    spreads = (0.0, 0.02, 0.1, 0.5)
    return torch.cat([cosines(9, 50, prompts, spread=spread, seed=at) for at, spread in enumerate(spreads)])


@pytest.mark.parametrize("mass", [0.8, None])
@pytest.mark.parametrize("entropy", [0.1, 0.01])
@pytest.mark.parametrize("prompts", [2, 3])
def test_a_plan_is_the_same_alone_in_a_stack_and_in_another_order(
    mass: float | None, entropy: float, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, similarity = Transport(entropy, mass), stacked(prompts)
    together = transport_plan(similarity, transport)
    order = torch.randperm(len(similarity), generator=torch.Generator().manual_seed(1))
    assert torch.equal(transport_plan(similarity[order], transport), together[order])
    for at, problem in enumerate(similarity):
        assert torch.equal(transport_plan(problem, transport), together[at])
    assert torch.equal(transport_plan(similarity.reshape(3, 12, 50, prompts), transport).flatten(0, 1), together)
    monkeypatch.setattr("silo.transport.SLICE_ON_CPU", 500)  # five problems at a time
    assert torch.equal(transport_plan(similarity, transport), together)
    monkeypatch.setattr("silo.transport.LOOK_ON_CPU", 7)  # looking later changes nothing
    assert torch.equal(transport_plan(similarity, transport), together)
    # and it is no accident: they do stop at different sweeps, and a sweep more changes them; two prompts leave nothing
    longer = transport_plan(similarity, dataclasses.replace(transport, threshold=EXACT))
    assert (float((longer - together).abs().max()) > 1e-6) == (prompts == 3)


@pytest.mark.parametrize("mass", [0.8, None])
def test_the_rule_for_stacks_does_depend_on_the_stack(mass: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, similarity = Transport(0.1, mass, 1e-2, stopping="stack"), stacked()
    together = transport_plan(similarity, transport)
    apart = torch.stack([transport_plan(problem, transport) for problem in similarity])
    assert float((apart - together).abs().max()) > 1e-5
    monkeypatch.setattr("silo.transport.SLICE_ON_CPU", 500)  # a stack is never cut
    monkeypatch.setattr("silo.transport.LOOK_ON_CPU", 7)
    assert torch.equal(transport_plan(similarity, transport), together)


def sweeps_made(similarity: Tensor, transport: Transport) -> int:
    """The first number of sweeps that gives the final plan."""
    final = transport_plan(similarity, transport)
    shorter = (dataclasses.replace(transport, max_sweeps=n) for n in range(1, transport.max_sweeps + 1))
    return next(one.max_sweeps for one in shorter if torch.equal(transport_plan(similarity, one), final))


def first_quiet_sweep(problems: Tensor, transport: Transport) -> int:
    """The first sweep after which `transport` would stop all these problems, counted with the plain formulas."""
    for sweep in range(1, transport.max_sweeps + 1):
        moves = []
        for problem in problems:
            (u, v), (old_u, old_v) = (scalings(problem, transport, n) for n in (sweep, sweep - 1))
            if transport.stopping == "problem":
                moves.append((v / old_v).log().abs().max())
            else:
                moves.append((u - old_u if transport.mass is None else v - old_v).abs().mean())
        if float(torch.stack(moves).mean()) < transport.threshold:
            return sweep
    raise AssertionError("never quiet")


@pytest.mark.parametrize(("mass", "stack_threshold"), [(0.8, 5.0), (None, 0.05)])
def test_when_the_sweeps_end(mass: float | None, stack_threshold: float) -> None:
    similarity = cosines(3, 6, 3, seed=4).double()
    alone = Transport(0.1, mass)
    counts = [sweeps_made(problem, alone) for problem in similarity]
    assert counts == [first_quiet_sweep(problem[None], alone) for problem in similarity]
    assert len(set(counts)) == 3
    stack = Transport(0.1, mass, stack_threshold, stopping="stack")
    assert sweeps_made(similarity, stack) == first_quiet_sweep(similarity, stack)


@pytest.mark.parametrize("mass", [0.8, None])
def test_sweeps_that_end_too_early_leave_columns_exact_and_rows_not(mass: float | None) -> None:
    similarity = cosines(4, 20, 3, spread=0.5)
    early, enough = (transport_plan(similarity, Transport(0.05, mass, max_sweeps=n)) for n in (2, 10_000))
    for plan in (early, enough):
        torch.testing.assert_close(plan.sum(1), torch.full((4, 3), (mass or 1) / 3))
    assert float((early.sum(2) * 20).max()) > 1.1
    assert float((enough.sum(2) * 20).max()) < math.exp(1e-3) + 1e-5


@pytest.mark.parametrize("mass", [0.8, None])
def test_permuted_patches_and_prompts_permute_the_plan(mass: float | None) -> None:
    similarity = cosines(3, 10, 4)
    rows, columns = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7]), torch.tensor([2, 0, 3, 1])
    plan = transport_plan(similarity, Transport(0.1, mass))
    permuted = transport_plan(similarity[:, rows][:, :, columns], Transport(0.1, mass))
    torch.testing.assert_close(permuted, plan[:, rows][:, :, columns])


def test_no_gradient_flows_and_nothing_is_changed() -> None:
    similarity = cosines(2, 5, 2).requires_grad_()
    before = similarity.detach().clone()
    plan = transport_plan(similarity, UNBALANCED)
    assert not plan.requires_grad
    assert torch.equal(similarity, before)


@pytest.mark.parametrize("stopping", ["problem", "stack"])
@pytest.mark.parametrize("shape", [(5, 2), (0, 5, 2), (2, 0, 5, 2), (2, 3, 1, 1), (1, 1, 1, 5, 2)])
def test_any_leading_axes(shape: tuple[int, ...], stopping: Literal["problem", "stack"]) -> None:
    plan = transport_plan(cosines(*shape), Transport(0.1, 0.8, stopping=stopping))
    assert plan.shape == shape
    torch.testing.assert_close(plan.sum((-2, -1)), torch.full(shape[:-2], 0.8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mass", [0.8, None])
@pytest.mark.parametrize("prompts", [2, 3])
@pytest.mark.parametrize("stopping", ["problem", "stack"])
def test_cuda_gives_the_plans_of_the_cpu(
    mass: float | None, prompts: int, stopping: Literal["problem", "stack"]
) -> None:
    transport, similarity = Transport(0.1, mass, stopping=stopping), stacked(prompts)
    on_device = transport_plan(similarity.cuda(), transport).cpu()
    torch.testing.assert_close(on_device, transport_plan(similarity, transport), rtol=2e-3, atol=1e-7)
