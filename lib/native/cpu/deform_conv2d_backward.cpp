// upsnet::deform_conv2d_backward on the CPU. The output is cut into parts whose number depends on the shape alone, each
// part sums its gradients privately, and the parts are added in a fixed order. So the result is bitwise the same for
// any number of threads. A part's private input gradient covers only the rows that its offsets reach; parts whose rows
// do not overlap sum straight into the result. The others' sums lie in memory that a thread uses again and again.

#include <atomic>
#include <bit>
#include <tuple>
#include <type_traits>
#include <utility>

#include "deform_call.h"

namespace upsnet {
namespace {

template <class T>
struct Entry {
  int64_t panel;
  int64_t (*scratch)(const Deform<T, T>&);
  int64_t (*weight_rows)(const Deform<T, T>&);
  int64_t (*weight_row)(const Deform<T, T>&);
  void (*run)(const BackwardTask<T>&, const Tile&, const PartSums<T>&, T*);
};

#define UPSNET_BACKWARD(NAME, TARGET, T, S, BYTES, ROWS, VECTORS)                                                    \
  TARGET void backward_##NAME(const BackwardTask<T>& task, const Tile& part, const PartSums<T>& sums, T* scratch) {  \
    Kernel<T, S, BYTES, ROWS, VECTORS>::backward(task, part, sums, scratch);                                         \
  }                                                                                                                  \
  const Entry<T> entry_##NAME = {                                                                                    \
      Kernel<T, S, BYTES, ROWS, VECTORS>::panel, Kernel<T, S, BYTES, ROWS, VECTORS>::backward_scratch,               \
      Kernel<T, S, BYTES, ROWS, VECTORS>::weight_rows, Kernel<T, S, BYTES, ROWS, VECTORS>::weight_row,               \
      backward_##NAME};

UPSNET_EACH_VARIANT(UPSNET_BACKWARD)

template <class T>
const Entry<T>& entry() {
  if constexpr (std::is_same_v<T, double>) return entry_precise;
  else {
#if UPSNET_X86
    const Variant variant = chosen_variant();
    if (variant == Variant::avx512) return entry_avx512;
    if (variant == Variant::avx2) return entry_avx2;
#endif
    return entry_generic;
  }
}

struct Part {
  Tile area;
  int64_t first_row, last_row;  // of the input, images one below the other: what its offsets reach
  int64_t layer;                // no two parts of a layer overlap; layer 0 sums straight into the result

  bool overlaps(const Part& other) const { return first_row < other.last_row && other.first_row < last_row; }
};

// Sums of weight and bias gradients, by part.
template <class T>
struct WeightSums {
  std::vector<Zeros<T>> weight, bias;
};

// Rows [first, last) of the input, images one below the other, that an area of the output reaches.
template <class T>
std::pair<int64_t, int64_t> reached_rows(const Deform<T, T>& d, const Tile& area) {
  int64_t first = d.images * d.height, last = 0;
  Place place(area);
  for (int64_t p = 0; p < area.count(); ++p, place.next(area))
    for (int64_t i = 0; i < d.offset_groups * d.taps(); ++i) {
      const T offset = d.offset[place.at(d.offset_strides, 2 * i)];
      const T y = T(place.row * d.stride_h + Tap::of(d, i % d.taps(), 0).y) + offset;
      if (!(y >= T(-1) && y < T(d.height))) continue;
      const int64_t cut = int64_t(y), top = cut - (T(cut) > y);  // floor; y + 1 would round up just below an integer
      first = std::min(first, place.image * d.height + std::max<int64_t>(top, 0));
      last = std::max(last, place.image * d.height + std::min(top + 2, d.height));
    }
  return {std::min(first, last), last};
}

// Whole images, or bands of rows: about a power of two between 2 and 16, one for 2048 pixels.
template <class T>
Grid part_grid(const Deform<T, T>& d) {
  const auto wanted = int64_t(std::bit_ceil(uint64_t(std::clamp<int64_t>(d.pixels() / 2048, 2, 16))));
  const int64_t along_images = std::clamp<int64_t>(d.images, 1, wanted);
  const int64_t along_rows = std::min(d.out_height, round_up(wanted, along_images) / along_images);
  return {d.whole_output(), d.pixels() == 0 ? 0 : along_images, along_rows, 1};
}

// In ascending layers.
template <class T>
std::vector<Part> make_parts(const Deform<T, T>& d) {
  const Grid grid = part_grid(d);
  std::vector<Part> parts(grid.count());
  torch::stable::parallel_for(0, grid.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, last] = reached_rows(d, grid.tile(i));
      parts[i] = {grid.tile(i), first, last, 0};
    }
  });
  std::vector<int64_t> free_row;  // by layer
  for (Part& part : parts) {
    const auto is_free = [&](int64_t row) { return row <= part.first_row; };
    const auto found = std::find_if(free_row.begin(), free_row.end(), is_free);
    part.layer = found - free_row.begin();
    if (found == free_row.end()) free_row.push_back(part.last_row);
    else *found = part.last_row;
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.layer < b.layer; });
  return parts;
}

// `grad_input`: zeros, channels last. The threads take the parts in their order; a part of a later layer is added when
// those before it are, which are further on: they are done, or were taken earlier.
template <class T>
WeightSums<T> sum_parts(const BackwardTask<T>& task, const Entry<T>& use, T* grad_input) {
  const Deform<T, T>& d = task.d;
  const std::vector<Part> parts = make_parts(d);
  const int64_t count = parts.size(), row_size = d.width * d.channels;
  WeightSums<T> sums;
  int64_t most_rows = 0;
  for (const Part& part : parts) {
    sums.weight.emplace_back(d.taps() * d.weight_groups * use.weight_rows(d) * use.weight_row(d));
    sums.bias.emplace_back(d.outputs);
    if (part.layer > 0) most_rows = std::max(most_rows, part.last_row - part.first_row);
  }
  std::atomic<int64_t> next = 0;
  std::vector<std::atomic<bool>> added(count);
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Zeros<T> scratch(use.scratch(d)), rows(most_rows * row_size);
    for (int64_t i = next++; i < count; i = next++) {
      const Part& part = parts[i];
      const bool direct = part.layer == 0;
      const int64_t size = (part.last_row - part.first_row) * row_size;
      if (!direct) std::fill_n(rows.get(), size, T(0));
      const PartSums<T> target = {direct ? grad_input : rows.get(), direct ? 0 : part.first_row,
                                  sums.weight[i].get(), sums.bias[i].get()};
      use.run(task, part.area, target, scratch.get());
      if (!direct) {
        for (int64_t j = 0; j < i; ++j)
          if (parts[j].overlaps(part)) added[j].wait(false);
        T* to = grad_input + part.first_row * row_size;
        for (int64_t k = 0; k < size; ++k) to[k] += rows.get()[k];
      }
      added[i] = true;
      added[i].notify_all();
    }
  });
  return sums;
}

// Runs `each` for every row of the input, images one below the other.
template <class T, class F>
void each_input_row(const Deform<T, T>& d, const F& each) {
  torch::stable::parallel_for(0, d.images * d.height, grain(d.width * d.channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) each(row);
  });
}

template <class T>
void add_weights(const Deform<T, T>& d, const Entry<T>& use, const WeightSums<T>& sums, T* grad_weight, T* grad_bias) {
  const int64_t taps = d.taps(), channels = d.group_channels(), row = use.weight_row(d);
  const int64_t group_size = use.weight_rows(d) * row;
  torch::stable::parallel_for(0, d.outputs, grain(channels * taps), [&](int64_t begin, int64_t end) {
    std::vector<T> sum(channels);
    for (int64_t o = begin; o < end; ++o) {
      const int64_t group = o / d.group_outputs(), at = o % d.group_outputs() * row;
      for (int64_t tap = 0; tap < taps; ++tap) {
        std::fill(sum.begin(), sum.end(), T(0));
        for (const Zeros<T>& weight : sums.weight) {
          const T* from = weight.get() + (tap * d.weight_groups + group) * group_size + at;
          for (int64_t c = 0; c < channels; ++c) sum[c] += from[c];
        }
        for (int64_t c = 0; c < channels; ++c) grad_weight[(o * channels + c) * taps + tap] = sum[c];
      }
      grad_bias[o] = T(0);
      for (const Zeros<T>& bias : sums.bias) grad_bias[o] += bias.get()[o];
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
                   const std::optional<Tensor>& mask, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const bool innermost = is_channels_last(input);  // the channels, and so in the result
  const Tensor source = channels_last<T>(input), upstream = channels_last<T>(grad);
  const Tensor kernel = torch::stable::contiguous(weight);
  const Entry<T>& use = entry<T>();
  BackwardTask<T> task{};
  task.d = geometry<T, T>(source, offset, kernel, mask, stride, padding, dilation);
  const Deform<T, T>& d = task.d;
  STD_TORCH_CHECK(grad.size(0) == d.images && grad.size(1) == d.outputs && grad.size(2) == d.out_height &&
                      grad.size(3) == d.out_width && grad.scalar_type() == input.scalar_type(),
                  "deform_conv2d: the gradient has the wrong shape or dtype");
  const int64_t samples = d.offset_groups * d.taps(), row_size = d.width * d.channels;
  const ScalarType type = input.scalar_type();
  Tensor grad_input = empty_images(input, {d.images, d.channels, d.height, d.width}, type, innermost);
  Tensor grad_offset = empty_images(input, {d.images, 2 * samples, d.out_height, d.out_width}, type, false);
  Tensor grad_weight = empty_images(input, {d.outputs, d.group_channels(), d.kernel_h, d.kernel_w}, type, false);
  Tensor grad_mask = empty_images(input, {d.images, mask ? samples : 0, d.out_height, d.out_width}, type, false);
  Tensor grad_bias = torch::stable::new_empty(input, {d.outputs});

  const Zeros<T> packed = pack_weight<T>(kernel, d.weight_groups, use.panel, 1, false);
  task.weight = packed.get();
  task.grad_output = plane(const_cast<T*>(values_of<T>(upstream)), d.outputs, d.out_height, d.out_width, true);
  task.grad_offset = target_of<T>(grad_offset);
  task.grad_mask = mask ? target_of<T>(grad_mask) : nullptr;
  const Zeros<T> spare(innermost ? 0 : d.images * d.height * row_size);
  T* const rows = innermost ? target_of<T>(grad_input) : spare.get();
  if (innermost) each_input_row(d, [&](int64_t row) { std::fill_n(rows + row * row_size, row_size, T(0)); });
  const WeightSums<T> sums = sum_parts(task, use, rows);
  if (!innermost) {
    const Plane<T> result = plane(target_of<T>(grad_input), d.channels, d.height, d.width, false);
    each_input_row(d, [&](int64_t row) {
      const Tile tile = {row / d.height, row % d.height, 0, 1, 1, d.width};
      move_tile<true>(result, tile, d.channels, rows + row * row_size, d.channels);
    });
  }
  add_weights(d, use, sums, target_of<T>(grad_weight), target_of<T>(grad_bias));
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

Gradients deform_conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
                                 std::optional<Tensor> mask, Ints stride, Ints padding, Ints dilation) {
  const ScalarType type = input.scalar_type();
  if (type == ScalarType::Float) return backward<float>(grad, input, offset, weight, mask, stride, padding, dilation);
  if (type == ScalarType::Double) return backward<double>(grad, input, offset, weight, mask, stride, padding, dilation);
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "deform_conv2d: float32, float64 or bfloat16 only");
  const auto [to_input, to_offset, to_weight, to_bias, to_mask] =
      backward<float>(widened(grad), widened(input), offset, widened(weight), mask, stride, padding, dilation);
  return {torch::stable::to(to_input, type), to_offset, torch::stable::to(to_weight, type),
          torch::stable::to(to_bias, type), to_mask};
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[] stride, "
      "int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&upsnet::deform_conv2d_backward));
}
