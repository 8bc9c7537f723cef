"""Brings a silo's labels and an experiment's class names together; pure."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedrt.errors import ConfigurationError, FailureReason, WorkError


def normalise(label: str) -> str:
    """The form in which labels are compared: NFKC, case folded, underscores and runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().replace("_", " ").split())


def renamed(labels: Iterable[str], class_names: Mapping[str, str]) -> dict[str, str]:
    """Each local label with the name that `class_names` gives it, or itself.

    Raises `ConfigurationError` if two keys of `class_names` mean the same label and different classes.
    """
    table: dict[str, str] = {}
    for label, name in class_names.items():
        if table.setdefault(normalise(label), name) != name:
            raise ConfigurationError(
                f"data.class_names maps {label!r} both to {table[normalise(label)]!r} and to {name!r}; keep one"
            )
    return {label: table.get(normalise(label), label) for label in labels}


@dataclass(frozen=True)
class ClassMatch:
    """`indices`: label -> position of its class in the experiment; `unknown`: labels without a class, sorted."""

    indices: Mapping[str, int]
    unknown: tuple[str, ...]

    def check(self) -> None:
        """Raise `WorkError` if a label is unknown.

        The message goes to the coordinator and holds counts only: where a folder is laid out wrongly, "labels" may be
        the names of patients. Whoever calls this lists `unknown` in the silo's own log.
        """
        if not self.unknown:
            return
        total = len(self.indices) + len(self.unknown)
        found = (
            f"{len(self.unknown)} of this silo's {total} labels are not classes of the experiment"
            if self.indices
            else f"this silo and the experiment have no class in common: none of its {total} labels is known"
        )
        raise WorkError(
            FailureReason.DATA_UNAVAILABLE,
            f"{found}; the silo's log lists them, and data.class_names in its configuration maps them",
        )


def match_classes(labels: Iterable[str], classes: Sequence[str]) -> ClassMatch:
    """Find each label among the ordered classes: literally, or else in normalised form.

    A class that no label means is fine: a silo may hold only some. A label that means two classes counts as unknown.
    """
    exact = {name: position for position, name in enumerate(classes)}
    alike: dict[str, list[int]] = {}
    for position, name in enumerate(classes):
        alike.setdefault(normalise(name), []).append(position)
    indices: dict[str, int] = {}
    unknown: list[str] = []
    for label in sorted(set(labels)):
        candidates = [exact[label]] if label in exact else alike.get(normalise(label), [])
        if len(candidates) == 1:
            indices[label] = candidates[0]
        else:
            unknown.append(label)
    return ClassMatch(indices, tuple(unknown))
