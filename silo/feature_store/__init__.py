"""Features of images on disk, found by the content of the image file and shared by all processes. No torch here."""

from silo.feature_store.contents import Contents, file_state, map_in_parts
from silo.feature_store.keeping import KeptRows
from silo.feature_store.kinds import PLAIN, FeatureKind, Row, RowKey, row_key
from silo.feature_store.shelf import Shelf
from silo.feature_store.store import FeatureStore, KindSummary, clear, summarize

__all__ = [
    "PLAIN",
    "Contents",
    "FeatureKind",
    "FeatureStore",
    "KeptRows",
    "KindSummary",
    "Row",
    "RowKey",
    "Shelf",
    "clear",
    "file_state",
    "map_in_parts",
    "row_key",
    "summarize",
]
