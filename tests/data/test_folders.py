"""Folders with a subfolder of images for each class."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

from sparse_adv import data

Image = pytest.importorskip("PIL.Image", reason="Pillow reads the images")


def draw(file: Path, value: int, size: tuple[int, int] = (3, 2), mode: str = "RGB") -> None:
    """Write an image of one colour with red = `value`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    colours = {"RGB": (value, 7, 9), "LA": (value, 255)}
    Image.new(mode, size, colours.get(mode, value)).save(file)


@pytest.fixture
def tree(tmp_path) -> Path:
    """12 training and 2 test images per class; red is 100 + i for cats, 200 + i for dogs, 50 more in test images."""
    for label, name in enumerate(("cats", "dogs")):
        for i in range(12):
            draw(tmp_path / "pets" / "train" / name / f"{i:02}.png", 100 * (label + 1) + i)
        for i in range(2):
            draw(tmp_path / "pets" / "test" / name / f"{i}.png", 100 * (label + 1) + 50 + i)
    return tmp_path / "pets"


def reds(split: data.Split) -> list[tuple[int, int]]:
    return sorted(zip(split.images[:, 0, 0, 0].tolist(), split.labels.tolist(), strict=True))


def test_train_and_test_folders_give_classes_in_alphabetical_order(tree):
    dataset = data.load(tree, validation=4)
    assert (dataset.classes, dataset.name, dataset.input_shape) == (2, "folder", (3, 2, 3))
    assert reds(dataset.test) == [(150, 0), (151, 0), (250, 1), (251, 1)]
    assert sorted(reds(dataset.train) + reds(dataset.validation)) == [
        (100 * k + i, k - 1) for k in (1, 2) for i in range(12)
    ]
    assert len(dataset.validation.labels) == 4
    assert dataset.test.images[0, :, 1, 2].tolist() == [150, 7, 9]


def test_limit_takes_the_same_number_of_images_of_each_class(tree):
    dataset = data.load(tree, limit=6, validation=1)
    assert sorted(reds(dataset.train) + reds(dataset.validation)) == [
        (100 * k + i, k - 1) for k in (1, 2) for i in range(3)
    ]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_used_unless_a_fraction_is_given(tree, name):
    for label, kind in enumerate(("cats", "dogs")):
        draw(tree / name / kind / "x.png", label + 1)
    assert reds(data.load(tree).validation) == [(1, 0), (2, 1)]
    assert len(data.load(tree).train.labels) == 24
    assert len(data.load(tree, validation=0.25).validation.labels) == 6


def test_without_a_test_folder_every_tenth_image_of_each_class_is_a_test_image(tree):
    flat = (tree / "train").rename(tree.with_name("flat"))
    first, other = data.load(flat, seed=0), data.load(flat, seed=1)
    assert reds(first.test) == reds(other.test) == [(109, 0), (209, 1)]
    assert len(first.train.labels) + len(first.validation.labels) == 22
    for file in flat.glob("*/0[5-9].png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"flat needs a folder test, or 10 images in each class .*: 'cats' has fewer"):
        data.load(flat)
    for i in range(10):  # now the other class alone would have no test image
        draw(flat / "cats" / f"{i}.png", 100 + i)
    with pytest.raises(ValueError, match="'dogs' has fewer"):
        data.load(flat)


def test_the_name_of_a_folder_chooses_no_normalisation(tree):
    """So that images which lie elsewhere are the same images."""
    for name in ("cifar10", "elsewhere"):
        assert data.load(tree.rename(tree.with_name(name))).name == "folder"
        tree = tree.with_name(name)


def png_of_16_bits(colour_type: int, channels: int) -> bytes:
    """A PNG of 3 x 2 pixels, which Pillow would read as one of 8 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + struct.pack(f">{3 * channels}H", *[3000] * 3 * channels) for _ in range(2))
    header = struct.pack(">IIBBBBB", 3, 2, 16, colour_type, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


DEEP = {
    "rgb.png": png_of_16_bits(2, 3),
    "rgba.png": png_of_16_bits(6, 4),
    "grey_alpha.png": png_of_16_bits(4, 2),
    "grey.png": png_of_16_bits(0, 1),
    "rgb.ppm": b"P6 3 2 65535\n" + 36 * b"\x0b",
    "twelve_bits.ppm": b"P6 3 2 4095\n" + 36 * b"\x0b",
    "words.ppm": b"P3 3 2 65535\n" + b" ".join(18 * [b"3000"]),
    "grey.pgm": b"P5 3 2 65535\n" + 12 * b"\x0b",
}


@pytest.mark.parametrize("name", DEEP)
def test_images_of_more_than_8_bits_are_refused(tree, name):
    (tree / "train" / "dogs" / name).write_bytes(DEEP[name])
    with pytest.raises(ValueError, match=rf"dogs/{name} must have 8 bits per channel, it has more"):
        data.load(tree)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "ppm", "tif", "tiff", "webp", "jpg"])
def test_images_of_8_bits_are_read_from_every_kind_of_file(tree, suffix):
    draw(tree / "train" / "dogs" / f"more.{suffix}", 40)
    assert len(data.load(tree, validation=2).train.labels) == 23


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images_have_one_channel_unless_one_image_has_colour(tmp_path, mode):
    for i in range(20):
        draw(tmp_path / "a" / f"{i:02}.png", i % 10, mode=mode)
        draw(tmp_path / "b" / f"{i:02}.png", i % 10, mode=mode)
    dataset = data.load(tmp_path)
    assert dataset.input_shape == (1, 2, 3)
    assert dataset.test.images.flatten(1).unique().tolist() == [255 if mode == "1" else 9]
    draw(tmp_path / "a" / "00.png", 1)
    assert data.load(tmp_path).input_shape == (3, 2, 3)


@pytest.mark.parametrize("has_alpha", [False, True])
def test_grey_images_with_a_palette_have_one_channel_too(tmp_path, has_alpha):
    """As GIFs have."""
    for name in ("a", "b"):
        for i in range(20):
            image = Image.new("L", (3, 2), 8 * i).convert("P")
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{i:02}.png", **({"transparency": b"\x07\x80"} if has_alpha else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.load(tmp_path)
    assert dataset.input_shape == (1, 2, 3) and dataset.test.images.flatten(1).unique().tolist() == [72, 152]
    Image.new("RGB", (3, 2), (255, 0, 0)).convert("P").save(tmp_path / "a" / "00.png")
    assert data.load(tmp_path).input_shape == (3, 2, 3)


def test_jpegs_are_read_and_other_files_are_ignored(tree):
    draw(tree / "test" / "cats" / "2.JPG", 80)
    (tree / "test" / "cats" / "notes.txt").write_text("about cats")
    (tree / "test" / "cats" / "._2.JPG").write_bytes(b"a Mac's")
    assert len(data.load(tree).test.labels) == 5


def test_error_names_an_image_of_another_size(tree):
    draw(tree / "train" / "dogs" / "03.png", 0, size=(2, 3))
    with pytest.raises(ValueError, match=r"one size: .*dogs/03\.png is 2 x 3, .* is 3 x 2"):
        data.load(tree)


@pytest.mark.parametrize("content", [b"", b"no image", "cut", "deep"])
def test_error_names_an_image_that_cannot_be_read(tree, content):
    file = tree / "train" / "dogs" / "03.png"
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif content == "deep":
        Image.fromarray(np.full((2, 3), 3000, dtype=np.uint16)).save(file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"dogs/03\.png (is not a readable image|must have 8 bits per channel)"):
        data.load(tree)


@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_decompression_bomb_raises_without_a_warning(tree, monkeypatch, factor):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6)
    draw(tree / "train" / "dogs" / "03.png", 0, size=(int(6 * factor), 1))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"dogs/03\.png is not a readable image: .*bomb"):
        warnings.simplefilter("error")
        data.load(tree)


def test_splits_with_different_classes_raise(tree):
    draw(tree / "test" / "birds" / "0.png", 1)
    with pytest.raises(ValueError, match=r"test and .*train must have the same classes, only one has 'birds'"):
        data.load(tree)


def test_error_without_pillow_says_what_to_install(tree, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sparse_adv\[data\]"'):
        data.load(tree)


FORMATS = {"png": "PNG", "JPG": "JPEG", "bmp": "BMP", "gif": "GIF", "ppm": "PPM", "tif": "TIFF", "webp": "WEBP"}


def test_images_of_every_format_are_read(tmp_path):
    for number, (suffix, format) in enumerate(FORMATS.items()):
        for i in range(10):
            (tmp_path / suffix).mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (20 * number,) * 3).save(tmp_path / suffix / f"{i}.{suffix}", format)
    dataset = data.load(tmp_path)
    assert dataset.classes == len(FORMATS) and len(dataset.test.labels) == len(FORMATS)


def two_frames(path: Path) -> None:
    Image.new("L", (4, 4)).save(path, save_all=True, append_images=[Image.new("L", (4, 4), 9)])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("dog/note.pdf", lambda path: path.write_text("text")),
        ("dog/more", lambda path: path.mkdir()),
        ("dog/9.psd", lambda path: path.write_bytes(b"8BPS")),
        ("dog/more.png", lambda path: path.mkdir()),
        ("dog/pipe.png", os.mkfifo),
        ("dog/link.png", lambda path: path.symlink_to("nowhere.png")),
        ("owl", lambda path: path.mkdir()),
        ("dog/9.gif", two_frames),
        ("dog/9.png", lambda path: Image.new("1", (5000, 4000)).save(path)),
        ("orphan.png", lambda path: Image.new("RGB", (4, 4)).save(path)),
    ],
)
def test_nothing_in_the_folder_of_a_class_is_left_out(tmp_path, name, make):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / label / f"{i:02}.png")
    make(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        data.load(tmp_path)


def test_a_folder_of_one_class_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    for i in range(10):
        Image.new("RGB", (4, 4)).save(tmp_path / "cat" / f"{i}.png")
    with pytest.raises(ValueError, match="must have a folder for each class, has only 'cat'"):
        data.load(tmp_path)


@pytest.mark.parametrize("names", [("val", "validation"), ("dev",)])
def test_a_folder_of_images_beside_train_is_used_or_refused(tree, names):
    (tree / "annotations").mkdir()
    for name in names:
        for kind in ("cats", "dogs"):
            draw(tree / name / kind / "x.png", 1)
    with pytest.raises(ValueError, match=names[-1]):
        data.load(tree)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_pictures_stand_as_the_camera_noted(tmp_path, suffix):
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # the left half is white; turned by 90 degrees, the upper one is
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder in ("train/a", "train/b", "test/a", "test/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / f"x.{suffix}", exif=exif)
    images = data.load(tmp_path).train.images
    assert images.shape[2:] == (8, 4) and images[0, :, :3].min() > 200 and images[0, :, 5:].max() < 50
