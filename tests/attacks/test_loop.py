"""The loop of PGD with values of each image: no graph keeps them, and the model's output is checked."""

import pytest
import torch
from helpers.attacked import batch, make_model

from sparse_adv.attacks import Graphs, pgd


class Noted(Graphs):
    """Counts the attacks that it is asked for."""

    calls = 0

    def run(self, loop, *batch):
        self.calls += 1
        return loop.run(*batch)


def test_graphs_are_asked_for_attacks_whose_settings_are_numbers_alone():
    """The values of a tensor are no part of a graph's key."""
    model, (images, labels) = make_model().eval(), batch()
    numbers = {"eps": 0.1, "alpha": 0.02, "lo": 0.0, "hi": 1.0}
    for name, value in numbers.items():
        graphs = Noted()
        size = 6 if name in ("eps", "alpha") else 3
        for given, calls in ((value, 1), (torch.full((size,), value), 1), (value, 2)):
            pgd(model, images, labels, steps=1, graphs=graphs, **numbers | {name: given})
            assert graphs.calls == calls, name


@pytest.mark.parametrize("loss", ["ce", lambda logits, labels: None])
def test_what_is_no_tensor_is_named(loss):
    model, (images, labels) = make_model().eval(), batch()
    wrong = "model must return logits" if loss == "ce" else "loss must return a tensor, got None"
    with pytest.raises(TypeError, match=wrong):
        pgd((lambda x: None) if loss == "ce" else model, images, labels, steps=1, loss=loss)


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
