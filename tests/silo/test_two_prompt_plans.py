"""Plans for two prompts, found by Newton's method: against water-filling and bisection, KKT conditions, and limits."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from silo import transport as solver
from silo.transport import Transport, transport_plan

Floats = NDArray[np.float64]
CAPPED, BALANCED = Transport(0.1, 0.8), Transport(0.1, None)
masses = st.none() | st.sampled_from([1.0, 1 - 1e-6, 0.8, 0.5]) | st.floats(1e-3, 1.0)


def filled(loads: Floats, mass: float) -> Floats:
    """Σ = `mass` of rows that may carry exp(`loads` + a common number) but at most 1, by filling the largest first."""
    if mass >= len(loads):
        return np.ones_like(loads)
    order = np.argsort(-loads)
    rest = np.logaddexp.accumulate(loads[order][::-1])[::-1]  # of a row and all smaller ones
    for full in range(len(loads)):
        if full < mass and loads[order[full]] + math.log(mass - full) - rest[full] <= 0:
            return np.minimum(np.exp(np.minimum(loads + math.log(mass - full) - rest[full], 0)), 1)
    raise AssertionError("no row is left")


def by_bisection(similarity: Tensor, transport: Transport) -> Tensor:
    """The plan of one problem [M, 2], in float64: the more the first prompt is preferred, the more it receives."""
    kernel = similarity.double().numpy() / transport.entropy
    contrast = kernel[:, 0] - kernel[:, 1]

    def plan(preference: float) -> Floats:
        odds = contrast + preference
        shares = np.exp(-np.logaddexp(0, np.stack([-odds, odds], -1)))
        loads = np.logaddexp(kernel[:, 0] + preference, kernel[:, 1])
        full = transport.mass is None
        rows = np.ones_like(loads) if full else filled(loads, (transport.mass or 1) * len(loads))
        return np.asarray(rows[:, None] * shares / len(loads))

    low, high = -contrast.max() - 1, -contrast.min() + 1
    for _ in range(80):
        middle = (low + high) / 2
        first, second = plan(middle).sum(0)
        low, high = (low, middle) if first > second else (middle, high)
    return torch.from_numpy(plan((low + high) / 2))


def drawn(kind: str, patches: int, spread: float, seed: int) -> Tensor:
    """Similarities [M, 2] in float32 of a kind that some solver might stumble over."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((patches, 2), generator=generator) - 0.5
    first = uniform[:, :1]
    ramp = torch.linspace(-0.5, 0.5, patches)[:, None]
    kinds = {
        "independent": uniform,
        "alike": torch.cat([first, first], 1),
        "nearly alike": first + 0.01 * uniform,
        "opposite": torch.cat([first, -first], 1),
        "shifted": torch.cat([first, 0.3 + first], 1),
        "ties": (3 * uniform).round() / 3,
        "ramps": torch.cat([ramp, -0.3 * ramp], 1),
        "outliers": torch.where(uniform > 0.45, uniform, 0.01 * uniform),
        "one flat": torch.cat([first, 0 * first], 1),
    }
    return 0.2 + spread * kinds[kind]


KINDS = ["independent", "alike", "nearly alike", "opposite", "shifted", "ties", "ramps", "outliers", "one flat"]


@dataclass(frozen=True)
class Problem:
    """One problem, and what is asked."""

    similarity: Tensor
    transport: Transport

    @property
    def cap(self) -> float:
        return 1 / len(self.similarity)

    def off(self, plan: Tensor) -> float:
        """How much mass lies elsewhere than in the plan by bisection, relatively."""
        mass = self.transport.mass or 1.0
        return float((plan.double() - by_bisection(self.similarity, self.transport)).abs().sum()) / mass


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    patches, spread = draw(st.integers(1, 300)), 10 ** draw(st.floats(-3, 0))
    mass = draw(masses | st.integers(1, patches).map(lambda full: full / patches))
    similarity = drawn(draw(st.sampled_from(KINDS)), patches, spread, draw(st.integers(0, 999)))
    return Problem(similarity, Transport(10 ** draw(st.floats(-3, 0)), mass))


# γ·M is a whole number, so that x is not unique; where a row is just full, so that Newton's steps come to nothing; and
# hardly any room is left
@given(problems())
@example(Problem(drawn("opposite", 7, 1.0, 3), Transport(0.01, 4 / 7)))
@example(Problem(drawn("shifted", 49, 1.0, 5), Transport(0.001, 16 / 49)))
@example(Problem(drawn("independent", 7, 1.0, 1), Transport(0.01, 1 - 1e-6)))
@example(Problem(drawn("shifted", 196, 1.0, 4), Transport(0.001, 1 - 1e-6)))
def test_the_plan_is_the_one_by_bisection(problem: Problem) -> None:
    exact = transport_plan(problem.similarity.double(), problem.transport)
    assert problem.off(exact) < 1e-9
    plan = transport_plan(problem.similarity, problem.transport)
    assert plan.dtype is torch.float32
    rounding = 2e-7 / problem.transport.entropy  # of S/ε, as a relative error of K
    assert problem.off(plan) < 4e-6 + rounding


@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_sums_and_complementary_rows(problem: Problem, dtype: torch.dtype) -> None:
    similarity, transport = problem.similarity.to(dtype), problem.transport
    plan = transport_plan(similarity, transport).double()
    exact, rows = (4e-7, 2e-6) if dtype is torch.float32 else (1e-12, 4e-11)
    assert plan.sum(0).tolist() == pytest.approx(2 * [(transport.mass or 1) / 2], rel=exact)
    loads = plan.sum(1) / problem.cap
    assert float(loads.max()) < 1 + rows
    if transport.mass is None:
        assert float(loads.min()) > 1 - rows
        return
    # a row below its cap is not scaled: there T/K is v, the largest that it is anywhere
    for column, cosines in zip(plan.T, similarity.double().T, strict=True):
        seen = column > 1e-30
        scaling, free = (column.log() - cosines / transport.entropy)[seen], (loads < 1 - 10 * rows)[seen]
        if bool(free.any()):
            rounding = torch.finfo(dtype).eps * (100 + 3 / transport.entropy)
            assert float(scaling.max() - scaling[free].min()) < rounding


def test_a_full_row_by_hand() -> None:
    """K = [[7, 2], [1, 1]], γ = ¾ and T₀₀ = t: (t / (½ − t)) / ((⅜ − t) / (t − ⅛)) = 7 / 2 for t = 0.3."""
    similarity = 0.1 * torch.tensor([[7.0, 2.0], [1.0, 1.0]], dtype=torch.float64).log()
    plan = transport_plan(similarity, Transport(0.1, 0.75))
    torch.testing.assert_close(plan, torch.tensor([[0.3, 0.2], [0.075, 0.175]]).double())


def test_a_tiny_entropy_gives_each_prompt_its_best_patches() -> None:
    """Six patches, four of them used; both prefer the first two, and the second prompt gives way at least cost."""
    similarity = torch.tensor([[0.9, 0.9], [0.8, 0.7], [0.5, 0.1], [0.1, 0.6], [0.0, 0.05], [0.05, 0.0]])
    plan = transport_plan(similarity, Transport(0.001, 4 / 6))
    expected = [[0, 1], [1, 0], [1, 0], [0, 1], [0, 0], [0, 0]]  # 0.9 + 0.8 + 0.5 + 0.6 is the largest sum
    torch.testing.assert_close(plan, torch.tensor(expected) / 6, atol=1e-5, rtol=0)


def test_very_many_plain_sweeps_tend_to_it() -> None:
    similarity = torch.stack([drawn("independent", 20, 0.4, seed) for seed in range(4)]).double()
    for transport in (CAPPED, BALANCED):
        sweeps = Transport(transport.entropy, transport.mass, 1e-300, 20_000, stopping="stack")
        torch.testing.assert_close(
            transport_plan(similarity, transport), transport_plan(similarity, sweeps), rtol=1e-8, atol=1e-12
        )


def test_threshold_and_sweeps_mean_nothing() -> None:
    similarity = drawn("independent", 20, 1.0, 0)
    few = Transport(0.1, 0.8, threshold=1e3, max_sweeps=1)
    assert torch.equal(transport_plan(similarity, few), transport_plan(similarity, CAPPED))


def test_all_mass_is_the_balanced_problem() -> None:
    similarity = drawn("independent", 30, 1.0, 0)
    full, nearly = (transport_plan(similarity, Transport(0.01, mass)) for mass in (1.0, 1 - 1e-6))
    assert torch.equal(full, transport_plan(similarity, Transport(0.01, None)))
    assert float((full - nearly).abs().sum()) < 1e-5


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0, None])
def test_prompts_that_are_alike_share_the_plan_of_one(mass: float | None) -> None:
    similarity = drawn("alike", 12, 1.0, 2)
    plan = transport_plan(similarity, Transport(0.1, mass))
    assert torch.equal(plan[:, 0], plan[:, 1])
    loads = filled(similarity[:, 0].double().numpy() / 0.1, 12 * (mass or 1.0)) / 12
    torch.testing.assert_close(2 * plan[:, 0].double(), torch.from_numpy(loads), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mass", [1e-3, 0.8, 1 - 1e-6, 1.0, None])
@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_patches_that_are_alike_and_a_single_one(mass: float | None, level: float) -> None:
    for patches in (1, 2, 7):
        plan = transport_plan(torch.full((patches, 2), level), Transport(0.01, mass))
        torch.testing.assert_close(plan, torch.full((patches, 2), (mass or 1.0) / 2 / patches))
        plan = transport_plan(torch.tensor([[level, -0.3]]).expand(patches, 2), Transport(0.01, mass))
        torch.testing.assert_close(plan, torch.full((patches, 2), (mass or 1.0) / 2 / patches))


def test_a_larger_mass_fills_more() -> None:
    similarity = drawn("nearly alike", 40, 1.0, 0)
    before = torch.zeros(40)
    for mass in (0.05, 0.2, 0.5, 0.9, 0.999, 1.0):
        loads = transport_plan(similarity, Transport(0.02, mass)).sum(1)
        assert bool((loads > before - 1e-7).all())
        before = loads


@pytest.mark.parametrize("mass", [1e-3, 0.5, 0.8, 1 - 1e-6, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_as_logarithm(mass: float | None, dtype: torch.dtype) -> None:
    similarity = torch.stack([drawn(kind, 64, 1.0, 7) for kind in KINDS]).to(dtype)
    plan = transport_plan(similarity, Transport(1e-4, mass))
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], (mass or 1) / 2))
    assert float(plan.sum(2).max()) * 64 < 1 + 2e-6


@pytest.mark.parametrize("mass", [0.8, None])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_its_own_plan_only_and_ends(mass: float | None, wrong: float) -> None:
    similarity = torch.stack([drawn("independent", 50, 1.0, seed) for seed in range(3)])
    spoilt = similarity.clone()
    spoilt[1, 4] = wrong
    plan, healthy = (transport_plan(one, Transport(0.1, mass)) for one in (spoilt, similarity))
    assert bool(plan[1].isnan().any())
    assert torch.equal(plan[[0, 2]], healthy[[0, 2]])


def test_problems_end_at_different_steps_and_the_last_one_ends_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = torch.stack([drawn("independent", 50, spread, 1) for spread in (0.0, 0.1, 1.0)])
    found = transport_plan(similarity, Transport(0.05, 0.8))
    done = []
    for steps in (1, 4, 30):
        monkeypatch.setattr(solver, "STEPS", steps)
        early = transport_plan(similarity, Transport(0.05, 0.8))
        torch.testing.assert_close(early.sum(1), torch.full((3, 2), 0.4))  # columns are exact even then
        done.append([torch.equal(*pair) for pair in zip(early, found, strict=True)])
        if steps == 1:
            assert float(early.sum(2).max()) * 50 > 1.01  # and rows are not
    assert done == [[True, False, False], [True, True, False], [True, True, True]]


def test_the_layout_in_memory_does_not_matter() -> None:
    planes = torch.stack([drawn("independent", 50, 1.0, seed).T for seed in range(6)], 1)  # [2, 6, 50]
    similarity = planes.reshape(2, 2, 3, 50).movedim(0, -1)
    plan = transport_plan(similarity, CAPPED)
    assert torch.equal(plan, transport_plan(similarity.contiguous(), CAPPED))
    assert torch.equal(plan, transport_plan(similarity.transpose(0, 1).contiguous(), CAPPED).transpose(0, 1))
    assert plan.movedim(-1, 0).is_contiguous()  # as the similarities are, so that their product is taken in order
