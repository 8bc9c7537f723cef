"""A silo's images on disk: which there are (`indexing`), of which class (`labels`), and their pixels (`images`).

Everything but `images` needs neither torch nor Pillow, so that `check-config` can use it.
"""

from silo.data.indexing import index
from silo.data.records import DataIndex, Record, Split

__all__ = ["DataIndex", "Record", "Split", "index"]
