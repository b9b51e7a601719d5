#include "cpu/pointwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/errors.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "common/tensor_checks.h"
#include "cpu/pointwise_kernel.h"
#include "cpu/staging.h"

namespace sparse_adv {

using torch::stable::Tensor;

namespace {

template <class T>
void run(const Tensor& out, const Tensor& input, const EpilogueTensors& epilogue) {
  const Runs runs = runs_of(out, epilogue.gate || epilogue.gate_out);
  const Pointwise<T> operands{.input = input.const_data_ptr<T>(),
                              .out = out.mutable_data_ptr<T>(),
                              .epilogue = epilogue.pointers<T>(out),
                              .runs = runs};
  const auto kernel = SPARSE_ADV_CHOOSE(pointwise<T>);
  parallel_for(0, out.numel() / runs.size(), std::max<int64_t>(1, kElementwiseGrain / runs.size()),
               [&](int64_t begin, int64_t end) { kernel(operands, begin, end); });
}

void pointwise_out_cpu(Tensor input, std::optional<Tensor> scale, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, bool relu, std::optional<Tensor> gate, Tensor out,
                       std::optional<Tensor> gate_out) {
  check(out.dim() == 4, "out must have 4 dimensions, got ", out.dim());
  check_floating("out", out, out);
  check(has_plain_layout(out), "out must be NCHW or channels_last without gaps, got strides ", text_of(out.strides()));
  const std::vector<int64_t> size{out.sizes().begin(), out.sizes().end()};
  check_size("input", input, size);
  check_dtype("input", input, "out", out);
  check(have_same_layout(input, out), "input must have the layout of out, strides ", text_of(out.strides()), ", got ",
        text_of(input.strides()));
  check_memory("out", out, "input", input, true);
  for (const auto& [name, vector] : {std::pair{"scale", scale}, std::pair{"bias", bias}}) {
    check_size(name, vector, {out.size(1)});
    check_dtype(name, vector, "out", out);
    check_memory("out", out, name, vector);
  }
  check_residual(residual, out);
  check_gate("gate", gate, out);
  check_memory("gate_out", gate_out, "input", input);
  const EpilogueTensors epilogue{
      .scale = scale, .bias = bias, .residual = residual, .relu = relu, .gate_out = gate_out, .gate = gate};
  check_activation(epilogue);
  check_gate_out(epilogue, out);
  pointwise_into(out, input, epilogue);
}

}  // namespace

void pointwise_into(Tensor& out, const Tensor& input, const EpilogueTensors& epilogue) {
  check_floating("out", out, out);
  if (out.numel() == 0) return;
  const Tensor staging = staging_for(out, has_plain_layout(out));
  EpilogueTensors operands = epilogue.laid_out_like(out);
  for (auto* vector : {&operands.scale, &operands.bias})
    if (*vector) *vector = torch::stable::to(**vector, staging.scalar_type());
  if (operands.residual) operands.residual = staged(*operands.residual, staging);
  const auto kernel = is_double(staging) ? &run<double> : &run<float>;
  kernel(staging, staged(input, staging), operands);
  unstage(staging, out);
}

STABLE_TORCH_LIBRARY_IMPL(sparse_adv, CPU, m) { m.impl("pointwise_out", SPARSE_ADV_BOX(&pointwise_out_cpu)); }

}  // namespace sparse_adv
