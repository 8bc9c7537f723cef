"""Identities: the text form is canonical, and nothing but exactly one is accepted."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedrt.errors import IdentityError
from fedrt.identity import Identity, Role, identity_from_uris

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?", fullmatch=True)
FEDERATIONS = st.lists(LABEL, min_size=1, max_size=3).map(".".join)
IDENTITIES = st.builds(Identity, FEDERATIONS, st.sampled_from(Role), LABEL)


@given(IDENTITIES)
def test_the_uri_parses_back(identity):
    assert Identity.from_uri(identity.uri) == identity


@given(st.one_of(st.text(), st.text(alphabet="spife:/-.aA0\n").map("spiffe://demo/silo/".__add__)))
@example("spiffe://demo/silo/north\n")
def test_a_text_is_refused_or_canonical(text):
    with contextlib.suppress(IdentityError):
        assert Identity.from_uri(text).uri == text


def test_it_reads_as_operators_write_it():
    identity = Identity("skin.example.org", Role.SILO, "north")
    assert identity.uri == "spiffe://skin.example.org/silo/north"
    assert str(identity) == "silo 'north' of federation 'skin.example.org'"


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("https://demo/silo/north", "does not start with 'spiffe://'"),
        ("SPIFFE://demo/silo/north", "does not start with 'spiffe://'"),
        ("spiffe://demo/silo", "not of the form"),
        ("spiffe://demo/silo/north/", "not of the form"),
        ("spiffe://demo/silo/north/x", "not of the form"),
        ("spiffe://demo/janitor/north", "unknown role 'janitor'; known roles: 'coordinator', 'silo', 'operator'"),
        ("spiffe://demo/silo/", "name '' is not usable"),
        ("spiffe://demo/silo/North", "name 'North' is not usable"),
        ("spiffe://demo/silo/n%6frth", "is not usable"),
        ("spiffe://demo/silo/-north", "is not usable"),
        ("spiffe://demo/silo/" + "n" * 64, "is not usable"),
        ("spiffe:///silo/north", "federation '' is not usable"),
        ("spiffe://demo..org/silo/north", "federation 'demo..org' is not usable"),
        ("spiffe://demo:443/silo/north", "federation 'demo:443' is not usable"),
        ("spiffe://" + "d" * 64 + "/silo/north", "is not usable"),
    ],
)
def test_a_malformed_uri_is_refused_with_its_reason(uri, complaint):
    with pytest.raises(IdentityError) as caught:
        Identity.from_uri(uri)
    assert complaint in str(caught.value)


def test_the_longest_name_and_federation_are_accepted():
    identity = Identity("d" * 63, Role.OPERATOR, "n" * 63)
    assert Identity.from_uri(identity.uri) == identity


def test_one_identity_is_found_among_host_names():
    found = identity_from_uris(["localhost", "127.0.0.1", "spiffe://demo/coordinator/main"])
    assert found == Identity("demo", Role.COORDINATOR, "main")


@pytest.mark.parametrize(
    ("uris", "complaint"),
    [
        ([], "names no 'spiffe://' identity"),
        (["localhost"], "names no 'spiffe://' identity"),
        (["spiffe://demo/silo/a", "spiffe://demo/silo/b"], "names 2 identities"),
        (["spiffe://demo/silo/a", "spiffe://demo/silo/a"], "names 2 identities"),
        (["spiffe://demo/silo/a", "Spiffe://demo/silo/b"], "names 2 identities"),
    ],
)
def test_none_or_several_identities_are_refused(uris, complaint):
    with pytest.raises(IdentityError, match=complaint):
        identity_from_uris(uris)
