"""The rules by numbers one can check by hand, the names of silos, and the section as operators write it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrt.config import Section, effective_yaml, json_schema, load_yaml
from fedrt.errors import ConfigurationError
from fedrt.spec import NAME
from fedrt.tensors import seeded_generator
from silo.partition import CollectionSection, PartitionSection, rules
from silo.partition.naming import domain_silos, numbered


def counts(train: Any, test: Any) -> rules.Counts:
    return rules.Counts(np.array(train, np.int64), np.array(test, np.int64))


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (10, [0.5, 0.3, 0.2], [5, 3, 2]),
        (7, [0.5, 0.3, 0.2], [4, 2, 1]),  # 3.5, 2.1, 1.4
        (1, [0.4, 0.35, 0.25], [1, 0, 0]),
        (5, [0.0, 1.0, 0.0], [0, 5, 0]),
        (3, [1 / 3, 1 / 3, 1 / 3], [1, 1, 1]),
        (0, [0.5, 0.5], [0, 0]),
    ],
)
def test_shares_are_rounded_by_largest_remainders(count: int, shares: list[float], expected: list[int]) -> None:
    assert rules.apportion(count, np.array(shares)).tolist() == expected


@given(st.integers(0, 500), st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda shares: sum(shares) > 0))
def test_rounding_loses_nothing_and_strays_less_than_one(count: int, drawn: list[float]) -> None:
    shares = np.array(drawn) / sum(drawn)
    given_out = rules.apportion(count, shares)
    assert given_out.sum() == count
    assert (np.abs(given_out - count * shares) < 1 + 1e-9).all()
    assert (given_out[shares == 0] == 0).all()


def test_equal_shares_of_few_images_are_a_matter_of_chance() -> None:
    """Two images of each class for four silos: who gets them must not follow from the order of the classes."""
    available = counts([2] * 50, [2] * 50)
    dealt = [rules.equal(available, 4, seeded_generator(seed)) for seed in range(2)]
    assert (dealt[0].train != dealt[1].train).any()
    assert (dealt[0].train != dealt[0].test).any()
    pairs = {tuple(np.flatnonzero(row)) for row in dealt[0].train}
    assert len(pairs) >= 6, "every pair of silos shares some class"


def test_the_mean_square_share_is_that_of_the_dirichlet_distribution() -> None:
    """E[sum of p²] = (beta + 1) / (K beta + 1) for a symmetric Dirichlet over K silos."""
    silos, beta, available = 6, 0.5, counts([100_000] * 800, [10] * 800)
    dealt = rules.skewed(available, silos, rules.Skew(beta, 1, False), lambda draw: seeded_generator(3, draw))
    squares = ((dealt.train / 100_000) ** 2).sum(axis=1)
    assert squares.mean() == pytest.approx((beta + 1) / (silos * beta + 1), rel=0.04)


def test_a_silo_without_test_images_gets_one_of_the_class_it_trains_on_most() -> None:
    dealt = counts([[6, 1, 2], [0, 5, 4]], [[2, 0, 0], [0, 3, 0]])
    assert rules._test_everyone(dealt)
    assert dealt.test.tolist() == [[2, 0, 0], [0, 2, 1]]
    assert not rules._test_everyone(counts([[3, 3]], [[1, 0]]))  # nobody has one to spare
    assert not rules._test_everyone(counts([[3, 0], [0, 3]], [[2, 0], [0, 0]]))  # none of the class it trains on


def test_balanced_shares_hold_nobody_far_above_an_equal_share() -> None:
    available = counts([50] * 10, [10] * 10)

    def largest(balanced: bool, seed: int) -> int:
        skew = rules.Skew(0.2, 1, balanced)
        dealt = rules.skewed(available, 5, skew, lambda draw: seeded_generator(seed, draw))
        assert dealt.train.sum(axis=1).tolist() == [50] * 10
        return int(dealt.train.sum(axis=0).max())

    free, bounded = ([largest(balanced, seed) for seed in range(20)] for balanced in (False, True))
    assert max(bounded) < 500 / 5 + 50
    assert max(free) > 500 / 5 + 50
    assert sum(bounded) < sum(free)


def test_a_class_of_test_images_only_is_dealt_when_everyone_is_full() -> None:
    available = counts([8, 0], [4, 6])
    dealt = rules.skewed(available, 2, rules.Skew(50.0, 4, True), lambda draw: seeded_generator(1, draw))
    assert dealt.train.sum(axis=0).tolist() == [4, 4]
    assert dealt.test[1].tolist() == [3, 3]


@given(st.floats(0.001, 0.02), st.integers(0, 2**32))
def test_a_tiny_beta_is_no_trouble(beta: float, seed: int) -> None:
    skew = rules.Skew(beta, 1, True)
    dealt = rules.skewed(counts([9] * 40, [9] * 40), 2, skew, lambda draw: seeded_generator(seed, draw))
    assert dealt.train.sum() == dealt.test.sum() == 360


def test_drawing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = itertools.count()
    monkeypatch.setattr(rules, "MAX_DRAWS", 7)
    with pytest.raises(ConfigurationError, match=r"7 draws with partition\.beta 0\.01 .* set partition\.balanced"):
        rules.skewed(
            counts([9], [9]), 4, rules.Skew(0.01, 2, False), lambda draw: seeded_generator(1, draw, next(draws))
        )
    assert next(draws) == 7


# --- names ---------------------------------------------------------------------------------------------------------


def test_silos_are_numbered_so_that_they_sort() -> None:
    assert numbered("silo", 2) == ("silo-01", "silo-02")
    for count in (9, 100, 1234):
        names = numbered("silo", count)
        assert list(names) == sorted(names)
        assert len(set(map(len, names))) == 1


def test_domains_that_read_alike_or_like_nothing_are_called_by_position() -> None:
    assert domain_silos(["Clip Art", "é_2"], 1) == {"Clip Art": ("clip-art",), "é_2": ("e-2",)}
    assert domain_silos(["a b", "a-b", "写真"], 1) == {
        "a b": ("domain-01",),
        "a-b": ("domain-02",),
        "写真": ("domain-03",),
    }
    with pytest.raises(ConfigurationError, match="called 'domain-01'; rename one"):
        domain_silos(["写真", "domain 01"], 1)


def test_long_names_of_domains_are_cut() -> None:
    domains = ["x" * 80, "y" * 59 + "-" + "y" * 20]
    assert domain_silos(domains, 1)[domains[0]] == ("x" * 63,)
    assert domain_silos(domains, 2) == {
        domains[0]: ("x" * 60 + "-01", "x" * 60 + "-02"),
        domains[1]: ("y" * 59 + "-01", "y" * 59 + "-02"),
    }
    assert domain_silos(["x" * 64, "x" * 65], 1) == {"x" * 64: ("domain-01",), "x" * 65: ("domain-02",)}


@given(st.lists(st.text(max_size=90), min_size=1, max_size=6, unique=True), st.integers(1, 300))
def test_every_name_is_one_that_a_party_may_have(domains: list[str], per_domain: int) -> None:
    try:
        silos = [name for names in domain_silos(domains, per_domain).values() for name in names]
    except ConfigurationError as error:
        message = str(error)
    else:
        assert len(set(silos)) == len(silos) == per_domain * len(domains)
        assert all(NAME.fullmatch(name) for name in silos)
        return
    assert "rename one of the domains" in message


# --- the section ---------------------------------------------------------------------------------------------------


class Host(Section):
    data: CollectionSection
    partition: PartitionSection


def load(place: Path, partition: str, data: str = "{root: images, layout: image_folder}") -> Host:
    path = place / "host.yaml"
    path.write_text(f"data: {data}\npartition: {partition}\n")
    return load_yaml(path, Host)


@pytest.mark.parametrize(
    "text",
    [
        "{kind: iid, silos: 3}",
        "{kind: iid, silos: 3, novel: half, seed: 9223372036854775807}",
        "{kind: pathological, silos: 10, shots: 16, novel: [cat, dog]}",
        "{kind: dirichlet, silos: 100, beta: 0.5, min_images: 1, balanced: true, max_train: 16, max_test: 100}",
        "{kind: domain, held_out_domain: sketch, base: true}",
        "{kind: domain_dirichlet, silos_per_domain: 5, beta: 1}",
    ],
)
def test_a_section_is_read_and_printed(tmp_path: Path, text: str) -> None:
    host = load(tmp_path, text)
    assert host.data.root == tmp_path / "images"
    (tmp_path / "again.yaml").write_text(effective_yaml(host))
    assert load_yaml(tmp_path / "again.yaml", Host) == host


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{silos: 3}", "partition: kind is missing; known are iid, pathological, dirichlet, domain, domain_dirichlet"),
        ("{kind: dirchlet, silos: 3}", "partition: kind 'dirchlet' is unknown; did you mean 'dirichlet'"),
        ("{kind: [], silos: 3}", r"kind \[\] is unknown; known are iid"),
        ("{kind: iid}", "silos is missing"),
        ("{kind: iid, silos: 0}", "silos must be at least 1; got 0"),
        ("{kind: iid, silos: 3, beta: 1}", "beta is not a known key"),
        ("{kind: dirichlet, silos: 3, beta: 0}", "beta must be at least 0.001"),
        ("{kind: iid, silos: 3, shots: 0}", "shots must be at least 1"),
        ("{kind: iid, silos: 3, seed: -1}", "seed must be at least 0"),
        ("{kind: iid, silos: 3, novel: cat}", r"must be half or a list of class names such as \[cat, dog\]; got 'cat'"),
        ("{kind: iid, silos: 3, novel: []}", "novel must be half or a list"),
        ("{kind: iid, silos: 3, novel: [cat, 7]}", "novel must be half or a list"),
        ("{kind: iid, silos: 3, novel: [cat, cat]}", "novel must name each class once"),
    ],
)  # fmt: skip
def test_a_wrong_section_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{root: x, layout: manifest}", "data: layout is 'manifest', but manifest is missing"),
        ("{root: x, layout: domain_folder, manifest: m.csv}", "remove manifest or set layout: manifest"),
        ("{root: x, layout: folders}", r"data\.layout must be 'image_folder', 'domain_folder' or 'manifest'"),
        ("{root: x, layout: image_folder, test_share: 1}", r"data\.test_share must be less than 1"),
    ],
)
def test_wrong_data_says_what_is_wrong(tmp_path: Path, data: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load(tmp_path, "{kind: domain}", data)


def test_an_editor_gets_a_schema() -> None:
    schema = json_schema(Host)
    assert set(schema["properties"]["partition"]["discriminator"]["mapping"]) == {
        "iid", "pathological", "dirichlet", "domain", "domain_dirichlet"
    }  # fmt: skip
    for name, definition in schema["$defs"].items():
        for key, field in definition["properties"].items():
            assert "description" in field, f"{name}.{key} has no description"
