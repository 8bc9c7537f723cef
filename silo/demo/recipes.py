"""What the demo trains on each data set, and how: chosen so that the prompt gains at every silo within a minute."""

from dataclasses import dataclass, replace

from silo.demo.hospitals import CLASS_NAMES


@dataclass(frozen=True)
class PromptSettings:
    """The numbers of promptfl.yaml."""

    context_length: int
    local_epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    rounds: int


@dataclass(frozen=True)
class Recipe:
    """One demo. `images` is the number of training images per hospital, and of test images, where they are drawn."""

    data: str
    classes: tuple[str, ...]
    images: int
    prompt: PromptSettings
    seed: int = 1


_PROMPT = PromptSettings(16, local_epochs=2, batch_size=32, optimizer="adamw", learning_rate=0.005, rounds=20)
_IMAGES = 480


def make_recipe(data: str, seed: int, rounds: int | None = None, images: int | None = None) -> Recipe:
    """The recipe of a data set, "world" or "digits", with another number of rounds or images if given."""
    prompt = _PROMPT if rounds is None else replace(_PROMPT, rounds=rounds)
    return Recipe(data, CLASS_NAMES[data](), _IMAGES if images is None else images, prompt, seed)
