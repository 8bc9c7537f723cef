"""What holds for every partition, whatever the collection and the section; and what each kind promises."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fedrt.errors import ConfigurationError
from fedrt.spec import NAME
from silo.data.records import Split
from silo.partition import Collection, Item, Partition, deal
from tests.silo.partition.drawn import BY_DOMAIN, collections, even, paths, section, sections, sizes, table


def check(partition: Partition, collection: Collection) -> None:
    """Everything that must be true of a partition, counted anew."""
    wanted = partition.section
    items = collection.items
    assert sorted(partition.classes + partition.novel_classes) == list(collection.labels)
    assert len(set(partition.silos)) == len(partition.silos) == expected_silos(collection, wanted)
    assert all(NAME.fullmatch(silo) for silo in partition.silos)
    eligible = {
        split: {
            index
            for index, item in enumerate(items)
            if item.split is split and item.label in partition.classes and not held_out(item, wanted)
        }
        for split in (Split.TRAIN, Split.TEST)
    }
    for split in (Split.TRAIN, Split.TEST):
        dealt = [index for holding in partition.holdings for index in holding.indices[split]]
        assert len(set(dealt)) == len(dealt), "two silos share an image"
        assert set(dealt) <= eligible[split]
    for holding in partition.holdings:
        check_holding(holding.indices, wanted)
        check_evaluation(holding.indices, partition, collection)
        for split, indices in holding.indices.items():
            assert dict(holding.class_counts[split]) == Counter(items[index].label for index in indices)
            assert [items[index].path for index in indices] == sorted(items[index].path for index in indices)
        shots = max(holding.class_counts[Split.TRAIN].values())
        assert wanted.shots is None or shots <= wanted.shots
        own = {items[index].domain for split in eligible for index in holding.indices[split]}
        assert holding.domain is None or own == {holding.domain}
        assert (holding.domain is not None) == (wanted.kind in BY_DOMAIN)
    if wanted.shots is None and wanted.max_train is None:
        assert sum(sizes(partition)) == len(eligible[Split.TRAIN]), "a training image was lost"
    if wanted.max_test is None:
        assert sum(sizes(partition, Split.TEST)) == len(eligible[Split.TEST]), "a test image was lost"


def check_holding(indices: Any, wanted: Any) -> None:
    train, others = (
        indices[Split.TRAIN],
        [index for split in indices if split is not Split.TRAIN for index in indices[split]],
    )
    assert train
    assert indices[Split.TEST]
    assert not set(train) & set(others), "an image is for training and for evaluation"
    assert wanted.max_train is None or len(train) <= wanted.max_train
    assert wanted.max_test is None or len(indices[Split.TEST]) <= wanted.max_test


def check_evaluation(indices: Any, partition: Partition, collection: Collection) -> None:
    wanted, classes, novel = partition.section, set(partition.classes), set(partition.novel_classes)
    tests = {index: item for index, item in enumerate(collection.items) if item.split is Split.TEST}
    kept = {index: item for index, item in tests.items() if not held_out(item, wanted)}
    expected = {}
    if wanted.base or wanted.novel:
        expected[Split.BASE] = {index for index, item in kept.items() if item.label in classes}
    if wanted.novel:
        expected[Split.NOVEL] = {index for index, item in kept.items() if item.label in novel}
    if wanted.held_out_domain:
        expected[Split.DOMAIN] = {
            index for index, item in tests.items() if held_out(item, wanted) and item.label in classes
        }
    assert {split: set(found) for split, found in indices.items() if split not in (Split.TRAIN, Split.TEST)} == expected


def held_out(item: Item, wanted: Any) -> bool:
    return wanted.held_out_domain is not None and item.domain == wanted.held_out_domain


def expected_silos(collection: Collection, wanted: Any) -> int:
    if wanted.kind not in BY_DOMAIN:
        return int(wanted.silos)
    return int(wanted.silos_per_domain) * len(set(collection.domains) - {wanted.held_out_domain})


@given(st.data())
def test_whatever_is_dealt_is_dealt_rightly(data: st.DataObject) -> None:
    collection = data.draw(collections())
    wanted = data.draw(sections(collection))
    try:
        partition = deal(collection, wanted)
    except ConfigurationError as error:
        message = str(error)
    else:
        event(wanted.kind)
        check(partition, collection)
        return
    event("refused")
    assert "partition." in message, "the message names nothing to change"


@given(st.data())
def test_what_is_possible_is_dealt(data: st.DataObject) -> None:
    collection = data.draw(collections(least=8))
    partition = deal(collection, data.draw(sections(collection, generous=True)))
    check(partition, collection)


@given(st.data())
def test_no_content_is_trained_on_and_evaluated(data: st.DataObject) -> None:
    """However many copies there are, on whichever side and in whichever class and domain."""
    drawn = data.draw(collections(least=8))
    sizes_of_pools = st.sampled_from([2, len(drawn.items), 10 * len(drawn.items)])
    content = st.integers(0, data.draw(sizes_of_pools)).map(str)
    some = data.draw(st.lists(st.none() | content, min_size=len(drawn.items), max_size=len(drawn.items)))
    collection = with_contents(drawn, some)
    wanted = data.draw(sections(collection, generous=True))
    try:
        partition = deal(collection, wanted)
    except ConfigurationError:
        event("refused")  # copies may leave a silo without training images
        return
    event(wanted.kind)
    trained, evaluated = set(), {item.content for item in collection.items if item.split is Split.TEST}
    for holding in partition.holdings:
        trained |= {collection.items[index].content for index in holding.indices[Split.TRAIN]}
        for split in set(holding.indices) - {Split.TRAIN}:
            assert {collection.items[index].content for index in holding.indices[split]} <= evaluated
    apart = {item.content for item in collection.items if item.label in partition.novel_classes}
    apart |= {item.content for item in collection.items if held_out(item, wanted)}
    assert not (trained & (evaluated | apart)) - {None}
    if wanted.shots is None and wanted.max_train is None:
        candidates = [
            item
            for item in collection.items
            if item.split is Split.TRAIN and item.label in partition.classes and not held_out(item, wanted)
        ]
        assert sum(sizes(partition)) + partition.copy_count == len(candidates), "an image was lost"


def with_contents(collection: Collection, contents: Sequence[str | None]) -> Collection:
    pairs = zip(collection.items, contents, strict=True)
    return Collection(collection.root, tuple(replace(item, content=content) for item, content in pairs))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"train/bee", "train/fox", "val"}),
        ({"novel": ["fox"]}, {"train/bee", "val"}),
        ({"held_out_domain": "sketch"}, {"train/fox", "val"}),
    ],
    ids=["neither", "novel", "held out"],
)
def test_copies_of_what_must_stay_unseen_are_left_out(values: dict[str, Any], expected: set[str]) -> None:
    """Of a test image always; of a novel class's or the held-out domain's training image where there is one."""
    domains = ("photo", "sketch")
    collection = table({"ant": 6, "bee": 2, "fox": 2}, {"ant": 2, "bee": 2, "fox": 2}, domains, held_back=1)
    same = {
        "test": ("photo/train/ant/0.png", "sketch/test/ant/0.png"),
        "train/fox": ("photo/train/ant/1.png", "photo/train/fox/0.png"),
        "train/bee": ("photo/train/ant/2.png", "sketch/train/bee/0.png"),
        "val": ("photo/train/ant/3.png", "photo/val/ant/0.png"),
    }
    contents = {path: name for name, paths in same.items() for path in paths}
    copied = with_contents(collection, [contents.get(item.path) for item in collection.items])
    partition = deal(copied, section(kind="iid", silos=2, **values))
    trained = {copied.items[index].path for holding in partition.holdings for index in holding.indices[Split.TRAIN]}
    assert {name for name, (first, _) in same.items() if first in trained} == expected
    assert partition.copy_count == 4 - len(expected)


def test_a_lack_that_copies_cause_is_told_as_such() -> None:
    collection = even(1, 4, 4)
    copied = with_contents(collection, ["0", "1", "2", "3"] * 2)
    words = r"hold 0 training images beside 4 copies of images that nobody may train on, too few"
    with pytest.raises(ConfigurationError, match=words):
        deal(copied, section(kind="iid", silos=2))


@given(st.data())
@settings(max_examples=50)
def test_the_order_of_the_items_does_not_matter_and_a_seed_repeats(data: st.DataObject) -> None:
    collection = data.draw(collections(least=8))
    wanted = data.draw(sections(collection, generous=True))
    mixed = Collection(collection.root, tuple(data.draw(st.permutations(collection.items))))
    first, second = deal(collection, wanted), deal(mixed, wanted)
    assert paths(first, collection) == paths(second, mixed)
    assert first.digest == second.digest
    assert first == deal(collection, wanted)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "iid", "silos": 4},
        {"kind": "pathological", "silos": 4},
        {"kind": "dirichlet", "silos": 4, "beta": 0.5},
        {"kind": "domain", "silos_per_domain": 2},
        {"kind": "domain_dirichlet", "silos_per_domain": 2, "beta": 0.5},
        {"kind": "domain", "shots": 3},
        {"kind": "domain", "max_test": 9},
    ],
    ids=str,
)
def test_a_seed_changes_the_deal_and_the_callers_replaces_the_sections(values: dict[str, Any]) -> None:
    collection = even(8, 12, 8, ("photo", "sketch"))
    dealt = [deal(collection, section(**values, seed=seed)) for seed in range(5)]
    assert len({str(paths(partition, collection)) for partition in dealt}) == 5
    assert len({partition.digest for partition in dealt}) == 5
    again = deal(collection, section(**values, seed=77), seed=3)
    assert again == dealt[3]
    assert again.seed == again.section.seed == 3


def test_what_a_seed_means_stays() -> None:
    """Results that name a seed must mean the same images after an update; only numpy's own streams may change this."""
    partition = deal(even(4, 6, 3), section(kind="dirichlet", silos=2, beta=0.5, min_images=3, seed=7))
    assert [dict(holding.class_counts[Split.TRAIN]) for holding in partition.holdings] == [
        {"class 000": 6, "class 001": 5, "class 002": 5, "class 003": 3},
        {"class 001": 1, "class 002": 1, "class 003": 3},
    ]
    assert partition.digest == "7237252bf07b355367a848afafd7579ba639131480b89f89e43ab63ee41ab4d6"


def test_a_smaller_cap_takes_a_subset() -> None:
    collection = even(5, 20, 12)

    def held(split: Split, **caps: int) -> list[set[int]]:
        partition = deal(collection, section(kind="dirichlet", silos=3, beta=1.0, min_images=8, **caps))
        return [set(holding.indices[split]) for holding in partition.holdings]

    for split, cap in ((Split.TRAIN, "shots"), (Split.TRAIN, "max_train"), (Split.TEST, "max_test")):
        grown = [held(split, **{cap: size}) for size in (1, 2, 4, 8)] + [held(split)]
        for small, large in pairwise(grown):
            assert all(few < many for few, many in zip(small, large, strict=True))


def test_sixteen_images_in_all_or_of_each_class() -> None:
    collection = even(10, 60, 20)
    in_all = deal(collection, section(kind="iid", silos=3, max_train=16))
    assert sizes(in_all) == [16, 16, 16]
    assert sizes(in_all, Split.TEST) == [67, 67, 66] or sorted(sizes(in_all, Split.TEST)) == [66, 67, 67]
    of_each = deal(collection, section(kind="pathological", silos=5, shots=16))
    assert sizes(of_each) == [32] * 5
    assert all(set(holding.class_counts[Split.TRAIN].values()) == {16} for holding in of_each.holdings)


# --- each kind -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**32))
def test_iid_gives_equal_shares(silos: int, classes: int, count: int, seed: int) -> None:
    collection = even(classes, silos + count, silos + count // 3)
    partition = deal(collection, section(kind="iid", silos=silos), seed)
    for split in (Split.TRAIN, Split.TEST):
        assert max(sizes(partition, split)) - min(sizes(partition, split)) <= 1
        for label in partition.classes:
            held = [holding.class_counts[split].get(label, 0) for holding in partition.holdings]
            assert max(held) - min(held) <= 2


def test_pathological_spreads_the_remainder() -> None:
    partition = deal(even(37, 5, 3), section(kind="pathological", silos=10))
    owned = [tuple(holding.class_counts[Split.TRAIN]) for holding in partition.holdings]
    assert sorted(map(len, owned)) == [3] * 3 + [4] * 7
    assert sorted(label for labels in owned for label in labels) == list(partition.classes)
    for holding in partition.holdings:
        assert holding.class_counts[Split.TEST].keys() == holding.class_counts[Split.TRAIN].keys()
        assert set(holding.class_counts[Split.TRAIN].values()) == {5}
        assert set(holding.class_counts[Split.TEST].values()) == {3}
    assert owned != sorted(owned), "the classes were not shuffled"


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32))
def test_pathological_owns_every_class_once(classes: int, silos: int, seed: int) -> None:
    collection = even(classes, 30, 30)
    if classes < silos:
        with pytest.raises(
            ConfigurationError, match=rf"partition\.silos is {silos}, but there are only {classes} classes"
        ):
            deal(collection, section(kind="pathological", silos=silos), seed)
        return
    partition = deal(collection, section(kind="pathological", silos=silos), seed)
    counts = [len(holding.class_counts[Split.TRAIN]) for holding in partition.holdings]
    assert sum(counts) == classes
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("kind", ["dirichlet", "domain_dirichlet"])
def test_a_large_beta_is_nearly_equal_and_a_small_one_skewed(kind: str) -> None:
    key = "silos" if kind == "dirichlet" else "silos_per_domain"
    collection = even(5, 200, 40, ("photo",))

    def largest_share(beta: float) -> float:
        """Of a class, the share of the silo that holds most of it: the mean over classes and seeds."""
        shares = []
        for seed in range(6):
            partition = deal(collection, section(kind=kind, **{key: 8}, beta=beta, min_images=1), seed)
            for label in partition.classes:
                held = [holding.class_counts[Split.TRAIN].get(label, 0) for holding in partition.holdings]
                shares.append(max(held) / sum(held))
        return sum(shares) / len(shares)

    equal, moderate, skewed = largest_share(1e6), largest_share(1.0), largest_share(0.1)
    assert equal == pytest.approx(1 / 8, abs=0.006)
    assert equal + 0.1 < moderate < skewed - 0.1
    assert skewed > 0.6


def test_test_images_follow_the_training_images() -> None:
    partition = deal(even(6, 300, 100), section(kind="dirichlet", silos=5, beta=0.4))
    for holding in partition.holdings:
        for label in partition.classes:
            train = holding.class_counts[Split.TRAIN].get(label, 0) / 300
            test = holding.class_counts[Split.TEST].get(label, 0) / 100
            assert abs(train - test) <= 1 / 100 + 1 / 300


@given(st.integers(0, 2**32), st.integers(1, 20), st.sampled_from([0.1, 0.5]))
@settings(max_examples=30)
def test_dirichlet_draws_again_until_everyone_has_enough(seed: int, least: int, beta: float) -> None:
    collection = even(4, 60, 30)
    partition = deal(collection, section(kind="dirichlet", silos=5, beta=beta, min_images=least), seed)
    assert min(sizes(partition)) >= least
    assert min(sizes(partition, Split.TEST)) >= 1


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_dirichlet_gives_everyone_a_test_image_of_a_class_it_trains_on(seed: int) -> None:
    collection = even(4, 40, 2)  # eight test images for six silos
    partition = deal(collection, section(kind="dirichlet", silos=6, beta=0.5, min_images=4), seed)
    assert sum(sizes(partition, Split.TEST)) == 8
    for holding in partition.holdings:
        assert holding.class_counts[Split.TEST].keys() <= holding.class_counts[Split.TRAIN].keys()


def test_silos_of_domains_hold_only_their_domain() -> None:
    collection = even(3, 8, 4, ("Clip Art", "photo", "sketch"))
    alone = deal(collection, section(kind="domain"))
    assert alone.silos == ("clip-art", "photo", "sketch")
    assert [holding.domain for holding in alone.holdings] == ["Clip Art", "photo", "sketch"]
    assert sizes(alone) == [24, 24, 24]
    shared = deal(collection, section(kind="domain", silos_per_domain=2, held_out_domain="photo"))
    assert shared.silos == ("clip-art-01", "clip-art-02", "sketch-01", "sketch-02")
    assert [len(holding.indices[Split.DOMAIN]) for holding in shared.holdings] == [12] * 4
    check(shared, collection)


def test_a_domain_can_be_held_out_of_any_kind() -> None:
    collection = even(3, 8, 4, ("photo", "sketch"))
    partition = deal(collection, section(kind="iid", silos=2, held_out_domain="sketch", base=True))
    check(partition, collection)
    for holding in partition.holdings:
        seen = {
            split: {collection.items[index].domain for index in indices} for split, indices in holding.indices.items()
        }
        assert seen.pop(Split.DOMAIN) == {"sketch"}
        assert all(domains == {"photo"} for domains in seen.values())


# --- novel classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 8])
def test_half_of_the_classes_are_novel_the_smaller_half(count: int) -> None:
    collection = even(count, 6, 4)
    partition = deal(collection, section(kind="iid", silos=2, novel="half"))
    assert len(partition.classes) == math.ceil(count / 2)
    assert partition.classes + partition.novel_classes == collection.labels
    check(partition, collection)


def test_novel_classes_are_found_as_labels_are() -> None:
    collection = table({"red_fox": 4, "Dog": 4, "cat": 4}, {"red_fox": 2, "Dog": 2, "cat": 2})
    partition = deal(collection, section(kind="iid", silos=2, novel=["Red Fox", "dog"]))
    assert partition.novel_classes == ("Dog", "red_fox")
    assert partition.classes == ("cat",)


# --- what cannot be dealt ------------------------------------------------------------------------------------------

SMALL = {"cat": 6, "dog": 6}


@pytest.mark.parametrize(
    ("train", "test", "values", "words"),
    [
        (
            SMALL,
            SMALL,
            {"kind": "iid", "silos": 13},
            r"hold 12 training images, .* 13 silos one each; lower partition\.silos, or",
        ),
        (
            SMALL,
            {"cat": 2},
            {"kind": "iid", "silos": 3},
            r"hold 2 test images, too few .* raise data\.test_share",
        ),
        (
            SMALL,
            {},
            {"kind": "iid", "silos": 1},
            "hold 0 test images",
        ),
        (
            {},
            SMALL,
            {"kind": "iid", "silos": 1},
            "hold 0 training images",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "pathological", "silos": 3},
            "only 2 classes to give to them",
        ),
        (
            SMALL,
            {"cat": 6},
            {"kind": "pathological", "silos": 2},
            r"'silo-0\d' would get no test images, only training images of 'dog'; add",
        ),
        (
            {"cat": 6},
            SMALL,
            {"kind": "pathological", "silos": 2},
            "would get no training images, only test images of 'dog'",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "dirichlet", "silos": 2, "beta": 1.0},
            r"2 silos 10 \(partition\.min_images\) each; lower partition\.silos or partition\.min_images",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "dirichlet", "silos": 6, "beta": 0.001, "min_images": 2},
            r"1000 draws .*0\.001 .* 6 silos 2 training.* raise partition\.beta",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "domain"},
            "the data have no domains.* set data.layout to domain_folder",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "iid", "silos": 1, "novel": ["owl"]},
            r"partition\.novel: the data have no class 'owl'; known are cat, dog",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "iid", "silos": 1, "novel": ["dogs"]},
            "did you mean 'dog'",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "iid", "silos": 1, "novel": ["dog", "cat"]},
            "takes 2 of 2 classes",
        ),
        (
            {"cat": 6},
            {"cat": 6},
            {"kind": "iid", "silos": 1, "novel": "half"},
            "takes 0 of 1 classes",
        ),
        (
            SMALL,
            {"cat": 6},
            {"kind": "iid", "silos": 1, "novel": ["dog"]},
            r"partition\.novel leaves no test images for the split 'novel'",
        ),
        (
            SMALL,
            SMALL,
            {"kind": "iid", "silos": 1, "held_out_domain": "photo"},
            "have no domain 'photo'; known are none",
        ),
    ],
)
def test_what_cannot_be_dealt_says_what_to_change(
    train: dict[str, int], test: dict[str, int], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        deal(table(train, test), section(**values))


def test_domains_that_cannot_be_dealt_are_named() -> None:
    items = [Item(f"{side.value}/{n}", "cat", side, "photo") for side in (Split.TRAIN, Split.TEST) for n in range(5)]
    items.append(Item("lonely", "cat", Split.TRAIN, "sketch"))
    collection = Collection(Path("/data"), tuple(items))
    with pytest.raises(ConfigurationError, match=r"domain 'sketch' holds 0 test images, .*partition\.silos_per_domain"):
        deal(collection, section(kind="domain"))
    with pytest.raises(ConfigurationError, match=r"partition\.held_out_domain leaves no test images .*'domain'"):
        deal(collection, section(kind="domain", held_out_domain="sketch"))
    with pytest.raises(ConfigurationError, match="have no domain 'scetch'; did you mean 'sketch'"):
        deal(collection, section(kind="domain", held_out_domain="scetch"))
    only = Collection(Path("/data"), tuple(item for item in items if item.domain == "photo"))
    with pytest.raises(ConfigurationError, match="hold 0 training images"):
        deal(only, section(kind="iid", silos=1, held_out_domain="photo"))
