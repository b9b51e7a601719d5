#include "cpu/path.h"

#include "cpu/window.h"

namespace sparse_adv {

Path choose_path(const Pattern& pattern, const Convolution& conv, Pass pass, torch::headeronly::ScalarType dtype) {
  const auto asked = static_cast<Path>(pattern.path[static_cast<int>(pass)]);
  const bool possible = dtype == torch::headeronly::ScalarType::Float && conv.N > 0 && conv.C > 0 && conv.H > 0 &&
                        conv.W > 0 && conv.K > 0;
  if (!possible || asked == Path::dense) return Path::dense;
  const Window window = pass == Pass::grad_input ? grad_input_window(conv) : forward_window(conv);
  if (!window.fits_int32(16)) return Path::dense;
  if (asked == Path::sparse) return Path::sparse;
  return pattern.density() <= 0.5 ? Path::sparse : Path::dense;
}

}  // namespace sparse_adv
