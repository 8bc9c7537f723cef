"""What a silo of another version may be asked, by the names in its Hello."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedrt.session.capabilities import OURS, PROTOCOL_1_0, Capability, named_by_both, needed, understood
from fedrt.session.frames import Hello
from fedrt.task import TaskKind
from tests.samples import task


def with_views(count, kind=TaskKind.TRAIN):
    plain = task(kind=kind)
    return replace(plain, local=replace(plain.local, training=replace(plain.local.training, views=count)))


def test_our_own_names_are_those_of_the_table_and_fit_into_hello():
    assert OURS == ("views",)
    assert Hello("1", capabilities=OURS).capabilities == OURS


def test_the_document_has_the_same_table():
    text = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    table = text.partition("| capability |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == OURS


def test_a_silo_that_names_nothing_is_one_of_protocol_1_0():
    assert understood(()) == PROTOCOL_1_0 == {Capability.VIEWS}
    assert named_by_both(()) == ()


def test_a_silo_that_names_something_has_what_it_names_and_no_more():
    assert understood(("views",)) == {Capability.VIEWS}
    assert understood(("of-a-later-version",)) == frozenset()


def test_names_of_a_later_version_and_repetitions_are_passed_over():
    assert named_by_both(("of-a-later-version", "views", "views")) == ("views",)


@pytest.mark.parametrize(
    ("asked", "capabilities"),
    [
        (with_views(0), set()),
        (with_views(1), {Capability.VIEWS}),
        (with_views(5, TaskKind.EVALUATE), set()),
        (with_views(5, TaskKind.INITIALIZE), set()),
    ],
)
def test_training_on_views_needs_a_silo_that_understands_them(asked, capabilities):
    assert needed(asked) == capabilities
