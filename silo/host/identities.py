"""Checks that every virtual silo has an identity of its own, before anything is loaded or dialled."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from fedrt.certificates import Expectation
from fedrt.errors import IdentityError
from fedrt.identity import Identity, Role
from fedrt.tls import IdentityFiles, load_identity

NAMED = 3  # missing silos that an error names


def check_identities(places: Mapping[str, Path], federation: str | None, now: datetime) -> tuple[Identity, ...]:
    """The identity of each silo, from its directory in `places`; all are of one federation.

    Raises `IdentityError`: one for all that are missing, with the command that makes them, else for the first that is
    not fit for use or belongs to another silo.
    """
    missing = [name for name, place in places.items() if not IdentityFiles(place).certificate_path.exists()]
    found: list[Identity] = []
    for name, place in places.items():
        if name in missing:
            continue
        loaded = load_identity(IdentityFiles(place), now, Expectation(Role.SILO, federation)).identity
        if loaded.name != name:
            raise IdentityError(
                f"identity in '{place}' is that of silo '{loaded.name}', not of '{name}'; "
                "each virtual silo needs its own: give the directory the name of its silo"
            )
        federation = federation or loaded.federation
        found.append(loaded)
    if missing:
        raise IdentityError(_complaint(places, missing, federation))
    return tuple(found)


def _complaint(places: Mapping[str, Path], missing: Sequence[str], federation: str | None) -> str:
    directory = places[missing[0]].parent
    named = ", ".join(f"'{name}'" for name in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    silos = " ".join(f"--silo={span}" for span in _spans(missing))
    made = directory.parent if directory.name == "silos" else Path("DIRECTORY")
    elsewhere = "" if directory.name == "silos" else ", then set identities to DIRECTORY/silos"
    return (
        f"identities '{directory}' lacks the certificates of {len(missing)} of {len(places)} virtual silos: "
        f"{named}{more}; for a throw-away federation run (in bash): fedrt-certs dev --directory "
        f"{shlex.quote(str(made))} --federation {federation or 'NAME'} {silos}{elsewhere}; "
        "otherwise obtain them from the federation operator"
    )


def _spans(names: Sequence[str]) -> Iterator[str]:
    """Names that count on as one brace expansion of bash: silo-01, silo-02 and silo-03 are silo-{01..03}."""
    at = 0
    while at < len(names):
        end = at + 1
        while end < len(names) and names[end] == _successor(names[end - 1]):
            end += 1
        prefix = names[at].rstrip("0123456789")
        yield names[at] if end == at + 1 else f"{prefix}{{{names[at][len(prefix) :]}..{names[end - 1][len(prefix) :]}}}"
        at = end


def _successor(name: str) -> str | None:
    number = re.search(r"[0-9]+\Z", name)
    return None if number is None else f"{name[: number.start()]}{int(number[0]) + 1:0{len(number[0])}d}"
