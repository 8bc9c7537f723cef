"""Deals one data set out to virtual silos: `read_collection`, `deal`, then `write_manifests`, `table` and `plot`.

Nothing here imports torch, except for `torchvision_sets`, when it exports.
"""

from silo.partition.collection import Collection, CollectionSection, Item, Layout, check_layout, read_collection
from silo.partition.dealing import deal
from silo.partition.figures import plot
from silo.partition.holdings import Holding, Partition
from silo.partition.manifests import write_manifests
from silo.partition.sections import PartitionSection
from silo.partition.tables import table

__all__ = [
    "Collection",
    "CollectionSection",
    "Holding",
    "Item",
    "Layout",
    "Partition",
    "PartitionSection",
    "check_layout",
    "deal",
    "plot",
    "read_collection",
    "table",
    "write_manifests",
]
