"""The engine: logits and input gradients of a whole model as a short list of fused steps.

An attack needs the gradient of the input and no other. So in eval mode BatchNorm is folded into the convolution before
it, and the convolution's kernel also adds the residual and applies the ReLU; in the backward pass it applies the gate
of a ReLU and adds another branch's gradient. Operations that cannot be fused are left to autograd.
"""

from sparse_adv.engine.dispatch import Autograd, InputGradients, explain, input_gradients
from sparse_adv.engine.gradients import NoGradientError
from sparse_adv.engine.program import Program
from sparse_adv.engine.traced_code import NotTraceable
from sparse_adv.engine.training import fuse_for_training

__all__ = [
    "Autograd",
    "InputGradients",
    "NoGradientError",
    "NotTraceable",
    "Program",
    "explain",
    "fuse_for_training",
    "input_gradients",
]
