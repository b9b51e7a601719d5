"""CIFAR: the same images from folder and archive, and messages about missing, damaged and malicious files."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_adv import data

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3072), dtype=np.uint8)


def batch(index: int, key=str.encode, labels="labels", classes=10) -> dict:
    """Batch number `index`, of four images; `key` converts the keys, by default to bytes."""
    values = {"data": PIXELS[index], labels: [(index + i) % classes for i in range(4)], "coarse_labels": [99] * 4}
    return {key(name): value for name, value in values.items()}


def write(folder: Path, **contents) -> Path:
    """Write CIFAR-10 into a folder; `contents` replaces batches by name, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(BATCHES):
        content = contents.get(name, batch(i))
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
    return folder


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    return archive


@pytest.fixture
def cifar10(tmp_path) -> Path:
    return write(tmp_path / "cifar-10-batches-py")


def test_images_are_uint8_planes_in_the_order_of_the_batches(cifar10):
    dataset = data.load(cifar10, validation=1)
    assert (dataset.classes, dataset.name, dataset.input_shape) == (10, "cifar10", (3, 32, 32))
    images = torch.from_numpy(PIXELS).view(6, 4, 3, 32, 32)
    assert dataset.test.images.equal(images[5]) and dataset.test.labels.tolist() == [5, 6, 7, 8]
    assert dataset.train.images.dtype == torch.uint8 and dataset.train.labels.dtype == torch.int64
    known = {image.numpy().tobytes(): (n // 4 + n % 4) % 10 for n, image in enumerate(images[:5].flatten(0, 1))}
    for part in (dataset.train, dataset.validation):
        assert [known.pop(image.numpy().tobytes()) for image in part.images] == part.labels.tolist()
    assert not known


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-python (1).tar.gz"])
def test_folder_archive_and_parent_folder_give_the_same_data_set(cifar10, tmp_path, name):
    (tmp_path / "downloads").mkdir()
    archive = pack(cifar10, tmp_path / "downloads" / name)
    places = [cifar10.parent, archive, *([archive.parent] if "(" not in name else [])]
    expected = data.load(cifar10)
    for place in places:
        dataset = data.load(place)
        for split, expected_split in zip(dataset[:3], expected[:3], strict=True):
            assert split.images.equal(expected_split.images) and split.labels.equal(expected_split.labels)
        assert dataset[3:] == expected[3:]


def test_a_folder_with_another_name_is_recognised(cifar10):
    assert data.load(cifar10.rename(cifar10.with_name("images"))).name == "cifar10"


def test_cifar100_gives_fine_labels_and_accepts_str_keys(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for i, name in enumerate(("train", "test")):
        content = batch(97 * i % 6, key=str, labels="fine_labels", classes=100)
        content["fine_labels"] = [96 + n for n in range(4)]
        (folder / name).write_bytes(pickle.dumps(content))
    dataset = data.load(tmp_path)
    assert (dataset.classes, dataset.name) == (100, "cifar100")
    assert dataset.test.labels.tolist() == [96, 97, 98, 99]
    write(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match=r"two data sets, choose one: .*cifar-10-batches-py or .*cifar-100-python"):
        data.load(tmp_path)


def test_labels_that_were_pickled_again_as_an_array_are_read(cifar10):
    expected = data.load(cifar10).test.labels
    content = batch(5)
    content[b"labels"] = np.array(content[b"labels"])
    (cifar10 / "test_batch").write_bytes(pickle.dumps(content))
    assert data.load(cifar10).test.labels.equal(expected)


def test_error_names_a_missing_batch(cifar10, tmp_path):
    (cifar10 / "data_batch_3").unlink()
    archive = pack(cifar10, tmp_path / "cifar-10-python.tar.gz")
    for place in (cifar10, tmp_path, archive):
        with pytest.raises(FileNotFoundError, match="lacks the batch 'data_batch_3'"):
            data.load(place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(batch(1))[:-500], "readable pickle"),
        (pickle.dumps([1, 2]), "must hold a dict, got list"),
        (
            {**batch(1), b"data": PIXELS[1].astype(np.float32)},
            "must hold 'data', a uint8 array with 3072 bytes per image",
        ),
        ({**batch(1), b"data": PIXELS[1][:, :100]}, "3072 bytes per image"),
        ({**batch(1), b"labels": [0, 1, 2]}, "must hold 'labels', a list with one integer per image"),
        ({**batch(1), b"labels": [0, 1, 2, 0.5]}, "one integer per image"),
        ({**batch(1), b"labels": [0, 1, 2, 10]}, r"labels from 0 to 10, outside \[0, 9\]"),
        ({**batch(1), b"labels": [0, 1, 2, -1]}, r"labels from -1 to 2, outside \[0, 9\]"),
    ],
)
def test_error_names_an_invalid_batch(tmp_path, content, message):
    write(tmp_path / "cifar-10-batches-py", data_batch_2=content)
    with pytest.raises(ValueError, match=rf"^batch 'data_batch_2' of .*cifar-10-batches-py .*{message}"):
        data.load(tmp_path)


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_malicious_pickle_raises_and_its_code_does_not_run(tmp_path):
    trace = tmp_path / "executed"
    write(tmp_path / "cifar-10-batches-py", test_batch={**batch(5), b"data": Malicious(trace)})
    with pytest.raises(ValueError, match=r"'test_batch' .*asks for posix\.mkdir|'test_batch' .*asks for nt\.mkdir"):
        data.load(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0005, 0.3, 0.9, 0.9999])
def test_a_truncated_archive_raises_one_sentence(cifar10, tmp_path, share):
    archive = pack(cifar10, tmp_path / "cifar-10-python.tar.gz")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz .*is damaged, or its download is incomplete"):
        data.load(archive)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_changed_byte_in_an_archive_is_detected_by_its_checksum(cifar10, tmp_path, share):
    archive = pack(cifar10, tmp_path / "cifar-10-python.tar.gz")
    content = bytearray(archive.read_bytes())
    content[int(len(content) * share)] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        data.load(archive)


def test_an_archive_of_other_files_raises(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("no images")
    with pytest.raises(ValueError, match="is not a data set in a supported format"):
        data.load(pack(tmp_path / "other", tmp_path / "other.tar.gz"))
