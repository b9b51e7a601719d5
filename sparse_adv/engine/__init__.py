"""The engine: logits and input gradients of a whole model as a short list of fused steps.

An attack needs the gradient of the input and no other. In eval mode BatchNorm is then part of the convolution before
it, and the ReLU and the addition of a residual are the end of the convolution's kernel; on the way back, so are the
gate of a ReLU and the addition of another branch's gradient. What cannot be fused is left to autograd, operation by
operation.
"""

from sparse_adv.engine.dispatch import Autograd, InputGradients, explain, input_gradients
from sparse_adv.engine.program import Program
from sparse_adv.engine.training import fuse_for_training

__all__ = ["Autograd", "InputGradients", "Program", "explain", "fuse_for_training", "input_gradients"]
