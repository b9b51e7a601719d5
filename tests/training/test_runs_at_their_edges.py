"""Runs with data and models at the edges: noise in eval mode, shuffled validation, streams, states that do not fit."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from sparse_adv import data, engine, training
from sparse_adv.training import TrainConfig
from sparse_adv.training.awp import perturbed_weights
from sparse_adv.training.checkpoint import damaged

CONFIG = TrainConfig("fgsm-rs", epochs=3, eps=0.1, lr=0.05, schedule="constant", overfitting_monitor=False)


class Noisy(nn.Module):
    """Draws numbers in eval mode too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc(x + 0.1 * torch.randn_like(x))


def split(count=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return data.Split(torch.rand(count, 1, 4, 4, generator=draw), torch.arange(count) % 4)


def shuffled(images):
    return DataLoader(TensorDataset(images.images, images.labels), 7, shuffle=True)


@pytest.mark.parametrize("make", [shuffled, lambda images: data.Batches(images, 7)], ids=["DataLoader", "Batches"])
def test_a_continued_run_measures_the_same_with_noise_and_shuffled_validation(tmp_path, make):
    results = []
    for name, stops in (("whole", [3]), ("parts", [1, 2, 3])):
        for stop in stops:
            torch.manual_seed(stop)
            model, state = Noisy(), torch.get_rng_state()
            records = training.train(
                model,
                data.Batches(split(), 8),
                CONFIG,
                validation=make(split(20, 1)),
                folder=tmp_path / name,
                on_epoch=lambda record, stop=stop: record.epoch >= stop,
            )
            assert torch.get_rng_state().equal(state)
        measured = [(record.loss, record.clean_accuracy, record.robust_accuracy) for record in records]
        results.append((measured, model.fc.weight.detach().clone()))
    assert results[0][0] == results[1][0] and results[0][1].equal(results[1][1])


def test_no_part_of_the_final_test_asks_for_the_engine_when_it_is_off(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    config = TrainConfig("natural", epochs=1, eps=0.1, engine=False)
    records = training.train(model, data.Batches(split(), 8), config, folder=tmp_path)
    monkeypatch.setattr(engine.dispatch, "_entry_of", lambda *_: pytest.fail("the engine was asked"))
    assert set(training.final_test(model, str(tmp_path), records, config, split()).test) == {"clean", "fgsm", "pgd-20"}


def test_batches_that_end_for_good_are_named():
    class Once:
        left = 1

        def __len__(self):
            return 2

        def __iter__(self):
            self.left, left = 0, self.left
            return iter([(torch.rand(4, 1, 4, 4), torch.arange(4))] * left)

    with pytest.raises(ValueError, match="batches must have images in each epoch, got none"):
        training.train(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), Once(), CONFIG)


class Stream(IterableDataset):
    def __init__(self, images, length):
        self.images = images
        if length:
            self.__class__ = type("Sized", (Stream,), {"__len__": lambda self: len(self.images.labels)})

    def __iter__(self):
        yield from zip(self.images.images, self.images.labels, strict=True)


@pytest.mark.parametrize("length", [True, False])
def test_loaders_of_streams_and_of_whole_batches_keep_a_folder(tmp_path, length):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    images, streamed = split(), DataLoader(Stream(split(20, 1), length), 5)
    whole = DataLoader(
        TensorDataset(images.images, images.labels),
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(range(24)), 8, drop_last=False),
    )
    records = training.train(model, whole, CONFIG, validation=streamed, folder=tmp_path)
    assert len(records) == 3 and records[-1].robust_accuracy is not None


def test_images_in_a_sequence_of_ones_own_are_recognised(tmp_path):
    class Pairs(Sequence):
        def __init__(self, pairs):
            self.pairs = pairs

        def __len__(self):
            return len(self.pairs)

        def __getitem__(self, index):
            return self.pairs[index]

    for seed, said in ((0, None), (1, "other training images")):
        batches = Pairs([(split(8, seed).images, split(8).labels)])
        model = Noisy()
        if said is None:
            training.train(model, batches, CONFIG, folder=tmp_path, on_epoch=lambda record: True)
        else:
            with pytest.raises(ValueError, match=said):
                training.train(model, batches, CONFIG, folder=tmp_path)


def test_a_model_with_extra_state_keeps_no_folder(tmp_path):
    class Counting(nn.Flatten):
        def get_extra_state(self):
            return {"count": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match=r"in a folder, got '0\._extra_state', a dict"):
        training.train(nn.Sequential(Counting(), nn.Linear(16, 4)), data.Batches(split(), 8), CONFIG, folder=tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_validation_labels_may_have_any_integer_dtype(dtype):
    images = split(20, 1)
    validation = data.Split(images.images, images.labels.to(dtype))
    records = training.train(Noisy(), data.Batches(split(), 8), CONFIG, validation=validation)
    assert len(records) == 3


def test_too_little_memory_is_no_damage(tmp_path):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert damaged(tmp_path, error) is error
    assert "(KeyError: 'x'): delete its folder" in str(damaged(tmp_path, KeyError("x")))


def test_many_samples_take_no_time_of_an_epoch():
    seen = []

    class Sampler(SequentialSampler):
        def set_epoch(self, epoch):
            seen.append(epoch)

    samples = [(torch.zeros(1), 0)] * 100_000
    loader = DataLoader(samples, 4, sampler=Sampler(samples))
    training.random_numbers.set_epoch(loader, 5)  # each sample was moved for each other one: minutes
    assert seen == [5]


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_labels_of_fgsm_rs_cs_add_up_to_1_in_16_bits(smoothing):
    made = training.objectives.build(TrainConfig("fgsm-rs-cs", label_smoothing=smoothing, eps=0.1))
    logits, labels = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    narrow = logits.bfloat16()
    assert made.cross_entropy(narrow, labels).item() == pytest.approx(made.cross_entropy(narrow.float(), labels).item())


def test_a_perturbation_of_weights_moves_no_statistics():
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.rand(8, 1, 4, 4)
    with perturbed_weights(model, lambda model: model(x).square().mean(), 0.01):
        pass
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())


def test_what_a_hook_keeps_must_be_read_again(tmp_path):
    class Keeping(training.UpdateHook):
        def state_dict(self):
            return {"best": np.float64(0.5)}

    with pytest.raises(TypeError, match="a state must be tensors, numbers, text"):
        training.train(Noisy(), data.Batches(split(), 8), CONFIG, folder=tmp_path, hook=Keeping())
    assert not (tmp_path / "state.pt").exists()
