"""Deals a data set out as host.yaml says, writes the parts as manifests, and says who holds what."""

import json
import sys
from pathlib import Path

import structlog
from rich.console import Console

from silo.data.records import Split
from silo.host.config import HostConfig, manifests_directory
from silo.partition import Collection, Partition, deal, read_collection, table, write_manifests
from silo.partition.manifests import RECORD


def deal_out(config: HostConfig) -> tuple[Collection, Partition]:
    """Read the data set and deal it out; nothing is written. Blocks, since files may be read whole.

    Raises `ConfigurationError`.
    """
    collection = read_collection(config.data)
    return collection, deal(collection, config.partition)


def prepare_parts(config: HostConfig) -> Partition:
    """Deal the data set out and write each silo's manifest below the state directory. Blocks.

    Files that were added or removed, or another section, give silos other images than at the last start while their
    private tensors stay: the log says so. Raises `ConfigurationError` and `StorageError`.
    """
    collection, partition = deal_out(config)
    directory = manifests_directory(config)
    earlier = _digest(directory / RECORD)
    if earlier not in (None, partition.digest):
        structlog.get_logger("silo.host").warning(
            "the silos hold other images than at the last start; for a fresh start set another state_directory",
            digest=partition.digest,
            earlier=earlier,
        )
    write_manifests(partition, collection, directory)
    return partition


def _digest(record: Path) -> str | None:
    """That of the last complete partition, if one is known."""
    try:
        found = json.loads(record.read_bytes()).get("digest")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def show(partition: Partition) -> None:
    """Print who holds what: a table for people at a terminal, else a line of the log for each silo."""
    if sys.stderr.isatty():
        Console(stderr=True).print(table(partition))
        return
    log = structlog.get_logger("silo.host")
    for holding in partition.holdings:
        counts = {f"{split.value}_count": len(held) for split, held in holding.indices.items()}
        log.info(
            "virtual silo",
            silo=holding.silo,
            **counts,
            class_count=len(holding.class_counts[Split.TRAIN]),
            **({} if holding.domain is None else {"domain": holding.domain}),
        )
