"""What a silo's worker is pointed at: a CLIP, images, a store of features. Importable without torch and Pillow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedrt.errors import ConfigurationError

Layout = Literal["image_folder", "manifest"]
ElementType = Literal["float32", "float16"]


@dataclass(frozen=True)
class ModelSource:
    """Which CLIP a silo runs, and where.

    `architecture`: a name of open_clip, or `fedrt-tiny`. `weights`: the path of a file, a pretrained tag of open_clip
    (downloaded unless cached), or `embedded`. `device`: `cpu`, `cuda`, `cuda:<number>`, or `auto` for a GPU if there is
    one; only the worker understands `auto`.
    """

    architecture: str
    weights: str
    device: str = "cpu"


@dataclass(frozen=True)
class FeatureSource:
    """Where features of images are kept on disk, how many bytes of them, and in which precision."""

    directory: Path
    max_bytes: int
    element_type: ElementType = "float32"


@dataclass(frozen=True)
class DataSource:
    """Where a silo's images lie and how their labels are read.

    `image_folder`: one directory per class below `root`, or below `root/train` and `root/test`. `manifest`: a CSV file
    with the columns path, label and optionally split. `class_names` maps labels of the silo to names of an experiment's
    classes. `test_share` is what goes to the test split where the data declare none. Raises `ConfigurationError`.
    """

    layout: Layout
    root: Path
    manifest: Path | None = None
    max_unreadable_share: float = 0.0
    class_names: Mapping[str, str] = field(default_factory=dict)
    test_share: float = 0.2

    def __post_init__(self) -> None:
        if self.layout not in ("image_folder", "manifest"):
            raise ConfigurationError(f"data.layout {self.layout!r} is unknown; known are 'image_folder' and 'manifest'")
        if self.layout == "manifest" and self.manifest is None:
            raise ConfigurationError("data.layout is 'manifest', but data.manifest is missing; name the CSV file there")
        if self.layout == "image_folder" and self.manifest is not None:
            raise ConfigurationError("data.manifest is set, but data.layout is 'image_folder'; set it to 'manifest'")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ConfigurationError(f"data.max_unreadable_share is {self.max_unreadable_share}; it must be in [0, 1]")
        if not 0 <= self.test_share < 1:
            raise ConfigurationError(f"data.test_share is {self.test_share}; it must be in [0, 1)")
        for label, name in self.class_names.items():
            if not label.strip() or not name.strip():
                raise ConfigurationError(f"data.class_names: {label!r}: {name!r} has an empty side; give both names")
