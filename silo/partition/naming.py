"""Names of virtual silos, each valid as the name of a party of a federation; pure."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from fedrt.errors import ConfigurationError

_MAX_CHARACTERS = 63


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """`prefix-01` to `prefix-<count>`, with as many digits as the last needs, so that they sort as they count."""
    width = max(2, len(str(count)))
    return tuple(f"{prefix}-{number:0{width}d}" for number in range(1, count + 1))


def domain_silos(domains: Sequence[str], per_domain: int) -> dict[str, tuple[str, ...]]:
    """For each domain the names of its silos: the domain's own name if there is one silo, else numbered.

    A domain whose name holds no letter or digit of ASCII, or reads like another's, is called after its position.
    """
    longest = _MAX_CHARACTERS - (0 if per_domain == 1 else len(numbered("", per_domain)[0]))
    prefixes = [_slug(domain)[:longest].strip("-") for domain in domains]
    times = Counter(prefixes)
    positions = numbered("domain", len(domains))
    prefixes = [
        prefix if prefix and times[prefix] == 1 else position
        for prefix, position in zip(prefixes, positions, strict=True)
    ]
    twice, count = Counter(prefixes).most_common(1)[0]
    if count > 1:
        raise ConfigurationError(f"two domains would both give silos called '{twice}'; rename one of the domains")
    return {
        domain: (prefix,) if per_domain == 1 else numbered(prefix, per_domain)
        for domain, prefix in zip(domains, prefixes, strict=True)
    }


def _slug(domain: str) -> str:
    plain = unicodedata.normalize("NFKD", domain).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
