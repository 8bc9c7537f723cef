"""FedOTP: its declaration, logits by hand, a plan that is a constant, and every shape of context."""

import json
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from towers import (
    DIMS,
    LinearTower,
    TurningTower,
    angled,
    drawn,
    examples,
    images,
    labelled,
    local,
    make,
    tensors,
    trained,
    variables,
)

from fedrt.aggregation import Median
from fedrt.context import ClassPosition
from fedrt.errors import SpecError
from fedrt.method import hyperparameters_json
from fedrt.methods import make_method
from fedrt.methods.fedotp import FedOTP
from fedrt.spec import OptimizerSpec, Precision
from fedrt.tensors import Normal, Phrase, Scope, TensorSpec
from silo.clip import FrozenClip, load_clip
from silo.method import Batch, ImageFeatures, Params, TextTower
from silo.methods.fedotp import build, similarity
from silo.sources import ModelSource
from silo.transport import Transport, transport_plan

NAMES = ("red circle", "blue square", "green triangle")


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return load_clip(ModelSource("fedrt-tiny", "embedded"))


def declared(**settings: object) -> FedOTP:
    return cast(FedOTP, make("fedotp", **settings))


def patches_of(given: ImageFeatures) -> Tensor:
    assert given.patches is not None
    return given.patches


def by_formula(method: FedOTP, text: TextTower, prompts: list[Tensor], given: ImageFeatures) -> Tensor:
    """s · Σ_mn T·S for prompts [C, D], with a plan for one image and class at a time."""
    solver = Transport(method.entropy, method.mass, method.threshold, method.max_sweeps)
    rows = []
    for patches in patches_of(given):
        cosines = [torch.stack([patches @ prompt[c] for prompt in prompts], -1) for c in range(len(prompts[0]))]
        rows.append(torch.stack([(transport_plan(one, solver) * one).sum() for one in cosines]))
    return text.logit_scale * torch.stack(rows)


def test_the_declaration() -> None:
    assert FedOTP.needs_patches
    assert FedOTP(context_length=5).tensors(DIMS) == (
        TensorSpec("shared_context", (5, 6), Scope.SHARED, Normal(0.02)),
        TensorSpec("private_context", (5, 6), Scope.PRIVATE, Normal(0.02)),
    )
    several = FedOTP(context_length=5, context_count=2, class_specific=True)
    assert [spec.shape for spec in several.tensors(DIMS)] == [(2, 3, 5, 6)] * 2
    assert make_method("fedotp", "{}") == FedOTP(
        context_length=16,
        mass=0.8,
        entropy=0.1,
        threshold=1e-3,
        max_sweeps=100,
        solver="unbalanced",
        stopping="problem",
    )


def test_written_hyperparameters_make_the_same_method() -> None:
    method = FedOTP(mass=1.0, entropy=0.01, solver="balanced", stopping="stack", max_sweeps=7, server=Median())
    assert make_method("fedotp", hyperparameters_json(method)) == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mass": 0}, r"mass is 0.0; it must be above 0 and at most 1"),
        ({"mass": -0.5}, "mass is -0.5; it must be above 0 and at most 1"),
        ({"mass": 1.001}, r"mass is 1.001; it must be above 0 and at most 1"),
        ({"mass": math.nan}, "mass is nan; it must be above 0 and at most 1"),
        ({"mass": "much"}, "'fedotp': mass: .*valid number.*; got 'much'"),
        ({"entropy": 0}, "entropy is 0.0; it must be positive"),
        ({"entropy": -1}, "entropy is -1.0; it must be positive"),
        ({"entropy": math.nan}, "entropy is nan; it must be positive"),
        ({"entropy": math.inf}, "entropy is inf; it must be positive"),
        ({"threshold": 0}, "threshold is 0.0; it must be positive"),
        ({"threshold": math.nan}, "threshold is nan; it must be positive"),
        ({"threshold": math.inf}, "threshold is inf; it must be positive"),
        ({"max_sweeps": 0}, "max_sweeps is 0; it must be at least 1"),
        ({"max_sweeps": 1.5}, "'fedotp': max_sweeps: .*valid integer.*; got 1.5"),
        ({"solver": "sinkhorn"}, "'fedotp': solver: Input should be 'unbalanced' or 'balanced'; got 'sinkhorn'"),
        ({"stopping": "batch"}, "'fedotp': stopping: Input should be 'problem' or 'stack'; got 'batch'"),
        ({"gamma": 0.8}, "'fedotp' has no hyper-parameter 'gamma'"),
        ({"context_length": 0}, "context_length must be at least 1"),
    ],
)
def test_a_wrong_hyperparameter_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_method("fedotp", json.dumps(values))


def test_logits_by_hand() -> None:
    """γ = ½ fills none of two patches, so T = ¼ · softmax(S/ε); with ε = 1 / ln 3 a cosine more weighs three times."""
    method = build(FedOTP(context_length=1, mass=0.5, entropy=1 / math.log(3), threshold=1e-9), TurningTower())
    axes = ImageFeatures(torch.tensor([[0.6, 0.8]]), torch.eye(2)[None])
    alike = method.classify({"shared_context": angled(0.0), "private_context": angled(0.0)})
    # each prompt sees one patch with cosine 1 and weight ¾, and one with cosine 0
    torch.testing.assert_close(alike(axes), torch.tensor([[0.75, 0.75]]))  # 2 · 2 · ¼ · ¾
    apart = method.classify({"shared_context": angled(0.0), "private_context": angled(math.pi / 2)})
    # private prompts: (0, 1) for the first class; (−1, 0) for the second, whose weights ¼ and ¾ go to −1 and 0
    torch.testing.assert_close(apart(axes), torch.tensor([[0.75, 2 * 0.25 * (0.75 - 0.25)]]))


def test_a_full_patch_by_hand() -> None:
    """One prompt direction, kernels 4:1, γ = ¾: the cap gives the patches ½ and ¼, not 0.6 and 0.15."""
    method = build(FedOTP(context_length=1, mass=0.75, entropy=1 / math.log(4), threshold=1e-9), TurningTower())
    params = {"shared_context": angled(0.0), "private_context": angled(0.0)}
    axes = ImageFeatures(torch.zeros(1, 2), torch.eye(2)[None])
    torch.testing.assert_close(method.classify(params)(axes), torch.tensor([[1.0, 1.0]]))  # 2 · ½


def test_alike_patches_leave_the_mean_cosine_times_the_mass() -> None:
    params = tensors(declared())
    given = ImageFeatures(images().pooled, patches_of(images())[:, :1].expand(-1, 7, -1))
    text = LinearTower()
    prompts = torch.stack([text.encode(params[name]) for name in params]).mean(0)
    for mass in (0.3, 0.8, 1.0):
        logits = local(declared(mass=mass)).classify(params)(given)
        torch.testing.assert_close(logits, mass * text.logit_scale * patches_of(given)[:, 0] @ prompts.T)


def test_mass_scales_logits_while_no_patch_is_full() -> None:
    params = tensors(declared())
    one, two = (local(declared(mass=mass)).classify(params)(images()) for mass in (0.07, 0.14))
    torch.testing.assert_close(two, 2 * one)
    full = local(declared(mass=0.98)).classify(params)(images())
    assert float((full - 14 * one).abs().max()) > 0.1  # then patches that suit less are taken too


def test_the_balanced_solver_uses_every_patch_whatever_the_mass() -> None:
    params = tensors(declared())
    balanced = [local(declared(solver="balanced", mass=mass)).classify(params)(images()) for mass in (0.1, 1.0)]
    assert torch.equal(*balanced)
    capped = local(declared(mass=1.0, threshold=1e-7, max_sweeps=100_000)).classify(params)(images())
    exact = local(declared(solver="balanced", threshold=1e-7)).classify(params)(images())
    torch.testing.assert_close(capped, exact, rtol=1e-3, atol=1e-3)
    assert float((exact - local(declared()).classify(params)(images())).abs().max()) > 0.1


def test_pooled_features_are_no_patch_and_are_not_used() -> None:
    classifier = local(declared()).classify(tensors(declared()))
    before = images()
    other = before._replace(pooled=-before.pooled)
    assert torch.equal(classifier(other), classifier(before))
    among = before._replace(patches=torch.cat([before.pooled[:, None], patches_of(before)], 1))
    assert float((classifier(among) - classifier(before)).abs().max()) > 0.1


def test_images_without_patches() -> None:
    classifier = local(declared()).classify(tensors(declared()))
    with pytest.raises(ValueError, match="'fedotp' classifies by patches"):
        classifier(ImageFeatures(images().pooled, None))


def test_the_order_of_patches_does_not_matter() -> None:
    classifier = local(declared()).classify(tensors(declared()))
    turned = images()._replace(patches=patches_of(images()).flip(1))
    torch.testing.assert_close(classifier(turned), classifier(images()))


def gradients_of(loss: Tensor, params: Params) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(params.values())))


def with_plan(params: Params, plan: Tensor | None, mass: float, entropy: float, batch: Batch) -> Tensor:
    """The loss at a given plan; or with the closed form of the plan, differentiated."""
    text = LinearTower()
    cosines = similarity(patches_of(batch.images), torch.stack([text.encode(tensor) for tensor in params.values()]))
    if plan is None:
        plan = mass / 2 * (cosines / entropy).softmax(-2)
    return F.cross_entropy(text.logit_scale * (plan * cosines).sum((-2, -1)).T, batch.labels)


def test_the_plan_is_a_constant_for_the_gradient() -> None:
    mass, entropy, batch = 1 / 7, 0.1, labelled()  # of seven patches none is full, so the plan has a closed form
    method = declared(mass=mass, entropy=entropy, threshold=1e-7)
    params = variables(method)
    loss = local(method).loss(params, {}, batch)
    prompts = torch.stack([LinearTower().encode(tensor.detach()) for tensor in params.values()])
    plan = transport_plan(similarity(patches_of(batch.images), prompts), Transport(entropy, mass, 1e-7))
    constant, through = (with_plan(params, one, mass, entropy, batch) for one in (plan, None))
    torch.testing.assert_close(constant, loss)
    torch.testing.assert_close(through, loss)
    ours = gradients_of(loss, params)
    for mine, expected, wrong in zip(ours, gradients_of(constant, params), gradients_of(through, params), strict=True):
        torch.testing.assert_close(mine, expected)
        assert float((mine - wrong).abs().max()) > 0.1 * float(mine.abs().max())


@pytest.mark.parametrize("settings", [{}, {"solver": "balanced"}, {"stopping": "stack"}, {"context_count": 2}])
def test_both_contexts_get_gradient(settings: dict[str, object]) -> None:
    params = variables(declared(**settings))
    gradients = gradients_of(local(declared(**settings)).loss(params, {}, labelled()), params)
    shared, private = (gradient.flatten(0, -3) if gradient.dim() > 2 else gradient[None] for gradient in gradients)
    assert float((shared - private).abs().max()) > 0
    for gradient in (*shared, *private):  # of each single context
        assert float(gradient.abs().max()) > 1e-4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_contexts_are_that_many_prompts_encoded_in_one_pass(count: int) -> None:
    method, text = declared(context_count=count), LinearTower()
    params = tensors(method)
    logits = local(method, text).classify(params)(images())
    assert text.calls == [(2, count, 3, 6)]
    every = [context for tensor in params.values() for context in tensor.reshape(count, 3, 6)]
    prompts = [text.encode(context) for context in every]
    torch.testing.assert_close(logits, by_formula(method, text, prompts, images()))
    # which of them are shared makes no difference to an image
    swapped = {"shared_context": params["private_context"], "private_context": params["shared_context"]}
    torch.testing.assert_close(local(method).classify(swapped)(images()), logits)


def contexts_for(clip: FrozenClip, method: FedOTP) -> dict[str, Tensor]:
    dims = (*method.leading(DIMS), method.context_length, clip.context_dim)
    return {name: 0.2 * drawn(at, *dims) for at, name in enumerate(("shared_context", "private_context"))}


def pictures(clip: FrozenClip) -> ImageFeatures:
    return clip.encode_images(drawn(9, 4, 3, 32, 32), patches=True)


@pytest.mark.parametrize("position", list(ClassPosition))
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_every_class_position_and_class_specific_contexts_on_clip(
    clip: FrozenClip, position: ClassPosition, class_specific: bool, count: int
) -> None:
    """What the authors' code cannot do with two prompts."""
    method = declared(class_position=position, class_specific=class_specific, context_count=count)
    text, params, given = clip.text_tower(NAMES), contexts_for(clip, method), pictures(clip)
    logits = local(method, text).classify(params)(given)
    every = [context for tensor in params.values() for context in (tensor if count > 1 else [tensor])]
    prompts = [text.encode(context, position, class_specific) for context in every]
    torch.testing.assert_close(logits, by_formula(method, text, prompts, given), rtol=1e-4, atol=1e-4)
    if position is not ClassPosition.END:
        end = local(declared(class_specific=class_specific, context_count=count), text).classify(params)(given)
        assert float((logits - end).abs().max()) > 1e-2


def test_class_specific_contexts_are_of_one_class_each() -> None:
    method = declared(class_specific=True)
    params, common = tensors(method), tensors(declared())
    same = {name: tensor.expand(3, 3, 6).clone() for name, tensor in common.items()}
    logits = local(method).classify(same)(images())
    torch.testing.assert_close(logits, local(declared()).classify(common)(images()))
    same["private_context"][1] = params["private_context"][1]
    changed = (local(method).classify(same)(images()) - logits).abs().amax(0)
    assert float(changed[1]) > 0.1
    assert float(changed[[0, 2]].max()) < 1e-5


def test_contexts_from_words(clip: FrozenClip) -> None:
    """Both start from the same words: then prompts are twins, and their gradients equal."""
    method = FedOTP(context_length=4, context_init="a photo of a")
    assert [spec.init for spec in method.tensors(DIMS)] == [Phrase("a photo of a")] * 2
    text, given = clip.text_tower(NAMES), pictures(clip)
    words = clip.embed_phrase("a photo of a", 4)
    params = {spec.name: words.clone().requires_grad_() for spec in method.tensors(DIMS)}
    logits = local(method, text).classify(params)(given)
    handcrafted = text.handcrafted()
    torch.testing.assert_close(
        logits, by_formula(method, text, [handcrafted, handcrafted], given), rtol=1e-4, atol=1e-4
    )
    shared, private = gradients_of(F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])), params)
    assert float(shared.abs().max()) > 1e-4
    torch.testing.assert_close(shared, private)


@pytest.mark.parametrize("entropy", [0.01, 0.001])
@pytest.mark.parametrize("solver", ["unbalanced", "balanced"])
def test_half_precision_stays_finite_with_a_small_entropy(clip: FrozenClip, entropy: float, solver: str) -> None:
    method = declared(entropy=entropy, solver=solver)
    text, given = clip.text_tower(NAMES), pictures(clip)
    params = {name: tensor.requires_grad_() for name, tensor in contexts_for(clip, method).items()}
    halves = ImageFeatures(given.pooled.bfloat16(), patches_of(given).bfloat16())
    for features in (given, halves):
        with torch.autocast("cpu", torch.bfloat16):
            logits = local(method, text).classify(params)(features)
            loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        assert logits.dtype is torch.float32
        assert bool(logits.isfinite().all())
        assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(loss, params))
    exact = local(method, text).classify(params)(given)
    assert float((logits - exact).detach().abs().max()) < 0.02 * float(text.logit_scale)


def test_similarities_are_not_rounded_under_autocast() -> None:
    patches, prompts = patches_of(images()), F.normalize(drawn(5, 2, 3, 4), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        cosines = similarity(patches, prompts)
    assert torch.equal(cosines, similarity(patches, prompts))
    assert cosines.shape == (3, 5, 7, 2)
    assert cosines.movedim(-1, 0).is_contiguous()  # as the plan wants it
    for b, c, m, n in ((0, 0, 0, 0), (4, 2, 6, 1), (1, 2, 3, 0)):
        assert float(cosines[c, b, m, n]) == pytest.approx(float(patches[b, m] @ prompts[n, c]), abs=1e-6)


def test_the_settings_of_the_search_arrive() -> None:
    params = tensors(declared(context_count=2))  # four prompts, whose plans are found by sweeps

    def logits(**settings: Any) -> Tensor:
        return local(declared(context_count=2, **settings)).classify(params)(images())

    usual = logits()
    for settings in ({"max_sweeps": 2}, {"threshold": 1.0}, {"entropy": 0.2}, {"mass": 0.7}, {"solver": "balanced"}):
        assert float((logits(**settings) - usual).abs().max()) > 1e-3, settings


def test_the_exact_plan_of_two_prompts_is_what_the_sweeps_tend_to() -> None:
    params = tensors(declared())

    def logits(**settings: Any) -> Tensor:
        return local(declared(**settings)).classify(params)(images())

    exact = logits()
    assert torch.equal(logits(threshold=1.0, max_sweeps=1), exact)  # which only bound the sweeps
    torch.testing.assert_close(logits(stopping="stack", threshold=1e-9, max_sweeps=10_000), exact, rtol=1e-5, atol=1e-5)


def test_an_image_depends_on_its_batch_only_if_all_stop_together() -> None:
    params = tensors(declared())

    def off(**settings: object) -> float:
        """How far the logits of single images are from those in a batch."""
        classifier = local(declared(**settings)).classify(params)
        alone = torch.cat([classifier(examples().batch(slice(at, at + 1)).images) for at in range(5)])
        return float((alone - classifier(images())).abs().max())

    assert off() < 1e-5
    assert off(stopping="stack", threshold=20.0) > 1e-3


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("settings", [{}, {"entropy": 0.01}, {"solver": "balanced"}, {"stopping": "stack"}])
def test_training_lowers_the_loss(settings: dict[str, object], precision: Precision) -> None:
    method = declared(**settings)
    start = tensors(method, size=0.1)
    optimizer = OptimizerSpec(learning_rate=0.05, weight_decay=0.0)
    result = trained(method, examples(), start, local_epochs=30, optimizer=optimizer, precision=precision)
    batch, loss = labelled(), local(method).loss
    before, after = (float(loss(params, {}, batch)) for params in (start, {**result.shared, **result.private}))
    assert after < 0.7 * before
    assert all(not torch.equal(start[name], tensor) for name, tensor in {**result.shared, **result.private}.items())
