"""Loads what work begins with, be it a task or a build of features: the index of the images, CLIP, and its features."""

import dataclasses
import logging

import torch

from fedrt.errors import ConfigurationError, StorageError, WorkError
from silo.clip.model import FrozenClip, load_clip
from silo.data import index
from silo.feature_store import FeatureStore
from silo.features import FeatureCache
from silo.sources import FeatureSource, ModelSource
from silo.worker_frames import Load

log = logging.getLogger(__name__)


def load_features(load: Load) -> tuple[FrozenClip, FeatureCache]:
    """Index the data, load CLIP, and open the store of features. Raises `ConfigurationError`."""
    if load.threads is not None:
        torch.set_num_threads(load.threads)
    store = None if load.features is None else open_store(load.features)
    found = {silo: index(source) for silo, source in load.data.items()}
    for one in found.values():
        if one.ignored_count:
            log.info("%d files below data.root are no images and were passed over", one.ignored_count)
    clip = load_clip(_on_device(load.model))
    shares = {silo: source.max_unreadable_share for silo, source in load.data.items()}
    element_type = "float32" if load.features is None else load.features.element_type
    cache = FeatureCache(clip, found, shares, store, element_type)
    try:
        cache.survey()
    except WorkError as error:
        raise ConfigurationError(f"{error}; the log names them: repair or remove them, or raise the share") from error
    return clip, cache


def open_store(source: FeatureSource) -> FeatureStore:
    """The store, even if the disk refuses: then it is tried again whenever there is something to find or to keep.

    Raises `ConfigurationError` if the directory holds something else.
    """
    store = FeatureStore(source.directory, source.max_bytes)
    try:
        store.open()
    except StorageError as error:
        log.warning("the store of features cannot be opened: %s", error)
    return store


def _on_device(source: ModelSource) -> ModelSource:
    """`auto` is a GPU if there is one."""
    if source.device != "auto":
        return source
    return dataclasses.replace(source, device="cuda" if torch.cuda.is_available() else "cpu")
