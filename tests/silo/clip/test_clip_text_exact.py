"""Property: features, logits and gradients of the text tower equal the textbook's, whatever the names and contexts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings, target
from hypothesis import strategies as st
from open_clip.model import CLIP
from plain_text import TEXT_MODELS, TOKENIZER, TOLERANCE, PlainText, error, text_model, tower_of
from torch import Tensor

from fedrt.context import ClassPosition

UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target]  # shrinking outlasts the suite's time limit
SMALL_MODELS = [kind for kind in TEXT_MODELS if kind != "RN50"]
END, MIDDLE, FRONT = ClassPosition.END, ClassPosition.MIDDLE, ClassPosition.FRONT
FAMILIES = (  # a name is the beginning of one of them, so that names share beginnings of many lengths
    "red fox cub at the edge of a dark pine forest on an early winter morning",
    "red foxglove in a jar",
    "Pneumonoultramicroscopicsilicovolcanoconiosis grade 2",
    "boeing_737-800 of the 1999 series, painted white & blue (second hull no. 31415926)",
    "größe: naïve fiancée 狐狸 🦊 красный αβγ",
    "I I I I I I I I I I I I I I I",
    "X X dog's ST. BERNARD's t-shirt",
)
WORDS = (
    "dog",
    "fox",
    "red",
    "CUB",
    "a",
    "X",
    "o'clock",
    "12",
    "3.14",
    "-",
    "!",
    "mRNA",
    "狐狸",
    "🦊",
    "califragilistic",
)


@dataclass(frozen=True)
class Call:
    """One use of a tower: contexts [*leading, (C,) length, E] of normal numbers times `size`."""

    length: int
    leading: tuple[int, ...] = ()
    position: ClassPosition = END
    class_specific: bool = False
    size: float = 0.02  # the papers' initial contexts; trained ones grow
    seed: int = 0

    def context(self, model: CLIP, class_count: int) -> Tensor:
        classes = (class_count,) if self.class_specific else ()
        shape = (*self.leading, *classes, self.length, model.positional_embedding.shape[1])
        return self.size * torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class Case:
    kind: str
    names: tuple[str, ...]
    calls: tuple[Call, ...]  # on one tower; all are encoded before the first is differentiated
    activation_limit: int = 1 << 40  # with 0, layers are computed again for the backward pass


Encode = Callable[[Tensor, ClassPosition, bool], Tensor]


def longest_context(model: CLIP, names: Sequence[str]) -> int:
    longest = max(len(TOKENIZER.encode(f"{name.replace('_', ' ')}.")) for name in names)
    return int(model.context_length) - 2 - longest


def loss_of(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of five random images, and a loss of all features; so large that 1 + max forgives no gradient."""
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(5, features.shape[-1], generator=generator), dim=-1).to(features.dtype)
    weights = torch.randn(features.shape, generator=generator).to(features.dtype)
    logits = 100 * images @ features.mT  # [..., 5, C]
    labels = torch.randint(0, features.shape[-2], (logits[..., 0].numel(),), generator=generator)
    return logits, 100 * (F.cross_entropy(logits.flatten(0, -2), labels) + (weights * features).sum())


def outcomes(encode: Encode, calls: Sequence[Call], contexts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features, logits and gradient of each call. The last one is differentiated first."""
    variables = [context.clone().requires_grad_() for context in contexts]
    features = [encode(x, call.position, call.class_specific) for x, call in zip(variables, calls, strict=True)]
    logits, losses = zip(*map(loss_of, features, [call.seed for call in calls]), strict=True)
    gradients = [torch.autograd.grad(losses[at], variables[at])[0] for at in reversed(range(len(calls)))]
    return list(zip(features, logits, reversed(gradients), strict=True))


def check(case: Case) -> float:
    """Raises if anything differs by more than the tolerance; the largest error otherwise."""
    model = text_model(case.kind)
    contexts = [call.context(model, len(case.names)) for call in case.calls]
    tower = tower_of(model, case.names, activation_limit=case.activation_limit)
    actual = outcomes(tower.encode, case.calls, contexts)
    worst = 0.0
    for dtype in (torch.float32, torch.float64):
        plain = outcomes(PlainText(model, case.names, dtype).encode, case.calls, contexts)
        for call, ours, theirs in zip(case.calls, actual, plain, strict=True):
            for what, one, other in zip(("features", "logits", "gradient"), ours, theirs, strict=True):
                worst = max(worst, error(one, other))
                assert error(one, other) <= TOLERANCE, f"{what} of {call} differ from the textbook in {dtype}"
    return worst


def plain_spelling(name: str) -> bool:
    """Whether a name has words, and has the same ones alone, before a dot and after other words.

    The tokeniser repairs letters that look damaged, such as "Ã ", and joins punctuation marks: both look around them.
    """
    alone, ended, inside = (TOKENIZER.encode(text) for text in (name, f"{name}.", f"X {name}."))
    return 0 < len(alone) <= len(ended) and ended == inside[1:]


def fitting(words: list[str], separator: str, room: int) -> str:
    """As many of the words as fit into a number of tokens, '.' included; 'dog' if none do.

    A name ends with no separator: CoOp keeps it and the tower strips it, which tells after a punctuation mark only.
    """
    while words and len(TOKENIZER.encode(" ".join(words).replace("_", " ") + ".")) > room:
        words.pop()
    name = separator.join(words)
    return name if plain_spelling(name.replace("_", " ")) else "dog"


@st.composite
def class_names(draw: st.DrawFn, room: int) -> tuple[str, ...]:
    anything = st.text(st.characters(categories=("L", "M", "N", "P", "S")), min_size=1, max_size=6)
    word = st.one_of(st.sampled_from(WORDS), anything.map(lambda text: text.replace("_", "") or "dog"))
    beginning = st.builds(lambda family, count: family.split()[:count], st.sampled_from(FAMILIES), st.integers(1, 15))
    words = st.one_of(beginning, st.lists(word, min_size=1, max_size=15))
    name = st.builds(fitting, words, separator=st.sampled_from([" ", "_", "  "]), room=st.just(room))
    count = draw(st.one_of(st.integers(1, 6), st.integers(1, 40)))
    return tuple(draw(st.lists(name, min_size=count, max_size=count)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(SMALL_MODELS))
    model = text_model(kind)
    names = draw(class_names(room=model.context_length - 3))
    longest = longest_context(model, names)
    call = st.builds(
        Call,
        length=st.one_of(st.integers(1, min(4, longest)), st.integers(1, longest), st.just(longest)),
        leading=st.sampled_from([(), (1,), (2,), (3,), (2, 2)]),
        position=st.sampled_from(list(ClassPosition)),
        class_specific=st.booleans(),
        size=st.sampled_from([0.0, 0.02, 0.5]),
        seed=st.integers(0, 2**31),
    )
    calls = tuple(draw(st.lists(call, min_size=1, max_size=2)))
    return Case(kind, names, calls, draw(st.sampled_from([0, 1 << 40])))


@settings(max_examples=60, phases=UNSHRUNK)
@given(cases())
@example(Case("heads of 64", ("dog",), (Call(1),)))  # one class of one token, one context token
@example(Case("one layer", ("dog", "red fox", "red fox cub"), (Call(4, (2,)), Call(4, (2,), seed=1))))
@example(Case("heads of 32", ("Dog", "dog", "dog_", "_dog", "dog!", "3.1"), (Call(3, (2,)), Call(3, (2,), FRONT))))
@example(Case("short", ("a", " ".join("I" * 21)), (Call(1, class_specific=True), Call(1, (1,), MIDDLE))))
def test_equals_the_textbook(case: Case) -> None:
    target(check(case), label="error")


@pytest.mark.parametrize("position", list(ClassPosition))
def test_longest_context_that_fits(position: ClassPosition) -> None:
    names = ("dog", "red fox", "Pneumonoultramicroscopicsilicovolcanoconiosis")
    longest = longest_context(text_model("heads of 32"), names)
    assert longest + len(TOKENIZER.encode(names[2])) == 74  # with start, '.' and end it fills the 77
    check(Case("heads of 32", names, (Call(longest, (2,), position),)))


def test_a_thousand_classes() -> None:
    beginnings = [" ".join(family.split(" ")[:4]) for family in FAMILIES[:3]]
    names = tuple(f"{beginnings[number % 3]} {number}"[: 3 + number % 29].strip() for number in range(1000))
    assert len({len(TOKENIZER.encode(name)) for name in names}) >= 10
    check(Case("short", names, (Call(4),)))


RN50_NAMES = ("dog", "a very long-haired 12-year-old golden retriever", "ice_cream")


@pytest.mark.parametrize(
    "call",
    [Call(16, (2,)), Call(1, position=MIDDLE, size=0.5), Call(5, (), FRONT, class_specific=True)],
    ids=["end", "middle", "front"],
)
def test_text_tower_of_rn50(call: Call) -> None:
    check(Case("RN50", RN50_NAMES, (call,)))


@pytest.mark.parametrize(
    ("position", "pattern"), [(END, "small red {}."), (MIDDLE, "small {} red."), (FRONT, "{} small red.")]
)
def test_textbook_reads_words_as_open_clip_does(position: ClassPosition, pattern: str) -> None:
    model, names = text_model("heads of 32"), ("dog", "Ice_Cream", "t-shirt")
    words = model.token_embedding(torch.tensor(TOKENIZER.encode("small red")))
    texts = [pattern.format(name.replace("_", " ")) for name in names]
    expected = model.encode_text(TOKENIZER(texts), normalize=True)
    for dtype in (torch.float32, torch.float64):
        assert error(PlainText(model, names, dtype).encode(words, position), expected) < 1e-6


def test_textbook_refuses_what_the_tokeniser_would_cut() -> None:
    with pytest.raises(AssertionError, match="cut a prompt short"):
        PlainText(text_model("one layer"), ["dog"]).encode(torch.zeros(13, 64))


NAMES = ("dog", "red", "red fox", "red fox cub", "a very long-haired 12-year-old golden retriever", "t-shirt")


@pytest.mark.parametrize("position", list(ClassPosition))
def test_constants_are_exact_even_if_first_asked_for_under_autocast(position: ClassPosition) -> None:
    model = text_model("heads of 32")
    tower, plain = tower_of(model, NAMES), PlainText(model, NAMES, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        constants = {"a photo of a": tower.handcrafted(), "X X X": tower.placeholder(3, position)}
    for phrase, features in constants.items():
        words = model.token_embedding(torch.tensor(TOKENIZER.encode(phrase)))
        expected = plain.encode(words, position if phrase == "X X X" else END)
        assert error(features, expected) <= TOLERANCE
        assert features.dtype == torch.float32
        assert not features.requires_grad


@settings(max_examples=15)
@given(st.data(), st.sampled_from(list(ClassPosition)), st.booleans())
def test_a_class_does_not_depend_on_the_list_around_it(
    data: st.DataObject, position: ClassPosition, class_specific: bool
) -> None:
    model = text_model("heads of 32")
    names = data.draw(class_names(room=24))
    chosen = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=8))
    context = Call(3, (2,), class_specific=class_specific).context(model, len(names))
    together = tower_of(model, names).encode(context, position, class_specific)
    some = context[:, chosen] if class_specific else context
    apart = tower_of(model, [names[at] for at in chosen]).encode(some, position, class_specific)
    assert error(apart, together[:, chosen]) <= TOLERANCE


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", list(ClassPosition))
def test_a_prompt_does_not_depend_on_the_others_of_its_call(position: ClassPosition, class_specific: bool) -> None:
    model = text_model("wide and deep")
    tower = tower_of(model, NAMES)
    contexts = Call(5, (2, 2), size=0.5, class_specific=class_specific).context(model, len(NAMES))
    together = tower.encode(contexts, position, class_specific)
    for first, second in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        alone = tower.encode(contexts[first, second], position, class_specific)
        assert error(alone, together[first, second]) <= TOLERANCE
        assert error(together[first, second], together[1 - first, second]) > 1000 * TOLERANCE
