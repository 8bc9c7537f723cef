"""The error of class features in reduced precision, on towers whose rounding one can foretell."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import towers
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.errors import FailureReason, WorkError
from fedrt.spec import Precision
from silo.method import TextTower
from silo.precision import feature_error, is_slow
from silo.training import autocast

CPU = torch.device("cpu")
BF16 = Precision.BF16


class RoundingTower(towers.LinearTower):
    """Gives its features in bfloat16 under autocast, as they are otherwise."""

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        assert not torch.is_grad_enabled()
        features = F.normalize(context.mean(-2)[..., None, :4] + self.classes, dim=-1)
        return features.bfloat16() if torch.is_autocast_enabled("cpu") else features


def encoding(*contexts: Tensor) -> Callable[[TextTower], object]:
    return lambda text: [text.encode(context) for context in contexts]


def bf16() -> AbstractContextManager[object]:
    return autocast(BF16, CPU)


def test_the_error_is_the_largest_rounding_of_an_entry() -> None:
    context = towers.drawn(1, 3, 6).requires_grad_()
    exact = F.normalize(context.detach().mean(0)[:4] + towers.LinearTower().classes, dim=-1)
    expected = float((exact - exact.bfloat16().float()).abs().max())
    assert 0 < expected < 2**-8
    assert feature_error(encoding(context), RoundingTower(), bf16()) == expected


def test_the_error_is_over_all_contexts() -> None:
    few, many = towers.drawn(1, 3, 6), towers.drawn(2, 3, 6)
    errors = [feature_error(encoding(context), RoundingTower(), bf16()) for context in (few, many)]
    assert errors[0] != errors[1]
    assert feature_error(encoding(few, many), RoundingTower(), bf16()) == max(errors)  # type: ignore[type-var]
    assert feature_error(encoding(many, few), RoundingTower(), bf16()) == max(errors)  # type: ignore[type-var]


def test_full_precision_has_no_error() -> None:
    assert feature_error(encoding(towers.drawn(1, 3, 6)), RoundingTower(), nullcontext()) == 0.0


@pytest.mark.parametrize("name", ["promptfl", "coop", "fedprox", "fedpgp", "promptfolio", "fedotp"])
def test_every_method_that_trains_shows_its_features(name: str) -> None:
    declared = towers.make(name)
    tensors = towers.tensors(declared)

    def classify(text: TextTower) -> object:
        return towers.local(declared, text).classify(tensors)

    error = feature_error(classify, RoundingTower(), bf16())
    assert error is not None
    assert 0 < error < 2**-7


def test_a_method_that_learns_no_context_has_no_error() -> None:
    def classify(text: TextTower) -> object:
        return towers.local(towers.make("zeroshot"), text).classify({})

    assert feature_error(classify, towers.LinearTower(), bf16()) is None


def test_the_recording_tower_gives_what_the_tower_gives() -> None:
    plain, seen = towers.LinearTower(), []

    def look(text: TextTower) -> None:
        context = towers.drawn(1, 3, 3, 6)
        seen.append(
            [
                text.logit_scale,
                text.handcrafted(),
                text.placeholder(2, ClassPosition.FRONT),
                text.placeholder(2),
                text.encode(context, ClassPosition.MIDDLE, True),
                text.encode(context[0]),
            ]
        )

    look(plain)
    feature_error(look, plain, nullcontext())
    for recorded in seen[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(recorded, seen[0], strict=True))
    assert len(seen) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_end_the_task(value: float) -> None:
    class Overflowing(towers.LinearTower):
        def encode(self, context: Tensor, *rest: object) -> Tensor:
            scale = value if torch.is_autocast_enabled("cpu") else 1.0
            return scale * super().encode(context)

    both = encoding(towers.drawn(1, 3, 6))
    with pytest.raises(WorkError, match=r"class features are not finite in training\.precision; use fp32") as caught:
        feature_error(both, Overflowing(), bf16())
    assert caught.value.reason is FailureReason.NOT_FINITE


@pytest.mark.parametrize(
    ("description", "slow"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", False),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile amx_int8\n", False),
        ("processor : 0\nFeatures\t: fp asimd svebf16 i8mm bf16 dgh\n", False),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("processor : 0\nmodel name : Not bf16y\nFeatures\t: fp asimd\n", True),
    ],
)
def test_a_cpu_without_instructions_for_bf16_is_slow(tmp_path: Path, description: str, slow: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(description)
    assert is_slow(BF16, CPU, path) == slow
    assert not is_slow(Precision.FP32, CPU, path)
    assert not is_slow(BF16, torch.device("cuda"), path)


def test_a_cpu_that_does_not_describe_itself_is_not_called_slow(tmp_path: Path) -> None:
    assert not is_slow(BF16, CPU, tmp_path / "none")
