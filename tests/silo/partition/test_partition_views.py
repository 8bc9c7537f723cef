"""The table and the figure, and that the package needs neither torch nor matplotlib before it draws."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from silo.partition import Partition, deal, plot, table
from tests.silo.partition.drawn import even, section
from tests.silo.partition.drawn import table as collection_of


def shown(partition: Partition, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    console.print(table(partition))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_says_who_holds_what() -> None:
    collection = collection_of({"cat": 12, "dog": 3, "eel": 3, "fox": 1}, {"cat": 4, "dog": 4}, ("photo", "sketch"))
    text = shown(deal(collection, section(kind="domain", held_out_domain="sketch")))
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["silo", "domain", "train", "test", "classes", "most", "training", "images"]
    assert lines[2] == ["photo", "photo", "19", "8", "4", "cat", "12,", "dog", "3,", "eel", "3,", "+1"]
    assert " ".join(lines[-1]) == "1 silos 19 8 4 train 19 to 19, median 19; each also domain 8"


def test_numbers_stay_where_the_terminal_is_narrow() -> None:
    names = {f"a class with a long name {number}": 6 for number in range(8)}
    collection = collection_of(names, dict.fromkeys(names, 2), ("a-rather-long-domain", "another-long-domain"))
    lines = shown(deal(collection, section(kind="domain")), 80).splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ["a-rather-long-domain"])
    assert row[1:5] == ["a-rather-long-domain", "48", "16", "8"]
    assert any(line.split()[:5] == ["2", "silos", "96", "32", "8"] for line in lines)


def test_a_hundred_silos_fit_on_a_screen() -> None:
    partition = deal(even(10, 100, 20), section(kind="dirichlet", silos=100, beta=0.5, min_images=1))
    lines = [line for line in shown(partition, 80).splitlines() if line.strip()]
    assert len(lines) <= 46
    assert all(len(line) <= 80 for line in lines)
    assert any("... 60 more" in line for line in lines)
    assert "silo-020" in lines[21]
    assert "silo-081" in lines[23]
    assert "silo-100" in lines[-2]
    assert lines[-1].split()[:5] == ["100", "silos", "1,000", "200", "10"]


def test_copies_that_nobody_got_are_told() -> None:
    partition = deal(even(1, 4, 2), section(kind="iid", silos=1))
    assert "copies" not in shown(partition)
    words = " ".join(shown(replace(partition, copy_count=1234)).split())
    assert words.endswith("nobody trains on 1,234 copies of images that must stay unseen")


def test_markup_in_a_label_is_text() -> None:
    collection = collection_of({"[red]x[/red]": 4}, {"[red]x[/red]": 2})
    assert "[red]x[/red] 4" in shown(deal(collection, section(kind="iid", silos=1)))


@pytest.mark.parametrize(
    ("kind", "silos", "classes"),
    [("iid", 1, 1), ("dirichlet", 6, 10), ("pathological", 10, 37), ("dirichlet", 100, 100), ("iid", 2, 300)],
)
def test_a_figure_shows_every_silo_and_class(tmp_path: Path, kind: str, silos: int, classes: int) -> None:
    values = {"beta": 0.3, "min_images": 1} if kind == "dirichlet" else {}
    partition = deal(even(classes, 12, 6), section(kind=kind, silos=silos, **values))
    path = tmp_path / "partition.png"
    plot(partition, path)
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = image.shape
    assert 350 < height < 4200
    assert 800 < width < 4200
    if silos > 40:
        assert height > 14 * silos, "the names of the silos would run into each other"
    if 40 < classes <= 200:
        assert width > 14 * classes
    white = (image == 255).all(axis=2).mean()
    assert 0.05 < white < 0.97
    assert [path.name for path in tmp_path.iterdir()] == ["partition.png"]


def test_more_images_are_darker(tmp_path: Path) -> None:
    """Two silos with one class each; the second has a hundredth of the images, so its cell is lighter."""
    collection = collection_of({"cat": 300, "dog": 3}, {"cat": 10, "dog": 10})
    partition = deal(collection, section(kind="pathological", silos=2))
    plot(partition, tmp_path / "two.png")
    image = np.asarray(Image.open(tmp_path / "two.png").convert("RGB")).astype(int)
    red, blue = image[..., 0], image[..., 2]
    dark = (np.abs(image - (8, 29, 88)).sum(axis=2) < 6).mean()  # the dark end of the colour map YlGnBu
    light = ((red > 220) & (blue > 170) & (blue < 215)).mean()  # near its light end, and not white
    assert dark > 0.03
    assert light > 0.03


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    label = r"$\frac{x$"
    plot(deal(collection_of({label: 4}, {label: 2}), section(kind="iid", silos=1)), tmp_path / "dollar.png")
    assert (tmp_path / "dollar.png").stat().st_size > 1000


PROGRAM = """
import sys
from pathlib import Path
from silo.data.records import Split
from silo.partition import Collection, Item, deal, plot, table, write_manifests
from silo.partition.sections import IidPartition
import silo.partition.torchvision_sets
items = tuple(Item(f"{side.value}{n}", "cat", side) for side in (Split.TRAIN, Split.TEST) for n in range(4))
collection = Collection(Path("x"), items)
partition = deal(collection, IidPartition(kind="iid", silos=2))
write_manifests(partition, collection, Path(sys.argv[1]))
table(partition)
print([name for name in ("torch", "torchvision", "matplotlib", "PIL") if name in sys.modules])
plot(partition, Path(sys.argv[1]) / "figure.png")
print([name for name in ("torch", "torchvision", "matplotlib.pyplot") if name in sys.modules])
"""


def test_dealing_loads_no_torch_and_drawing_no_pyplot(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]
