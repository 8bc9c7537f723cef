"""Collections and sections for the tests of partitions: hand-made, drawn at random, and as files on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from pydantic import TypeAdapter

from silo.data.records import Split
from silo.partition import Collection, Item, Partition, PartitionSection

KINDS = ("iid", "pathological", "dirichlet", "domain", "domain_dirichlet")
BY_DOMAIN = ("domain", "domain_dirichlet")
LABELS = ("ant", "bee", "Cat", "dog", "eel", "fox", "gnu", "hen")
DOMAINS = ("photo", "sketch", "clip art")
_ADAPTER: TypeAdapter[Any] = TypeAdapter(PartitionSection)


def section(**values: Any) -> Any:
    return _ADAPTER.validate_python(values)


def table(
    train: Mapping[str, int], test: Mapping[str, int], domains: Sequence[str | None] = (None,), held_back: int = 0
) -> Collection:
    """A collection with so many images of each label, in each domain."""
    items = [
        Item(f"{domain or ''}/{split.value if split else 'val'}/{label}/{number}.png", label, split, domain)
        for domain in domains
        for split, counts in ((Split.TRAIN, train), (Split.TEST, test), (None, dict.fromkeys(train, held_back)))
        for label, count in counts.items()
        for number in range(count)
    ]
    return Collection(Path("/data"), tuple(items))


def even(classes: int, train: int, test: int, domains: Sequence[str | None] = (None,)) -> Collection:
    labels = [f"class {number:03d}" for number in range(classes)]
    return table(dict.fromkeys(labels, train), dict.fromkeys(labels, test), domains)


@st.composite
def collections(draw: st.DrawFn, least: int = 0) -> Collection:
    """Any table of up to eight classes and three domains, in any order; `least` images in every cell."""
    labels = LABELS[: draw(st.integers(1 if least == 0 else 2, len(LABELS)))]
    domains = draw(st.sampled_from([(None,), DOMAINS[:1], DOMAINS[:2], DOMAINS]))
    if least:
        domains = draw(st.sampled_from([DOMAINS[:2], DOMAINS]))
    items = []
    for domain in domains:
        for label in labels:
            for split, most in ((Split.TRAIN, least + 9), (Split.TEST, least + 5), (None, 2)):
                count = draw(st.integers(least if split else 0, most))
                name = split.value if split else "held back"
                items += [Item(f"{domain}/{name}/{label}/{n}.png", label, split, domain) for n in range(count)]
    if not any(item.split for item in items):
        items.append(Item("only.png", "ant", Split.TRAIN, domains[0]))
    return Collection(Path("/data"), tuple(draw(st.permutations(items))))


@st.composite
def sections(draw: st.DrawFn, collection: Collection, generous: bool = False) -> Any:
    """Any section that names classes and domains of the collection; a generous one must be possible."""
    kind = draw(st.sampled_from(KINDS if collection.domains else KINDS[:3]))
    values: dict[str, Any] = {"kind": kind, "seed": draw(st.integers(0, 2**63 - 1))}
    classes = len(collection.labels)
    if draw(st.booleans()) and (classes > 1 or not generous):
        novel = draw(
            st.lists(st.sampled_from(collection.labels), min_size=1, max_size=max(1, classes - 1), unique=True)
        )
        values["novel"] = draw(st.sampled_from(["half", novel]))
        classes = (classes + 1) // 2 if values["novel"] == "half" else classes - len(novel)
    if collection.domains and draw(st.booleans()):
        values["held_out_domain"] = draw(st.sampled_from(collection.domains))
    most = min(4, classes) if kind == "pathological" and generous else 4
    values["silos_per_domain" if kind in BY_DOMAIN else "silos"] = draw(st.integers(1, most))
    if "dirichlet" in kind:
        values["beta"] = draw(st.sampled_from([0.3, 1.0, 50.0] if generous else [0.05, 0.3, 1.0, 50.0]))
        values["min_images"] = draw(st.integers(1, 1 if generous else 4))
        values["balanced"] = draw(st.booleans())
    for cap in ("shots", "max_train", "max_test"):
        values[cap] = draw(st.none() | st.integers(1, 6))
    return section(**values, base=draw(st.booleans()))


def paths(partition: Partition, collection: Collection) -> dict[str, dict[Split, list[str]]]:
    """Silo -> split -> paths, as a person would compare two partitions."""
    return {
        holding.silo: {
            split: [collection.items[index].path for index in indices] for split, indices in holding.indices.items()
        }
        for holding in partition.holdings
    }


def sizes(partition: Partition, split: Split = Split.TRAIN) -> list[int]:
    return [len(holding.indices[split]) for holding in partition.holdings]
