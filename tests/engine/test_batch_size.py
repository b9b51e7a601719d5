"""Programs of the engine compute any number of images up to their batch, where the model's operations allow it."""

import pytest
import torch
from helpers.other_networks import ResNet
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_adv import engine
from sparse_adv.engine.batch_size import scaled
from sparse_adv.nn import MaskedConv2d, sparsify

BATCH = 6


def loss(logits):
    return logits.flatten(1).square().sum(1) + logits.flatten(1)[:, 0]


class Changed(nn.Module):
    """A convolution, a function of its result, and a classifier of as many features."""

    def __init__(self, function, features):
        super().__init__()
        self.conv, self.function, self.fc = nn.Conv2d(3, 4, 3, padding=1), function, nn.Linear(features, 5)

    def forward(self, x):
        return self.fc(self.function(self.conv(x).relu()))


def viewed(x):
    return x.view(x.size(0), -1)


def of_patches(x):
    """Patches of all images are rows of one matrix, as in window attention."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch * 4, channels * 16)
    return (patches * patches.mean(1, keepdim=True)).view(batch, -1)


def less_the_mean(x):
    """Each image's features depend on the other images."""
    return (x - x.mean(0)).flatten(1)


def with_token(x):
    return torch.cat([x.new_ones(x.shape[0], 1), x.flatten(1)[:, 1:]], 1)


@pytest.fixture
def images_of_steps(monkeypatch):
    """The number of images of each pass of a program."""
    seen = []
    for_images = engine.program.buffers.Memory.for_images
    monkeypatch.setattr(
        engine.program.buffers.Memory,
        "for_images",
        lambda self, images, differentiable: seen.append(images) or for_images(self, images, differentiable),
    )
    return seen


def check(model, batch, counts, size=8):
    """Logits and gradients of each number of images are those of the model itself."""
    x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program), engine.explain(model, x)
        for count in counts:
            autograd, some = engine.Autograd(model), x[-count:]
            for actual, expected in (
                (gradients.logits(some), autograd.logits(some)),
                (gradients.gradient(some, loss), autograd.gradient(some, loss)),
            ):
                assert (actual - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-6)


@pytest.mark.parametrize("function", [viewed, of_patches, less_the_mean, with_token], ids=lambda f: f.__name__)
def test_operations_that_follow_the_number_of_images_compute_no_others(function, images_of_steps):
    torch.manual_seed(0)
    counts = [BATCH, *range(1, BATCH + 1), 2, 5]
    check(Changed(function, 256).eval(), BATCH, counts)
    assert images_of_steps[-2 * len(counts) :] == [count for count in counts for _ in range(2)]


def test_operations_that_follow_it_in_another_way_are_for_whole_batches(images_of_steps):
    """One image cannot be halved, so the trace does not say what the halves of other numbers are."""
    torch.manual_seed(0)
    check(Changed(lambda x: torch.cat(x.flatten(1).chunk(2)), 256).eval(), BATCH, [BATCH, 3, 1])
    assert images_of_steps[-6:] == [BATCH] * 6


def test_whole_batches_of_images_that_depend_on_each_other_are_left_to_autograd():
    """Zeros that fill up a batch would change the other images; the trial sees it."""
    torch.manual_seed(0)
    model = Changed(lambda x: torch.cat(less_the_mean(x).chunk(2)), 256).eval()
    x = torch.rand(9, 3, 8, 8)  # its program has ten images
    autograd = engine.Autograd(model).gradient(x, loss)
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Autograd), "the images must not be padded"
        assert torch.equal(gradients.gradient(x, loss), autograd)


def test_each_size_of_a_batch_has_a_program_for_it():
    torch.manual_seed(0)
    model = Changed(viewed, 256).eval()
    for batch in (BATCH, 4 * BATCH, BATCH - 1):
        check(model, batch, [batch, 2])


@pytest.mark.parametrize("dense", [True, False])
def test_a_network_with_residuals_and_pooling(dense, images_of_steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2), ResNet())
    if not dense:
        sparsify(model, {"0": torch.eye(3, dtype=torch.bool)[:, :, None, None]})
    check(model.eval(), BATCH, [6, 3, 5, 1, 6], size=16)
    assert images_of_steps[-10:] == [6, 6, 3, 3, 5, 5, 1, 1, 6, 6]


def test_fewer_images_for_which_another_kernel_is_chosen(images_of_steps):
    """The dense kernel, which the fewer images take, reads weights that the sparse one does not."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 5)]
    model = nn.Sequential(*layers)
    sparsify(model, {"1": torch.rand(32, 32, 3, 3) < 0.25})
    masked = model[1]
    assert isinstance(masked, MaskedConv2d)
    with torch.no_grad():
        masked.weight.data = torch.randn(32, 32, 3, 3)  # not zero where it is pruned
    counts = [16, 3, 16, 9, 1]
    kernels = {count: masked.plan(torch.empty(count, 32, 8, 8)).forward.kernel for count in counts}
    assert kernels[16] == "sparse" and kernels[1] == "dense"
    check(model.eval(), 16, counts)
    assert set(counts) <= set(images_of_steps)


@given(st.integers(2, 50), st.integers(1, 50), st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=5))
def test_sizes_that_are_constant_or_proportional_are_scaled(batch, images, dims):
    def shape(count):
        return torch.Size([size * count if grows else size for grows, size in dims])

    assert scaled(shape(batch), shape(1), batch, images) == shape(images)
    nested = [(shape(batch), "a"), torch.empty(shape(batch), device="meta")]
    of_one = [(shape(1), "a"), torch.empty(shape(1), device="meta")]
    (size, name), tensor = scaled(nested, of_one, batch, images)
    assert (size, name, tensor.shape) == (shape(images), "a", shape(images))


@pytest.mark.parametrize(
    ("result", "of_one"),
    [
        (5, 2),
        (4, 0),
        (torch.Size([4, 4]), torch.Size([4])),
        (1.5, 1.0),
        ("a", "b"),
        (4, 1.0),
        (True, False),
        ({4}, {1}),
    ],
)
def test_other_results_have_no_scale(result, of_one):
    with pytest.raises(ValueError, match="do not say what is right for 3"):
        scaled(result, of_one, batch=4, images=3)
