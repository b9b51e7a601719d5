"""MNIST's idx files: as they are, packed, where torchvision keeps them; and what is wrong with one in a sentence."""

import gzip
import struct
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
    """The four files; contents by name with _ for -, None for none."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-images-idx3-ubyte", IMAGES), (f"{part}-labels-idx1-ubyte", LABELS)):
            content = contents.get(name.replace("-", "_"), idx(array))
            if content is not None:
                (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_images_have_one_channel_and_keep_their_labels(tmp_path, packed):
    dataset = data.load(write(tmp_path, packed), validation=5)
    assert (dataset.classes, dataset.name, dataset.input_shape) == (10, "mnist", (1, 4, 3))
    assert dataset.test.images.equal(torch.from_numpy(IMAGES).unsqueeze(1))
    assert dataset.test.labels.tolist() == LABELS.tolist()
    known = {image.tobytes(): label for image, label in zip(IMAGES, LABELS.tolist(), strict=True)}
    for part in (dataset.train, dataset.validation):
        assert [known.pop(image.numpy().tobytes()) for image in part.images] == part.labels.tolist()
    assert not known


@pytest.mark.parametrize(
    ("folder", "name"), [("raw", "mnist"), ("MNIST/raw", "mnist"), ("FashionMNIST/raw", "fashion_mnist")]
)
def test_torchvisions_folders_are_found_and_tell_which_data_set_it_is(tmp_path, monkeypatch, folder, name):
    write(tmp_path / folder)
    assert data.load(tmp_path).name == name
    monkeypatch.chdir(tmp_path / folder)
    assert data.load(".").name == name


def test_of_two_data_sets_one_must_be_named(tmp_path):
    for folder in ("MNIST/raw", "FashionMNIST/raw"):
        write(tmp_path / folder)
    with pytest.raises(ValueError, match=r"two data sets, name one of them: .*MNIST/raw or .*FashionMNIST/raw"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path, **{name.replace("-", "_"): None})
    with pytest.raises(FileNotFoundError, match=name):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (
            {"train_images_idx3_ubyte": idx(IMAGES)[:-1]},
            r"train-images.* must have 256 bytes for \[20, 4, 3\], got 255",
        ),
        ({"train_images_idx3_ubyte": idx(IMAGES) + b"x"}, "got 257"),
        ({"train_images_idx3_ubyte": b""}, "train-images.* no idx file of bytes in 3 dimensions"),
        ({"train_labels_idx1_ubyte": idx(IMAGES)}, "train-labels.* no idx file of bytes in 1 dimensions"),
        ({"t10k_labels_idx1_ubyte": idx(LABELS[:19])}, "20 t10k-images but 19 t10k-labels"),
        ({"train_labels_idx1_ubyte": idx(LABELS + 1)}, r"train-labels up to 10, outside \[0, 9\]"),
        ({"t10k_images_idx3_ubyte": idx(IMAGES[:, :2])}, "training images of 4 x 3 pixels but test images of 2 x 3"),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path, contents, said):
    write(tmp_path, **contents)
    with pytest.raises(ValueError, match=said):
        data.load(tmp_path)


def test_a_packed_file_cut_short_is_named(tmp_path):
    file = write(tmp_path, packed=True) / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for end in (len(whole) - 4, len(whole) // 2, 5):
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged, as by a download cut short"):
            data.load(tmp_path)
