"""The ops alone: one sparse convolution with its gradients, and one PGD step, in your own code.

python examples/ops_only.py
"""

import torch

from sparse_adv import ops

torch.manual_seed(0)
images = torch.rand(32, 64, 16, 16, requires_grad=True)
weight = torch.randn(128, 64, 3, 3, requires_grad=True)
mask = torch.rand(128 // 4, 64, 3, 3).lt(0.1).repeat_interleave(4, 0)  # blocks of 4 output channels, density 0.1

pattern = ops.compile_pattern(mask, block=(4, 1))  # once per mask
output = ops.masked_conv2d(images, weight, pattern, padding=1, relu=True)
output.square().mean().backward()

expected = torch.nn.functional.conv2d(images, weight * mask, padding=1).relu()
print(f"largest difference from the dense convolution: {(output - expected).abs().max():.1e}")
print(f"gradients outside the mask: {weight.grad[~mask].count_nonzero()}")

clean = torch.rand(32, 3, 32, 32)
adversarial = ops.random_start(clean, eps=8 / 255)
adversarial = ops.pgd_step(adversarial, torch.randn_like(clean), clean, alpha=2 / 255, eps=8 / 255)
print(f"largest change of a pixel: {(adversarial - clean).abs().max() * 255:.1f} / 255")
