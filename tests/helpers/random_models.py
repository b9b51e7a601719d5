"""Small models that hypothesis draws: layers in any order, and values that several of them read."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_adv.nn import MaskedConv2d, MaskedLinear

CHANNELS, SIZE, BATCH = 4, 6, 5


class RandomModel(nn.Module):
    """Applies operations to earlier values: each reads some and makes the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.operations: list[tuple[Callable[..., Tensor] | int, tuple[int, ...]]] = []
        """A function, or the number of a layer, and the numbers of the values that it reads."""
        self.output = 0

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for operation, reads in self.operations:
            function = self.layers[operation] if isinstance(operation, int) else operation
            values.append(function(*(values[i] for i in reads)))
        return values[self.output]

    def __repr__(self) -> str:
        names = {function: name for name, function in FUNCTIONS.items()}
        lines = (
            f"{i}: {names.get(operation) or self.layers[operation]} of {reads}"
            for i, (operation, reads) in enumerate(self.operations, 1)
        )
        return "\n".join(["", *lines, f"output: {self.output}"])


def _add_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


ONE_OPERAND = {
    "relu": F.relu,
    "relu in place": partial(F.relu, inplace=True),
    "method relu": lambda x: x.relu(),
    "twice": lambda x: x + x,
    "scaled": lambda x: 0.5 * x,
    "shifted": lambda x: x + 0.1,
    "global mean": lambda x: x.mean((2, 3), keepdim=True),
}
TWO_OPERANDS = {
    "sum": lambda x, y: x + y,
    "sum in place": _add_in_place,
    "weighted sum": lambda x, y: torch.add(x, y, alpha=-0.5),
    "product": lambda x, y: x * y,
    "concatenation": lambda x, y: torch.cat((x, y), 1),
}
MIXING = {
    "halves swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "first half": lambda x: x.chunk(2, 1)[0],
    "split": lambda x: torch.cat(x.split((1, x.shape[1] - 1), 1), 1),
    "unbound": lambda x: torch.stack(x.unbind(1), 1),
    "two channels": lambda x: x[:, :2],
    "reversed": lambda x: x.flip(1),
    "shuffled": lambda x: x.unflatten(1, (-1, 1)).transpose(1, 2).flatten(1, 2).roll(1, 1),
    "largest channel": lambda x: x.max(1, keepdim=True)[0],
    "largest pixel": lambda x: x.max(3, keepdim=True)[0].max(2, keepdim=True).values,
    "times width": lambda x: x * x.size(1),
    "over root of width": lambda x: x / x.shape[1] ** 0.5,
    "softmax": lambda x: x.softmax(1),
    "softmax of pixels": lambda x: x.softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "channels summed up": lambda x: x.cumsum(1),
    "one for all": lambda x: x[:, :1].expand(x.shape).contiguous(),
    "mean of channels": lambda x: x.mean(1, keepdim=True),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)),
    "pixels transposed": lambda x: x.transpose(2, 3),
    "excited": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "centred": lambda x: x - x.mean(0, keepdim=True),
    "viewed": lambda x: x.reshape(x.shape[0], x.shape[1], -1).reshape(x.shape),
    "chosen": lambda x: torch.where(x > 0, x, 0.1 * x),
}
"""Functions of one operand that mix its channels or read its size, or look as if they did."""
FUNCTIONS = ONE_OPERAND | TWO_OPERANDS | MIXING
LAYERS = ("conv", "conv", "conv", "transposed", "norm", "norm", "relu", "relu", "relu in place", "pool", "dropout")
KINDS = (*LAYERS, *ONE_OPERAND, *TWO_OPERANDS, "sum", "sum", "layer again")
MIXING_KINDS = (*LAYERS * 3, *KINDS, *MIXING)


@st.composite
def random_models(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> RandomModel:
    """A model in eval mode and float64, for inputs [N, CHANNELS, SIZE, SIZE]."""
    torch.manual_seed(draw(st.integers(0, 999)))
    model = RandomModel().eval()
    values = [torch.rand(2, CHANNELS, SIZE, SIZE)]
    applied: list[int] = []
    """The value that each layer reads."""

    def apply(operation: Callable[..., Tensor] | int, *reads: int) -> None:
        function = model.layers[operation] if isinstance(operation, int) else operation
        # Only the shapes matter here. On copies, as a sum in place of a value with itself would grow.
        values.append(function(*(values[i].clone() for i in reads)).detach())
        model.operations.append((operation, reads))

    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(kinds))
        # Mostly the last value, so that there are long chains to fuse; else any, so that some are read several times.
        read = len(values) - 1 if draw(st.booleans()) else draw(st.integers(0, len(values) - 1))
        shape = values[read].shape
        same = [i for i, value in enumerate(values) if value.shape == shape]
        if kind in ("relu in place", "sum in place") and read == 0:
            continue  # no leaf of autograd may be overwritten
        if kind in ONE_OPERAND and not (kind in LAYERS and draw(st.booleans())):
            apply(ONE_OPERAND[kind], read)
        elif kind in MIXING:
            apply(MIXING[kind], read)
        elif kind in TWO_OPERANDS:
            if kind == "concatenation":
                same = [i for i, value in enumerate(values) if value.shape[2:] == shape[2:]]
            apply(TWO_OPERANDS[kind], read, draw(st.sampled_from(same)))
        elif kind == "layer again":
            again = [(i, j) for i, j in enumerate(applied) if values[j].shape == shape]
            if again:
                apply(draw(st.sampled_from(again))[0], read)
        else:
            model.layers.append(_layer(draw, kind, shape))
            applied.append(read)
            apply(len(model.layers) - 1, read)
    # Usually the last value; else any of them, the input included: later operations are then not needed.
    model.output = len(values) - 1 if draw(st.integers(0, 3)) else draw(st.integers(0, len(values) - 1))
    if draw(st.booleans()):
        model.layers.append(nn.Flatten())
        apply(len(model.layers) - 1, model.output)
        model.layers.append(_maybe_masked(draw, nn.Linear(values[-1].shape[1], 3, bias=draw(st.booleans()))))
        apply(len(model.layers) - 1, len(values) - 1)
        model.output = len(values) - 1
    return model.double().eval()


def _layer(draw: st.DrawFn, kind: str, shape: torch.Size) -> nn.Module:
    channels, size = shape[1], min(shape[2:])
    bias = draw(st.booleans())
    if kind == "norm":
        affine, tracks = draw(st.booleans()), draw(st.integers(0, 11)) > 0
        norm = nn.BatchNorm2d(channels, affine=affine, track_running_stats=tracks)
        for name, tensor in norm.state_dict().items():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5 if name == "running_var" else -1, 2)
        return norm
    if kind in ("relu", "relu in place"):
        return nn.ReLU(inplace=kind == "relu in place")
    if kind == "dropout":
        return draw(st.sampled_from((nn.Dropout, nn.Dropout2d, nn.Identity)))()
    if kind == "pool":
        kernel = min(2, size)
        pools = nn.MaxPool2d(kernel, 1), nn.AvgPool2d(kernel), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2)
        return draw(st.sampled_from(pools))
    outputs = draw(st.sampled_from((2, 4, channels)))
    if kind == "transposed":
        return nn.ConvTranspose2d(channels, outputs, 2, stride=draw(st.integers(1, 2 if size < 8 else 1)), bias=bias)
    groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0 and outputs % g == 0]))
    kernel, dilation = draw(st.sampled_from((1, 3))), draw(st.integers(1, 2))
    if draw(st.integers(0, 4)) == 0:
        conv = nn.Conv2d(channels, outputs, kernel, padding="same", dilation=dilation, groups=groups, bias=bias)
        return conv
    padding = dilation * (kernel // 2)
    modes = ("zeros", "zeros", "zeros", "circular", "reflect") if size > padding else ("zeros",)
    conv = nn.Conv2d(
        channels,
        outputs,
        kernel,
        draw(st.integers(1, 2)),
        padding,
        dilation,
        groups,
        bias,
        draw(st.sampled_from(modes)),
    )
    return _maybe_masked(draw, conv)


def _maybe_masked(draw: st.DrawFn, layer: nn.Conv2d | nn.Linear) -> nn.Module:
    density = draw(st.sampled_from((None, None, 0, 0.3, 1)))
    if density is None or getattr(layer, "padding_mode", "zeros") != "zeros":
        return layer
    mask = torch.rand_like(layer.weight) < density
    if isinstance(layer, nn.Linear):
        return MaskedLinear.from_dense(layer, mask)
    return MaskedConv2d.from_dense(layer, mask, block=(1, 1))
