// The schema of every op. Implementations are registered in csrc/<device>/<op>.* or csrc/cpu/<op>/, and those in Triton
// in sparse_adv/ops/<op>_cuda.py; documentation, fake kernels and gradients are in sparse_adv/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparse_adv, m) {
  // No keyword-only arguments and no defaults, because ops/autograd.py counts positions: the dispatcher drops arguments
  // that equal their default, and then the number of gradients would be wrong. y = relu(scale[k] * conv2d(input, weight
  // * mask) + bias[k] + residual); `pattern` is what compile_pattern returns.
  m.def(
      "masked_conv2d(Tensor input, Tensor weight, Tensor[] pattern, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, Tensor? scale, Tensor? residual, bool relu) -> Tensor");
  // Gradient of conv2d(input, weight * mask) with respect to input; input_size is [N, C, H, W].
  m.def(
      "masked_conv2d_grad_input(Tensor grad_output, Tensor weight, Tensor[] pattern, SymInt[4] input_size, SymInt[2] "
      "stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  // Gradient with respect to weight, exactly 0 where the mask is false.
  m.def(
      "masked_conv2d_grad_weight(Tensor grad_output, Tensor input, Tensor[] pattern, SymInt[2] stride, SymInt[2] "
      "padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  // Forward and grad_input into memory that the caller provides. out = relu?(conv2d(input, weight * mask) + bias +
  // residual); gate_out, only with relu, receives a bit per element of out: whether the ReLU passes the gradient
  // (cpu/epilogue.h).
  m.def(
      "masked_conv2d_out(Tensor input, Tensor weight, Tensor[] pattern, Tensor? bias, SymInt[2] stride, SymInt[2] "
      "padding, SymInt[2] dilation, SymInt groups, Tensor? residual, bool relu, Tensor(a!) out, Tensor(b!)? gate_out) "
      "-> ()");
  // out = gate * (grad_input + residual); the input has the size of out.
  m.def(
      "masked_conv2d_grad_input_out(Tensor grad_output, Tensor weight, Tensor[] pattern, SymInt[2] stride, SymInt[2] "
      "padding, SymInt[2] dilation, SymInt groups, Tensor? residual, Tensor? gate, Tensor(a!) out) -> ()");
  // conv2d(input, weight) with weights [K, C, 3, 3], stride 1 and padding 0 to 2 by Winograd's filtering with tiles of
  // tile x tile pixels. transposed exchanges K and C and turns the taps by 180 degrees: the gradient of the input.
  m.def(
      "winograd_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] padding, int tile, bool transposed) -> "
      "Tensor");
  // The gradient of its weights, in the same way.
  m.def("winograd_conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] padding, int tile) -> Tensor");
  // Its two parts: the transformation of the weights, and the convolution with transformed weights, which writes to
  // memory that the caller provides.
  m.def("winograd_conv2d_weight(Tensor weight, int tile, bool transposed) -> Tensor");
  // out = act(winograd_conv2d(input, weight) + bias + residual), act = relu, gate or nothing.
  m.def(
      "winograd_conv2d_out(Tensor input, Tensor weight, SymInt[2] padding, Tensor? bias, Tensor? residual, bool relu, "
      "Tensor? gate, Tensor(a!) out, Tensor(b!)? gate_out) -> ()");
  // With masked weights: the live filters alone, transformed, in the order of the matrix (row_offsets, channels).
  m.def(
      "masked_winograd_conv2d_weight(Tensor weight, Tensor mask, Tensor row_offsets, Tensor channels, int oc_block, "
      "bool transposed) -> Tensor");
  // out = act(conv2d(input, those weights) + bias + residual) with tiles of 4 x 4 pixels, act = relu, gate or nothing.
  m.def(
      "masked_winograd_conv2d_out(Tensor input, Tensor row_offsets, Tensor channels, Tensor values, SymInt[2] padding, "
      "Tensor? bias, Tensor? residual, bool relu, Tensor? gate, Tensor(a!) out, Tensor(b!)? gate_out) -> ()");
  // The epilogue of the convolutions on its own: out = act(scale[c] * input + bias[c] + residual), act = relu, gate or
  // nothing.
  m.def(
      "pointwise_out(Tensor input, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, Tensor? gate, Tensor(a!) "
      "out, Tensor(b!)? gate_out) -> ()");
  // Max pooling with windows and stride of `kernel_size`. index receives the number of each window's largest element.
  m.def("max_pool2d_out(Tensor input, int[2] kernel_size, Tensor(a!) out, Tensor(b!)? index) -> ()");
  // out = gate * (grad_input + residual); the input has the size of out.
  m.def(
      "max_pool2d_grad_input_out(Tensor grad_output, Tensor index, int[2] kernel_size, Tensor? residual, Tensor? gate, "
      "Tensor(a!) out) -> ()");
  // BatchNorm with the statistics of the batch: out = relu?(batch_norm(input) + residual), with mean, biased variance
  // and the gate of the ReLU. Without relu the gate is empty.
  m.def(
      "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool relu) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  // Gradients of input, weight, bias and residual; that of the residual is empty unless it is needed.
  m.def(
      "batch_norm_act_grad(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor var, Tensor? gate, "
      "float eps, bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)");
  // The weights kept by the mask, times the factor of their output channel, in the order of the column indices of
  // forward and of grad_input.
  m.def("pack_values(Tensor weight, Tensor[] pattern, Tensor? scale=None) -> Tensor[]");
  // For forward, grad_input and grad_weight, in this order: the kernel (1 sparse, 2 dense) and the multiply-adds that
  // it executes. Only dtype, sizes and strides of the input are read. grad_output is assumed to have the layout of the
  // output, which is the input's.
  m.def(
      "masked_conv2d_plan(Tensor input, Tensor[] pattern, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> "
      "int[]");
  // The norm is a bool, because torch loses the copy of a string that it hands to an op of a library on the stable ABI
  // (pytorch issue 191340): no schema here has a str.
  // linf: clamp(clamp(adv + alpha * sign(grad), clean - eps, clean + eps), lo, hi); l2: normalised step and projection.
  m.def(
      "pgd_step(Tensor adv, Tensor grad, Tensor clean, float alpha, float eps, bool l2, float lo, float hi) -> "
      "Tensor");
  m.def(
      "pgd_step_(Tensor(a!) adv, Tensor grad, Tensor clean, float alpha, float eps, bool l2, float lo, float hi) -> "
      "()");
  // The linf step, and its result normalised for the network: (moved - mean[c]) / std[c] in bfloat16 and channels_last.
  m.def(
      "pgd_step_normalized(Tensor adv, Tensor grad, Tensor clean, Tensor mean, Tensor std, float alpha, float eps, "
      "float lo, float hi) -> (Tensor, Tensor)");
  // clamp(clean + noise, lo, hi), noise uniform in the ball; seed is int64 [2]: Philox key and offset.
  m.def("random_start(Tensor clean, Tensor seed, float eps, bool l2, float lo, float hi) -> Tensor");
}
