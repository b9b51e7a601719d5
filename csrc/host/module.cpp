// The Python module `_host`, for functions that are not tensor ops: the pattern compiler on NumPy arrays, and build
// facts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "host/pattern_compiler.h"

namespace py = pybind11;
using namespace sparse_adv;

namespace {

template <class Container>
py::array_t<typename Container::value_type> to_array(const Container& values) {
  return py::array_t<typename Container::value_type>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::list compile_pattern(const py::array_t<bool, py::array::c_style>& mask, const std::array<int64_t, 4>& block,
                         int64_t groups) {
  if (mask.ndim() != 4) throw std::invalid_argument("mask must have 4 dimensions");
  const CompiledMask compiled =
      compile_mask(reinterpret_cast<const uint8_t*>(mask.data()),
                   {mask.shape(0), mask.shape(1), mask.shape(2), mask.shape(3)}, block, groups);
  py::list pattern;
  pattern.append(to_array(compiled.header));
  pattern.append(mask);
  for (const CsrArrays* csr : {&compiled.forward, &compiled.grad_input}) {
    pattern.append(to_array(csr->row_offsets));
    pattern.append(to_array(csr->col_indices));
  }
  return pattern;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Pattern compiler and build facts of sparse_adv.";
  m.def("compile_pattern", &compile_pattern, py::arg("mask"), py::arg("block"), py::arg("groups") = 1,
        "The arrays of pattern_layout.h for a mask [K, C/groups, R, S]: header, mask, row offsets and column indices "
        "of the forward pass, the same of grad_input.");
  m.attr("header_fields") =
      py::dict(py::arg("format") = static_cast<int>(kFormat), py::arg("groups") = static_cast<int>(kGroups),
               py::arg("block") = static_cast<int>(kBlockOut), py::arg("kept") = static_cast<int>(kKeptWeights),
               py::arg("requested_kernel") = static_cast<int>(kForwardKernel),
               py::arg("weight_is_masked") = static_cast<int>(kWeightIsMasked));
  m.attr("version") = SPARSE_ADV_VERSION;
  m.attr("compiler") = SPARSE_ADV_COMPILER;
  m.attr("cuda") = SPARSE_ADV_CUDA;              // nvcc's version, empty where the CUDA ops were not built
  m.attr("cuda_archs") = SPARSE_ADV_CUDA_ARCHS;  // as in TORCH_CUDA_ARCH_LIST
}
