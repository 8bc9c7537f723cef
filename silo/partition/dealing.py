"""Deals the images of a collection out to silos: a function of the collection, the section and the seed alone.

Training images come from the training side only, and what is evaluated from the test side only. An image of a novel
class or of the held-out domain is nobody's training image. Neither is a copy of one, nor a copy of a test image: public
data sets have a few across their declared split, which is why they are left out rather than refused. The order of the
items does not matter, only their paths.
"""

import difflib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedrt.errors import ConfigurationError
from fedrt.tensors import seeded_generator
from silo.data.labels import match_classes
from silo.data.records import Split
from silo.partition import rules
from silo.partition.collection import Collection, Item
from silo.partition.holdings import Holding, Indices, Partition, count_labels, digest_of
from silo.partition.naming import domain_silos, numbered
from silo.partition.sections import (
    Dealing,
    DirichletPartition,
    DomainDirichletPartition,
    DomainPartition,
    PartitionSection,
    PathologicalPartition,
    Skewed,
)

Stream = partial[np.random.Generator]  # takes a purpose
_Key = tuple[Split, str | None, str]


def deal(collection: Collection, section: PartitionSection, seed: int | None = None) -> Partition:
    """Deal the collection out as `section` says; `seed` replaces that of the section.

    With the same seed, a smaller `shots`, `max_train` or `max_test` takes a subset of what a larger one takes. Raises
    `ConfigurationError` where a silo would have nothing to train on or to be measured on, naming what to change.
    """
    if seed is not None:
        section = section.model_copy(update={"seed": seed})
    novel = _novel_classes(section, collection.labels)
    classes = tuple(label for label in collection.labels if label not in set(novel))
    table = _sort_out(collection, section.held_out_domain, novel)
    for_everyone = _evaluation(table, section, classes, novel)
    evaluation_counts = count_labels(collection, for_everyone)
    holdings = [
        Holding(silo, group.domain, own | for_everyone, count_labels(collection, own) | evaluation_counts)
        for group in _groups(table, section)
        for silo, own in _deal_group(table, group, section, classes)
    ]
    digest = digest_of(collection, (classes, novel), holdings)
    return Partition(classes, novel, tuple(holdings), section, digest, table.copy_count)


@dataclass(frozen=True)
class _Table:
    """Items by side, domain and class, in order of path; those of the held-out domain apart. `rank`: that order.

    `copy_count` training images are left out.
    """

    domains: tuple[str | None, ...]
    rank: Mapping[int, int]
    kept: Mapping[_Key, Sequence[int]]
    held_out: Mapping[_Key, Sequence[int]]
    copy_count: int

    def of_class(self, split: Split, label: str, domain: str | None) -> list[int]:
        """The items of a class on one side, of one domain or (None) of all but the held-out one."""
        domains = self.domains if domain is None else (domain,)
        return self.ordered(index for each in domains for index in self.kept.get((split, each, label), ()))

    def ordered(self, indices: Iterable[int]) -> list[int]:
        """The indices in the order of their paths."""
        return sorted(indices, key=self.rank.__getitem__)


@dataclass(frozen=True)
class _Group:
    """Silos that images are dealt among: all of them, or those of one domain."""

    domain: str | None
    silos: tuple[str, ...]


def _sort_out(collection: Collection, held_out_domain: str | None, novel: Sequence[str]) -> _Table:
    domains = collection.domains
    if held_out_domain is not None and held_out_domain not in domains:
        raise ConfigurationError(f"partition.held_out_domain: {_unknown(held_out_domain, domains, 'domain')}")
    apart = [_is_apart(item, held_out_domain, set(novel)) for item in collection.items]
    unseen = {item.content for item, is_apart in zip(collection.items, apart, strict=True) if is_apart}
    unseen = (unseen | collection.test_contents) - {None}
    kept: dict[_Key, list[int]] = defaultdict(list)
    held_out: dict[_Key, list[int]] = defaultdict(list)
    copy_count = 0
    for index in collection.order:
        item = collection.items[index]
        if item.split is Split.TRAIN and item.content in unseen and not apart[index]:
            copy_count += 1
        elif item.split is not None:
            part = held_out if item.domain is not None and item.domain == held_out_domain else kept
            part[item.split, item.domain, item.label].append(index)
    dealt = tuple(domain for domain in domains if domain != held_out_domain) or (None,)
    return _Table(dealt, {index: rank for rank, index in enumerate(collection.order)}, kept, held_out, copy_count)


def _is_apart(item: Item, held_out_domain: str | None, novel: Container[str]) -> bool:
    return item.label in novel or (item.domain is not None and item.domain == held_out_domain)


def _groups(table: _Table, section: PartitionSection) -> list[_Group]:
    if not isinstance(section, DomainPartition | DomainDirichletPartition):
        return [_Group(None, numbered("silo", section.silos))]
    domains = [domain for domain in table.domains if domain is not None]
    if not domains:
        raise ConfigurationError(
            f"partition.kind is '{section.kind}', but the data have no domains to deal out; set data.layout to "
            "domain_folder, add a column 'domain' to the manifest, or choose another kind"
        )
    return [_Group(domain, silos) for domain, silos in domain_silos(domains, section.silos_per_domain).items()]


def _deal_group(
    table: _Table, group: _Group, section: PartitionSection, classes: Sequence[str]
) -> Iterator[tuple[str, dict[Split, Indices]]]:
    stream = partial(seeded_generator, section.seed, "partition")
    train, test = (_shuffled(table, split, classes, group, stream) for split in (Split.TRAIN, Split.TEST))
    available = rules.Counts(*(np.array([len(found) for found in side], np.int64) for side in (train, test)))
    _check_enough(available, group, section, table.copy_count)
    counts = _share(available, len(group.silos), section, partial(stream, "deal", group.domain or ""))
    _check_everyone(counts, group, classes)
    trained, tested = _cut(train, counts.train, section.shots), _cut(test, counts.test, None)
    for silo, own_train, own_test in zip(group.silos, trained, tested, strict=True):
        own = {
            Split.TRAIN: _some(own_train, section.max_train, stream("max_train", silo)),
            Split.TEST: _some(own_test, section.max_test, stream("max_test", silo)),
        }
        yield silo, {split: tuple(table.ordered(indices)) for split, indices in own.items()}


def _shuffled(table: _Table, split: Split, classes: Sequence[str], group: _Group, stream: Stream) -> list[list[int]]:
    """The items of each class that this group is dealt, each class in an order of its own."""
    lists = []
    for label in classes:
        found = table.of_class(split, label, group.domain)
        generator = stream("order", split.value, group.domain or "", label)
        lists.append(_some(found, None, generator))
    return lists


def _some(indices: Sequence[int], most: int | None, generator: np.random.Generator) -> list[int]:
    """The indices in a random order, or the first `most` of them."""
    return [indices[position] for position in generator.permutation(len(indices))[:most].tolist()]


def _share(available: rules.Counts, silo_count: int, section: PartitionSection, stream: Stream) -> rules.Counts:
    match section:
        case DirichletPartition() | DomainDirichletPartition():
            skew = rules.Skew(section.beta, section.min_images, section.balanced)
            return rules.skewed(available, silo_count, skew, stream)
        case PathologicalPartition():
            return rules.disjoint(available, silo_count, stream())
        case _:
            return rules.equal(available, silo_count, stream())


def _cut(shuffled: Sequence[Sequence[int]], counts: rules.IntArray, shots: int | None) -> list[list[int]]:
    """Each silo's items [K]: of each class its slice, as long as counts [C, K] says, or the first `shots` of that."""
    silos: list[list[int]] = [[] for _ in range(counts.shape[1])]
    for found, row in zip(shuffled, counts.tolist(), strict=True):
        start = 0
        for held, count in zip(silos, row, strict=True):
            held.extend(found[start : start + count][:shots])
            start += count
    return silos


def _check_enough(available: rules.Counts, group: _Group, section: PartitionSection, copy_count: int) -> None:
    where, silos = "the data hold", "partition.silos"
    if group.domain is not None:
        where, silos = f"domain '{group.domain}' holds", "partition.silos_per_domain"
    train, test, count = int(available.train.sum()), int(available.test.sum()), len(group.silos)
    each, change = "one", silos
    if isinstance(section, Skewed) and section.min_images > 1:
        each, change = f"{section.min_images} (partition.min_images)", f"{silos} or partition.min_images"
    if train < count * (section.min_images if isinstance(section, Skewed) else 1):
        copies = f" beside {copy_count} copies of images that nobody may train on" if copy_count else ""
        raise ConfigurationError(
            f"{where} {train} training images{copies}, too few to give {count} silos {each} each; lower {change}, or "
            "add images"
        )
    if test < count:
        raise ConfigurationError(
            f"{where} {test} test images, too few to give {count} silos one each; lower {silos}, add test images, or "
            "raise data.test_share where the data name no split"
        )


def _check_everyone(counts: rules.Counts, group: _Group, classes: Sequence[str]) -> None:
    for kind, side, other, opposite in (
        ("training", counts.train, "test", counts.test),
        ("test", counts.test, "training", counts.train),
    ):
        for silo in np.flatnonzero(side.sum(axis=0) == 0):
            held = [repr(classes[label]) for label in np.flatnonzero(opposite[:, silo])[:3]]
            only = f", only {other} images of {', '.join(held)}" if held else ""
            raise ConfigurationError(
                f"silo '{group.silos[silo]}' would get no {kind} images{only}; add {kind} images of its classes, or "
                "lower partition.silos so that it gets further classes"
            )


def _evaluation(table: _Table, section: Dealing, classes: Sequence[str], novel: Sequence[str]) -> dict[Split, Indices]:
    """What every silo evaluates on beside its own images."""
    wanted: dict[Split, list[int]] = {}
    if section.base or novel:
        wanted[Split.BASE] = [index for label in classes for index in table.of_class(Split.TEST, label, None)]
    if novel:
        wanted[Split.NOVEL] = [index for label in novel for index in table.of_class(Split.TEST, label, None)]
    if (domain := section.held_out_domain) is not None:
        wanted[Split.DOMAIN] = [
            index for label in classes for index in table.held_out.get((Split.TEST, domain, label), ())
        ]
    for split, key in ((Split.NOVEL, "novel"), (Split.DOMAIN, "held_out_domain")):
        if split in wanted and not wanted[split]:
            raise ConfigurationError(
                f"partition.{key} leaves no test images for the split '{split.value}'; choose another, or add some"
            )
    return {split: tuple(table.ordered(indices)) for split, indices in wanted.items()}


def _novel_classes(section: Dealing, labels: Sequence[str]) -> tuple[str, ...]:
    if section.novel is None:
        return ()
    if section.novel == "half":
        novel = set(labels[(len(labels) + 1) // 2 :])
    else:
        match = match_classes(section.novel, labels)
        if match.unknown:
            raise ConfigurationError(f"partition.novel: {_unknown(match.unknown[0], labels, 'class')}")
        novel = {labels[position] for position in match.indices.values()}
    if not novel or len(novel) == len(labels):
        raise ConfigurationError(
            f"partition.novel takes {len(novel)} of {len(labels)} classes; leave at least one novel class and one other"
        )
    return tuple(sorted(novel))


def _unknown(name: str, known: Sequence[str], word: str) -> str:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known[:10]) or 'none'}"
    return f"the data have no {word} '{name}'; {hint}"
