// The operands of an epilogue (epilogue.h) as tensors: their checks, and the pointers that the kernels read.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "cpu/epilogue.h"
#include "cpu/runs.h"

namespace sparse_adv {

struct EpilogueTensors {
  std::optional<torch::stable::Tensor> scale = std::nullopt, bias = std::nullopt, residual = std::nullopt;
  bool relu = false;
  std::optional<torch::stable::Tensor> gate_out = std::nullopt, gate = std::nullopt;

  // With contiguous vectors and the residual in the layout of `out`; copies where they are not so.
  EpilogueTensors laid_out_like(const torch::stable::Tensor& out) const;

  // The operands must be laid out like `out` and live as long as the pointers.
  template <class T>
  Epilogue<T> pointers(const torch::stable::Tensor& out) const;
};

// The size of the gate of a tensor, uint8: [N, C, H, ceil(W / 8)] if it is NCHW, [N, H, W, ceil(C / 8)] if it is
// channels_last, as is_channels_last decides.
std::array<int64_t, 4> gate_size(const torch::stable::Tensor& like);

// How the elementwise kernels cut a tensor that is NCHW or channels_last without gaps, with its gate if it has one.
Runs runs_of(const torch::stable::Tensor& tensor, bool has_gate);

// Throws unless the tensor is a gate of `out`.
void check_gate(const char* name, const std::optional<torch::stable::Tensor>& gate, const torch::stable::Tensor& out);

// Throws unless a residual has the size, the dtype and the layout of `out`, and is out or shares no memory with it.
void check_residual(const std::optional<torch::stable::Tensor>& residual, const torch::stable::Tensor& out);

// Throws unless a convolution of the images `like` with these weights can write to `out`: it has this size, their dtype
// and their layout, residual and gate fit it, and neither out nor gate_out shares memory with one of these operands.
void check_out(const torch::stable::Tensor& out, const std::array<int64_t, 4>& size, const char* like_name,
               const torch::stable::Tensor& like, const torch::stable::Tensor& weight, const EpilogueTensors& epilogue);

// Throws if out or gate_out shares memory with a tensor that the kernels read meanwhile.
void check_is_not_written(const char* name, const torch::stable::Tensor& read, const torch::stable::Tensor& out,
                          const EpilogueTensors& epilogue);

// Throws if there are a ReLU and a gate, or a gate is to be written without a ReLU.
void check_activation(const EpilogueTensors& epilogue);

// Throws if a gate that is written shares memory with an operand of its epilogue.
void check_gate_out(const EpilogueTensors& epilogue, const torch::stable::Tensor& out);

}  // namespace sparse_adv
