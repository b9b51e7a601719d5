#include "cpu/epilogue_tensors.h"

#include <torch/csrc/stable/ops.h>

#include "common/errors.h"
#include "common/layout.h"
#include "common/tensor_checks.h"

namespace sparse_adv {

using torch::stable::Tensor;

namespace {

GateLayout gate_layout(const Tensor& like) {
  const std::array<int64_t, 4> size = gate_size(like);
  return {.row_size = like.size(is_channels_last(like) ? 1 : 3),
          .row_bytes = size[3],
          .image_bytes = size[1] * size[2] * size[3]};
}

}  // namespace

std::array<int64_t, 4> gate_size(const Tensor& like) {
  const int64_t N = like.size(0), C = like.size(1), H = like.size(2), W = like.size(3);
  if (is_channels_last(like)) return {N, H, W, (C + 7) / 8};
  return {N, C, H, (W + 7) / 8};
}

Runs runs_of(const Tensor& tensor, bool has_gate) {
  const int64_t C = tensor.size(1), H = tensor.size(2), W = tensor.size(3);
  if (is_channels_last(tensor)) return {.channels = C, .channels_last = true, .rows = 1, .row_size = C};
  // In memory an image of one pixel is one of channels_last; as it counts as NCHW, its gate has a row for each channel.
  if (H * W == 1) return {.channels = C, .channels_last = true, .rows = has_gate ? C : 1, .row_size = has_gate ? 1 : C};
  const int64_t rows = has_gate && W % 8 != 0 ? H : 1;
  return {.channels = C, .channels_last = false, .rows = rows, .row_size = H * W / rows};
}

void check_gate(const char* name, const std::optional<Tensor>& gate, const Tensor& out) {
  if (!gate) return;
  const std::array<int64_t, 4> size = gate_size(out);
  check_size(name, gate, {size.begin(), size.end()});
  check(gate->scalar_type() == torch::headeronly::ScalarType::Byte && gate->is_contiguous(), name,
        " must be uint8 and contiguous, got ", gate->scalar_type(), " with strides ", text_of(gate->strides()));
  check_memory(name, gate, "out", out);
}

void check_residual(const std::optional<Tensor>& residual, const Tensor& out) {
  if (!residual) return;
  check_size("residual", residual, {out.sizes().begin(), out.sizes().end()});
  check_dtype("residual", residual, "out", out);
  check(have_same_layout(*residual, out), "residual must have the layout of out, strides ", text_of(out.strides()),
        ", got ", text_of(residual->strides()));
  check_memory("out", out, "residual", residual, true);
}

void check_out(const Tensor& out, const std::array<int64_t, 4>& size, const char* like_name, const Tensor& like,
               const Tensor& weight, const EpilogueTensors& epilogue) {
  check_size("out", out, {size.begin(), size.end()});
  check_dtype("out", out, like_name, like);
  const bool fits = has_plain_layout(like) ? layouts_agree(out, like) : out.is_contiguous();
  check(fits, "out must be ", is_channels_last(like) ? "channels_last" : "NCHW", " without gaps, as ", like_name,
        " is, got strides ", text_of(out.strides()));
  check_residual(epilogue.residual, out);
  check_gate("gate", epilogue.gate, out);
  check_gate_out(epilogue, out);
  check_memory("out", out, "bias", epilogue.bias);
  check_is_not_written(like_name, like, out, epilogue);
  check_is_not_written("weight", weight, out, epilogue);
}

void check_is_not_written(const char* name, const Tensor& read, const Tensor& out, const EpilogueTensors& epilogue) {
  check_memory("out", out, name, read);
  check_memory("gate_out", epilogue.gate_out, name, read);
}

void check_activation(const EpilogueTensors& epilogue) {
  check(!(epilogue.relu && epilogue.gate), "relu and gate exclude each other");
  check(epilogue.relu || !epilogue.gate_out, "gate_out receives the bits of the ReLU, but relu is False");
}

void check_gate_out(const EpilogueTensors& epilogue, const Tensor& out) {
  const std::optional<Tensor>& gate_out = epilogue.gate_out;
  check_gate("gate_out", gate_out, out);
  check_memory("gate_out", gate_out, "scale", epilogue.scale);
  check_memory("gate_out", gate_out, "bias", epilogue.bias);
  check_memory("gate_out", gate_out, "residual", epilogue.residual);
}

EpilogueTensors EpilogueTensors::laid_out_like(const Tensor& out) const {
  EpilogueTensors laid_out = *this;
  if (scale) laid_out.scale = torch::stable::contiguous(*scale);
  if (bias) laid_out.bias = torch::stable::contiguous(*bias);
  if (residual) laid_out.residual = in_layout_of(out, *residual);
  return laid_out;
}

template <class T>
Epilogue<T> EpilogueTensors::pointers(const Tensor& out) const {
  const auto data = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr<T>() : nullptr; };
  return {.scale = data(scale),
          .bias = data(bias),
          .residual = data(residual),
          .relu = relu,
          .gate_out = gate_out ? gate_out->mutable_data_ptr<uint8_t>() : nullptr,
          .gate = gate ? gate->const_data_ptr<uint8_t>() : nullptr,
          .gate_layout = gate_layout(out)};
}

template Epilogue<float> EpilogueTensors::pointers(const Tensor&) const;
template Epilogue<double> EpilogueTensors::pointers(const Tensor&) const;

}  // namespace sparse_adv
