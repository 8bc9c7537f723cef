"""What lab.yaml says: the data, and the settings, methods and seeds whose combinations are run."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fedrt.config import LocalPath, PartyName, Section, json_schema, load_yaml
from fedrt.experiment_file import MethodSection, RoundsSection, TrainingSection, experiment_schema
from silo.config import ModelSection, Text
from silo.lab.world import WorldSection
from silo.partition.collection import CollectionSection, Layout, check_layout
from silo.partition.sections import PartitionSection
from silo.partition.torchvision_sets import SETS
from silo.sources import DataSource

MAX_ID_CHARACTERS = 60  # of an experiment's name, less room for "-2" where it is tried again
DIGEST_CHARACTERS = 8


class LabData(Section):
    """The images: a folder, a data set of torchvision, or drawn scenes."""

    root: LocalPath | None = Field(
        default=None, description="Directory of the images; with torchvision, where it finds its own files"
    )
    layout: Layout | None = Field(default=None, description="How the images lie below root, as in host.yaml")
    manifest: LocalPath | None = Field(default=None, description="The CSV file, for layout manifest only")
    class_names: dict[Text, Text] = Field(
        default_factory=dict, description="The data's name of a class: the experiments' name of it"
    )
    test_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=DataSource.test_share,
        description="Share of each class kept for evaluation where the data name no split",
    )
    torchvision: Text | None = Field(
        default=None, description="Name of a data set of torchvision, such as CIFAR100; written once as image files"
    )
    world: WorldSection | None = Field(default=None, description="Drawn scenes, written once as image files")

    @model_validator(mode="after")
    def _is_one_of_three(self) -> Self:
        ways = [key for key in ("layout", "torchvision", "world") if getattr(self, key) is not None]
        if len(ways) != 1:
            given = "none of layout, torchvision and world is" if not ways else f"{' and '.join(ways)} are all"
            raise ValueError(f"{given} given; give exactly one of layout, torchvision and world")
        if (self.root is None) != (self.world is not None):
            raise ValueError(
                "root is set beside world, which is drawn below the lab's directory; remove root"
                if self.world
                else "root is missing; add the directory of the images, or of torchvision's files"
            )
        if self.torchvision is not None and self.torchvision not in SETS:
            raise ValueError(f"torchvision {self.torchvision!r} is not known here; known are {', '.join(SETS)}")
        if self.layout is not None:
            self.collection()
        return self

    def collection(self) -> CollectionSection:
        """The section of a folder. Raises `ValueError` for other data, and for a manifest without its layout."""
        if self.root is None or self.layout is None:
            raise ValueError("these data are no folder yet")
        check_layout(self.layout, self.manifest)
        return self.folder(self.root, self.layout)

    def folder(self, root: Path, layout: Layout) -> CollectionSection:
        """The section of these data once they lie below `root`."""
        return CollectionSection(
            root=root, layout=layout, manifest=self.manifest, class_names=self.class_names, test_share=self.test_share
        )


class LabRounds(RoundsSection):
    """The rounds of every experiment. Who takes part follows from the partition."""

    @model_validator(mode="after")
    def _silos_follow_from_the_partition(self) -> Self:
        if self.silos:
            raise ValueError("silos follow from the partition; remove silos")
        return self


class RoundsChange(LabRounds):
    """Keys of rounds that are other than the lab's."""

    count: int = Field(default=0, description="Rounds of training; 0 only evaluates")


class LabEvaluation(Section):
    """When the silos evaluate; on what follows from the partition."""

    every: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Rounds between evaluations; 0: after the last only"
    )


class SettingSection(Section):
    """One way to deal the data out, and what else is other than the lab's."""

    partition: PartitionSection = Field(description="How the images are dealt out to silos, as in host.yaml")
    data: LabData | None = Field(default=None, description="Other data than the lab's")
    rounds: RoundsChange | None = Field(default=None, description="Keys of rounds that are other here")
    training: TrainingSection | None = Field(default=None, description="Keys of training that are other here")
    evaluation: LabEvaluation | None = Field(default=None, description="When the silos evaluate here")

    @model_validator(mode="after")
    def _seeds_are_the_labs(self) -> Self:
        if "seed" in self.partition.model_fields_set:
            raise ValueError("partition.seed is set, but seeds are the lab's; remove partition.seed")
        return self


class LabMethod(Section):
    """A method with its hyper-parameters, and what else is other than the lab's and the setting's."""

    method: MethodSection = Field(description="The method by name, and its hyper-parameters")
    rounds: RoundsChange | None = Field(default=None, description="Keys of rounds that are other for this method")
    training: TrainingSection | None = Field(
        default=None, description="Keys of training that are other for this method"
    )


class LabFile(Section):
    """The keys of lab.yaml."""

    lab: PartyName = Field(description="Name of the lab")
    directory: LocalPath = Field(description="Where everything goes: images, cells, results, figures")
    model: ModelSection = Field(description="The frozen CLIP, as in silo.yaml")
    data: LabData | None = Field(default=None, description="The images; a setting may have others")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Local training in one round")
    rounds: LabRounds = Field(description="How many rounds, and for how long")
    evaluation: LabEvaluation = Field(default_factory=LabEvaluation, description="When the silos evaluate")
    settings: Annotated[dict[PartyName, SettingSection], Field(min_length=1)] = Field(
        description="Ways to deal the data out, by name"
    )
    methods: Annotated[dict[PartyName, LabMethod], Field(min_length=1)] = Field(description="Methods, by label")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = Field(
        description="Each seeds the partition and the experiment"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds names a seed twice; remove one")
        for name, setting in self.settings.items():
            if self.data is None and setting.data is None:
                raise ValueError(f"setting {name!r} has no data; add data to it or to the lab")
        for setting_name in self.settings:
            for method in self.methods:
                text = f"{setting_name}-{method}-s{max(self.seeds)}"
                if len(text) + 1 + DIGEST_CHARACTERS > MAX_ID_CHARACTERS:
                    raise ValueError(
                        f"{text!r} is {len(text)} characters long, and names of experiments begin so; shorten the name "
                        f"of the setting or the label of the method to have {MAX_ID_CHARACTERS - DIGEST_CHARACTERS - 1}"
                    )
        return self


def lab_schema() -> dict[str, Any]:
    """The JSON Schema of a lab.yaml, with the hyper-parameters of every built-in method."""
    schema = json_schema(LabFile)
    definitions: dict[str, Any] = schema["$defs"]
    others: dict[str, Any] = experiment_schema()["$defs"]
    unused = {name for name in others if name.endswith("Section") and name != "MethodSection"}
    definitions |= {name: others[name] for name in others if name not in unused}
    return schema


def load_lab(path: Path) -> LabFile:
    """Read lab.yaml. Raises `ConfigurationError` that lists every problem of its keys."""
    return load_yaml(path, LabFile)
