"""What a row of features is of: the kind says how it was computed, the key which image in which view."""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from silo.sources import ElementType

Row = npt.NDArray[np.floating]  # [1, D], the pooled feature, or [1 + M, D] with the patches after it
RowKey = bytes  # the SHA-256 of the image file and the number of the view

KEY_BYTES = 36
PLAIN = 0  # the number of the view that evaluation sees; augmented views count from 1
FORMAT = 1


@dataclass(frozen=True)
class FeatureKind:
    """Everything but the image that the bits of its features depend on and that is known beforehand.

    `device` is "cpu" or "cuda", whose features differ in the last bits. So do pooled features computed with patches and
    without: therefore `patches`. The same weights may be run with another activation: therefore `quick_gelu`.
    """

    architecture: str
    quick_gelu: bool
    weights_sha256: str
    preprocessing: str
    device: str
    patches: bool
    element_type: ElementType

    @property
    def digest(self) -> str:
        """64 hexadecimal digits; the first 16 are the name of the directory."""
        text = json.dumps([FORMAT, *asdict(self).values()], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Of the directory that holds the rows of this kind."""
        return self.digest[:16]


def row_key(content: bytes, view: int) -> RowKey:
    """The key of a row: `content` is the SHA-256 of the image file, 32 bytes."""
    return content + view.to_bytes(4, "little")
