"""The benchmarks' textbook: right by open_clip's own functions, by recorded values and by hand; and its FLOPs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor

from silo.embedded import embedded_paths
from silo.examples import Examples
from tests.bench import textbook
from tests.bench.arithmetic import Step, counted_flops, needed_flops, textbook_flops
from tests.bench.measuring import Product, difference, interleaved, worst_difference
from tests.bench.setting import ADJECTIVES, NOUNS, Case, class_names, engine, gradients, random_clip, random_pixels
from tests.bench.setting import textbook as textbook_side
from tests.bench.textbook import METHODS, Textbook, contrast, make_textbook, sgd_step, unbalanced_plan
from tests.reference.recorded import FOLDER, Reference, close, load_reference, settings, values, variables, within

NAMES = ("dog", "golden_retriever", "extraordinarily unpronounceable creature of the deep")
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
recorded = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/reference/values is not here")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return CLIP(**CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def book_of(reference: Reference, method: str) -> Textbook:
    kept = values("tokens")["vocab_ids"].tolist()
    return make_textbook(method, reference.clip.model, reference.class_names, 4, kept)


def follow(
    reference: Reference, book: Textbook, params: dict[str, Tensor]
) -> tuple[Tensor, list[dict[str, Tensor]], list[float]]:
    """Logits of the first batch, then five recorded steps: the tensors after each, and the losses before."""
    optimizer = torch.optim.SGD(params.values(), 0.005, 0.9, weight_decay=0.05)
    with torch.no_grad():
        logits = book.logits(book.encode_prompts(params, to_train=False), book.encode_images(reference.images[:4]))
    states, losses = [], []
    for at in range(0, 20, 4):
        pixels, labels = reference.images[at : at + 4], reference.labels[at : at + 4]
        losses.append(sgd_step(optimizer, lambda: book.loss(params, pixels, labels)))  # noqa: B023  # called at once
        states.append({name: tensor.detach().clone() for name, tensor in params.items()})
    return logits, states, losses


def gradient(book: Textbook, params: dict[str, Tensor], reference: Reference) -> dict[str, Tensor]:
    loss = book.loss(params, reference.images[:4], reference.labels[:4])
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def test_written_prompts_are_open_clips_own_features(model: CLIP) -> None:
    book = make_textbook("fedpgp", model, NAMES, 4)
    sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    expected = model.encode_text(open_clip.tokenize(sentences), normalize=True)
    assert torch.equal(book.frozen, expected)


def test_a_context_of_words_gives_the_features_of_these_words(model: CLIP) -> None:
    book = make_textbook("promptfl", model, NAMES, 4)
    words = open_clip.tokenize("a photo of a")[0, 1:5]
    torch.testing.assert_close(book.text(model.token_embedding(words)), book.frozen)


def test_images_are_open_clips_own_features(model: CLIP) -> None:
    pixels = drawn(3, 3, 32, 32)
    expected = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(make_textbook("promptfl", model, NAMES, 4).encode_images(pixels), expected)
    tokens = make_textbook("fedotp", model, NAMES, 4).encode_images(pixels)
    assert tokens.shape == (3, 1 + 16, 32)
    torch.testing.assert_close(tokens[:, 0], expected)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(3, 17))


@recorded
def test_promptfl_as_recorded(reference: Reference) -> None:
    expected, book = values("coop"), book_of(reference, "promptfl")
    params = variables(context=expected["ctx_init"])
    close(gradient(book, params, reference)["context"], expected["grad_ctx_end"])
    logits, states, losses = follow(reference, book, params)
    close(logits, expected["logits_end"])
    close(torch.tensor(losses), expected["losses"])
    within(states[0]["context"], expected["ctx_step1"])
    within(states[4]["context"], expected["ctx_step5"])


@recorded
def test_fedotp_as_recorded(reference: Reference) -> None:
    expected, book = values("fedotp"), book_of(reference, "fedotp")
    both = expected["ctx_init"]
    params = variables(shared_context=both[0], private_context=both[1])
    close(torch.stack(list(gradient(book, params, reference).values())), expected["cot_grad_ctx"])
    logits, states, losses = follow(reference, book, params)
    close(logits, expected["cot_logits"])
    close(torch.tensor(losses), expected["losses"])
    within(torch.stack(list(states[0].values())), expected["ctx_step1"])
    within(torch.stack(list(states[4].values())), expected["ctx_step5"])


@recorded
def test_fedpgp_as_recorded(reference: Reference) -> None:
    expected, about = values("fedpgp"), settings("fedpgp")["fedpgp"]
    assert (about["mu"], about["temp"]) == (textbook.CONTRAST_WEIGHT, textbook.TEMPERATURE)
    book = book_of(reference, "fedpgp")
    book = dataclasses.replace(book, frozen=expected["text_features_norm_frozen"])  # there of "X X X X <name>."
    names = {"shared_context": "sigma", "left": "U", "right": "V"}
    params = variables(**{ours: expected[f"{theirs}_init"][0] for ours, theirs in names.items()})
    for ours, found in gradient(book, params, reference).items():
        close(found, expected[f"grad_total_{names[ours]}"][0])
    logits, states, losses = follow(reference, book, params)
    close(logits, expected["logits"])
    close(torch.tensor(losses), expected["losses"])
    for ours, theirs in names.items():
        within(states[4][ours], expected[f"{theirs}_step5"][0])


@recorded
def test_promptfolio_as_recorded(reference: Reference) -> None:
    expected, book = values("promptfolio"), book_of(reference, "promptfolio")
    both = expected["ctx_init"]
    params = variables(shared_context=both[0], private_context=both[1])
    close(torch.stack(list(gradient(book, params, reference).values())), expected["mix_grad_ctx"])
    logits, states, losses = follow(reference, book, params)
    close(logits, expected["mix_logits"])
    close(torch.tensor(losses), expected["losses"])
    within(torch.stack(list(states[4].values())), expected["ctx_step5"])


@recorded
def test_plans_as_recorded() -> None:
    expected = values("ot_solver")
    cases = [case for case in settings("ot_solver")["cases"] if case["solver"] == "COT"]
    assert len(cases) == 6
    for case in cases:
        plan, _ = unbalanced_plan(expected["similarity"], case["gamma"], case["eps"], case["thresh"], case["max_iter"])
        within(plan, expected[f"T_{case['index']}"], 5e-6)


def test_a_plan_by_hand() -> None:
    # the near patch gives its 1/2, the cap, and the far one the rest of 0.8
    plan, sweeps = unbalanced_plan(torch.tensor([[1.0], [-1.0]]), mass=0.8, entropy=1.0, threshold=1e-6)
    torch.testing.assert_close(plan, torch.tensor([[0.5], [0.3]]), atol=1e-5, rtol=0)
    assert 1 < sweeps < 100


def test_a_plan_without_caps_is_a_softmax() -> None:
    similarity = 0.1 * drawn(5, 7, 2)
    plan, sweeps = unbalanced_plan(similarity, mass=0.1, entropy=1.0, threshold=1e-6)
    torch.testing.assert_close(plan, 0.05 * similarity.softmax(-2))
    assert sweeps == 3  # v = 1 is so large that caps bind in the first; the third changes nothing


def test_the_contrast_by_hand() -> None:
    first, second = torch.eye(2)
    # nearness to the frozen prompt 1, to the personal one 0, τ = 0.5: log(1 + e^((0 − 1)/0.5))
    found = contrast(first[None], first[None], second[None])
    assert float(found) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_what_the_textbook_does_not_take(model: CLIP) -> None:
    with pytest.raises(ValueError, match=r"class 'dog' needs 78 tokens, the model takes 77"):
        make_textbook("promptfl", model, NAMES, 74)
    book = make_textbook("coop", model, NAMES, 4)
    with pytest.raises(ValueError, match=r"method 'coop' is not in the textbook; it has promptfl, fedotp"):
        book.encode_prompts({"context": drawn(4, 64)})


def start(method: str) -> dict[str, Tensor]:
    shapes: dict[str, Sequence[int]] = {"shared_context": (4, 64), "private_context": (4, 64)}
    if method == "promptfl":
        shapes = {"context": (4, 64)}
    if method == "fedpgp":
        shapes = {"shared_context": (4, 64), "left": (4, 2), "right": (2, 64)}
    return {name: (0.02 * drawn(*shape)).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_counter_agrees_with_the_formula(model: CLIP, method: str) -> None:
    book, params, pixels = make_textbook(method, model, NAMES, 4), start(method), drawn(5, 3, 32, 32)
    counted = counted_flops(lambda: book.loss(params, pixels, torch.arange(5) % 3).backward())
    assert counted.uncounted == ()
    step = Step(method, 4, (3, 4, 10), 5)
    rows = 3 * step.prompts
    again = (
        2 * 2 * 77**2 * 64 * rows
    )  # PyTorch's attention computes its scores a second time, going back, in each layer
    low_rank = 6 * 4 * 2 * 64 if method == "fedpgp" else 0  # U·V, and back to both
    _, sweeps = unbalanced_plan(similarity_of(book, params, pixels)) if method == "fedotp" else (0, 0)
    transport = sweeps * 2 * 2 * 5 * 3 * 16 * 2  # K·v and Kᵀ·u for 5 × 3 problems of 16 × 2
    assert counted.flops == textbook_flops(model, step) + again + low_rank + transport


def similarity_of(book: Textbook, params: dict[str, Tensor], pixels: Tensor) -> Tensor:
    return torch.einsum("bmd,ncd->bcmn", book.encode_images(pixels)[:, 1:], book.encode_prompts(params).detach())


def test_the_least_flops_token_by_token(model: CLIP) -> None:
    suffixes, prefix, width = (3, 4, 10), 5, 64
    total = 0
    for _prompt in range(2):
        for layer in range(2):
            last = layer == 1
            tokens = [(place, False) for place in range(prefix)]
            tokens += [(prefix + at, at == length - 1) for length in suffixes for at in range(length)]
            for place, is_end in tokens:
                runs = not last or is_end
                linear = 24 * width**2 if runs else 4 * width**2  # in the last layer keys and values only
                total += 2 * linear + (3 * 4 * width * (place + 1) if runs else 0)
        total += 3 * 2 * 2 * width * 32  # the projections of three classes, there and back
    total += 2 * 2 * 5 * 3 * 32  # cosines of five images with three classes, there and back
    assert needed_flops(model, Step("promptfolio", 4, suffixes, 5)) == total


def test_products_in_place_are_counted_and_unknown_ones_named() -> None:
    left, right, out = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    assert counted_flops(lambda: out.addmm_(left, right)).flops == 2 * 3 * 4 * 5
    assert counted_flops(lambda: torch.mv(left, right[:, 0])).flops == 2 * 3 * 4
    named = counted_flops(lambda: torch.dot(left[0], left[1]))
    assert (named.flops, named.uncounted) == (0, ("aten.dot",))


def test_differences_by_hand() -> None:
    found = difference(torch.tensor([1.0, -3.5]), torch.tensor([1.0, -3.0]))
    assert found == {"absolute": 0.5, "relative": 0.1667, "of_one_plus_max": 0.125}
    pair = {"a": torch.tensor([0.0]), "b": torch.tensor([1.0])}
    assert worst_difference(pair, {"a": torch.tensor([0.0]), "b": torch.tensor([4.0])})["absolute"] == 3.0


def test_work_is_done_in_turns() -> None:
    done: list[str] = []
    work = {"slow": lambda: done.append("slow"), "fast": lambda: done.append("fast")}
    taken = interleaved(work, torch.device("cpu"), 2, {"fast": 2})
    assert done == ["slow", "fast", "fast"] * 2
    assert {name: len(times) for name, times in taken.items()} == {"slow": 2, "fast": 4}


def test_the_peak_is_the_best_product() -> None:
    assert Product(lambda: None, gflop=6.0).gflops([3.0, 2.0]) == 3.0


def test_class_names_are_distinct_and_short() -> None:
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    assert all(len(tokenizer.encode(word)) == 1 for word in (*NOUNS.split(), *ADJECTIVES.split()))
    for count in (1, 10, 100, 1000):
        names = class_names("ViT-B-16", count)
        assert len(set(names)) == count
    assert [len(name.split()) for name in class_names("ViT-B-16", 4)] == [1, 1, 2, 2]


@pytest.mark.skipif(not embedded_paths().weights_path.is_file(), reason="the embedded CLIP has not been trained here")
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_agrees_with_the_textbook(method: str) -> None:
    stops = {"stopping": "stack"} if method == "fedotp" else {}
    case = Case(random_clip("fedrt-tiny", torch.device("cpu")), method, 5, 3, 4, stops)
    pixels = random_pixels(case.clip, 4)
    features = case.clip.encode_images(pixels, case.declared.needs_patches)
    ours = engine(case, Examples(features, torch.arange(4), case.labels()))
    book = textbook_side(case, pixels)
    assert difference(ours.logits(), book.logits())["of_one_plus_max"] < 5e-5
    assert worst_difference(gradients(ours), gradients(book))["of_one_plus_max"] < 5e-5
    before = {name: tensor.detach().clone() for name, tensor in ours.params.items()}
    ours.step()
    book.step()
    for name, tensor in ours.params.items():
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, book.params[name], atol=1e-5, rtol=0)
