"""What the section `partition` of a YAML file says: how one data set is dealt out to virtual silos."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from fedrt.config import Section
from silo.config import Text

MAX_SILOS = 10_000


def _novel(value: Any) -> Any:
    if value is None or value == "half":
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("must be half or a list of class names such as [cat, dog]")
    if len(set(value)) != len(value):
        raise ValueError("must name each class once")
    return tuple(value)


SiloCount = Annotated[int, Field(ge=1, le=MAX_SILOS)]
ImageCount = Annotated[int, Field(ge=1)]
Novel = Annotated[
    Literal["half"] | tuple[Text, ...] | None,
    BeforeValidator(_novel),
    WithJsonSchema(
        {"anyOf": [{"const": "half"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "null"}]}
    ),
]


class Dealing(Section):
    """What every kind of partition has."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1, description="Seed of every random choice")
    shots: ImageCount | None = Field(default=None, description="Most training images of a class that a silo gets")
    max_train: ImageCount | None = Field(default=None, description="Most training images that a silo gets in all")
    max_test: ImageCount | None = Field(default=None, description="Most test images of its own that a silo gets")
    novel: Novel = Field(
        default=None,
        description="Classes that nobody trains on: a list of names, or half for the second half in sorted order",
    )
    base: bool = Field(
        default=False, description="Give every silo all test images of all classes, too; novel implies it"
    )
    held_out_domain: Text | None = Field(default=None, description="A domain that nobody trains on")


class IidPartition(Dealing):
    """Every silo gets an equal share of the images and of every class."""

    kind: Literal["iid"] = Field(description="Equal shares")
    silos: SiloCount = Field(description="Number of silos")


class PathologicalPartition(Dealing):
    """Every silo gets classes of its own, with all their images."""

    kind: Literal["pathological"] = Field(description="Disjoint sets of classes")
    silos: SiloCount = Field(description="Number of silos; at most one for each class")


class Skewed(Dealing):
    """The keys of a Dirichlet draw."""

    beta: Annotated[float, Field(ge=0.001, le=1e6)] = Field(
        description="Concentration: 0.1 gives each silo few classes, 100 nearly equal shares"
    )
    min_images: ImageCount = Field(
        default=10, description="Training images below which no silo may fall, before shots and max_train"
    )
    balanced: bool = Field(
        default=False, description="Silos that hold their equal share of training images get nothing of further classes"
    )


class DirichletPartition(Skewed):
    """Every class is shared out by a Dirichlet draw of its own."""

    kind: Literal["dirichlet"] = Field(description="Shares of every class drawn at random")
    silos: SiloCount = Field(description="Number of silos")


class DomainPartition(Dealing):
    """Every domain has its own silos, with equal shares of it."""

    kind: Literal["domain"] = Field(description="Silos of one domain each")
    silos_per_domain: SiloCount = Field(default=1, description="Number of silos of each domain")


class DomainDirichletPartition(Skewed):
    """Every domain has its own silos, and every class of it is shared out by a Dirichlet draw."""

    kind: Literal["domain_dirichlet"] = Field(description="Silos of one domain each, with shares drawn at random")
    silos_per_domain: SiloCount = Field(description="Number of silos of each domain")


KINDS: tuple[str, ...] = ("iid", "pathological", "dirichlet", "domain", "domain_dirichlet")


def _of_a_kind(value: Any) -> Any:
    """Say what is wrong with `kind` in the operator's words, before the union does in its own."""
    if isinstance(value, dict) and value.get("kind") not in KINDS:
        known = f"known are {', '.join(KINDS)}"
        if "kind" not in value:
            raise ValueError(f"kind is missing; {known}")
        close = difflib.get_close_matches(str(value["kind"]), KINDS, 1)
        raise ValueError(f"kind {value['kind']!r} is unknown; {f'did you mean {close[0]!r}?' if close else known}")
    return value


PartitionSection = Annotated[
    IidPartition | PathologicalPartition | DirichletPartition | DomainPartition | DomainDirichletPartition,
    Field(discriminator="kind"),
    BeforeValidator(_of_a_kind),
]
"""How one data set is dealt out; its keys depend on `kind`."""
