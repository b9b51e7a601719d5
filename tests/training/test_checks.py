"""What cannot be trained is refused in one sentence."""

from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, TRAIN, VALIDATION, ExtraState, batches, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv import data, masks, tickets, training
from sparse_adv.nn import sparsify

CONFIG = replace(QUICK, epochs=1)
IMAGES, LABELS = data.to_unit(TRAIN.images), TRAIN.labels
PAIR = IMAGES[:8], LABELS[:8]
TWO = r"a batch must be two tensors \(images, labels\), got "


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((*PAIR, torch.arange(8)), TWO + r"\(Tensor, Tensor, Tensor\)"),
        ({"image": PAIR[0], "label": PAIR[1]}, TWO + "a dict"),
        ((PAIR[0].numpy(), PAIR[1].numpy()), TWO + r"\(ndarray, ndarray\)"),
        ([PAIR[0], PAIR[1].tolist()], TWO + r"\(Tensor, list\)"),
        (PAIR[0], TWO + "a Tensor"),
        ((PAIR[0][0], PAIR[1][0]), r"labels \[N\], got a single one: give the DataLoader a batch_size"),
    ],
)
def test_a_batch_that_is_no_pair_of_images_and_labels_is_refused_wherever_batches_are_read(batch, said):
    for use in (
        lambda: training.train(network(), [batch], CONFIG),
        lambda: training.train(network(), [PAIR], CONFIG, validation=[batch]),
        lambda: training.clean_accuracy(network(), [batch]),
        lambda: tickets.search(network(), [batch], CONFIG, tickets.PruneConfig(permute_channels=True)),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            use()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES.double(), r"shape \(8, 1, 6, 6\) and dtype torch.float64: "),
        (IMAGES.permute(0, 2, 3, 1), r"shape \(8, 6, 6, 1\) and dtype torch.float32: "),
        (IMAGES[:, :, 1:], r"shape \(8, 1, 5, 6\) and dtype torch.float32: "),
    ],
)
def test_images_that_the_model_does_not_take_are_named_with_shape_and_dtype(images, said):
    loader = DataLoader(TensorDataset(images, LABELS), 8)
    with pytest.raises(ValueError, match="model does not take images of " + said):
        training.train(network(), loader, CONFIG)


def test_a_batch_without_images_is_refused_and_not_taken_for_a_loss_that_diverged():
    with pytest.raises(ValueError, match="batches must have images in each batch, got one without any"):
        training.train(network(), [PAIR, (IMAGES[:0], LABELS[:0])], CONFIG)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: network().requires_grad_(False), "a parameter that requires a gradient, got none"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, device="meta")), "weights in memory, got '0.weight' on the meta"),
        (lambda: nn.Sequential(nn.LazyConv2d(2, 3)), "module '0' has no weight yet: run a forward pass first"),
    ],
)
def test_a_model_without_anything_to_train_is_refused(model, said):
    with pytest.raises(ValueError, match=said):
        training.train(model(), batches(), CONFIG)


@pytest.mark.parametrize("objective", ["natural", "pgd", "trades", "mart", "free"])
@pytest.mark.parametrize("use_engine", [True, False])
def test_auxiliary_logits_in_training_mode_are_refused(objective, use_engine):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x):
            logits = self.network(x)
            return (logits, logits) if self.training else logits

    config = replace(CONFIG, objective=objective, engine=use_engine)
    with pytest.raises(TypeError, match=r"logits \[8, classes\] in training mode too, got a tuple: leave out"):
        training.train(Auxiliary(), [PAIR], config)


def test_a_search_of_a_model_with_masks_is_refused_before_anything_is_written(tmp_path):
    model = sparsify(network(), masks.prune(network(), 0.5))
    for folder in (None, tmp_path / "search"):
        with pytest.raises(ValueError, match=r"model must be dense, got a mask in '0': call densify\(model\) first"):
            tickets.search(model, batches(), CONFIG, validation=VALIDATION, folder=folder)
    assert not (tmp_path / "search").exists()


UNFIT = {
    "channels": data.Split(VALIDATION.images.expand(-1, 3, -1, -1), VALIDATION.labels),
    "labels beyond the first batch": data.Split(torch.rand(300, 1, 6, 6), (torch.arange(300) == 299) * 2),
    "range": data.Split(VALIDATION.images.float(), VALIDATION.labels),
    "NaN": data.Split(torch.full((8, 1, 6, 6), torch.nan), LABELS[:8]),
    "dtype of labels": data.Split(VALIDATION.images, VALIDATION.labels.float()),
    "batches": [(VALIDATION.images.float(), VALIDATION.labels)],
}


@pytest.mark.parametrize("validation", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("half", [False, True])
def test_validation_images_are_checked_as_training_images_are_before_the_first_update(validation, half, tmp_path):
    steps = []
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    watch = {"folder": tmp_path, "on_step": steps.append}
    given = tickets.PruneConfig(half_resolution=half)
    for use in (
        lambda **images: training.train(model, batches(), replace(CONFIG, evaluate_every=5), **images, **watch),
        lambda **images: tickets.search(model, batches(), CONFIG, given, **images, **watch),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^validation: (images|labels|model)"):
            use(validation=validation)
        assert not steps
        use(validation=VALIDATION)  # in the same folder
        steps.clear()
        watch["folder"] = tmp_path / "search"


def test_checking_validation_images_leaves_the_model_and_the_random_numbers_as_they_are():
    modes = []

    class Counted(nn.Sequential):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    model = Counted(*network())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 8, shuffle=True)
    before = torch.get_rng_state()
    training.Training(model, batches(), CONFIG, validation=loader)
    assert modes == [False] and model.training and torch.get_rng_state().equal(before)
    assert all(value.equal(model.state_dict()[name]) for name, value in state.items())


def test_batches_that_end_for_good_are_named():
    class Once:
        left = 1

        def __len__(self):
            return 2

        def __iter__(self):
            self.left, left = 0, self.left
            return iter([PAIR] * left)

    with pytest.raises(ValueError, match="batches must have images in each epoch, got none"):
        training.train(network(), Once(), replace(CONFIG, epochs=2))


def test_a_model_with_extra_state_keeps_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"in a folder, got '8\._extra_state', a dict"):
        training.train(nn.Sequential(*network(), ExtraState()), batches(), CONFIG, folder=tmp_path)
