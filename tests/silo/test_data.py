"""What a silo can point at: folders, manifests, every kind of image file, labels, and the split."""

import contextlib
import csv
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedrt.errors import ConfigurationError, FailureReason, WorkError
from silo.data import Split, index
from silo.data.images import UnreadableImage, check_header, read_image
from silo.data.indexing import fingerprint, identities, split_by_content
from silo.data.labels import match_classes, normalise, renamed
from silo.data.manifest import scan_manifest
from silo.data.records import Entry
from silo.sources import DataSource


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, shade // 256 % 256, 7)).save(path)
    return path


def folder(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        for each in range(count):
            picture(root / name / f"{each}.png", 1000 * number + each)
    return root


def manifest(root: Path, text: str | bytes, name: str = "list.csv") -> DataSource:
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return DataSource("manifest", root, path)


# --- image folders -------------------------------------------------------------------------------------------------


def test_a_folder_with_declared_splits_keeps_them(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"cat": 3, "dog": 2})
    folder(tmp_path / "Test", {"cat": 1})
    folder(tmp_path / "val", {"dog": 1})
    found = index(DataSource("image_folder", tmp_path))
    assert found.class_counts == {"train": {"cat": 3, "dog": 2}, "validation": {"dog": 1}, "test": {"cat": 1}}
    assert [record.name for record in found.of_split(Split.TEST)] == ["Test/cat/0.png"]


def test_a_folder_without_splits_is_split_per_class(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 10, "dog": 5, "owl": 1})
    found = index(DataSource("image_folder", tmp_path))
    assert found.class_counts == {"train": {"cat": 8, "dog": 4, "owl": 1}, "test": {"cat": 2, "dog": 1}}
    assert index(DataSource("image_folder", tmp_path)).digest == found.digest
    everything = index(DataSource("image_folder", tmp_path, test_share=0))
    assert everything.class_counts == {"train": {"cat": 10, "dog": 5, "owl": 1}}
    assert everything.digest != found.digest


def test_a_renamed_image_stays_on_its_side(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 20})
    before = {fingerprint(r.path): r.split for r in index(DataSource("image_folder", tmp_path)).records}
    for number, path in enumerate(sorted((tmp_path / "cat").iterdir())):
        path.rename(tmp_path / "cat" / f"renamed-{(number * 7) % 20}.png")
    after = {fingerprint(r.path): r.split for r in index(DataSource("image_folder", tmp_path)).records}
    assert after == before


def test_what_is_no_image_is_passed_over_and_counted(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 2})
    for name in ("cat/.DS_Store", "cat/._0.png", "cat/notes.txt", "readme.md"):
        (tmp_path / name).write_text("x")
    picture(tmp_path / "cat" / "deeper" / "UPPER.PNG", 9)
    picture(tmp_path / ".thumbnails" / "t.png", 9)
    picture(tmp_path / "cat" / ".hidden" / "t.png", 9)
    found = index(DataSource("image_folder", tmp_path, test_share=0))
    assert [record.name for record in found.records] == ["cat/0.png", "cat/1.png", "cat/deeper/UPPER.PNG"]
    assert found.ignored_count == 4


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 2, "bus": 2})
    assert index(DataSource("image_folder", tmp_path)).labels == ("bus", "train")


def build_nothing(root: Path) -> None:
    root.rmdir()


def build_file(root: Path) -> None:
    root.rmdir()
    root.write_text("x")


def build_flat(root: Path) -> None:
    picture(root / "a.png")


def build_train_only(root: Path) -> None:
    folder(root / "train", {"cat": 1})


def build_mixed(root: Path) -> None:
    for name in ("train", "test", "cat"):
        folder(root / name, {"cat": 1})


def build_two_spellings(root: Path) -> None:
    for name in ("train", "test", "testing"):
        folder(root / name, {"cat": 1})


def build_link_out(root: Path) -> None:
    outside = picture(root.parent / "outside" / "a.png")
    (root / "cat").mkdir()
    (root / "cat" / "a.png").symlink_to(outside)


def build_directory_link(root: Path) -> None:
    folder(root, {"cat": 1})
    (root / "dog").symlink_to(root / "cat")


def build_strange_name(root: Path) -> None:
    os.makedirs(os.fsencode(root) + b"/caf\xe9")
    picture(root / "cat" / "a.png")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (build_nothing, "does not exist; set it to"),
        (build_file, "is not a directory; set it to"),
        (lambda root: None, "holds no images; lay them out as <class>/<image>"),
        (build_flat, r"holds no images \(1 other files were passed over\)"),
        (build_train_only, "add both 'train' and 'test'"),
        (build_mixed, "holds 'cat' beside split directories"),
        (build_two_spellings, "holds both 'test' and 'testing'; keep one"),
        (build_link_out, "out of data.root; use data.layout 'manifest'"),
        (build_directory_link, "is a link to a directory"),
        (build_strange_name, "not UTF-8; rename it"),
    ],
)
def test_a_folder_that_cannot_be_read_is_a_configuration_error(
    tmp_path: Path, build: Callable[[Path], None], words: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    build(root)
    with pytest.raises(ConfigurationError, match=words):
        index(DataSource("image_folder", root))


def test_a_link_within_the_root_is_followed(tmp_path: Path) -> None:
    target = picture(tmp_path / ".annex" / "object.png")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").symlink_to(target)
    assert index(DataSource("image_folder", tmp_path)).labels == ("cat",)


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    folder(tmp_path / "real", {"cat": 2})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(index(DataSource("image_folder", tmp_path / "link")).records) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "zip"},
        {"layout": "manifest"},
        {"manifest": Path("/m.csv")},
        {"max_unreadable_share": 1.5},
        {"test_share": 1.0},
        {"class_names": {"": "cat"}},
    ],
)
def test_a_source_that_makes_no_sense_cannot_exist(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"^data\."):
        DataSource(**({"layout": "image_folder", "root": Path("/d")} | wrong))


# --- manifests -----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.png", "b.png", "sub/c d.png", "e.png", "f.png")):
        picture(tmp_path / name, number)
    return tmp_path


def test_a_manifest_with_splits(images: Path) -> None:
    found = index(manifest(images, "path,label,split\na.png,cat,train\nb.png,dog,TEST\nsub/c d.png,cat,val\n"))
    assert [(r.name, r.label, r.split) for r in found.records] == [
        ("a.png", "cat", Split.TRAIN),
        ("sub/c d.png", "cat", Split.VALIDATION),
        ("b.png", "dog", Split.TEST),
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfPath,Label\r\na.png,cat\r\nb.png,dog\r\n",
        "label;path;patient\ncat;a.png;17\ndog;b.png;18\n",
        "label\tpath\ncat\ta.png\n\n\ndog\tb.png",
        'path,label\n"a.png","cat"\n" b.png ",dog\n , \n',
        "path,label,split\na.png,cat,\nb.png,dog,\n",
    ],
)
def test_a_manifest_as_spreadsheets_write_it(images: Path, text: str | bytes) -> None:
    found = index(manifest(images, text))
    assert [(record.name, record.label) for record in found.records] == [("a.png", "cat"), ("b.png", "dog")]


def test_a_silo_takes_no_notice_of_domains(images: Path) -> None:
    source = manifest(images, "domain,label,path\n photo ,cat,a.png\n,dog,b.png\n")
    assert source.manifest is not None
    entries = scan_manifest(source.manifest, images)
    assert [(entry.name, entry.domain) for entry in entries] == [("a.png", "photo"), ("b.png", None)]
    assert [record.name for record in index(source).records] == ["a.png", "b.png"]


def test_paths_are_relative_to_the_root_or_to_the_manifest(images: Path) -> None:
    (images / "sub" / "list.csv").write_text(f"path,label\nc d.png,cat\na.png,cat\n{images}/b.png,cat\n")
    found = index(DataSource("manifest", images, images / "sub" / "list.csv", test_share=0))
    assert [record.name for record in found.records] == ["a.png", "b.png", "sub/c d.png"]


def test_a_file_that_is_missing_stays_in_the_index(images: Path) -> None:
    found = index(manifest(images, "path,label\na.png,cat\nghost.png,cat\n"))
    assert len(found.records) == 2
    with pytest.raises(UnreadableImage, match="No such file"):
        check_header(images / "ghost.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column 'path'"),
        ("path\na.png\n", "has no column 'label'"),
        ("file,label\na.png,cat\n", "has no column 'path'"),
        ("path,label,label\na.png,cat,dog\n", "two columns 'label'"),
        ("path,label\n", "lists no images"),
        ("path,label\na.png,cat\nb.png,\n", "line 3: the label is empty"),
        ("path,label\n,cat\n", "line 2: the path is empty"),
        ("path,label\na.png,cat,extra\n", "line 2 has 3 fields; the header has 2"),
        ("path,label\na.png\n", "line 2 has 1 fields"),
        ("path,label,split\na.png,cat,train\nb.png,cat,holdout\n", "line 3: the split 'holdout' is unknown; known are"),
        ("path,label,split\na.png,cat,train\nb.png,cat,\n", "line 3: the split is empty"),
        ("path,label\na.png,cat\nb.png,cat\n./a.png,dog\n", "line 4: './a.png' was listed in line 2 already"),
        ("path,label\n../a.png,cat\n", "line 2: '../a.png' leads out of data.root"),
        ("path,label\n/etc/passwd,cat\n", "line 2: '/etc/passwd' leads out"),
        ("path,label\nx.png,cat\ny.png,cat\n", "none of the 2 files"),
        ('path,label\n"a.png,cat\n', "line 2: "),
        ("path,label\na\0.png,cat\n", "line 2: "),
        ("path,label\ncaf\xe9.png,cat\n".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_wrong_manifest_names_the_line(images: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        index(manifest(images, text))


def test_a_path_that_leaves_the_root_through_a_link_is_refused(images: Path) -> None:
    root = images / "root"
    root.mkdir()
    (root / "way-out").symlink_to(images)
    with pytest.raises(ConfigurationError, match=r"line 2: 'way-out/a\.png' leads out"):
        index(manifest(root, "path,label\nway-out/a.png,cat\n"))


def test_a_manifest_that_is_missing_or_a_directory(images: Path) -> None:
    for name in ("ghost.csv", "sub"):
        with pytest.raises(ConfigurationError, match=r"cannot read data\.manifest"):
            index(DataSource("manifest", images, images / name))


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["x", "y", 'q"uo,te']), st.booleans()), max_size=9))
def test_any_table_that_python_writes_is_read_back(rows: list[tuple[str, str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        picture(root / "always.png", 77)
        table = {"always.png": ("x", "train")}
        for name, label, is_test in rows:
            picture(root / f"{name}.png", ord(name))
            table[f"{name}.png"] = (label, "test" if is_test else "train")
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("path", "label", "split"), *((n, *rest) for n, rest in table.items())])
        found = index(manifest(root, text.getvalue()))
        assert {r.name: (r.label, r.split.value) for r in found.records} == table


# --- the split -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["cat", "dog"])), min_size=1, max_size=40),
    st.floats(0, 0.9),
)
def test_train_and_test_never_share_an_image(files: list[tuple[int, str]], share: float) -> None:
    with tempfile.TemporaryDirectory() as place:
        entries = []
        for number, (content, label) in enumerate(files):
            path = Path(place) / str(number)
            path.write_bytes(f"content {content}".encode())
            entries.append(Entry(path, str(number), label, None))
        splits = split_by_content(entries, share)
        assert split_by_content(entries[::-1], share) == splits
        assert set(splits) == {entry.name for entry in entries}
        sides: dict[int, set[Split]] = {}
        for (content, _), entry in zip(files, entries, strict=True):
            sides.setdefault(content, set()).add(splits[entry.name])
        assert all(len(side) == 1 for side in sides.values())
        assert Split.TRAIN in splits.values()


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_each_class_gives_its_share(count: int, share: float) -> None:
    entries = [Entry(Path(f"/nowhere/{n}"), str(n), "cat", None) for n in range(count)]
    tests = sum(split is Split.TEST for split in split_by_content(entries, share).values())
    assert abs(tests - count * share) <= 1
    assert tests >= 1 or share == 0 or count == 1
    assert tests < count


def test_a_fingerprint_sees_size_beginning_and_end(tmp_path: Path) -> None:
    size = 100_000
    contents = [bytes(size), b"x" + bytes(size - 1), bytes(size - 1) + b"x", bytes(size + 1), bytes(40_000), b""]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    assert len({fingerprint(tmp_path / str(number)) for number in range(len(contents))}) == len(contents)
    (tmp_path / "copy").write_bytes(contents[1])
    assert fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "1")
    assert fingerprint(tmp_path / "nowhere") is None


def test_large_files_that_differ_in_the_middle_alone_are_no_copies(tmp_path: Path) -> None:
    contents = [bytes(100_000), bytes(50_000) + b"x" + bytes(49_999), bytes(100_000), bytes(65_536), bytes(65_536)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    paths = [tmp_path / name for name in ("0", "1", "2", "3", "4", "nowhere", "neither")]
    prints = [fingerprint(path) for path in paths]
    assert prints[0] == prints[1]
    found = identities(paths, prints)
    assert found[0] == found[2]
    assert found[3] == found[4] == prints[3], "a fingerprint says all about a small file"
    assert len({found[0], found[1], found[3]}) == 3
    assert found[5:] == [None, None]


# --- labels --------------------------------------------------------------------------------------------------------


def test_labels_are_compared_without_case_underscores_and_spaces() -> None:
    match = match_classes(["basal_cell__Carcinoma", " NAEVUS "], ["Melanoma", "basal cell carcinoma", "naevus"])
    assert dict(match.indices) == {"basal_cell__Carcinoma": 1, " NAEVUS ": 2}
    match.check()
    assert normalise("Cafe\u0301") == normalise("CAF\u00c9")


def test_unknown_labels_are_refused_with_counts_only() -> None:
    match = match_classes(["melanoma", "Jane Doe", "John Roe"], ["melanoma", "naevus"])
    assert match.unknown == ("Jane Doe", "John Roe")
    with pytest.raises(WorkError, match="2 of this silo's 3 labels are not classes of the experiment") as caught:
        match.check()
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE
    assert "Doe" not in str(caught.value)


def test_no_class_in_common_says_so() -> None:
    with pytest.raises(WorkError, match="no class in common: none of its 2 labels"):
        match_classes(["a", "b"], ["c"]).check()


def test_a_literal_match_wins_and_an_ambiguous_one_is_unknown() -> None:
    classes = ["red circle", "Red_Circle"]
    assert match_classes(["Red_Circle"], classes).indices == {"Red_Circle": 1}
    assert match_classes(["RED CIRCLE"], classes).unknown == ("RED CIRCLE",)


def test_class_names_map_local_labels(tmp_path: Path) -> None:
    folder(tmp_path, {"MEL": 3, "Mel 2": 2, "nv": 1})
    source = DataSource("image_folder", tmp_path, class_names={"mel": "melanoma", "mel_2": "melanoma"}, test_share=0)
    assert index(source).class_counts == {"train": {"melanoma": 5, "nv": 1}}


def test_class_names_that_contradict_each_other_are_refused() -> None:
    assert renamed(["x"], {"a b": "one", "A_B": "one"}) == {"x": "x"}
    with pytest.raises(ConfigurationError, match="maps 'A_B' both to 'one' and to 'two'; keep one"):
        renamed(["x"], {"a b": "one", "A_B": "two"})


# --- pixels --------------------------------------------------------------------------------------------------------

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)
    return found


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Image.Image:
    path = tmp_path / name
    image.save(path, **options)
    check_header(path)
    found = read_image(path)
    assert found.mode == "RGB"
    return found


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.gif", "a.tif", "a.webp", "a.ppm", "a.jp2", "a.jpg"])
def test_every_file_type_keeps_its_colour(tmp_path: Path, name: str) -> None:
    found = saved(tmp_path, Image.new("RGB", (16, 16), RED), name)
    assert np.abs(np.int16(pixel(found, 8, 8)) - np.int16(RED)).max() <= 2


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), "a.png", RED),
        ("RGBA", (255, 0, 0, 0), "a.png", WHITE),
        ("RGBA", (0, 0, 0, 51), "a.png", (204, 204, 204)),
        ("LA", (0, 0), "a.png", WHITE),
        ("L", 100, "a.png", (100, 100, 100)),
        ("L", 100, "a.tif", (100, 100, 100)),
        ("1", 1, "a.png", WHITE),
        ("1", 0, "a.tif", BLACK),
        ("P", 3, "a.png", (9, 10, 11)),
        ("I;16", 65535, "a.png", WHITE),
        ("I;16", 32768, "a.png", (128, 128, 128)),
        ("I;16", 257, "a.tif", (1, 1, 1)),
        ("I;16", 4095, "a.tif", (16, 16, 16)),
        ("I", 65535, "a.tif", WHITE),
        ("CMYK", (0, 255, 255, 0), "a.tif", RED),
        ("YCbCr", (76, 85, 255), "a.jpg", (254, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: object, name: str, expected: tuple[int, int, int]
) -> None:
    image = Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]
    if mode == "P":
        image.putpalette(list(range(30)))
    assert pixel(saved(tmp_path, image, name)) == expected


def test_transparency_of_palettes_and_key_colours_is_over_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    found = saved(tmp_path, palette, "p.png", transparency=0)
    assert (pixel(found, 0), pixel(found, 1)) == (WHITE, RED)
    assert pixel(saved(tmp_path, Image.new("RGB", (2, 2), RED), "key.png", transparency=RED)) == WHITE


@pytest.mark.parametrize("endian", ["<", ">"])
def test_16_bit_pgm_and_big_endian_files(tmp_path: Path, endian: str) -> None:
    values = np.array([[0, 257, 65535]], np.uint16)
    if endian == ">":
        (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / "a.pgm")
    assert np.asarray(read_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 1, 255]


def tiff_16(tmp_path: Path, values: np.ndarray, photometric: int, bits: int = 16, order: str = "<") -> Path:
    """A TIFF written by hand: Pillow writes neither big-endian, white-is-zero, nor 12 bits."""
    data = values.astype(f"{order}u2").tobytes()
    if bits == 12:
        a, b = (int(value) for value in values[0])
        data = bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, photometric), (273, 200)]
    tags += [(277, 1), (278, values.shape[0]), (279, len(data))]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, value in tags:
        packed = struct.pack(f"{order}H", value) + b"\0\0"
        head += struct.pack(f"{order}HHI", tag, 3, 1) + packed
    path = tmp_path / "hand.tif"
    path.write_bytes((head + bytes(4)).ljust(200, b"\0") + data)
    return path


def test_tiff_of_16_bits_in_either_order_and_either_polarity(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535]], np.uint16)
    assert np.asarray(read_image(tiff_16(tmp_path, values, 1)))[0, :, 0].tolist() == [0, 1, 255]
    assert np.asarray(read_image(tiff_16(tmp_path, values, 1, order=">")))[0, :, 0].tolist() == [0, 1, 255]
    assert np.asarray(read_image(tiff_16(tmp_path, values, 0)))[0, :, 0].tolist() == [255, 254, 0]


def test_tiff_of_12_bits_uses_its_own_range(tmp_path: Path) -> None:
    path = tiff_16(tmp_path, np.array([[0, 4095]], np.uint16), 1, bits=12)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 255]


def test_cmyk_jpeg_as_adobe_writes_it(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel(saved(tmp_path, image, "a.jpg", quality=100), 8, 8)[0] > 250
    data = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in data  # inverted, as Photoshop does; Pillow writes and reads it so
    assert pixel(read_image(tmp_path / "a.jpg"), 8, 8)[1] < 5


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), BLACK)
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    for name in ("a.jpg", "a.png", "a.tif"):
        found = saved(tmp_path, image, name, exif=exif)
        assert found.size == (10, 20)
        assert pixel(found, 5, 2)[0] > 240
        assert pixel(found, 5, 17)[0] < 15


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "a.gif", "a.bmp"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_file_is_unreadable(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)


def bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))))


def large(path: Path) -> None:
    path.write_bytes(b"P5 20000 5000 255\n")


def narrow(path: Path) -> None:
    Image.new("L", (60_000, 1)).save(path, "PNG")


def narrow_upright(path: Path) -> None:
    Image.new("RGB", (100, 5_001)).save(path, "PNG")


def floating(path: Path) -> None:
    Image.new("F", (2, 2), 0.5).save(path, "TIFF")


def signed(path: Path) -> None:
    Image.new("I", (2, 2), -1000).save(path, "TIFF")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (bomb, "DecompressionBomb"),
        pytest.param(
            *(large, "100000000 pixels; allowed are"),
            marks=pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
        ),
        (narrow, "60000 x 1 pixels; one side is more than 50 times the other"),
        (narrow_upright, "100 x 5001 pixels"),
        (floating, "floating-point"),
        (signed, "beyond 0..65535"),
        (lambda path: path.write_bytes(b""), "no known image format"),
        (lambda path: path.write_text("hello"), "no known image format"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_cannot_be_read_says_why_but_not_where(
    tmp_path: Path, write: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "jane-doe.png"
    write(path)
    with pytest.raises(UnreadableImage, match=words) as caught:
        read_image(path)
    assert "jane" not in str(caught.value)


def test_a_narrow_image_is_found_by_its_header_and_one_at_the_limit_is_read(tmp_path: Path) -> None:
    narrow(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="60000 x 1 pixels"):
        check_header(tmp_path / "a.png")
    assert saved(tmp_path, Image.new("RGB", (100, 5_000), RED), "b.png").size == (100, 5_000)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.binary(min_size=1, max_size=60), st.integers(0, 400), st.sampled_from(["png", "jpeg", "gif", "tiff", "bmp"]))
def test_a_damaged_file_is_read_or_unreadable_and_nothing_else(noise: bytes, at: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.img"
        gradient = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
        Image.fromarray(gradient).save(path, kind)
        data = bytearray(path.read_bytes())
        data[at : at + len(noise)] = noise
        path.write_bytes(data)
        with contextlib.suppress(UnreadableImage):
            assert read_image(path).mode == "RGB"
