"""What a silo's operator sets: the keys of silo.yaml, and the values that the rest of the silo takes from them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from fedrt.config import (
    FederationName,
    IdentitySection,
    LocalPath,
    LogSection,
    MetricsSection,
    Section,
    anchored,
    duration,
    load_yaml,
    size,
)
from fedrt.errors import ConfigurationError
from fedrt.notation import Duration, RemoteAddress, Size, bounded, format_duration, parse_size
from silo.sources import DataSource, ElementType, FeatureSource, ModelSource

Text = Annotated[str, Field(min_length=1)]


def _weights_path(weights: str) -> Path | None:
    """The path that `weights` is, or None for an open_clip tag: tags hold no slash and no suffix of a weights file."""
    path = Path(weights)
    return path if "/" in weights or path.suffix in (".safetensors", ".pt", ".pth", ".bin") else None


def _anchored_weights(weights: str, found: ValidationInfo) -> str:
    path = _weights_path(weights)
    return weights if path is None else str(anchored(path, found))


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
        raise ValueError("must be auto, cpu, cuda or the number of a GPU such as cuda:0")
    return device


class CoordinatorSection(Section):
    """Where the coordinator is."""

    session_address: RemoteAddress = Field(
        description="The coordinator's session address, such as fed.example.org:7443"
    )
    server_name: Text | None = Field(
        default=None, description="Name expected in the coordinator's certificate, if it is not the host of the address"
    )


class ModelSection(Section):
    """The frozen CLIP."""

    architecture: Text = Field(description="open_clip architecture, such as ViT-B-16, or fedrt-tiny")
    weights: Annotated[Text, AfterValidator(_anchored_weights)] = Field(
        description="Path of the weights file, an open_clip tag such as openai, or embedded (fedrt-tiny only)"
    )
    device: Annotated[Text, AfterValidator(_check_device)] = Field(
        default="auto", description="cpu, cuda or cuda:0; auto takes a GPU if there is one"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads of the worker; all if not set"
    )


class DataSection(Section):
    """The site's images."""

    root: LocalPath = Field(description="Directory of the images")
    layout: Literal["image_folder", "manifest"] = Field(
        description="image_folder: one directory per class; manifest: a CSV file with path, label and optional split"
    )
    manifest: LocalPath | None = Field(default=None, description="The CSV file, for layout manifest only")
    max_unreadable_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=DataSource.max_unreadable_share, description="Share of unreadable files up to which they are skipped"
    )
    class_names: dict[Text, Text] = Field(
        default_factory=dict, description="The site's name of a class: the experiments' name of it"
    )
    test_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=DataSource.test_share,
        description="Share of the examples kept for evaluation where the data name no split",
    )

    @model_validator(mode="after")
    def _manifest_goes_with_its_layout(self) -> Self:
        if self.layout == "manifest" and self.manifest is None:
            raise ValueError("layout is 'manifest', but manifest is missing; add the path of the CSV file")
        if self.layout == "image_folder" and self.manifest is not None:
            raise ValueError("manifest is set, but layout is 'image_folder'; remove manifest or set layout: manifest")
        return self


LEAST_FEATURES = "1GiB"  # less would hold the patches of 2,600 images at most


class FeaturesSection(Section):
    """Where features of images are kept, so that no image is encoded twice."""

    directory: LocalPath | None = Field(
        default=None,
        description="Directory of the store, on a local disk; several daemons may share it. Default: features in "
        "state_directory",
    )
    max_size: Size = size("50GiB", "What the store may hold; what was used least recently makes room")
    element_type: ElementType = Field(
        default="float32", description="float16 takes half the space, and rounds; the log says how much when it encodes"
    )

    @field_validator("max_size")
    @classmethod
    def _large_enough(cls, max_size: int) -> int:
        if max_size < parse_size(LEAST_FEATURES):
            raise ValueError(f"must be at least {LEAST_FEATURES}")
        return max_size


class PolicySection(Section):
    """What the site allows; the coordinator cannot change it."""

    methods: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=("*",), description="Names or patterns (*, ?) of the methods that may run here"
    )
    experiments: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=("*",), description="Names or patterns (*, ?) of the experiments that may run here"
    )
    min_examples: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Images that a result must rest on: those trained on, or those of each split measured"
    )


class ReconnectSection(Section):
    """How long the silo waits before it dials again; the wait doubles from `initial` to `max`, with jitter."""

    initial: Annotated[Duration, bounded("10ms", "1h")] = duration("1s", "First wait before dialling again")
    max: Annotated[Duration, bounded("10ms", "1h")] = duration("10s", "Longest wait before dialling again")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.initial:
            raise ValueError(
                f"max is {format_duration(self.max)}, less than initial, which is {format_duration(self.initial)}; "
                "raise max or lower initial"
            )
        return self


class SiloConfig(Section):
    """The keys of silo.yaml."""

    federation: FederationName | None = Field(
        default=None, description="Federation that this silo belongs to; taken from its certificate if not set"
    )
    coordinator: CoordinatorSection = Field(description="Where the coordinator is")
    identity: IdentitySection = Field(description="Where this silo's key and certificate lie")
    state_directory: LocalPath = Field(description="Directory of the ledger, spool and vault; private to the service")
    model: ModelSection = Field(description="The frozen CLIP")
    data: DataSection = Field(description="The site's images")
    features: FeaturesSection = Field(
        default_factory=FeaturesSection, description="Where features of images are kept, so that none is encoded twice"
    )
    policy: PolicySection = Field(default_factory=PolicySection, description="What this site allows")
    metrics: MetricsSection | None = Field(default=None, description="Prometheus metrics; none if not set")
    log: LogSection = Field(default_factory=LogSection, description="What is logged to stderr")
    shutdown_grace: Annotated[Duration, bounded("0s", "1d")] = duration(
        "5m", "Time that work under way is given to finish at shutdown"
    )
    reconnect: ReconnectSection = Field(default_factory=ReconnectSection, description="When a lost session is retried")


def load_silo_config(path: Path) -> SiloConfig:
    """Read silo.yaml. Raises `ConfigurationError` that lists every problem."""
    return load_yaml(path, SiloConfig)


def model_source(config: SiloConfig) -> ModelSource:
    """What the worker needs to load CLIP."""
    model = config.model
    return ModelSource(architecture=model.architecture, weights=model.weights, device=model.device)


def data_source(config: SiloConfig) -> DataSource:
    """What the worker needs to find the images."""
    data = config.data
    class_names: Mapping[str, str] = dict(data.class_names)
    return DataSource(
        layout=data.layout,
        root=data.root,
        manifest=data.manifest,
        max_unreadable_share=data.max_unreadable_share,
        class_names=class_names,
        test_share=data.test_share,
    )


def feature_source(features: FeaturesSection, state_directory: Path) -> FeatureSource:
    """Where the worker keeps features of images."""
    directory = features.directory or state_directory / "features"
    return FeatureSource(directory, features.max_size, features.element_type)


def check_files(config: SiloConfig) -> None:
    """Raise `ConfigurationError` listing which files and directories that the configuration names do not exist."""
    weights, data = _weights_path(config.model.weights), config.data
    missing = []
    if weights is not None and not weights.is_file():
        missing.append(f"model.weights: file '{weights}' does not exist; copy the weights there or correct the path")
    if not data.root.is_dir():
        missing.append(f"data.root: directory '{data.root}' does not exist; create it or correct the path")
    if data.manifest is not None and not data.manifest.is_file():
        missing.append(f"data.manifest: file '{data.manifest}' does not exist; create it or correct the path")
    if missing:
        raise ConfigurationError(
            "; ".join(missing) if len(missing) == 1 else "\n  ".join(["files are missing", *missing])
        )
