"""Who a daemon or person is: a role and a name inside one federation, written as the URI in its certificate.

    spiffe://<federation>/<role>/<name>          spiffe://skin.example.org/silo/north

Nothing in a message says who sent it; only the verified certificate does. The text form is canonical: a text that
parses is exactly the text that the parsed value prints, so two spellings of one identity cannot exist.
"""

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedrt.errors import IdentityError

SCHEME = "spiffe://"
# `\Z` and not `$`: `$` also matches before a final newline.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_FEDERATION = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*\Z")
_FEDERATION_MAX_CHARACTERS = 63  # X.509 allows 64 for an organization name, where authorities carry it


class Role(enum.Enum):
    """What a certificate's owner may be; the table RPC -> roles builds on it."""

    COORDINATOR = "coordinator"
    SILO = "silo"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Identity:
    """One owner of a certificate. Raises IdentityError for a federation or name that is not well-formed."""

    federation: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        check_federation(self.federation)
        check_name(self.name)

    def __str__(self) -> str:
        return f"{self.role.value} {self.name!r} of federation {self.federation!r}"

    @property
    def uri(self) -> str:
        """The URI that a certificate carries as its subject alternative name."""
        return f"{SCHEME}{self.federation}/{self.role.value}/{self.name}"

    @classmethod
    def from_uri(cls, uri: str) -> "Identity":
        """Parse the URI form, the inverse of `uri`; raises IdentityError."""
        if not uri.startswith(SCHEME):
            raise IdentityError(f"identity {uri!r} does not start with {SCHEME!r}; it was not issued by fedrt-certs")
        parts = uri.removeprefix(SCHEME).split("/")
        if len(parts) != 3:
            raise IdentityError(f"identity {uri!r} is not of the form '{SCHEME}<federation>/<role>/<name>'")
        federation, role, name = parts
        try:
            return cls(federation, Role(role), name)
        except ValueError:
            known = ", ".join(f"'{known.value}'" for known in Role)
            raise IdentityError(f"identity {uri!r} has the unknown role {role!r}; known roles: {known}") from None


def identity_from_uris(uris: Sequence[str]) -> Identity:
    """Return the identity among a certificate's alternative names; host names and addresses are passed over.

    Raises IdentityError unless exactly one entry is a `spiffe://` URI: with two, a certificate would be two persons.
    """
    found = [uri for uri in uris if uri.lower().startswith(SCHEME)]
    if not found:
        raise IdentityError(f"the certificate names no '{SCHEME}' identity; use a certificate issued by the federation")
    if len(found) > 1:
        listed = ", ".join(repr(uri) for uri in found[:3])
        raise IdentityError(f"the certificate names {len(found)} identities ({listed}), not one; issue it again")
    return Identity.from_uri(found[0])


def check_name(name: str) -> str:
    """Return `name` if it may name a coordinator, silo or operator; raises IdentityError."""
    if _NAME.match(name) is None:
        raise IdentityError(
            f"name {name[:80]!r} is not usable; use 1 to 63 of a-z, 0-9 and '-', beginning and ending without '-'"
        )
    return name


def check_federation(federation: str) -> str:
    """Return `federation` if it may name a federation; raises IdentityError."""
    if len(federation) > _FEDERATION_MAX_CHARACTERS or _FEDERATION.match(federation) is None:
        raise IdentityError(
            f"federation {federation[:80]!r} is not usable; use a name like 'demo' or 'skin.example.org': "
            f"at most {_FEDERATION_MAX_CHARACTERS} of a-z, 0-9, '-' and single dots"
        )
    return federation
