"""PromptFolio: the mixture by hand, its limits, and the share that `auto` chooses, against a search for the best."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from towers import TurningTower, angled, drawn, examples, images, local, make, tensors, trained

from fedrt.methods.promptfolio import PUBLISHED_SHARE
from silo.method import Batch, ImageFeatures
from silo.methods.promptfolio import ROUNDING, SLICE, best_share, margins

NAMES = ("shared_context", "private_context")


def test_the_mixture_by_hand() -> None:
    """One context at 0, one at a right angle: features 0.6·(1, 0) + 0.4·(0, 1), shorter than 1."""
    method = local(make("promptfolio", context_length=1), TurningTower())
    params = dict(zip(NAMES, (angled(0.0), angled(math.pi / 2)), strict=True))
    logits = method.classify(params)(ImageFeatures(torch.eye(2), None))
    torch.testing.assert_close(logits, 2 * torch.tensor([[0.6, -0.4], [0.4, 0.6]]))


@pytest.mark.parametrize(("share", "name", "kept"), [(0, "promptfl", NAMES[0]), (1, "coop", NAMES[1])])
@pytest.mark.parametrize("options", [{}, {"context_count": 2}, {"class_specific": True}])
def test_a_pure_share_is_another_method(share: int, name: str, kept: str, options: dict[str, object]) -> None:
    mixed, pure = make("promptfolio", share=share, **options), make(name, **options)
    start = tensors(mixed, size=0.1)
    ours, theirs = trained(mixed, examples(), start), trained(pure, examples(), {"context": start[kept]})
    ours_held, theirs_held = {**ours.shared, **ours.private}, {**theirs.shared, **theirs.private}
    torch.testing.assert_close(ours_held[kept], theirs_held["context"])
    logits = local(pure).classify(theirs_held)(images())
    torch.testing.assert_close(local(mixed).classify(ours_held)(images()), logits)
    (other,) = set(NAMES) - {kept}
    decay = (1 - 0.1 * 5e-4) ** 2  # all that moves what has no weight in the mixture
    torch.testing.assert_close(ours_held[other], decay * start[other], rtol=1e-4, atol=1e-6)


def ratio(scores: Tensor, share: Tensor) -> Tensor:
    """Mean/std of the mixed scores, for each share."""
    mixed = (1 - share[:, None]) * scores[0].double() + share[:, None] * scores[1].double()
    return mixed.mean(1) / mixed.std(1, correction=0)


@pytest.mark.parametrize(
    ("shared", "private", "expected"),
    [
        ([3, 1], [1, 3], 0.5),  # means 2 and 2, variances 1 and 1, covariance −1
        ([3, 3, -1, -1], [2, 0, 2, 0], 0.8),  # equal means, independent: 4 / (4 + 1)
        ([3, 3, 1, 1], [2, 0, 2, 0], 1 / 3),  # means 2 and 1, equal variances, independent
        ([4, 2], [2, 0], 0.0),  # the same spread around a smaller mean
        ([1, 0, 2, 1], [5, 4, 6, 5], 1.0),  # and around a greater one
        ([-1, -1, -3, -3], [0, -2, 0, -2], 1.0),  # both negative: the end with the greater ratio, −1 above −2
        ([0, -2, 0, -2], [-1, -1, -3, -3], 0.0),
        ([0, 0, -2, -2], [2, 0, 2, 0], 1.0),  # one right, one wrong
        ([2, 2], [1, 3], 0.0),  # always right by the same lead: nothing is gained
        ([-2, -2], [1, 3], 1.0),  # always wrong by the same lead
    ],
)
def test_best_share_by_hand(shared: list[float], private: list[float], expected: float) -> None:
    assert best_share(torch.tensor([shared, private]).float()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "scores",
    [
        [[0.3], [0.1]],  # one example
        [[0.3, 0.3, 0.3], [0.1, 0.1, 0.1]],  # no two different scores
        [[0.3, 0.3 + 2e-6], [0.1, 0.1 - 4e-6]],  # none that differ by more than rounding
        [[0.3, 0.1, -0.2], [0.3, 0.1, -0.2]],  # two equal contexts
        [[0.3, 0.1, -0.2], [0.3 + 5e-6, 0.1, -0.2]],  # equal but for rounding
        [[1.0, 3.0], [2.0, 6.0]],  # one twice the other: every share has the same ratio
        [[0.0, 0.0], [1.0, -1.0]],  # the shared one knows nothing, the private one is right as often as wrong
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # one class
    ],
)
def test_without_a_preference_the_share_is_the_published_one(scores: list[list[float]]) -> None:
    assert best_share(torch.tensor(scores)) == PUBLISHED_SHARE == 0.4


@given(st.integers(0, 10_000), st.integers(2, 30), st.floats(-3, 3), st.floats(-3, 3), st.floats(-1, 1))
def test_no_other_share_has_a_greater_ratio(seed: int, count: int, first: float, second: float, tie: float) -> None:
    noise = drawn(seed, 2, count).double()
    noise[1] = tie * noise[0] + math.sqrt(1 - tie**2) * noise[1] * 2
    scores = noise + torch.tensor([[first], [second]])
    found = best_share(scores)
    assert 0 <= found <= 1
    if float((scores[0] - scores[1]).abs().max()) > ROUNDING:
        best = float(ratio(scores, torch.linspace(0, 1, 2001)).max())
        assert float(ratio(scores, torch.tensor([found]))) >= best - 1e-6 * abs(best)


@given(st.integers(0, 10_000), st.floats(0.5, 3), st.floats(0.5, 3))
def test_where_the_formula_gives_a_maximum_it_is_the_formula_clipped(seed: int, first: float, second: float) -> None:
    scores = drawn(seed, 2, 12).double() + torch.tensor([[first], [second]])
    (var_g, cov), (_, var_l) = torch.cov(scores).tolist()  # with n − 1, which makes no difference
    mean_g, mean_l = scores.mean(1).tolist()
    below = mean_l * var_g + mean_g * var_l - (mean_g + mean_l) * cov
    if below > 1e-6:
        expected = min(max((mean_l * var_g - mean_g * cov) / below, 0.0), 1.0)
        assert best_share(scores) == pytest.approx(expected, abs=1e-9)


def test_margins_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], [[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]]])
    batch = Batch(ImageFeatures(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), None), torch.tensor([0, 1]))
    # cosines of image 0: (1, 0, 0.6) and (0, 1, 0.8); of image 1: (0.6, 0.8, 1) and (0.8, 0.6, 0.96)
    expected = torch.tensor([[1 - 0.6, 0.8 - 1], [0 - 1.0, 0.6 - 0.96]])
    torch.testing.assert_close(margins(features, batch), expected)
    assert torch.equal(margins(features[:, :1], batch._replace(labels=torch.tensor([0, 0]))), torch.zeros(2, 2))


def test_margins_of_many_images_are_those_of_each() -> None:
    count = SLICE + 7
    data = examples(count)
    features = torch.nn.functional.normalize(drawn(1, 2, 3, 4), dim=-1)
    together = margins(features, data.batch(slice(None)))
    assert together.shape == (2, count)
    torch.testing.assert_close(together[:, SLICE - 2 :], margins(features, data.batch(slice(SLICE - 2, None))))


def test_mixed_margins_bound_the_margin_of_the_mixture_from_below() -> None:
    data = examples(200).batch(slice(None))
    features = torch.nn.functional.normalize(drawn(1, 2, 3, 4), dim=-1)
    shared, private = margins(features, data)
    mixed = 0.6 * features[0] + 0.4 * features[1]
    exact = margins(torch.stack([mixed, mixed]), data)[0]
    assert bool((exact >= 0.6 * shared + 0.4 * private - 1e-6).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"context_count": 2}, {"class_specific": True}, {"class_position": "front"}],
    ids=str,
)
def test_auto_settles_the_share_before_each_round_and_keeps_it_in_private(options: dict[str, object]) -> None:
    declared = make("promptfolio", share="auto", **options)
    start = tensors(declared, size=0.3)
    half = local(make("promptfolio", share=0.5, **options)).classify(start)
    data = replace(examples(60), labels=half(images(60)).argmax(1))  # so that neither context is useless
    result = trained(declared, data, start)
    prepare = local(declared).prepare
    assert prepare is not None
    settled = prepare(start, data.batch(slice(None)))["share"]
    assert torch.equal(result.private["share"], settled)  # the optimiser leaves it alone, decay included
    share = float(settled)
    assert 0 < share < 1
    assert share not in {PUBLISHED_SHARE, float(start["share"])}
    given = trained(make("promptfolio", share=share, **options), data, {name: start[name] for name in NAMES})
    torch.testing.assert_close(result.shared, given.shared)
    torch.testing.assert_close(result.private, {**given.private, "share": settled})


def test_auto_classifies_with_the_share_that_the_silo_holds() -> None:
    params = tensors(make("promptfolio", share="auto")) | {"share": torch.tensor([0.25])}
    logits = local(make("promptfolio", share="auto")).classify(params)(images())
    torch.testing.assert_close(logits, local(make("promptfolio", share=0.25)).classify(params)(images()))


@pytest.mark.parametrize(("shared", "private", "expected"), [(0.0, 1.5, 0.1), (1.5, 0.0, 0.9), (0.2, -0.2, None)])
def test_auto_is_the_best_share_of_the_margins_and_leaves_some_to_both(
    shared: float, private: float, expected: float | None
) -> None:
    declared = make("promptfolio", share="auto", context_length=1)
    params = {"shared_context": angled(shared), "private_context": angled(private), "share": torch.tensor([0.4])}
    pooled = torch.nn.functional.normalize(drawn(5, 40, 2), dim=-1)
    batch = Batch(ImageFeatures(pooled, None), pooled.argmax(1))
    text = TurningTower()
    method = local(declared, text)
    assert method.prepare is not None
    best = best_share(margins(torch.stack([text.encode(params[name]) for name in NAMES]), batch))
    found = float(method.prepare(params, batch)["share"])
    assert found == pytest.approx(min(max(best, 0.1), 0.9))
    assert (found == pytest.approx(expected)) if expected else (0.1 < found < 0.9)
