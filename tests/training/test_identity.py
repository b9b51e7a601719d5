"""A folder holds one run: of one configuration, network and set of images."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small_runs import QUICK, TRAIN, VALIDATION, Stop, batches, equal_states, network, stop_after
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sparse_adv import data, masks, runs, sparsify, training
from sparse_adv.config import DataConfig, NetworkConfig, PruneConfig
from sparse_adv.data import Batches
from sparse_adv.runs import Cost
from sparse_adv.training import identity

CONFIG = replace(QUICK, epochs=2)


def run(folder, model=None, images=None, validation=VALIDATION, config=CONFIG, stop_at=None):
    model, images = network() if model is None else model, batches() if images is None else images
    options = {"validation": validation, "folder": folder, "on_epoch": stop_after(stop_at)}
    return training.train(model, images, config, **options)


def sparse(density=0.5):
    model = network()
    return sparsify(model, masks.prune(model, density))


def activation_changed():
    model = network()
    model[2] = torch.nn.Tanh()
    return model


def first_layer_frozen():
    model = network()
    model[0].requires_grad_(False)
    return model


def other_labels(split):
    return split._replace(labels=1 - split.labels)


@pytest.mark.parametrize("stop_at", [1, None])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": lambda: sparse()}, "network"),
        ({"model": activation_changed}, "network"),
        ({"model": first_layer_frozen}, "network"),
        ({"model": lambda: network(seed=1)}, "initial weights"),
        ({"images": lambda: data.Batches(TRAIN._replace(images=TRAIN.images * 0), 32)}, "training images"),
        ({"images": lambda: data.Batches(other_labels(TRAIN), 32)}, "training images"),
        ({"images": lambda: batches(seed=1)}, "training images"),
        ({"validation": lambda: other_labels(VALIDATION)}, "validation images"),
        ({"validation": lambda: None}, "validation images"),
    ],
)
def test_another_run_is_refused(tmp_path, other, said, stop_at):
    with pytest.raises(Stop) if stop_at else pytest.MonkeyPatch.context():
        run(tmp_path, stop_at=stop_at)
    before = (tmp_path / runs.STATE).read_bytes()
    changed = {name: make() for name, make in other.items()}
    changed |= {"validation": changed["validation"]} if "validation" in other else {}
    with pytest.raises(ValueError, match=f"holds a run with other {said}: take another folder"):
        run(tmp_path, **changed)
    assert (tmp_path / runs.STATE).read_bytes() == before


def test_a_sparse_run_is_not_taken_for_one_under_other_masks(tmp_path):
    run(tmp_path, model=sparse(0.5))
    with pytest.raises(ValueError, match="other network"):
        run(tmp_path, model=sparse(0.25))


def loader(images=TRAIN, **options):
    return DataLoader(TensorDataset(data.to_unit(images.images), images.labels), 32, shuffle=True, **options)


def in_list(images=TRAIN):
    return list(data.Batches(images, 32, shuffle=False))


class InSequence(Sequence):
    """A sequence of one's own: it has no more than an item for each index."""

    def __init__(self, images=TRAIN):
        self.batches = in_list(images)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


@pytest.mark.parametrize("wrap", [loader, in_list, InSequence])
def test_images_of_loaders_lists_and_sequences_are_recognised(tmp_path, wrap):
    run(tmp_path, images=wrap(), stop_at=None)
    run(tmp_path, images=wrap())
    with pytest.raises(ValueError, match="other training images"):
        run(tmp_path, images=wrap(TRAIN._replace(images=255 - TRAIN.images)))


def test_the_model_that_was_trained_or_interrupted_continues_its_own_run(tmp_path):
    expected = network()
    run(tmp_path / "whole", expected)
    model = network()

    def interrupt(step):
        if step == 5:
            raise KeyboardInterrupt

    options = {"validation": VALIDATION, "folder": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        training.train(model, batches(), CONFIG, on_step=interrupt, **options)
    training.train(model, batches(), CONFIG, **options)
    assert equal_states(model.state_dict(), expected.state_dict())
    training.train(model, batches(), CONFIG, **options)  # a finished run returns
    assert equal_states(model.state_dict(), expected.state_dict())


class Counting(torch.nn.Sequential):
    """Counts its passes, and has a setting beside the count."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.passes, self.slope = 0, 1.0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


@pytest.mark.parametrize("interrupted", [True, False])
def test_what_passes_through_a_network_change_is_no_part_of_what_it_is(tmp_path, interrupted):
    model = Counting(*network())
    with pytest.raises(Stop) if interrupted else pytest.MonkeyPatch.context():
        run(tmp_path, model, stop_at=1 if interrupted else None)
    model(VALIDATION.images / 255)
    assert [record.epoch for record in run(tmp_path, model)] == [1, 2]
    run(tmp_path, Counting(*network()))  # as a new process would
    run(tmp_path / "another", model)
    model.load_state_dict(network().state_dict())
    run(tmp_path, model)  # it was trained twice since
    model.slope = 2.0
    with pytest.raises(ValueError, match="other network"):
        run(tmp_path, model)


def labels_swapped(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return images, 1 - labels


def test_labels_that_only_the_collation_changes_are_other_images(tmp_path):
    run(tmp_path, images=loader(), stop_at=None)
    with pytest.raises(ValueError, match="other training images"):
        run(tmp_path, images=loader(collate_fn=labels_swapped))


def test_another_function_in_a_module_is_another_network(tmp_path):
    digests = []
    for activation in (torch.relu, torch.tanh, torch.nn.functional.gelu, labels_swapped, torch.relu):
        model = network()
        model.activation = activation
        digests.append(identity.network_digest(model))
    assert len(set(digests)) == 4 and digests[0] == digests[-1]


def test_a_run_continued_with_other_threads_says_so(tmp_path, caplog):
    with pytest.raises(Stop):
        run(tmp_path, stop_at=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            run(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert f"was trained with threads {threads}, now {threads + 1}" in caplog.text


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": np.float64(0.1)},
        {"lr": np.float32(0.1)},
        {"epochs": np.int64(2)},
        {"seed": np.uint8(3)},
        {"engine": np.bool_(True)},
        {"objective": np.str_("natural")},
        {"eps": torch.tensor(0.1)},
        {"milestones": np.array([0.5, 0.75])},
        {"milestones": [np.float32(0.5)]},
    ],
    ids=str,
)
def test_settings_of_numpy_and_torch_are_plain_and_continue(tmp_path, setting):
    config = replace(CONFIG, **setting)
    (value,) = (getattr(config, name) for name in setting)
    assert type(value) in (bool, int, float, str, tuple)
    with pytest.raises(Stop):
        run(tmp_path, config=config, stop_at=1)
    assert len(run(tmp_path, config=config)) == 2


def test_other_records_are_plain_too():
    assert type(Cost(np.float32(1.5), np.int64(3)).macs) is int
    assert type(PruneConfig(block=np.array([4, 1])).block[0]) is int
    assert type(DataConfig(batch_size=np.int32(8)).batch_size) is int
    assert type(NetworkConfig("vgg16", np.int64(8)).width) is int
    with pytest.raises(ValueError, match="epochs must be an integer"):
        replace(CONFIG, epochs=np.float64(2.5))
    with pytest.raises(ValueError, match="milestones must be fractions"):
        replace(CONFIG, milestones=5)


class Noisy(Dataset):
    """Images that are changed at random, by all three generators."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        factor = random.random() * np.random.rand() * torch.rand(())
        return TRAIN.images[index].float() / 255 * factor, TRAIN.labels[index]


LOADERS = {
    "global": lambda: DataLoader(Noisy(), 32, shuffle=True),
    "workers": lambda: DataLoader(Noisy(), 32, shuffle=True, num_workers=1),
    "generator": lambda: DataLoader(Noisy(), 32, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "sampler": lambda: DataLoader(
        Noisy(),
        32,
        sampler=torch.utils.data.RandomSampler(Noisy(), generator=torch.Generator().manual_seed(5)),
    ),
    "distributed": lambda: DataLoader(Noisy(), 32, sampler=DistributedSampler(Noisy(), 1, 0)),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_loaders_repeat_and_continue_bit_for_bit(tmp_path, make):
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    whole = run(tmp_path / "whole", images=make())
    with pytest.raises(Stop):
        run(tmp_path / "stopped", images=make(), stop_at=1)
    stopped = run(tmp_path / "stopped", images=make())
    assert [record.loss for record in whole] == [record.loss for record in stopped]
    assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_every_epoch_of_a_distributed_sampler_has_its_own_order():
    sampler, orders = DistributedSampler(Noisy(), 1, 0), []

    class Recording(DistributedSampler):
        def __iter__(self):
            orders.append(list(super().__iter__()))
            return iter(orders[-1])

    sampler = Recording(Noisy(), 1, 0)
    training.train(network(), DataLoader(Noisy(), 32, sampler=sampler), CONFIG)
    assert len(orders) == 2 and orders[0] != orders[1]


@pytest.mark.parametrize("engine", [True, False])
def test_a_frozen_batch_norm_keeps_its_statistics_in_every_epoch(engine):
    model = network()
    model[1].eval()
    before = {key: value.clone() for key, value in model[1].named_buffers()}
    modes = []
    model[4].register_forward_hook(lambda module, *_: modes.append((module.training, model[1].training)))
    training.train(model, batches(), replace(CONFIG, engine=engine))
    assert all(value.equal(before[key]) for key, value in model[1].named_buffers())
    assert model[4].num_batches_tracked == 6
    trained = [mode for mode in modes if mode[0]]
    assert not any(first for _, first in trained)


def test_a_second_training_keeps_the_frozen_modules_of_the_first(tmp_path):
    model = network()
    model[1].eval()
    before = {key: value.clone() for key, value in model[1].named_buffers()}
    config = replace(CONFIG, engine=True)
    training.train(model, batches(), config, folder=tmp_path)
    assert not model.training
    training.train(model, batches(), config, folder=tmp_path)  # the same run
    training.train(model, batches(), config)
    assert all(value.equal(before[key]) for key, value in model[1].named_buffers())


def test_what_makes_another_network_changes_its_digest():
    whole = identity.network_digest(network().train())
    frozen, other, masked = network().train(), network(channels=6).train(), network().train()
    frozen[1].eval()
    sparsify(masked, masks.prune(masked, density=0.5))
    digests = {whole, *(identity.network_digest(each) for each in (frozen, other, masked))}
    assert len(digests) == 4 and identity.network_digest(network(seed=1).train()) == whole
    fewer = network().train()
    sparsify(fewer, masks.prune(fewer, density=0.25))
    same = [identity.network_digest(each, with_masks=False) for each in (masked, fewer)]
    assert same[0] == same[1] and identity.network_digest(masked) != identity.network_digest(fewer)


class Leaky(torch.nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope, self.steps = slope, [1, slope]

    def forward(self, x):
        return torch.nn.functional.leaky_relu(x, self.slope)


class Noise:
    """Batches that are made when they are asked for."""

    def __init__(self, seed):
        self.seed = seed

    def __len__(self):
        return 3


def test_attributes_that_a_module_reads_are_part_of_the_network():
    digests = [identity.network_digest(torch.nn.Sequential(Leaky(slope))) for slope in (0.1, 0.2, 0.1)]
    assert digests[0] == digests[2] != digests[1]


def test_what_chooses_the_images_is_part_of_them():
    dataset = TensorDataset(torch.zeros(200, 1), torch.zeros(200))

    def of(sampler):
        return identity.images_digest(DataLoader(dataset, 10, sampler=sampler))

    first, second = SubsetRandomSampler(range(100)), SubsetRandomSampler(range(100, 200))
    assert of(first) == of(SubsetRandomSampler(range(100))) != of(second)
    lists = [of(SubsetRandomSampler(list(chosen))) for chosen in (range(100), range(100, 200))]
    assert lists[0] != lists[1]
    weighted = [of(WeightedRandomSampler([1.0, weight] * 100, 100)) for weight in (1, 2)]
    assert weighted[0] != weighted[1]
    sampler = DistributedSampler(dataset, 1, 0)
    before = of(sampler)
    sampler.set_epoch(3)
    assert of(sampler) == before
    assert identity.images_digest(Noise(0)) != identity.images_digest(Noise(1))


def test_every_setting_of_batches_is_part_of_them():
    plain = identity.images_digest(batches())
    changes = {"batch_size": 16, "shuffle": False, "augment": True, "seed": 1, "world_size": 2}
    for name, value in changes.items():
        assert identity.images_digest(Batches(TRAIN, **({"batch_size": 32} | {name: value}))) != plain, name
    assert identity.images_digest(batches()) == plain


def test_a_tensor_that_is_expanded_is_not_written_out():
    huge = torch.zeros(1).expand(1 << 40)
    digest = identity.weights_digest({"a": huge})
    assert digest == identity.weights_digest({"a": torch.zeros(1).expand(1 << 40)})
    assert digest != identity.weights_digest({"a": torch.ones(1).expand(1 << 40)})
