"""The nine recorded transport plans: by the rule for stacks that they were recorded with, and the exact ones."""

from typing import Any

import pytest
import torch
from recorded import FOLDER, settings, values, within
from torch import Tensor

from silo.transport import Transport, transport_plan

PLANS = 5e-6  # the tolerance of plans
CASES: list[dict[str, Any]] = settings("ot_solver")["cases"] if FOLDER.is_dir() else []
OFF = {0: 8e-4, 1: 4e-5, 2: 4e-5, 5: 0.3}  # recorded after 100 sweeps, 5 after 3: too few. How far they are at most

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
def test_the_exact_plans(case: dict[str, Any]) -> None:
    """Two prompts leave nothing to a threshold or a number of sweeps. Columns and rows sum to what they should."""
    plan, recorded = solved(case, stopping="problem")
    within(plan, recorded, OFF.get(case["index"], PLANS))
    assert (float((plan - recorded).abs().max()) > 2 * PLANS) == (case["index"] in OFF)
    rows = plan.sum(2) * plan.shape[1]
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], case["gamma"] / plan.shape[2]))
    assert float(rows.max()) <= 1 + 2e-6
    if case["gamma"] == 1:
        assert float(rows.min()) >= 1 - 2e-6
    assert (float(recorded.sum(2).max() * plan.shape[1]) > 1 + 1e-5) == (case["index"] in OFF)


@every_case
def test_very_many_sweeps_tend_to_the_exact_plans(case: dict[str, Any]) -> None:
    exact, sweeps = solved(case, stopping="problem")[0], solved(case, threshold=1e-300, max_sweeps=10_000)[0]
    within(sweeps, exact, PLANS)


@every_case
def test_another_entropy_or_solver_would_be_noticed(case: dict[str, Any]) -> None:
    for changed in ({"entropy": 1.01 * case["eps"]}, {"mass": None if case["solver"] == "COT" else 0.9}):
        plan, recorded = solved(case, **changed)
        assert float((plan - recorded).abs().max()) > 2 * PLANS
