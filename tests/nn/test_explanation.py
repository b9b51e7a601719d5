"""`explain`: the kernel of each layer, the reason, and both densities."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_adv.masks import prune
from sparse_adv.nn import count_macs, explain, explanation, mac_density, sparsify, tune, tuning
from sparse_adv.nn.macs import calls_of
from sparse_adv.ops import PASSES
from sparse_adv.ops.masked_conv2d_pattern import block_pattern

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, (2, 3), padding="same", padding_mode="zeros"),
        nn.Conv2d(16, 8, 1),
    )
    return sparsify(dense, prune(dense, 0.2, exclude=["3"]))


def given(kernel):
    return {name: {p: {"kernel": kernel} for p in PASSES} for name in ("0", "2")}


def test_every_convolution_and_both_densities_are_shown(model):
    masks = {name: model[int(name)].weight_mask for name in ("0", "2")}
    explained = explain(model, SHAPE)
    text = str(explained)
    assert [row.layer for row in explained.rows] == ["0", "2", "3"]
    assert explained.mac_density == mac_density(model, masks, SHAPE)
    kept = sum(int(mask.sum()) for mask in masks.values()) + 128
    assert explained.density == kept / (16 * 27 + 16 * 96 + 128)
    assert f"density of convolution weights: {explained.density:.4f}" in text
    assert f"of multiply-adds: {explained.mac_density:.4f}" in text
    assert "16x3x3x3" in text and "(table)" in text and "dense (no mask)" in text


def test_a_block_is_shown_as_far_as_the_weight_reaches():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1))
    row, inner = explain(sparsify(model, prune(model, 0.5, block=(4, 4)))).rows
    assert row.block == (4, 1, 1, 1) and inner.block == (4, 4, 1, 1)


def test_without_a_shape_kernels_that_depend_on_the_input_are_unknown(model):
    assert explain(model).mac_density is None
    assert "unknown without an example input" in str(explain(model))
    tune(model, SHAPE, given("sparse"))
    assert "sparse (given)" in str(explain(model))
    torch.use_deterministic_algorithms(True)  # which ignores what was tuned
    try:
        assert "given" not in str(explain(model)) and "unknown without an example input" in str(explain(model))
        assert "given" not in str(explain(model, SHAPE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert "sparse (given)" in str(explain(model))
    assert str(explain(nn.ReLU())).endswith("the model has no linear layers and no 2-D convolutions")


def test_a_layer_that_the_model_does_not_call_is_told():
    """A plain list still holds the dense layer that `sparsify` replaced."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.first = [self.a]

        def forward(self, x):
            return self.b(self.first[0](x))

    model = Listed()
    explained = explain(sparsify(model, prune(model, 0.2)), SHAPE)
    assert explained.rows[0].kernels == dict.fromkeys(PASSES, "not called") and explained.rows[0].macs is None
    assert "not called" in str(explained) and "not called" not in explained.rows[1].kernels.values()
    assert "not called" not in str(explain(model))


def test_measured_times_are_shown(model, monkeypatch):
    monkeypatch.setattr(tuning, "_race", lambda *_: {"sparse": 1e-3, "dense": 4.8e-3})
    tune(model, SHAPE)
    assert "sparse (tuned: 1 ms, dense 4.8 ms)" in str(explain(model))


def test_linear_layers_count_by_the_rows_of_their_input():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    masks = prune(model, 0.4, linear=True)
    dense = explain(model, (3, 4, 5, 5)).rows[-1]
    assert set(dense.kernels.values()) == {"dense (no mask)"} and dense.macs == (3 * 72, 3 * 72)
    explained = explain(sparsify(model, masks), (3, 4, 5, 5))
    row = explained.rows[-1]
    assert row.layer == "3" and set(row.kernels.values()) == {"dense (linear)"}
    assert row.macs == (3 * int(masks["3"].sum()), 3 * 72)
    assert explained.mac_density == mac_density(model, masks, (3, 4, 5, 5))
    assert f"density of convolution and linear weights: {explained.density:.4f}" in str(explained)


def test_the_layout_of_a_sample_counts():
    """In NCHW this layer takes the sparse kernel forward, in channels_last the dense one."""
    mask = torch.rand(32, 32, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.1
    layer = sparsify(nn.Conv2d(32, 32, 3, padding=1), {"": mask})
    x = torch.rand(4, 32, 14, 14)
    samples = {"sparse": x, "dense": x.to(memory_format=torch.channels_last)}
    macs = {"sparse": 4 * 14 * 14 * int(mask.sum()), "dense": 4 * 14 * 14 * mask.numel()}
    for kernel, sample in samples.items():
        assert explain(layer, sample).rows[0].kernels["forward"] == f"{kernel} (table)"
        assert count_macs(layer, sample).forward == macs[kernel]


@pytest.mark.parametrize(
    ("block", "dtype", "expected"),
    [
        ((64, 64), torch.bfloat16, "sparse (roofline)"),
        ((64, 64), torch.float64, "dense (no sparse kernel for float64 on cuda)"),
        ((1, 1), torch.bfloat16, "dense (no sparse kernel for block (1, 1, 1, 1) on cuda)"),
    ],
)
def test_on_cuda_explain_and_count_macs_tell_what_the_passes_run(monkeypatch, block, dtype, expected):
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1, bias=False))
    mask = prune(model, 0.1, block)["0"]
    sparsify(model, {"0": mask}, block)
    if block == (64, 64):
        model[0]._compiled.pattern = block_pattern(model[0].pattern)  # as compile_pattern does for a mask on CUDA
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without memory, also on CUDA
        model[0].weight = nn.Parameter(torch.empty(mask.shape, dtype=dtype, device="cuda"))
        images = torch.empty(512, 256, 8, 8, dtype=dtype, device="cuda")
        calls, macs = calls_of(model, images), count_macs(model, images)
    monkeypatch.setattr(explanation, "calls_of", lambda *_: calls)
    assert explain(model, images).rows[0].kernels == dict.fromkeys(PASSES, expected)
    weights = int(mask.sum()) if expected.startswith("sparse") else mask.numel()
    assert macs[:3] == (512 * 8 * 8 * weights,) * 3
