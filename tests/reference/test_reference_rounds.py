"""Aggregation, and two federated rounds of PromptFL: with a fresh optimiser per task, and with one carried on."""

import numpy as np
import pytest
import torch
from recorded import Reference, aggregate, close, federation, settings, values, within

from fedrt.methods.promptfl import PromptFL

PLAIN = PromptFL(context_length=4)


@pytest.mark.parametrize(
    ("uploads", "expected"), [("list_params", "avg_list"), ("dict_a", "avg_dict_a"), ("dict_b", "avg_dict_b")]
)
@pytest.mark.parametrize("order", [1, -1])
def test_weighted_mean_of_deltas(uploads: str, expected: str, order: int) -> None:
    """fedrt adds the mean difference to where the silos started, wherever that is."""
    recorded = values("fedavg")
    counts, participants = recorded["counts"].tolist(), recorded["participants"].tolist()
    stacked = recorded[uploads]
    start = {"context": torch.from_numpy(np.random.default_rng(0).standard_normal(stacked[0].shape, np.float32))}
    after = aggregate(PLAIN, start, {silo: {"context": stacked[silo]} for silo in participants[::order]}, counts)
    within(after["context"], recorded[expected])


def test_weighted_mean_over_all() -> None:
    recorded = values("fedavg")
    stacked = recorded["list_params"]
    uploads = {silo: {"context": upload} for silo, upload in enumerate(stacked)}
    after = aggregate(PLAIN, {"context": torch.zeros_like(stacked[0])}, uploads, recorded["counts"].tolist())
    within(after["context"], recorded["avg_list_all"])


def test_several_tensors_are_averaged_side_by_side() -> None:
    recorded = values("fedavg")
    counts, participants = recorded["counts"].tolist(), recorded["participants"].tolist()
    start = {name: torch.zeros_like(recorded[f"dict_{name}"][0]) for name in "ab"}
    uploads = {silo: {name: recorded[f"dict_{name}"][silo] for name in "ab"} for silo in participants}
    after = aggregate(PLAIN, start, uploads, counts)
    for name in "ab":
        within(after[name], recorded[f"avg_dict_{name}"])


@pytest.mark.parametrize("variant", ["fresh", "carry"])
def test_two_rounds_of_promptfl(reference: Reference, variant: str) -> None:
    recorded, about = values("promptfl_rounds"), settings("promptfl_rounds")
    rounds = federation(reference, PLAIN, {"context": recorded["ctx_init"]}, about, carry=variant == "carry")
    for one in rounds:
        for silo, tensors in one.trained.items():
            within(tensors["context"], recorded[f"{variant}_round{one.number}_client{silo}"])
        within(one.shared["context"], recorded[f"{variant}_round{one.number}_global"])
    assert [list(one.trained) for one in rounds] == [[0, 1, 2], [2, 0]]
    logits = reference.local(PLAIN).classify(rounds[-1].shared)(reference.batch(0).images)
    close(logits, recorded[f"{variant}_final_logits"])


def test_the_two_variants_differ_by_more_than_the_tolerance() -> None:
    recorded = values("promptfl_rounds")
    difference = recorded["fresh_round2_global"] - recorded["carry_round2_global"]
    assert float(difference.abs().max()) > 1e-3
