"""MNIST and Fashion-MNIST: plain and compressed idx files, the folders of torchvision, and messages about bad files."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_adv import data

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 3), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, packed: bool = False, **contents: bytes | None) -> Path:
    """Write the four files; `contents` replaces files by name (with _ for -), None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-images-idx3-ubyte", IMAGES), (f"{part}-labels-idx1-ubyte", LABELS)):
            content = contents.get(name.replace("-", "_"), idx(array))
            if content is not None:
                (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_images_have_one_channel_and_match_their_labels(tmp_path, packed):
    dataset = data.load(write(tmp_path, packed), validation=5)
    assert (dataset.classes, dataset.name, dataset.input_shape) == (10, "mnist", (1, 4, 3))
    assert dataset.test.images.equal(torch.from_numpy(IMAGES).unsqueeze(1))
    assert dataset.test.labels.tolist() == LABELS.tolist()
    known = {image.tobytes(): label for image, label in zip(IMAGES, LABELS.tolist(), strict=True)}
    for part in (dataset.train, dataset.validation):
        assert [known.pop(image.numpy().tobytes()) for image in part.images] == part.labels.tolist()
    assert not known


@pytest.mark.parametrize(("part", "name"), [("train", "training"), ("t10k", "test")])
def test_a_split_without_images_is_refused_when_it_is_read(tmp_path, part, name):
    none = {f"{part}_images_idx3_ubyte": idx(IMAGES[:0]), f"{part}_labels_idx1_ubyte": idx(LABELS[:0])}
    with pytest.raises(ValueError, match=f"{tmp_path} must have {name} images, got none"):
        data.load(write(tmp_path, **none))


@pytest.mark.parametrize(
    ("folder", "name"), [("raw", "mnist"), ("MNIST/raw", "mnist"), ("FashionMNIST/raw", "fashion_mnist")]
)
def test_folders_of_torchvision_are_recognised_and_give_the_name(tmp_path, monkeypatch, folder, name):
    write(tmp_path / folder)
    assert data.load(tmp_path).name == name
    monkeypatch.chdir(tmp_path / folder)
    assert data.load(".").name == name


def test_the_names_that_kaggle_gives_the_files_are_known(tmp_path):
    for file in list(write(tmp_path).iterdir()):
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    assert data.load(tmp_path).test.labels.tolist() == LABELS.tolist()


def test_a_folder_further_up_does_not_give_the_name(tmp_path):
    write(tmp_path / "fashion" / "numbers" / "raw")
    assert data.load(tmp_path / "fashion" / "numbers").name == "mnist"


def test_a_folder_with_two_data_sets_raises(tmp_path):
    for folder in ("MNIST/raw", "FashionMNIST/raw"):
        write(tmp_path / folder)
    with pytest.raises(ValueError, match=r"two data sets, choose one: .*MNIST/raw or .*FashionMNIST/raw"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_error_names_a_missing_file(tmp_path, name):
    write(tmp_path, **{name.replace("-", "_"): None})
    with pytest.raises(FileNotFoundError, match=name):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"train_images_idx3_ubyte": idx(IMAGES)[:-1]},
            r"train-images.* must have 240 bytes after its header for sizes \[20, 4, 3\], got 239",
        ),
        ({"train_images_idx3_ubyte": idx(IMAGES) + b"x"}, "got more than 240"),
        ({"train_images_idx3_ubyte": b""}, "train-images.* is not an idx file of bytes with 3 dimensions"),
        ({"train_labels_idx1_ubyte": idx(IMAGES)}, "train-labels.* is not an idx file of bytes with 1 dimensions"),
        ({"t10k_labels_idx1_ubyte": idx(LABELS[:19])}, "20 t10k-images but 19 t10k-labels"),
        ({"train_labels_idx1_ubyte": idx(LABELS + 1)}, r"train-labels up to 10, outside \[0, 9\]"),
        ({"t10k_images_idx3_ubyte": idx(IMAGES[:, :2])}, "training images of 4 x 3 pixels but test images of 2 x 3"),
    ],
)
def test_error_names_an_invalid_file(tmp_path, contents, message):
    write(tmp_path, **contents)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


def test_error_names_a_truncated_gzip_file(tmp_path):
    file = write(tmp_path, packed=True) / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for end in (len(whole) - 4, len(whole) // 2, 5):
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged or its download is incomplete"):
            data.load(tmp_path)


@pytest.mark.parametrize(("count", "said"), [(20, "got more than 240"), (2**31, "must have at most 256 MiB")])
def test_a_compressed_file_that_expands_without_end_is_not_unpacked(tmp_path, count, said):
    folder = write(tmp_path)
    name = "train-images-idx3-ubyte"
    (folder / name).unlink()
    header = struct.pack(">4B3I", 0, 0, 8, 3, count, 4, 3)
    (folder / f"{name}.gz").write_bytes(gzip.compress(header + bytes(1 << 26), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=said):
        data.load(folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
