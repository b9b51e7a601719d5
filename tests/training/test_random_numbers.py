"""Data sets and samplers inside of others: they too get the number of the epoch, and their generators are saved."""

import random
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from helpers.small_runs import QUICK, TRAIN, equal_states, network
from torch import Generator
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from sparse_adv import data, training
from sparse_adv.training import random_numbers


class Images(Dataset):
    """Knows the epoch."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(TRAIN.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return data.to_unit(TRAIN.images[index]), TRAIN.labels[index]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


WRAPPERS = {
    "itself": lambda images: images,
    "Subset": lambda images: Subset(images, range(10)),
    "ConcatDataset": lambda images: ConcatDataset([Subset(images, [1, 2]), Subset(images, [3])]),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_epoch_reaches_a_data_set_inside_of_others_once(name):
    images = Images()
    random_numbers.set_epoch(DataLoader(WRAPPERS[name](images)), 3)
    assert images.epochs == [3]


def test_the_epoch_reaches_a_sampler_inside_of_others():
    sampler = DistributedSampler(range(8), num_replicas=1, rank=0)
    random_numbers.set_epoch(DataLoader(range(8), batch_sampler=BatchSampler(sampler, 2, False)), 3)
    assert sampler.epoch == 3


def test_generators_of_all_parts_are_saved():
    generators = [Generator().manual_seed(i) for i in range(2)]
    sampler = BatchSampler(RandomSampler(range(8), generator=generators[0]), 2, False)
    loader = DataLoader(range(8), batch_sampler=sampler, generator=generators[1])
    states = random_numbers.states_of(loader)
    first = [*map(torch.Tensor.tolist, loader), float(torch.rand((), generator=generators[1]))]
    random_numbers.load_states(loader, states)
    again = [*map(torch.Tensor.tolist, loader), float(torch.rand((), generator=generators[1]))]
    assert again == first and len(states) == 2


def test_a_run_that_is_continued_with_other_generators_is_refused(tmp_path):
    def train(epochs: int, generator: Generator | None) -> None:
        config = training.loop.replace(QUICK, epochs=epochs)
        loader = DataLoader(Images(), 32, shuffle=True, generator=generator)
        training.train(network(), loader, config, folder=tmp_path / "run")

    train(1, None)
    with pytest.raises(ValueError, match="batches and model have 1 generators of their own, had 0 when"):
        train(2, Generator())


@pytest.mark.parametrize("own", [np.random.default_rng(0), np.random.RandomState(0), Random(0), Generator()])
def test_a_generator_that_is_not_saved_is_told(own, tmp_path, caplog):
    images = Images()
    loader = DataLoader(Subset(images, range(8)), 4, shuffle=True, generator=Generator())
    config = replace(QUICK, epochs=1)
    training.train(network(), loader, config, folder=tmp_path / "a")
    assert "not saved" not in caplog.text
    images.rng = own
    training.train(network(), loader, config, folder=tmp_path / "b")
    assert "Images.rng is a generator that is not saved: a run that is continued draws other numbers" in caplog.text


class Augmented(Images):
    """A data set whose transform draws, as those of torchvision do."""

    def __init__(self, own) -> None:
        super().__init__()
        self.transform = Identity()
        self.transform.own = own


class Identity:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image


class Noisy(torch.nn.Sequential):
    """Draws noise from a generator of its own."""

    def __init__(self, *layers) -> None:
        super().__init__(*layers)
        self.own = Generator().manual_seed(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * torch.rand(x.shape, generator=self.own) if self.training else x)


def test_a_generator_of_a_transform_or_a_module_is_told_if_it_is_not_saved(caplog):
    random_numbers.warn_of_unsaved(DataLoader(Augmented(np.random.default_rng(0))), torch.nn.Identity())
    assert "Identity.own is a generator that is not saved" in caplog.text
    caplog.clear()
    model = torch.nn.Sequential(Noisy())
    random_numbers.warn_of_unsaved([], model)
    assert not caplog.text
    model[0].numpy = np.random.default_rng(0)
    random_numbers.warn_of_unsaved([], model)
    assert "Noisy.numpy is a generator that is not saved" in caplog.text


def test_a_generator_of_a_module_goes_on_in_a_run_that_is_continued(tmp_path):
    models = [Noisy(*network()) for _ in range(3)]
    config = replace(QUICK, epochs=2)
    training.train(models[0], DataLoader(Images(), 32), config, folder=tmp_path / "whole")
    training.train(models[1], DataLoader(Images(), 32), replace(config, epochs=1), folder=tmp_path / "cut")
    training.train(models[2], DataLoader(Images(), 32), config, folder=tmp_path / "cut")
    assert equal_states(models[0].state_dict(), models[2].state_dict())


def test_persistent_workers_are_told(caplog):
    random_numbers.warn_of_unsaved(DataLoader(Images(), 4, num_workers=1, persistent_workers=True))
    assert "the workers of the DataLoader are persistent" in caplog.text


def test_every_global_generator_gets_the_seed_and_goes_on_where_it_was():
    def drawn() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    found = []
    for outer, seed in ((0, 3), (1, 3), (1, 4)):
        random.seed(outer)
        np.random.seed(outer)
        torch.manual_seed(outer)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        with random_numbers.seeded(seed):
            found.append(drawn())
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert found[0] == found[1] and not any(a == b for a, b in zip(found[1], found[2], strict=True))


def test_many_samples_take_no_time_of_an_epoch():
    seen = []

    class Sampler(SequentialSampler):
        def set_epoch(self, epoch):
            seen.append(epoch)

    samples = [(torch.zeros(1), 0)] * 100_000
    loader = DataLoader(samples, 4, sampler=Sampler(samples))
    random_numbers.set_epoch(loader, 5)  # each sample was moved for each other one: minutes
    assert seen == [5]
