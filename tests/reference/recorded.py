"""The recorded values, their tolerances, and the small CLIP that they were computed with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor

from fedrt.aggregation import ServerState, Update
from fedrt.method import Method, ModelDims
from fedrt.spec import OptimizerSpec, TrainingSpec
from fedrt.tensors import Scope
from silo.clip import ClipTextTower, FrozenClip
from silo.clip.tokens import Vocabulary
from silo.examples import Examples
from silo.method import Batch, LocalMethod
from silo.methods import find_local_method
from silo.training import OptimizerState, Plan, RoundPosition, Start, Trained, make_optimizer, train

FOLDER = Path(__file__).parents[2].parent / "shared" / "reference" / "values"
SGD = OptimizerSpec(learning_rate=0.005, momentum=0.9, weight_decay=0.05)  # of every recorded case
BATCH = 4
ROUNDS = 2  # of every recorded federation
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 23, "width": 128, "heads": 2, "layers": 2},
}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 64}


def values(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def settings(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return loaded


def close(actual: Tensor, expected: Tensor) -> None:
    """Features, logits, losses and gradients: 5e-5 · (1 + max|expected|), as METHODS.md section 7 says."""
    within(actual, expected, 5e-5 * (1 + float(expected.abs().max())))


def within(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Parameters and aggregates: 1e-5."""
    assert actual.shape == expected.shape
    worst = float((actual.detach() - expected).abs().max())
    assert worst <= tolerance, f"off by {worst:.2e}, allowed are {tolerance:.2e}"


@dataclass(frozen=True)
class Reference:
    """What the recorded cases share: one text tower with two image towers, class names, images and labels."""

    clip: FrozenClip
    resnet: FrozenClip
    class_names: tuple[str, ...]
    images: Tensor
    labels: Tensor

    @property
    def dims(self) -> ModelDims:
        return ModelDims(self.clip.context_dim, self.clip.feature_dim, len(self.class_names))

    def batch(self, number: int, patches: bool = False) -> Batch:
        """Batch `number` of the ViT's images, as features."""
        rows = slice(number * BATCH, (number + 1) * BATCH)
        return Batch(self.clip.encode_images(self.images[rows], patches), self.labels[rows])

    def examples(self, numbers: Sequence[int], patches: bool = False) -> Examples:
        """Some batches, one after the other."""
        rows = torch.cat([torch.arange(number * BATCH, (number + 1) * BATCH) for number in numbers])
        labels = self.labels[rows]
        return Examples(self.clip.encode_images(self.images[rows], patches), torch.arange(len(rows)), labels)

    def text_tower(self) -> ClipTextTower:
        return self.clip.text_tower(self.class_names)

    def local(self, declared: Method) -> LocalMethod:
        """The local half of a method, on this CLIP."""
        return find_local_method(declared.name)(declared, self.text_tower())


def variables(**tensors: Tensor) -> dict[str, Tensor]:
    """Copies that collect gradients."""
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def gradients(loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient for each tensor."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), retain_graph=True), strict=True))


def descend(
    reference: Reference,
    method: LocalMethod,
    start: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    patches: bool = False,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Five steps of SGD, step k on batch k: the tensors after each step, and the losses [5] before it."""
    params = variables(**start)
    optimizer = make_optimizer(SGD, list(params.values()))
    states, losses = [], []
    for number in range(5):
        loss = method.loss(params, received, reference.batch(number, patches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states.append({name: tensor.detach().clone() for name, tensor in params.items()})
        losses.append(loss.detach())
    return states, torch.stack(losses)


def train_silo(
    reference: Reference,
    declared: Method,
    tensors: Mapping[str, Tensor],
    examples: Examples,
    round_number: int = 1,
    optimizer: OptimizerState | None = None,
) -> Trained:
    """One silo's task, by the runtime's own training: as many steps as there are recorded batches."""
    specs = declared.tensors(reference.dims)
    held = {scope: {s.name: tensors[s.name] for s in specs if s.scope is scope} for scope in Scope}
    plan = Plan(
        TrainingSpec(batch_size=BATCH, optimizer=SGD),
        RoundPosition(round_number, ROUNDS),
        seed_that_keeps_the_batches(),
    )
    start = Start(held[Scope.SHARED], held[Scope.PRIVATE], optimizer)
    return train(reference.local(declared), specs, start, examples, plan, lambda *_: None)


def seed_that_keeps_the_batches() -> int:
    """A seed whose shuffle of eight examples puts the first four into the first batch, as the recording did."""
    return next(
        seed
        for seed in range(10_000)
        if set(torch.randperm(2 * BATCH, generator=torch.Generator().manual_seed(seed))[:BATCH].tolist())
        == set(range(BATCH))
    )


def aggregate(
    declared: Method, shared: Mapping[str, Tensor], uploads: Mapping[int, Mapping[str, Tensor]], counts: Sequence[int]
) -> dict[str, Tensor]:
    """The server's step as the coordinator takes it, with the updates in the order of `uploads`."""
    updates = [
        Update(f"silo-{silo}", {name: (upload[name] - shared[name]).numpy() for name in shared}, counts[silo])
        for silo, upload in uploads.items()
    ]
    after = declared.aggregate(ServerState({name: tensor.numpy() for name, tensor in shared.items()}), updates)
    return {name: torch.from_numpy(array) for name, array in after.shared.items()}


@dataclass(frozen=True)
class Round:
    """What a recorded federation did in one round: each silo's tensors after training, then what everybody holds."""

    number: int
    trained: dict[int, dict[str, Tensor]]
    shared: dict[str, Tensor]
    private: dict[int, dict[str, Tensor]]


def federation(
    reference: Reference, declared: Method, initial: Mapping[str, Tensor], about: dict[str, Any], carry: bool = False
) -> list[Round]:
    """Both recorded rounds, from the same initial tensors for all silos.

    With `carry`, one optimiser state goes on from silo to silo and from round to round.
    """
    scopes = {spec.name: spec.scope for spec in declared.tensors(reference.dims)}
    shared = {name: tensor for name, tensor in initial.items() if scopes[name] is Scope.SHARED}
    own = {name: tensor for name, tensor in initial.items() if scopes[name] is Scope.PRIVATE}
    private = dict.fromkeys(range(len(about["counts"])), own)
    state: OptimizerState | None = None
    rounds = []
    for number in range(1, ROUNDS + 1):
        trained = {}
        for silo in about["participants"][f"round{number}"]:
            examples = reference.examples(about["client_batches"][str(silo)], declared.needs_patches)
            result = train_silo(reference, declared, {**shared, **private[silo]}, examples, number, state)
            state = result.optimizer if carry else None
            trained[silo] = {**result.shared, **result.private}
            private = {**private, silo: result.private}
        shared = aggregate(declared, shared, trained, about["counts"])
        rounds.append(Round(number, trained, shared, private))
    return rounds


def load_reference() -> Reference:
    kept = values("tokens")["vocab_ids"].tolist()
    state = values("clip_vit")
    vit = CLIP(**CONFIG)
    vit.load_state_dict(state, strict=True)
    resnet = CLIP(**CONFIG | {"vision_cfg": RESNET})
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    resnet.load_state_dict(text | values("clip_rn_visual"), strict=True)
    data = values("images")
    names = tuple(settings("tokens")["class_names"])
    return Reference(_frozen(vit, kept), _frozen(resnet, kept), names, data["images"], data["labels"])


def _frozen(model: CLIP, kept_ids: list[int]) -> FrozenClip:
    def unused(_: object) -> Tensor:
        raise AssertionError("the recorded images are prepared already")

    return FrozenClip("reference", "0" * 64, model.eval().requires_grad_(False), Vocabulary(kept_ids), unused)
