"""The keys of host.yaml, and the silo.yaml that each of the host's virtual silos would have as a daemon of its own."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedrt.config import FederationName, IdentitySection, LocalPath, LogSection, Section, duration, load_yaml
from fedrt.notation import Duration, bounded
from silo.config import (
    CoordinatorSection,
    DataSection,
    FeaturesSection,
    ModelSection,
    PolicySection,
    ReconnectSection,
    SiloConfig,
    check_files,
)
from silo.partition.collection import CollectionSection
from silo.partition.sections import PartitionSection


class HostConfig(Section):
    """The keys of host.yaml."""

    federation: FederationName | None = Field(
        default=None,
        description="Federation that the virtual silos belong to; taken from their certificates if not set",
    )
    coordinator: CoordinatorSection = Field(description="Where the coordinator is")
    identities: LocalPath = Field(
        description="Directory that holds, for each virtual silo, a directory of its name with its key and certificate"
    )
    state_directory: LocalPath = Field(
        description="Directory of the parts dealt out, and of each virtual silo's ledger, spool and vault"
    )
    model: ModelSection = Field(description="The frozen CLIP that all virtual silos share")
    data: CollectionSection = Field(description="The data set that is dealt out to the virtual silos")
    partition: PartitionSection = Field(description="How the data set is dealt out")
    features: FeaturesSection = Field(
        default_factory=FeaturesSection, description="Where features of images are kept, so that none is encoded twice"
    )
    policy: PolicySection = Field(default_factory=PolicySection, description="What each virtual silo allows")
    log: LogSection = Field(default_factory=LogSection, description="What is logged to stderr")
    shutdown_grace: Annotated[Duration, bounded("0s", "1d")] = duration(
        "5m", "Time that work under way, and work that waits for it, is given to finish at shutdown"
    )
    reconnect: ReconnectSection = Field(default_factory=ReconnectSection, description="When a lost session is retried")


def load_host_config(path: Path) -> HostConfig:
    """Read host.yaml. Raises `ConfigurationError` that lists every problem."""
    return load_yaml(path, HostConfig)


def manifests_directory(config: HostConfig) -> Path:
    """Where the host writes who holds what."""
    return config.state_directory / "partition"


def silo_config(config: HostConfig, name: str) -> SiloConfig:
    """What a virtual silo's silo.yaml would say: its identity, its state, and its part of the images as a manifest."""
    manifest = manifests_directory(config) / f"{name}.csv"
    return _silo_config(config, name, DataSection(root=config.data.root, layout="manifest", manifest=manifest))


def check_host_files(config: HostConfig) -> None:
    """Raise `ConfigurationError` listing which files and directories that the configuration names do not exist."""
    root, manifest = config.data.root, config.data.manifest
    data = DataSection(root=root, layout="image_folder")
    if manifest is not None:
        data = DataSection(root=root, layout="manifest", manifest=manifest)
    check_files(_silo_config(config, "any", data))


def _silo_config(config: HostConfig, name: str, data: DataSection) -> SiloConfig:
    return SiloConfig.model_construct(  # the values are checked already, and no longer in the operators' notation
        federation=config.federation,
        coordinator=config.coordinator,
        identity=IdentitySection(directory=config.identities / name),
        state_directory=config.state_directory / "silos" / name,
        model=config.model,
        data=data,
        features=config.features,
        policy=config.policy,
        metrics=None,
        log=config.log,
        shutdown_grace=config.shutdown_grace,
        reconnect=config.reconnect,
    )
