"""Collections from folders and manifests, and that no content is trained on and evaluated, whatever the kind."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedrt.errors import ConfigurationError
from silo.data.records import Split
from silo.partition import Collection, CollectionSection, Item, Layout, check_layout, deal, read_collection
from tests.silo.partition.drawn import BY_DOMAIN, KINDS, section

KINDS_AND_LAYOUTS = [
    *((kind, layout) for kind in KINDS for layout in ("domain_folder", "manifest")),
    *((kind, "image_folder") for kind in KINDS if kind not in BY_DOMAIN),
]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def read(root: Path, layout: Layout = "image_folder", **values: Any) -> Collection:
    return read_collection(CollectionSection(root=root, layout=layout, **values))


def rows(collection: Collection) -> list[tuple[str, str, str | None, str | None]]:
    return [(item.path, item.label, item.split and item.split.value, item.domain) for item in collection.items]


def listed(root: Path, text: str, **values: Any) -> Collection:
    write(root / "list.csv", text)
    return read(root, "manifest", manifest=root / "list.csv", **values)


# --- train and test share no content -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
@given(
    copies=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 17)), max_size=40),
    extra=st.fixed_dictionaries(
        {}, optional={"novel": st.just("half"), "held_out_domain": st.just("d1"), "shots": st.integers(1, 4)}
    ),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=8)
def test_no_content_is_trained_on_and_evaluated(
    kind: str, layout: Layout, copies: list[tuple[int, int, int]], extra: dict[str, Any], seed: int
) -> None:
    """Also where copies of an image lie in other classes and domains."""
    if layout == "image_folder":
        extra = {key: value for key, value in extra.items() if key != "held_out_domain"}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        files = [
            (label, domain, f"{label} {domain} {number}")
            for label in range(3)
            for domain in range(2)
            for number in range(8)
        ]
        originals = list(files)
        files += [(label, domain, originals[number][2]) for label, domain, number in copies]
        table = []
        for number, (label, domain, content) in enumerate(files):
            path = write(
                root / (f"d{domain}" if layout == "domain_folder" else ".") / f"c{label}" / f"{number}.png", content
            )
            table.append(f"{path.relative_to(root)},c{label},d{domain}")
        if layout == "manifest":
            collection = listed(root, "\n".join(["path,label,domain", *table]), test_share=0.4)
        else:
            collection = read(root, layout, test_share=0.4)
        assert len(collection.items) == len(files)
        try:
            partition = deal(collection, wanted(kind, extra), seed)
        except ConfigurationError as error:  # copies may leave a silo without training images
            if "would get no training images" not in str(error):
                raise
            reject()  # and not return: too many of these would show

        def contents(split: Split) -> set[str]:
            held = [index for holding in partition.holdings for index in holding.indices.get(split, ())]
            return {(root / collection.items[index].path).read_text() for index in held}

        trained = contents(Split.TRAIN)
        for split in (Split.TEST, Split.BASE, Split.NOVEL, Split.DOMAIN):
            assert not trained & contents(split)
        assert trained
        assert contents(Split.TEST)


def wanted(kind: str, extra: dict[str, Any]) -> Any:
    silos = {"silos_per_domain": 1} if kind.startswith("domain") else {"silos": 2}
    skew = {"beta": 1.0, "min_images": 1} if kind.endswith("dirichlet") else {}
    return section(kind=kind, **silos, **skew, **extra)


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
@pytest.mark.parametrize("link", [False, True])
def test_copies_across_a_declared_split_are_nobodys_training_images(
    tmp_path: Path, kind: str, layout: Layout, link: bool
) -> None:
    """Byte copies and hard links, within a class, from another class and from another domain."""
    root = tmp_path / "images"
    place = "{side}/c{label}/d{domain}" if layout == "image_folder" else "d{domain}/{side}/c{label}"
    files = {
        (side, label, domain, number): root / place.format(side=side, label=label, domain=domain) / f"{number}.png"
        for side, count in (("train", 8), ("test", 4))
        for label in range(4)
        for domain in range(2)
        for number in range(count)
    }
    for key, path in files.items():
        write(path, str(key))
    tested = [path for key, path in files.items() if key[0] == "test"]
    copies = [root / f"{files['train', number % 4, number % 2, 0].parent}" / f"copy{number}.png" for number in range(9)]
    for number, copy in enumerate(copies):
        original = tested[number * 3]
        os.link(original, copy) if link else shutil.copy(original, copy)
    with capture_logs() as logs:
        if layout == "manifest":
            lines = (
                f"{path.relative_to(root)},{path.parts[-2]},{path.parts[-3]},{path.parts[-4]}\n"
                for path in sorted(root.rglob("*.png"))
            )
            collection = listed(root, "path,label,split,domain\n" + "".join(lines))
        else:
            collection = read(root, layout)
    warning = "training images are copies of test images; nobody trains on them"
    assert [(entry["event"], entry["copy_count"]) for entry in logs] == [(warning, 9)]
    extra = {"novel": "half", **({} if layout == "image_folder" else {"held_out_domain": "d1"})}
    for values in ({}, extra):
        partition = deal(collection, wanted(kind, values))
        held = {
            split: {
                (root / collection.items[index].path).read_text()
                for holding in partition.holdings
                for index in holding.indices.get(split, ())
            }
            for split in Split
        }
        assert held[Split.TRAIN]
        for split in (Split.TEST, Split.BASE, Split.NOVEL, Split.DOMAIN):
            assert not held[Split.TRAIN] & held[split]
        assert bool(held[Split.NOVEL]) == bool(values)
    assert deal(collection, wanted(kind, {})).copy_count == 9


# --- layouts -------------------------------------------------------------------------------------------------------


def test_a_folder_with_declared_splits_keeps_them_and_holds_validation_back(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "val/cat/b.png", "test/dog/c.png"):
        write(tmp_path / name, name)
    assert rows(read(tmp_path)) == [
        ("test/dog/c.png", "dog", "test", None),
        ("train/cat/a.png", "cat", "train", None),
        ("val/cat/b.png", "cat", None, None),
    ]


def test_domains_are_directories_with_or_without_splits(tmp_path: Path) -> None:
    for domain in ("photo", "sketch"):
        for number in range(10):
            write(tmp_path / "plain" / domain / "cat" / f"{number}.png", f"{domain}{number}")
            side = "train" if number < 7 else "test"
            write(tmp_path / "declared" / domain / side / "cat" / f"{number}.png", f"{domain}{number}")
    write(tmp_path / "plain" / ".cache" / "cat" / "x.png", "x")
    write(tmp_path / "plain" / "notes.txt", "x")
    plain = read(tmp_path / "plain", "domain_folder", test_share=0.3)
    assert plain.domains == ("photo", "sketch")
    assert [item.split for item in plain.items].count(Split.TEST) == 6  # 0.3 of the class over both domains
    declared = read(tmp_path / "declared", "domain_folder")
    assert {(item.domain, item.split) for item in declared.items} == {
        (domain, split) for domain in plain.domains for split in (Split.TRAIN, Split.TEST)
    }
    assert declared.items[0].path == "photo/test/cat/7.png"


def test_a_manifest_may_name_split_and_domain(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.png", name)
    collection = listed(
        tmp_path,
        "\ufeffPath;Label;Split;Site; DOMAIN \n a.png ;cat;train;1; photo \n\n"
        "b.png;cat;test;1;sketch\n c.png;dog;val;2;photo\n",
    )
    assert rows(collection) == [
        ("a.png", "cat", "train", "photo"),
        ("b.png", "cat", "test", "sketch"),
        ("c.png", "dog", None, "photo"),
    ]
    assert collection.labels == ("cat",)


def test_an_empty_column_of_domains_is_none(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.png", name)
    collection = listed(tmp_path, "path,label,split,domain\na.png,cat,train, \nb.png,cat,test,\n")
    assert collection.domains == ()


def test_class_names_bring_domains_together(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "photo" / "back_pack" / f"{number}.png", f"p{number}")
        write(tmp_path / "sketch" / "Rucksack" / f"{number}.png", f"s{number}")
    collection = read(tmp_path, "domain_folder", class_names={"Back Pack": "backpack", "rucksack": "backpack"})
    assert collection.labels == ("backpack",)


def test_a_file_that_links_show_twice_is_one_image(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "b.png", "same file")
    (tmp_path / "cat" / "a.png").symlink_to("b.png")
    write(tmp_path / "cat" / "c.png", "another")
    assert [item.path for item in read(tmp_path).items] == ["cat/a.png", "cat/c.png"]
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "d.png").symlink_to("../cat/b.png")
    with pytest.raises(ConfigurationError, match=r"'cat/a\.png' and 'dog/d\.png' are links to one file, but differ"):
        read(tmp_path)


def test_the_digest_is_that_of_the_table(tmp_path: Path) -> None:
    items = (Item("a", "cat", Split.TRAIN), Item("b", "dog", Split.TEST), Item("c", "dog", None))
    first = Collection(tmp_path, items)
    assert Collection(tmp_path / "elsewhere", items[::-1]).digest == first.digest
    for other in (items[:2], (*items[:2], Item("c", "cat", None)), (*items[:2], Item("c", "dog", Split.TEST))):
        assert Collection(tmp_path, other).digest != first.digest


@pytest.mark.parametrize("declared", [False, True])
def test_changed_contents_give_another_digest(tmp_path: Path, declared: bool) -> None:
    """A lab runs finished cells again whose images have changed on disk, and a host says that they have."""
    for side in ("train", "test"):
        for number in range(6):
            write(tmp_path / "a" / (side if declared else ".") / "cat" / f"{side}{number}.png", f"{side}{number}")
    write(tmp_path / "a" / "list.csv", "path,label\nghost.png,cat\n" + listing(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def digests(name: str) -> tuple[str, ...]:
        folder = read(tmp_path / name)
        csv_file = read(tmp_path / name, "manifest", manifest=tmp_path / name / "list.csv")
        return folder.digest, deal(folder, section(kind="iid", silos=2)).digest, csv_file.digest

    first = digests("a")
    assert digests("b") == first, "where the root lies says nothing, nor does a file that is not there"
    changed = next((tmp_path / "b").rglob("train3.png"))
    changed.write_text("TRAIN3")
    assert not set(digests("b")) & set(first)
    changed.write_text("train3")
    assert digests("b") == first


def listing(root: Path) -> str:
    return "".join(f"{path.relative_to(root)},cat\n" for path in sorted(root.rglob("*.png")))


# --- what is no collection -----------------------------------------------------------------------------------------


def no_root(root: Path) -> None:
    root.rmdir()


def no_domains(root: Path) -> None:
    write(root / "a.png", "x")


def splits_on_top(root: Path) -> None:
    write(root / "train" / "photo" / "cat" / "a.png", "x")
    write(root / "test" / "photo" / "cat" / "b.png", "x")


def some_declare(root: Path) -> None:
    write(root / "photo" / "cat" / "a.png", "x")
    for side in ("train", "test"):
        write(root / "sketch" / side / "cat" / "a.png", side)


def empty_domain(root: Path) -> None:
    write(root / "photo" / "cat" / "a.png", "x")
    (root / "sketch").mkdir()


def linked_domain(root: Path) -> None:
    write(root / "photo" / "cat" / "a.png", "x")
    (root / "sketch").symlink_to(root / "photo")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (no_root, r"data\.root '.*' does not exist; set it to"),
        (no_domains, "holds no directories; lay it out as <domain>/<class>/<image>"),
        (splits_on_top, r"holds 'test' where domain_folder expects .* set data\.layout to image_folder"),
        (some_declare, "domain 'sketch' has the directories train and test, but domain 'photo' has not"),
        (empty_domain, r"sketch' holds no images"),
        (linked_domain, r"sketch' is a link to a directory"),
    ],
)
def test_a_folder_without_domains_says_what_to_change(
    tmp_path: Path, build: Callable[[Path], None], words: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    build(root)
    with pytest.raises(ConfigurationError, match=words):
        read(root, "domain_folder")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label,domain\na.png,cat,photo\nb.png,cat,\n", r"'b\.png' has no domain, but others have; give every"),
        ("path,label,split\na.png,cat,train\nb.png,cat,base\n", "'b.png' is declared for the split 'base'"),
        ("path,label,split\na.png,cat,train\nb.png,cat,perhaps\n", "line 3: the split 'perhaps' is unknown"),
        ("path,label,split\na.png,cat,val\n", "holds no training and no test images"),
        ("path,lable\na.png,cat\n", "has no column 'label'"),
    ],
)  # fmt: skip
def test_a_wrong_manifest_names_the_line_or_the_file(tmp_path: Path, text: str, words: str) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.png", name)
    with pytest.raises(ConfigurationError, match=words):
        listed(tmp_path, text)


@pytest.mark.parametrize("name", ["cat /a.png", " cat/a.png", "cat/a.png ", "cat/caf\udce9.png"])
def test_a_name_that_no_manifest_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text("x")
    write(tmp_path / "dog" / "a.png", "y")
    if name.endswith(" "):
        path.rename(tmp_path / "cat" / " .png")
        assert [item.path for item in read(tmp_path).items] == ["cat/ .png", "dog/a.png"]  # spaces within are fine
        return
    with pytest.raises(ConfigurationError, match=r"; rename it"):
        read(tmp_path)


def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # permissions mean nothing where tests run as root
    with pytest.raises(ConfigurationError, match=r"cannot read the directory .* Permission denied; make it readable"):
        read(tmp_path, "domain_folder")


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ((), "holds no training and no test images"),
        ((Item("a", "cat", None),), "holds no training and no test images"),
        ((Item("a", "cat", Split.TRAIN), Item("a", "cat", Split.TEST)), "'a' is in the collection 2 times"),
        ((Item("a", "cat", Split.TRAIN, "photo"), Item("b", "cat", Split.TEST)), "'b' has no domain, but others have"),
        ((Item("a", "cat", Split.TRAIN), Item("b", "cat", Split.NOVEL)), "'b' is declared for the split 'novel'"),
    ],
)
def test_a_table_that_no_data_set_can_have_is_refused(items: tuple[Item, ...], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Collection(Path("/data"), items)


@pytest.mark.parametrize(
    ("layout", "manifest", "words"),
    [
        ("manifest", None, "layout is 'manifest', but manifest is missing; add"),
        ("domain_folder", Path("all.csv"), "manifest is set, but layout is 'domain_folder'; remove"),
    ],
)
def test_a_manifest_goes_with_its_layout(layout: Layout, manifest: Path | None, words: str) -> None:
    """For every file that has these keys, in the same words."""
    check_layout("manifest", Path("all.csv"))
    check_layout("image_folder", None)
    with pytest.raises(ValueError, match=words):
        check_layout(layout, manifest)
    with pytest.raises(ValueError, match=words):
        CollectionSection(root=Path("/data"), layout=layout, manifest=manifest)


def test_without_a_test_share_nothing_can_be_dealt(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "cat" / f"{number}.png", str(number))
    with pytest.raises(ConfigurationError, match=r"raise data\.test_share"):
        deal(read(tmp_path, test_share=0.0), section(kind="iid", silos=2))
