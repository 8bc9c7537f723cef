"""The text tower equals open_clip's own `encode_text` wherever a prompt can be written in words, gradients included."""

import open_clip
import pytest
import torch
from plain_text import PlainText, tower_of
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.errors import FailureReason, WorkError
from silo.clip import FrozenClip
from silo.clip.tokens import Vocabulary

NAMES = ("dog", "ice_cream", "St. Bernard", "a very long-haired 12-year-old golden retriever", "t-shirt")
WORDS = "a photo of a"


def textbook(clip: FrozenClip, texts: list[str]) -> Tensor:
    """Unit-norm features by open_clip: 77 positions, padding and all."""
    features: Tensor = clip.model.encode_text(open_clip.tokenize(texts), normalize=True)
    return features


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= 1e-5 * (1 + float(expected.detach().abs().max()))


def context_for(clip: FrozenClip, *shape: int) -> Tensor:
    return torch.randn(*shape, clip.context_dim, generator=torch.Generator().manual_seed(3)) * 0.02


def test_handcrafted_prompt(mini: FrozenClip) -> None:
    expected = textbook(mini, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    close(mini.text_tower(NAMES).handcrafted(), expected)


PATTERNS = {
    ClassPosition.END: ("X X X X {}.", "X X X {}."),
    ClassPosition.MIDDLE: ("X X {} X X.", "X {} X X."),
    ClassPosition.FRONT: ("{} X X X X.", "{} X X X."),
}


@pytest.mark.parametrize("position", list(ClassPosition))
def test_placeholder_prompt(mini: FrozenClip, position: ClassPosition) -> None:
    tower = mini.text_tower(NAMES)
    for length, pattern in zip((4, 3), PATTERNS[position], strict=True):
        expected = textbook(mini, [pattern.format(name.replace("_", " ")) for name in NAMES])
        close(tower.placeholder(length, position), expected)


def test_placeholder_features_are_computed_once_for_each_length_and_position(mini: FrozenClip) -> None:
    tower = mini.text_tower(NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        first = tower.placeholder(4)
    assert tower.placeholder(4, ClassPosition.END) is first
    assert not first.requires_grad
    assert torch.equal(first, mini.text_tower(NAMES).placeholder(4))
    assert not torch.allclose(first, tower.placeholder(5))
    assert not torch.allclose(first, tower.placeholder(4, ClassPosition.FRONT))
    assert not torch.allclose(first, tower.handcrafted())  # of four words too


def test_placeholder_that_does_not_fit(mini: FrozenClip) -> None:
    with pytest.raises(WorkError, match=r"'dog' needs 81 tokens .*context length is 77; shorten"):
        mini.text_tower(["dog"]).placeholder(77)


def test_handcrafted_features_are_computed_once_whatever_the_first_caller_trains_under(mini: FrozenClip) -> None:
    tower = mini.text_tower(NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        first = tower.handcrafted()
    assert tower.handcrafted() is first
    assert not first.requires_grad
    assert torch.equal(first, mini.text_tower(NAMES).handcrafted())


def test_context_equal_to_words_gives_the_features_of_the_words(mini: FrozenClip) -> None:
    tower = mini.text_tower(NAMES)
    close(tower.encode(mini.embed_phrase(WORDS, 4)), tower.handcrafted())


@pytest.mark.parametrize(
    ("position", "pattern"),
    [(ClassPosition.FRONT, "{} a photo of a."), (ClassPosition.MIDDLE, "a photo {} of a.")],
)
def test_class_position(mini: FrozenClip, position: ClassPosition, pattern: str) -> None:
    actual = mini.text_tower(NAMES).encode(mini.embed_phrase(WORDS, 4), position)
    close(actual, textbook(mini, [pattern.format(name.replace("_", " ")) for name in NAMES]))


def test_middle_puts_the_smaller_half_first(mini: FrozenClip) -> None:
    actual = mini.text_tower(NAMES).encode(mini.embed_phrase("one two three", 3), ClassPosition.MIDDLE)
    close(actual, textbook(mini, [f"one {name.replace('_', ' ')} two three." for name in NAMES]))


@pytest.mark.parametrize("length", [1, 16])
def test_random_context_and_its_gradient(mini: FrozenClip, length: int) -> None:
    direction = torch.randn(len(NAMES), mini.feature_dim, generator=torch.Generator().manual_seed(4))
    plain, gradients = PlainText(mini.model, NAMES), []
    for encode in (mini.text_tower(NAMES).encode, plain.encode):
        context = context_for(mini, length).requires_grad_()
        features = encode(context)
        close(features, plain.encode(context))
        (features * direction).sum().backward()
        assert context.grad is not None
        gradients.append(context.grad)
    close(*gradients)
    assert all(p.grad is None and not p.requires_grad for p in mini.model.parameters())


def test_leading_dimensions(mini: FrozenClip) -> None:
    tower = mini.text_tower(NAMES)
    contexts = context_for(mini, 2, 3, 5)
    features = tower.encode(contexts)
    assert features.shape == (2, 3, len(NAMES), mini.feature_dim)
    close(features[1, 2], tower.encode(contexts[1, 2]))


@pytest.mark.parametrize("position", list(ClassPosition))
def test_class_specific_contexts(mini: FrozenClip, position: ClassPosition) -> None:
    tower = mini.text_tower(NAMES)
    contexts = context_for(mini, 2, len(NAMES), 4)
    features = tower.encode(contexts, position, class_specific=True)
    for at in range(len(NAMES)):
        close(features[1, at], tower.encode(contexts[1, at], position)[at])


def test_one_tower_serves_all_positions(mini: FrozenClip) -> None:
    tower, context = mini.text_tower(NAMES), context_for(mini, 4)
    apart = [mini.text_tower(NAMES).encode(context, position) for position in ClassPosition]
    close(torch.stack([tower.encode(context, position) for position in ClassPosition]), torch.stack(apart))
    assert not torch.allclose(apart[0], apart[1])


def test_features_do_not_depend_on_the_other_classes(mini: FrozenClip) -> None:
    context = context_for(mini, 4)
    close(mini.text_tower(NAMES[:1]).encode(context)[0], mini.text_tower(NAMES).encode(context)[0])


def test_features_have_unit_norm_and_the_scale_is_exponentiated(mini: FrozenClip) -> None:
    tower = mini.text_tower(NAMES)
    close(tower.encode(context_for(mini, 4)).norm(dim=-1), torch.ones(len(NAMES)))
    assert float(tower.logit_scale) == pytest.approx(float(mini.model.logit_scale.exp()))
    assert tower.logit_scale.shape == ()


@pytest.mark.parametrize("position", list(ClassPosition))
@pytest.mark.parametrize("classes", [(), (2,)], ids=["shared", "class specific"])
def test_longest_context_that_fits_and_one_more(
    mini: FrozenClip, classes: tuple[int, ...], position: ClassPosition
) -> None:
    names = ("dog", "ice cream")
    tower = mini.text_tower(names)
    longest = 77 - 5  # start, two words, '.', end
    context = context_for(mini, *classes, longest)
    expected = PlainText(mini.model, names).encode(context, position, bool(classes))
    close(tower.encode(context, position, bool(classes)), expected)
    with pytest.raises(WorkError, match=r"'ice cream' needs 78 tokens .*context length is 77; shorten") as caught:
        tower.encode(context_for(mini, *classes, longest + 1), position, bool(classes))
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE


def test_name_that_leaves_no_room(mini: FrozenClip) -> None:
    with pytest.raises(WorkError, match=r"needs \d+ tokens"):
        mini.text_tower(["dog " * 80])


@pytest.mark.parametrize("name", ["_", " "])
def test_names_without_words(mini: FrozenClip, name: str) -> None:
    with pytest.raises(WorkError, match="holds no words; rename the class"):
        mini.text_tower(["cat", name])


def test_phrase_of_another_length(mini: FrozenClip) -> None:
    assert mini.embed_phrase("a_photo of a", 4).shape == (4, mini.context_dim)
    with pytest.raises(WorkError, match=r"'a photo of a' has 4 tokens, but the context has 16; set the context length"):
        mini.embed_phrase(WORDS, 16)


@pytest.mark.parametrize("position", list(ClassPosition))
def test_wrong_shapes_are_programming_errors(mini: FrozenClip, position: ClassPosition) -> None:
    tower = mini.text_tower(NAMES)
    with pytest.raises(ValueError, match="wide"):
        tower.encode(torch.zeros(4, mini.context_dim + 1), position)
    for count in (1, len(NAMES) - 1, len(NAMES) + 1):  # one would broadcast
        with pytest.raises(ValueError, match="classes"):
            tower.encode(torch.zeros(2, count, 4, mini.context_dim), position, class_specific=True)


def test_no_classes(mini: FrozenClip) -> None:
    with pytest.raises(ValueError, match="at least one"):
        mini.text_tower([])


def test_compact_vocabulary_gives_the_features_of_the_whole_one(mini: FrozenClip) -> None:
    full = Vocabulary()
    names = ("red circle", "blue square")
    kept = sorted({0, full.start, full.end, *(i for text in (WORDS, *names, ".") for i in full.encode(text))})
    state = mini.model.state_dict()
    state["token_embedding.weight"] = state["token_embedding.weight"][kept]
    model = type(mini.model)(
        32,
        {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        {"context_length": 77, "vocab_size": len(kept), "width": 64, "heads": 2, "layers": 2},
    ).eval()
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("visual.")}, strict=False)
    tower = tower_of(model.requires_grad_(False), names, Vocabulary(kept))
    close(tower.handcrafted(), mini.text_tower(names).handcrafted())
    with pytest.raises(WorkError, match="'green', 'velvet'"):
        tower_of(model, ["green circle", "red velvet", "blue square"], Vocabulary(kept))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_forward_and_backward(mini: FrozenClip, dtype: torch.dtype) -> None:
    context = context_for(mini, 4).requires_grad_()
    tower = mini.text_tower(NAMES)
    with torch.autocast("cpu", dtype):
        features = tower.encode(context)
    features.float().sum().backward()
    assert context.grad is not None
    assert context.grad.dtype == torch.float32
    assert float((features.float() - tower.encode(context)).detach().abs().max()) < 0.05
