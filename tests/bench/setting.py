"""What the benchmarks of the engine run on: a CLIP with random weights, short class names, images and tensors."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from fedrt.method import Method, ModelDims
from fedrt.methods import make_method
from fedrt.spec import OptimizerSpec, Precision
from fedrt.tensors import initial_tensors
from silo.clip import FrozenClip, load_clip
from silo.clip.architecture import TINY, find_architecture
from silo.clip.views import Preprocessing
from silo.embedded.datasets import world_class_names
from silo.examples import Examples
from silo.method import Batch, LocalMethod
from silo.methods import find_local_method
from silo.sources import ModelSource
from silo.training import autocast, descend, deterministic, make_optimizer
from tests.bench.arithmetic import Step
from tests.bench.textbook import Textbook, make_textbook, sgd_step

SEED = 1
RANK = 8  # of FedPGP
NOUNS = """
apple baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel car castle cat cattle
chair clock cloud cow crab crocodile cup dinosaur dolphin elephant flower forest fox girl hamster horse house
kangaroo lamp leopard lion lizard lobster man moose motorcycle mountain mouse mushroom oak orange orchid otter
palm panda pear pine plain plate poppy rabbit raccoon ray river road rocket rose sea seal shark skunk snail
snake spider squirrel sunflower table tank telephone television tiger tractor train tree trout tulip turtle
wardrobe whale willow wolf woman worm airplane banana bird boat book box bread bucket cake camera candle carrot
cheese chicken church coat corn cross crown desk dog door dress drum duck egg eagle fish flag fork frog glass
goat guitar hammer hat helmet key kite knife leaf lemon monkey moon needle onion owl pen penguin piano pig pizza
potato ring robot ruler sail sheep ship shirt shoe spoon star sword tomato tooth truck umbrella violin wheel
window zebra
"""  # one token each
ADJECTIVES = """
red blue green yellow black white small big old young wild golden silver wooden round tall short striped spotted
dark bright broken frozen wet dry flat sharp soft heavy light
"""  # one token each


def class_names(architecture: str, count: int) -> tuple[str, ...]:
    """Short names, half of them of one token and half of two, while there are enough of one; always the same."""
    if architecture == TINY:  # its vocabulary is its own
        return world_class_names()[:count]
    single = NOUNS.split()
    pairs = [f"{adjective} {noun}" for adjective in ADJECTIVES.split() for noun in single]
    chosen = random.Random(SEED)
    chosen.shuffle(single)
    chosen.shuffle(pairs)
    first = min(-(-count // 2), len(single))
    return (*single[:first], *pairs[: count - first])


def random_clip(architecture: str, device: torch.device) -> FrozenClip:
    """A frozen CLIP with weights as open_clip draws them, always the same; the embedded one under its own name."""
    if architecture == TINY:
        return load_clip(ModelSource(TINY, "embedded", str(device)))
    found = find_architecture(architecture)
    torch.manual_seed(SEED)
    model = found.build(quick_gelu=False).requires_grad_(False).eval().to(device)
    preprocess = Preprocessing(PreprocessCfg(size=model.visual.image_size))
    return FrozenClip(found.name, "0" * 64, model, found.vocabulary(), preprocess)


def random_pixels(clip: FrozenClip, count: int) -> Tensor:
    """Prepared images [B, 3, H, W] of noise, each of another brightness and contrast so that they differ."""
    generator = torch.Generator().manual_seed(SEED)
    size = clip.model.visual.image_size
    noise = torch.randn(count, 3, *(size if isinstance(size, tuple) else (size, size)), generator=generator)
    shift, contrast = torch.randn(2, count, 3, 1, 1, generator=generator)
    return (noise * (0.5 + contrast.abs()) + shift).to(clip.device)


@dataclass(frozen=True)
class Case:
    """One method, C classes, contexts of L vectors, and batches of B images."""

    clip: FrozenClip
    method_name: str
    class_count: int
    context_length: int
    batch_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)  # further hyper-parameters of the method

    @property
    def names(self) -> tuple[str, ...]:
        return class_names(self.clip.architecture, self.class_count)

    @property
    def declared(self) -> Method:
        values = {"context_length": self.context_length, **self.settings}
        if self.method_name == "fedpgp":
            values["rank"] = min(RANK, self.context_length)
        return make_method(self.method_name, json.dumps(values))

    @property
    def step(self) -> Step:
        """What the arithmetic is done with."""
        lengths = [len(self.clip.vocabulary.encode(f"{name}.")) + 1 for name in self.names]
        return Step(self.method_name, self.context_length, lengths, self.batch_size)

    def mean_name_tokens(self) -> float:
        """Tokens of a class name, without full stop and end."""
        lengths = self.step.suffix_lengths
        return sum(lengths) / len(lengths) - 2

    def labels(self) -> Tensor:
        return (torch.arange(self.batch_size) % self.class_count).to(self.clip.device)

    def start(self) -> dict[str, Tensor]:
        """The tensors that both sides start from, collecting gradients."""
        specs = self.declared.tensors(ModelDims(self.clip.context_dim, self.clip.feature_dim, self.class_count))
        drawn = initial_tensors(specs, SEED)
        return {name: torch.tensor(array, device=self.clip.device).requires_grad_() for name, array in drawn.items()}


@dataclass(frozen=True)
class Side:
    """The engine or the textbook: its logits, its loss and its training step, all on tensors of its own."""

    params: dict[str, Tensor]
    logits: Callable[[], Tensor]
    loss: Callable[[], Tensor]
    step: Callable[[], object]


def engine(case: Case, examples: Examples, precision: Precision = Precision.FP32) -> Side:
    """The runtime's own parts on features computed before, as `silo.training.train` puts them together."""
    params, arithmetic = case.start(), autocast(precision, case.clip.device)
    method: LocalMethod = find_local_method(case.method_name)(case.declared, case.clip.text_tower(case.names))
    received = {name: tensor.detach().clone() for name, tensor in params.items()}
    rows = torch.arange(case.batch_size, device=case.clip.device)
    optimizer = make_optimizer(OptimizerSpec(), list(params.values()))
    scaler = torch.amp.GradScaler(case.clip.device.type, enabled=False)

    def batch() -> Batch:
        return examples.batch(rows)

    def logits() -> Tensor:
        with arithmetic:
            return method.classify(params)(batch().images)

    def loss() -> Tensor:
        with arithmetic:
            return method.loss(params, received, batch())

    def step() -> Tensor:
        with deterministic(case.clip.device):
            return descend(partial(method.loss, params, received, batch()), arithmetic, optimizer, scaler)

    return Side(params, logits, loss, step)


def textbook_of(case: Case) -> Textbook:
    """The opponent on the engine's own CLIP."""
    kept = find_architecture(case.clip.architecture).kept_ids
    return make_textbook(case.method_name, case.clip.model, case.names, case.context_length, kept)


def textbook(case: Case, pixels: Tensor) -> Side:
    """The opponent's step, from pixels every time."""
    book = textbook_of(case)
    params, labels, settings = case.start(), case.labels(), OptimizerSpec()
    optimizer = torch.optim.SGD(
        params.values(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )

    def logits() -> Tensor:
        return book.logits(book.encode_prompts(params), book.encode_images(pixels))

    def loss() -> Tensor:
        return book.loss(params, pixels, labels)

    return Side(params, logits, loss, lambda: sgd_step(optimizer, loss))


def gradients(side: Side) -> Mapping[str, Tensor]:
    """Of the loss, for each tensor."""
    return dict(zip(side.params, torch.autograd.grad(side.loss(), list(side.params.values())), strict=True))
