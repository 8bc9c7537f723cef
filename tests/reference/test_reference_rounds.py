"""Aggregation, and two federated rounds of PromptFL with a fresh optimiser for each client and round."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from recorded import BATCH, SGD, Reference, close, settings, values, within
from torch import Tensor

from fedrt.aggregation import ServerState, Update, federated_average
from fedrt.method import ModelDims
from fedrt.methods.promptfl import PromptFL
from fedrt.spec import TrainingSpec
from silo.method import ImageFeatures
from silo.methods import promptfl
from silo.training import Examples, Plan, RoundPosition, Start, train


def average(start: Tensor, uploads: dict[int, Tensor], counts: Sequence[int]) -> Tensor:
    """The server's step as fedrt does it: add the weighted mean of the deltas."""
    state = ServerState({"context": start.numpy()})
    updates = [
        Update(f"silo-{client}", {"context": (upload - start).numpy()}, counts[client])
        for client, upload in uploads.items()
    ]
    return torch.from_numpy(federated_average(state, updates).shared["context"])


@pytest.mark.parametrize(
    ("uploads", "expected"), [("list_params", "avg_list"), ("dict_a", "avg_dict_a"), ("dict_b", "avg_dict_b")]
)
def test_weighted_mean_of_deltas(uploads: str, expected: str) -> None:
    recorded = values("fedavg")
    counts, participants = recorded["counts"].tolist(), recorded["participants"].tolist()
    stacked = recorded[uploads]
    start = torch.from_numpy(np.random.default_rng(0).standard_normal(stacked[0].shape).astype(np.float32))
    within(average(start, {i: stacked[i] for i in participants}, counts), recorded[expected])
    within(average(start, {i: stacked[i] for i in reversed(participants)}, counts), recorded[expected])


def test_weighted_mean_over_all() -> None:
    recorded = values("fedavg")
    stacked = recorded["list_params"]
    everyone = average(torch.zeros_like(stacked[0]), dict(enumerate(stacked)), recorded["counts"].tolist())
    within(everyone, recorded["avg_list_all"])


def seed_that_keeps_the_batches() -> int:
    """A seed whose shuffle of eight examples puts the first four into the first batch, as the recording did."""
    return next(
        seed
        for seed in range(10_000)
        if set(torch.randperm(2 * BATCH, generator=torch.Generator().manual_seed(seed))[:BATCH].tolist())
        == {0, 1, 2, 3}
    )


def train_client(reference: Reference, context: Tensor, batches: Sequence[int], round_number: int) -> Tensor:
    declared = PromptFL(context_length=4)
    method = promptfl.build(declared, reference.clip.text_tower(reference.class_names))
    specs = declared.tensors(ModelDims(reference.clip.context_dim, reference.clip.feature_dim, 6))
    parts = [reference.batch(number) for number in batches]
    pooled = ImageFeatures(torch.cat([part.images.pooled for part in parts]), None)
    examples = Examples(pooled, torch.cat([part.labels for part in parts]))
    plan = Plan(
        TrainingSpec(batch_size=BATCH, optimizer=SGD), RoundPosition(round_number, 2), seed_that_keeps_the_batches()
    )
    return train(method, specs, Start({"context": context}, {}), examples, plan, lambda *_: None).shared["context"]


def test_two_rounds_of_promptfl(reference: Reference) -> None:
    recorded, about = values("promptfl_rounds"), settings("promptfl_rounds")
    context = recorded["ctx_init"]
    for number in (1, 2):
        uploads: dict[int, Tensor] = {}
        for client in about["participants"][f"round{number}"]:
            uploads[client] = train_client(reference, context, about["client_batches"][str(client)], number)
            within(uploads[client], recorded[f"fresh_round{number}_client{client}"])
        context = average(context, uploads, about["counts"])
        within(context, recorded[f"fresh_round{number}_global"])
    method = promptfl.build(PromptFL(context_length=4), reference.clip.text_tower(reference.class_names))
    close(method.logits({"context": context}, reference.batch(0).images), recorded["fresh_final_logits"])
