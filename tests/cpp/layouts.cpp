// Images to lanes and back.
#include "cpp/kernels_check.h"

namespace sparse_adv {

static Images describe(const float* data, int64_t channels, int64_t pixels, bool channels_last, int count) {
  return {data, channels * pixels, channels, pixels, channels_last, count};
}

static int64_t element(const Images& images, int64_t image, int64_t channel, int64_t pixel) {
  return image * images.image_size +
         (images.channels_last ? pixel * images.channels + channel : channel * images.pixels + pixel);
}

static bool check_fill_window(const Kernels& kernels, bool channels_last, int count, int64_t first_pixel,
                              bool ascending) {
  const int64_t channels = 2 * kernels.lanes + 3, pixels = 4 * kernels.lanes + 5, plane = pixels + 6;
  const std::vector<float> data = numbers(count * channels * pixels);
  const Images images = describe(data.data(), channels, pixels, channels_last, count);
  // Ascending with a gap after every lanes + 2 pixels, or in reverse with one pixel that goes nowhere.
  std::vector<int32_t> place(pixels - first_pixel), gaps;
  for (int32_t i = 0; i < std::ssize(place); ++i)
    place[i] = ascending ? i + i / (kernels.lanes + 2) : i == 1 ? -1 : static_cast<int32_t>(plane - 2 - i);
  for (int32_t i = 0; i < plane; ++i)
    if (std::ranges::find(place, i) == place.end()) gaps.push_back(i);
  const Placement placement{first_pixel, std::ssize(place), place.data(), gaps.data(), std::ssize(gaps),
                            plane,       ascending};
  const int64_t first = 1, last = channels;
  std::vector<float> window((last - first) * plane * kernels.lanes, kUntouched);
  kernels.fill_window(images, placement, first, last, window.data());

  std::vector<double> expected(window.size());
  for (int64_t c = first; c < last; ++c)
    for (int64_t p = 0; p < std::ssize(place); ++p)
      for (int i = 0; i < count && place[p] >= 0; ++i)
        expected[((c - first) * plane + place[p]) * kernels.lanes + i] = data[element(images, i, c, first_pixel + p)];
  return equal(window, expected);
}

bool check_fill_window(const Kernels& kernels) {
  bool good = true;
  for (bool channels_last : {false, true})
    for (int count : {1, kernels.lanes - 1, kernels.lanes})
      for (int64_t first_pixel : {0, 3})
        for (bool ascending : {false, true})
          good &= check_fill_window(kernels, channels_last, count, first_pixel, ascending);
  return good;
}

static bool check_fill_rows(const Kernels& kernels, int64_t row_size, int64_t row_at, int64_t row_count) {
  const int64_t lanes = kernels.lanes, channels = 4, first = 1, image_rows = 5, first_row = 1, rows = 6;
  const int64_t whole = (row_size + lanes - 1) / lanes * lanes, lead = lanes, pitch = lead + whole + lanes;
  const RowPlacement placement{row_size, first_row, row_count, row_at, rows, whole + lanes, pitch, rows * pitch};
  const std::vector<float> image = numbers(channels * image_rows * row_size);
  std::vector<float> window((channels - first) * placement.plane, kUntouched);
  kernels.fill_rows(image.data(), image_rows * row_size, placement, first, channels, window.data() + lead);

  std::vector<double> expected(window.size(), kUntouched);
  for (int64_t c = first; c < channels; ++c)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = 0; x < placement.data; ++x) {
        const bool inside = r >= row_at && r < row_at + row_count && x < row_size;
        expected[(c - first) * placement.plane + r * pitch + lead + x] =
            inside ? image[(c * image_rows + first_row + r - row_at) * row_size + x] : 0.0;
      }
  return equal(window, expected);
}

bool check_fill_rows(const Kernels& kernels) {
  bool good = true;
  for (int64_t row_size : {1, kernels.lanes, kernels.lanes + 3})
    for (int64_t row_at : {0, 2})
      for (int64_t row_count : {0, 1, 4}) good &= check_fill_rows(kernels, row_size, row_at, row_count);
  return good;
}

static bool check_store_sums(const Kernels& kernels, const Images& shape, bool with_affine, bool with_residual) {
  const int64_t plane = shape.pixels + 3, size = shape.count * shape.image_size, first = 2,
                count = shape.pixels - first;
  const std::vector<float> data = numbers((shape.channels + 2) * plane * kernels.lanes);
  std::vector<int32_t> plane_of(shape.channels), place(count);
  for (size_t k = 0; k < plane_of.size(); ++k) plane_of[k] = static_cast<int32_t>(k + (k > 1 ? 2 : 0));
  for (int64_t p = 0; p < count; ++p) place[p] = static_cast<int32_t>(p % 2 ? plane - 1 - p : p);
  const Sums sums{data.data(), plane_of.data(), plane, first, count, place.data()};
  const std::vector<float> scale = numbers(shape.channels), bias = numbers(shape.channels), residual = numbers(size);
  const Epilogue epilogue{with_affine ? scale.data() : nullptr, with_affine ? bias.data() : nullptr,
                          with_residual ? residual.data() : nullptr, with_residual};
  std::vector<float> output(size, kUntouched);
  kernels.store_sums(sums, epilogue, shape, output.data());

  std::vector<double> expected(size, kUntouched);
  for (int i = 0; i < shape.count; ++i)
    for (int64_t k = 0; k < shape.channels; ++k)
      for (int64_t p = 0; p < count; ++p) {
        const int64_t at = element(shape, i, k, first + p);
        expected[at] = ended(epilogue, data[(plane_of[k] * plane + place[p]) * kernels.lanes + i], k, at);
      }
  return equal(output, expected);
}

bool check_store_sums(const Kernels& kernels) {
  bool good = true;
  for (bool channels_last : {false, true})
    for (int count : {1, kernels.lanes - 1, kernels.lanes})
      for (bool with_affine : {false, true})
        for (bool with_residual : {false, true})
          good &= check_store_sums(kernels,
                                   describe(nullptr, kernels.lanes + 3, 6 * kernels.lanes + 1, channels_last, count),
                                   with_affine, with_residual);
  return good;
}

}  // namespace sparse_adv
