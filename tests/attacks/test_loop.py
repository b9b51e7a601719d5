"""The loop of PGD: which restart counts, plain functions, values of each image, and outputs that are none."""

import pytest
import torch
from helpers.attacked import batch, generator, make_model, philox_state
from helpers.cpu_graphs import CpuGraphs
from helpers.searched import classified
from torch import nn

from sparse_adv.attacks import apgd, eotpgd, fgsm, losses, mifgsm, pgd, rfgsm
from sparse_adv.ops import random_start


@pytest.mark.parametrize(("name", "value"), {"eps": 0.1, "alpha": 0.02, "lo": 0.0, "hi": 1.0}.items())
def test_settings_that_are_tensors_have_no_graph(name, value):
    """The values of a tensor are no part of a graph's key."""
    model, graphs, (images, labels) = make_model(), CpuGraphs(), batch()
    size = 6 if name in ("eps", "alpha") else 3
    pgd(model, images, labels, steps=1, graphs=graphs, **{name: torch.full((size,), value)})
    assert not graphs.cache.calls
    pgd(model, images, labels, steps=1, graphs=graphs, **{name: value})
    assert len(graphs.cache.calls) == 1


@pytest.mark.parametrize("loss", ["ce", lambda logits, labels: None])
def test_what_is_no_tensor_is_named(loss):
    model, (images, labels) = make_model().eval(), batch()
    wrong = "model must return logits" if loss == "ce" else "loss must return a tensor, got None"
    with pytest.raises(TypeError, match=wrong):
        pgd((lambda x: None) if loss == "ce" else model, images, labels, steps=1, loss=loss)


@pytest.mark.parametrize(
    ("attack", "options"),
    [(pgd, {}), (pgd, {"restarts": 2}), (fgsm, {}), (mifgsm, {}), (eotpgd, {}), (rfgsm, {}), (apgd, {})],
)
def test_a_loss_of_more_or_fewer_numbers_than_images_is_refused(attack, options):
    model, images, labels = classified()
    for loss, shape in (lambda logits, labels: logits, r"\[6, 5\]"), (lambda logits, labels: logits[:3, 0], r"\[3\]"):
        with pytest.raises(ValueError, match=rf"loss must return one number for each image, \[6\], got {shape}"):
            attack(model, images, labels, loss=loss, **options)


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (), (1,)], ids=str)
def test_a_loss_may_be_one_number_for_each_image_or_for_all(shape, restarts):
    model, (images, labels) = make_model().eval(), batch()

    def loss(logits, labels):
        values = losses.margin(logits, labels)
        return values.view(len(values), *shape[1:]) if shape[:1] == (6,) else values.sum().view(shape)

    adv, expected = (
        pgd(model, images, labels, steps=2, restarts=restarts, loss=each, generator=generator())
        for each in (loss, "margin")
    )
    assert adv.equal(expected)


def test_a_loss_of_the_caller_takes_whatever_the_model_returns():
    """A dict, or a tensor whose first dimension is not that of the images."""
    model, (images, labels) = make_model().eval(), batch()
    expected = pgd(model, images, labels, steps=2, random_start=False)
    for wrapped, logits_of in (
        (lambda x: {"logits": model(x)}, lambda output: output["logits"]),
        (lambda x: model(x).T, lambda output: output.T),
    ):

        def loss(output, labels, logits_of=logits_of):
            return losses.cross_entropy(logits_of(output), labels)

        assert pgd(wrapped, images, labels, steps=2, random_start=False, loss=loss).equal(expected)


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (None, lambda logits, labels: logits[:, 0]),
        ({"class": 2}, lambda logits, labels: logits[:, labels["class"]]),
        (torch.tensor(0.5), lambda logits, labels: logits[:, 0] * labels),
        (torch.arange(30.0).view(6, 5).cos(), lambda logits, labels: (logits * labels).sum(1)),
    ],
    ids=["none", "dict", "one number", "rows"],
)
def test_restarts_are_compared_image_by_image_whatever_the_labels_of_a_scalar_loss_are(labels, values):
    model, (images, _) = make_model().eval(), batch()

    def attacked(loss):
        draw = torch.Generator().manual_seed(0)
        return pgd(model, images, labels, eps=0.1, alpha=0.02, steps=2, restarts=3, loss=loss, generator=draw)

    assert attacked(lambda *given: values(*given).sum()).equal(attacked(values))


class Threshold(nn.Module):
    """Takes an image for class 1 if its first pixel is brighter than 0.53."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixel = x.flatten(1)[:, :1]
        return torch.cat([0.53 - pixel, torch.zeros_like(pixel)], 1)


@pytest.mark.parametrize("mode", ["eval", "batch"])  # with "batch" images that are finished stay in the batch
def test_a_success_outranks_failures_of_higher_loss_and_without_one_the_highest_loss_counts(mode):
    images, labels, eps = torch.full((40, 1, 2, 2), 0.5), torch.zeros(40, dtype=torch.int64), 0.1
    blocks = torch.tensor([0, images.numel() // 4])
    starts = torch.stack([random_start(images, eps, seed=philox_state() + k * blocks) for k in range(3)])
    logits = torch.stack([Threshold()(start) for start in starts])
    won, loss = logits.argmax(2) == 1, logits[:, :, 0]  # each failure has a higher loss than each success
    assert (won[0] & ~won[1] & ~won[2]).any() and (~won[0] & won[1]).any()
    assert (~won.any(0) & (loss[0] < loss[2]) & (loss[2] < loss[1])).any()
    chosen = loss.where(~won, 3 - torch.arange(3.0)[:, None]).argmax(0)
    adv = pgd(
        Threshold().eval(),
        images,
        labels,
        eps=eps,
        steps=0,
        restarts=3,
        loss=lambda logits, labels: -losses.margin(logits, labels),
        generator=generator(),
        check=False,
        bn_mode=mode,
        engine=False,
    )
    assert torch.equal(adv, starts[chosen, torch.arange(40)])


def test_restarts_keep_the_memory_format_of_the_images():
    images, labels = batch()
    images = images.contiguous(memory_format=torch.channels_last)
    model = make_model().eval()
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5  # won at once, so that the restarts attack a part of the batch
    adv = pgd(model, images, labels, eps=0.01, alpha=0.005, steps=2, restarts=3)
    assert adv.is_contiguous(memory_format=torch.channels_last) and not adv.is_contiguous()


def test_a_plain_function_is_called_once_for_each_gradient_and_may_change_in_between():
    """The engine, which would trace this one, leaves it to autograd."""
    (images, labels), weight = batch(), torch.randn(192, 5)
    options = {"eps": 1.0, "alpha": 0.02, "random_start": False}
    expected, factors = images, [1.0, -1.0, 2.0]
    for factor in factors:
        expected = pgd(lambda x, k=factor: x.flatten(1) @ weight * k, expected, labels, steps=1, **options)
    left = iter(factors)
    adv = pgd(lambda x: x.flatten(1) @ weight * next(left), images, labels, steps=3, **options)
    assert torch.equal(adv, expected) and not list(left)
