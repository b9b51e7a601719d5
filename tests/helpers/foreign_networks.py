"""Narrow networks of which published checkpoints are: with the module names of kuangliu, HYDRA, TRADES and DeepMind.

`models.checkpoints` must recognise their state dicts. For ways to write a forward pass see `other_networks`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(channels: int, outputs: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, size, stride, padding=size // 2, bias=bias)


class Basic(nn.Module):
    """kuangliu's BasicBlock."""

    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        changes = stride != 1 or channels != outputs
        self.shortcut = nn.Sequential(
            *([conv(channels, outputs, 1, stride), nn.BatchNorm2d(outputs)] if changes else [])
        )

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Bottleneck(Basic):
    """kuangliu's Bottleneck."""

    def __init__(self, channels, outputs, stride):
        super().__init__(channels, outputs, stride)
        inner = outputs // 4
        self.conv1, self.bn1 = conv(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PreAct(nn.Module):
    """The PreActBlock of kuangliu and, with the shortcut of x itself, of fast_adversarial."""

    def __init__(self, channels, outputs, stride, raw=False):
        super().__init__()
        self.raw = raw
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if stride != 1 or channels != outputs:
            self.shortcut = nn.Sequential(conv(channels, outputs, 1, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(x if self.raw else out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class Residual(nn.Module):
    """kuangliu's ResNet, and its PreActResNet with or without BatchNorm before the pooling; "mu" as in RobustBench."""

    def __init__(self, block, depths, *, width=4, expansion=1, preact=False, last_norm=False, normalized=False):
        super().__init__()
        self.preact, self.conv1 = preact, conv(3, width, 3)
        if not preact:
            self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in enumerate(depths):
            outputs, blocks = expansion * width * 2**stage, []
            for i in range(depth):
                blocks.append(block(channels, outputs, 2 if stage and not i else 1))
                channels = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        if last_norm:
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, 10)
        self.register_buffer("mu", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1) if normalized else None)
        self.register_buffer("sigma", torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1) if normalized else None)

    def forward(self, x):
        x = x if self.mu is None else (x - self.mu) / self.sigma
        out = self.conv1(x) if self.preact else F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = F.relu(self.bn(out)) if hasattr(self, "bn") else out
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


class Vgg(nn.Module):
    """VGG-16 of kuangliu, and of HYDRA with its three linear layers."""

    def __init__(self, width=4, hydra=False):
        super().__init__()
        layers, channels = [], 3
        for stage, (multiple, convolutions) in enumerate([(1, 2), (2, 2), (4, 3), (8, 3), (8, 3)]):
            for _ in range(convolutions):
                outputs = multiple * width
                layers += [conv(channels, outputs, 3, bias=not hydra), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            layers += [nn.MaxPool2d(2)] if stage < 4 or not hydra else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)
        if hydra:
            hidden = [nn.Linear(4 * channels, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width), nn.ReLU()]
            self.classifier = nn.Sequential(*hidden, nn.Linear(4 * width, 10))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class WideBlock(nn.Module):
    """The block of TRADES' WideResNet."""

    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.convShortcut = conv(channels, outputs, 1, stride) if channels != outputs else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class Group(nn.Module):
    """A stage of TRADES' WideResNet."""

    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.layer = nn.Sequential(WideBlock(channels, outputs, stride))

    def forward(self, x):
        return self.layer(x)


class Trades(nn.Module):
    """WRN-10-2 of TRADES, with its unused copy of the first stage."""

    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 16, 3)
        self.block1, self.sub_block1 = Group(16, 32, 1), Group(16, 32, 1)
        self.block2, self.block3 = Group(32, 64, 2), Group(64, 128, 2)
        self.bn1, self.fc = nn.BatchNorm2d(128), nn.Linear(128, 10)

    def forward(self, x):
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(out)), 8).flatten(1))


class DeepMindBlock(nn.Module):
    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.stride = stride
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(channels), nn.BatchNorm2d(outputs)
        self.conv_0 = nn.Conv2d(channels, outputs, 3, stride, bias=False)
        self.conv_1 = conv(outputs, outputs, 3)
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.silu(self.batchnorm_0(x))
        padded = F.pad(out, (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1))
        return self.conv_1(F.silu(self.batchnorm_1(self.conv_0(padded)))) + self.shortcut(out)


class DeepMindGroup(nn.Module):
    def __init__(self, channels, outputs, stride):
        super().__init__()
        self.block = nn.Sequential(DeepMindBlock(channels, outputs, stride))

    def forward(self, x):
        return self.block(x)


class DeepMind(nn.Module):
    """WRN-10-2 of DeepMind with Swish."""

    def __init__(self):
        super().__init__()
        self.init_conv = conv(3, 16, 3)
        self.layer = nn.Sequential(DeepMindGroup(16, 32, 1), DeepMindGroup(32, 64, 2), DeepMindGroup(64, 128, 2))
        self.batchnorm, self.logits = nn.BatchNorm2d(128), nn.Linear(128, 10)

    def forward(self, x):
        out = F.silu(self.batchnorm(self.layer(self.init_conv(x))))
        return self.logits(F.avg_pool2d(out, 8).flatten(1))


@torch.no_grad()
def randomised(net: nn.Module) -> nn.Module:
    """The network in eval mode with random statistics, gammas and betas, so that each tensor matters."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return net.eval()


def with_scores(net: nn.Module, density: float) -> tuple[dict[str, Tensor], nn.Module]:
    """HYDRA's checkpoint of a network, with scores, and the network with the weights of the lowest scores at zero."""
    state = dict(net.state_dict())
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            scores = torch.randn_like(module.weight)
            state[f"{name}.weight"] = module.weight.detach().clone()
            state[f"{name}.popup_scores"] = scores
            lowest = scores.abs().flatten().argsort()[: int((1 - density) * scores.numel())]
            module.weight.data.view(-1)[lowest] = 0
    return state, net
