"""The nine recorded transport plans: by the rule for stacks that they were recorded with, and by fedrt's own."""

from typing import Any

import pytest
import torch
from recorded import FOLDER, settings, values, within
from torch import Tensor

from silo.transport import Transport, transport_plan

PLANS = 5e-6  # the tolerance of plans
CASES: list[dict[str, Any]] = settings("ot_solver")["cases"] if FOLDER.is_dir() else []
CONVERGED = {3, 4, 6, 7, 8}  # 0, 1 and 2 would need more than their 100 sweeps, and 5 more than its 3

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"case {case['index']}")


def asked(case: dict[str, Any], **changed: Any) -> Transport:
    fields: dict[str, Any] = {
        "entropy": case["eps"],
        "mass": case["gamma"] if case["solver"] == "COT" else None,
        "threshold": case["thresh"],
        "max_sweeps": case["max_iter"],
        "stopping": "stack",
    }
    return Transport(**fields | changed)


def solved(case: dict[str, Any], **changed: Any) -> tuple[Tensor, Tensor]:
    """Our plan and the recorded one."""
    recorded = values("ot_solver")
    return transport_plan(recorded["similarity"], asked(case, **changed)), recorded[f"T_{case['index']}"]


@every_case
def test_the_rule_for_stacks(case: dict[str, Any]) -> None:
    plan, recorded = solved(case)
    within(plan, recorded, PLANS)
    assert float(plan.sum((1, 2)).mean()) == pytest.approx(case["total_mass"], abs=1e-6)


@every_case
def test_the_rule_for_each_problem(case: dict[str, Any]) -> None:
    """With a threshold finer than the tolerance. What had not converged ends at the same last sweep."""
    within(*solved(case, stopping="problem", threshold=1e-6), PLANS)


@every_case
def test_which_cases_had_converged(case: dict[str, Any]) -> None:
    plan, recorded = solved(case, stopping="problem", threshold=1e-6, max_sweeps=10_000)
    if case["index"] in CONVERGED:
        within(plan, recorded, PLANS)
    else:
        assert float((plan - recorded).abs().max()) > 2 * PLANS


@every_case
def test_sums_with_the_default_threshold(case: dict[str, Any]) -> None:
    plan, recorded = solved(case, stopping="problem", threshold=1e-3)
    rows = plan.sum(2) * plan.shape[1]
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], case["gamma"] / plan.shape[2]))
    in_time = case["index"] not in {0, 5}  # 100 sweeps are too few with all mass on the way, and 3 are anyway
    assert (float(rows.max()) <= 1.00101) == in_time
    if case["solver"] == "Sinkhorn":
        assert float(rows.min()) >= 0.99899
    within(plan, recorded, 2e-3)


@every_case
def test_another_entropy_or_solver_would_be_noticed(case: dict[str, Any]) -> None:
    for changed in ({"entropy": 1.01 * case["eps"]}, {"mass": None if case["solver"] == "COT" else 0.9}):
        plan, recorded = solved(case, **changed)
        assert float((plan - recorded).abs().max()) > 2 * PLANS
