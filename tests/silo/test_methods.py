"""The contract that every built-in method keeps: both halves, logits, gradients, scopes, server rules, odd silos."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from towers import DIMS, LinearTower, examples, images, labelled, local, make, tensors, trained, variables

import fedrt.methods
import silo.methods
from fedrt.aggregation import ServerState, Update
from fedrt.errors import SpecError
from fedrt.method import Method
from fedrt.tensors import Scope, schema_sha256
from silo.method import LocalMethod, TextTower
from silo.methods import BUILT_IN, find_local_method, local_method_names

NAMES = sorted(BUILT_IN)
LEARNING = sorted(set(NAMES) - {"zeroshot"})
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("fedpgp", {"positive": "placeholder"}),
    ("fedpgp", {"contrast_weight": 0}),
    ("promptfolio", {"share": "auto"}),
]
# a schema that changes by accident makes silos of the last release refuse every experiment
DIGESTS = {
    "coop": "25ec64fa728ebb3d4a99d6d40e739e933fe674bbdf1766fab6ea494df63fa3a0",
    "fedotp": "6e3126799148d7e5a9cfa88d991cd6299a8f7abf3a5d6eea1ea4d4503f99f292",
    "fedpgp": "98356d14e3bfefacb4a924858054283827874d5a7e38a642c3c117b05e1efe7d",
    "fedprox": "65145ff9b17cfc84b0b5e73cb6694140646603a472149b29d9b3e22d9a3738d7",
    "promptfl": "65145ff9b17cfc84b0b5e73cb6694140646603a472149b29d9b3e22d9a3738d7",
    "promptfolio": "b9e40c4a9cd80689024e3e13caa443c4328df842cce068568c4c5fbd3ffe8725",
    "zeroshot": "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
}
SHARED = {"coop": set(), "zeroshot": set(), "promptfl": {"context"}, "fedprox": {"context"}}
RULES = ["weighted_mean", "uniform_mean", "server_momentum", "server_adam", "median", "trimmed_mean"]

every_method = pytest.mark.parametrize("name", NAMES)
every_learning_method = pytest.mark.parametrize("name", LEARNING)
every_variant = pytest.mark.parametrize(("name", "settings"), VARIANTS)


def test_both_halves_of_every_method_exist() -> None:
    assert set(BUILT_IN) == set(fedrt.methods.BUILT_IN)
    assert all(declared.name == name for name, declared in fedrt.methods.BUILT_IN.items())


@every_variant
def test_logits_have_a_row_per_image_and_a_column_per_class(name: str, settings: dict[str, Any]) -> None:
    declared = make(name, **settings)
    classifier = local(declared).classify(tensors(declared))
    assert classifier(images(5)).shape == (5, 3)
    assert classifier(images(1)).shape == (1, 3)


@every_variant
def test_gradient_reaches_every_trained_tensor(name: str, settings: dict[str, Any]) -> None:
    declared = make(name, **settings)
    params = variables(declared)
    received = {key: value.detach() + 1 for key, value in params.items()}
    loss = local(declared).loss(params, received, labelled())
    assert loss.shape == ()
    assert bool(loss.isfinite())
    for tensor in (tensor for tensor in params.values() if tensor.requires_grad):
        (gradient,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        assert float(gradient.abs().max()) > 0


@every_variant
def test_logits_of_an_image_do_not_depend_on_its_batch(name: str, settings: dict[str, Any]) -> None:
    declared = make(name, **settings)
    classifier = local(declared).classify(tensors(declared))
    batch = labelled(5)
    alone = examples(5).batch(slice(2, 3))
    torch.testing.assert_close(classifier(alone.images)[0], classifier(batch.images)[2])


@every_variant
def test_the_text_tower_runs_once_for_many_batches_and_once_in_a_loss(name: str, settings: dict[str, Any]) -> None:
    declared, text = make(name, **settings), LinearTower()
    params, passes = tensors(declared), int(name != "zeroshot")
    classifier = local(declared, text).classify(params)
    for count in (5, 2, 1):
        classifier(images(count))
    assert len(text.calls) == passes
    local(declared, text).loss(params, params, labelled())
    assert len(text.calls) == 2 * passes


@every_variant
def test_prepare_returns_exactly_the_tensors_that_are_not_trained(name: str, settings: dict[str, Any]) -> None:
    declared = make(name, **settings)
    untrained = {spec.name: spec.shape for spec in declared.tensors(DIMS) if not spec.trained}
    method, params = local(declared), tensors(declared)
    if not untrained:
        assert method.prepare is None
        return
    assert method.prepare is not None
    settled = method.prepare(params, labelled())
    assert {key: tuple(tensor.shape) for key, tensor in settled.items()} == untrained
    again = method.prepare(params, labelled())
    assert all(torch.equal(settled[key], again[key]) for key in settled)  # nothing is drawn


@every_method
def test_the_schema_is_the_recorded_one(name: str) -> None:
    """Names, shapes and scopes with the published hyper-parameters."""
    assert schema_sha256(fedrt.methods.BUILT_IN[name]().tensors(DIMS)).hex() == DIGESTS[name]


@every_variant
def test_only_shared_tensors_leave_the_training_as_shared(name: str, settings: dict[str, Any]) -> None:
    declared = make(name, **settings)
    shared = SHARED.get(name, {"shared_context"})
    assert {spec.name for spec in declared.tensors(DIMS) if spec.scope is Scope.SHARED} == shared
    if name != "zeroshot":
        result = trained(declared, examples())
        assert set(result.shared) == shared
        assert set(result.private) == {spec.name for spec in declared.tensors(DIMS)} - shared


def updates(declared: Method) -> list[Update]:
    """Of five silos, with numbers that float32 adds differently in every order."""
    shared = [spec for spec in declared.tensors(DIMS) if spec.scope is Scope.SHARED]
    random = np.random.default_rng(5)

    def deltas(size: float) -> dict[str, np.ndarray]:
        return {spec.name: (size * random.normal(size=spec.shape)).astype(np.float32) for spec in shared}

    return [Update(f"silo-{at}", deltas(10.0**at), at + 1) for at in range(5)]


@every_learning_method
@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_updates_changes_no_bit(name: str, rule: str) -> None:
    declared = make(name, server={"rule": rule})
    given = updates(declared)
    start = ServerState({key: np.ones_like(delta) for key, delta in given[0].delta.items()})
    seen = set()
    for order in itertools.islice(itertools.permutations(given), 0, None, 7):
        after = declared.aggregate(declared.aggregate(start, order), order[::-1])
        assert set(after.shared) == set(given[0].delta)
        tables = (after.shared, after.memory)
        seen.add(tuple(table[key].tobytes() for table in tables for key in sorted(table)))
    assert len(seen) == 1


@every_learning_method
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"server_adam"}))
def test_one_update_alone_adds_exactly_its_delta(name: str, rule: str) -> None:
    """In the first round; Adam's steps have the size of its rate, whatever the delta."""
    declared = make(name, server={"rule": rule})
    (alone,) = updates(declared)[3:4]
    start = {key: np.full_like(delta, 0.1) for key, delta in alone.delta.items()}
    after = declared.aggregate(ServerState(start), [alone])
    assert {key: array.tobytes() for key, array in after.shared.items()} == {
        key: (start[key] + delta).tobytes() for key, delta in alone.delta.items()
    }


@every_variant
@pytest.mark.parametrize(("count", "class_count"), [(1, 3), (1, 1), (6, 1), (5, 3)])
def test_extreme_silos_train(name: str, settings: dict[str, Any], count: int, class_count: int) -> None:
    """One example, one class, or a batch larger than the data."""
    if name == "zeroshot":
        return
    result = trained(make(name, **settings), examples(count, class_count), class_count=class_count, batch_size=32)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*result.shared.values(), *result.private.values()))
    if class_count == 1 and name not in {"fedpgp"}:  # whose contrastive term goes on
        assert result.metrics["loss"] == pytest.approx(0.0, abs=1e-2)


def test_promptfl_with_the_handcrafted_features_is_zero_shot() -> None:
    nothing = {"context": torch.zeros(3, 6)}
    logits = local(make("promptfl")).classify(nothing)(images())
    torch.testing.assert_close(logits, local(make("zeroshot")).classify({})(images()))


def test_unknown_method() -> None:
    with pytest.raises(SpecError, match=r"'fedxyz' has no local half on this silo; install .*'promptfl'.*'zeroshot'"):
        find_local_method("fedxyz")


@dataclass(frozen=True)
class Point:
    """An entry point of a third-party package."""

    name: str
    target: object

    def load(self) -> object:
        return self.target


def test_third_party_methods_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(method: Any, text: TextTower) -> LocalMethod:
        raise NotImplementedError

    points = {"silo.methods": [Point("fedxyz", build), Point("promptfl", build)]}
    monkeypatch.setattr(silo.methods, "entry_points", lambda group: points[group])
    assert find_local_method("fedxyz") is build
    assert find_local_method("promptfl") is BUILT_IN["promptfl"]  # a package cannot take the name of a built-in
    assert local_method_names() == sorted({*BUILT_IN, "fedxyz"})
