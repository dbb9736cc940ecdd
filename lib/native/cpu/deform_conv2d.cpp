// upsnet::deform_conv2d on the CPU: tiles of output pixels in parallel; a tile samples tap by tap and multiplies at
// once (deform_kernels.h). No pixel's sum depends on the tile that it lies in, nor on the number of threads.

#include <type_traits>

#include "deform_call.h"

namespace upsnet {
namespace {

template <class T, class S>
struct Entry {
  int64_t panel, factors, rows;
  int64_t (*scratch)(const Deform<T, S>&, int64_t);
  void (*run)(const ForwardTask<T, S>&, T*, int64_t, int64_t);
};

#define UPSNET_FORWARD(NAME, TARGET, T, S, BYTES, ROWS, VECTORS)                                          \
  TARGET void forward_##NAME(const ForwardTask<T, S>& task, T* scratch, int64_t begin, int64_t end) {     \
    Kernel<T, S, BYTES, ROWS, VECTORS>::forward(task, scratch, begin, end);                               \
  }                                                                                                       \
  const Entry<T, S> entry_##NAME = {Kernel<T, S, BYTES, ROWS, VECTORS>::panel,                            \
                                    Kernel<T, S, BYTES, ROWS, VECTORS>::factors, ROWS,                    \
                                    Kernel<T, S, BYTES, ROWS, VECTORS>::forward_scratch, forward_##NAME};

UPSNET_EACH_VARIANT(UPSNET_FORWARD)
#if UPSNET_X86
UPSNET_FORWARD(halves, UPSNET_TARGET_AVX512_BF16, float, uint16_t, 64, 12, 2)
#endif

template <class T, class S>
const Entry<T, S>& entry() {
  if constexpr (std::is_same_v<T, double>) return entry_precise;
  else {
#if UPSNET_X86
    if constexpr (!std::is_same_v<T, S>) return entry_halves;
    else {
      const Variant variant = chosen_variant();
      if (variant == Variant::avx512) return entry_avx512;
      if (variant == Variant::avx2) return entry_avx2;
    }
#endif
    if constexpr (std::is_same_v<T, S>) return entry_generic;
  }
}

// Small maps get smaller tiles so that every thread has several.
int64_t tile_size(int64_t pixels, int64_t rows) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  return std::clamp(round_up(std::max<int64_t>(1, pixels / (4 * threads)), rows), 2 * rows, largest_tile);
}

template <class T, class S>
Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const bool innermost = is_channels_last(input);  // the channels, and so in the result
  const Tensor source = channels_last<S>(input), kernel = torch::stable::contiguous(weight);
  const Entry<T, S>& use = entry<T, S>();
  ForwardTask<T, S> task{};
  task.d = geometry<T, S>(source, offset, kernel, mask, stride, padding, dilation);
  const Deform<T, S>& d = task.d;
  Tensor output = empty_images(input, {d.images, d.outputs, d.out_height, d.out_width}, input.scalar_type(), innermost);
  if (d.pixels() == 0 || d.outputs == 0) return output;

  const Zeros<S> packed = pack_weight<S>(kernel, d.weight_groups, use.panel, use.factors, true);
  const int64_t wide = round_up(d.group_outputs(), use.panel);
  const Zeros<T> padded_bias(d.weight_groups * wide);
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == d.outputs && bias->scalar_type() == input.scalar_type(),
                    "deform_conv2d: bias has the wrong shape or dtype");
    const Tensor values = torch::stable::contiguous(std::is_same_v<T, S> ? *bias : widened(*bias));
    for (int64_t g = 0; g < d.weight_groups; ++g)
      std::copy_n(values_of<T>(values) + g * d.group_outputs(), d.group_outputs(), padded_bias.get() + g * wide);
  }
  task.bias = padded_bias.get();
  task.weight = packed.get();
  task.output = plane(target_of<S>(output), d.outputs, d.out_height, d.out_width, innermost);
  task.tile = tile_size(d.pixels(), use.rows);
  task.grid = Grid::of(d.whole_output(), task.tile);
  torch::stable::parallel_for(0, task.grid.count(), 1, [&](int64_t begin, int64_t end) {
    const Zeros<T> scratch(use.scratch(d, task.tile));
    use.run(task, scratch.get(), begin, end);
  });
  return output;
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight, std::optional<Tensor> bias,
                     std::optional<Tensor> mask, Ints stride, Ints padding, Ints dilation) {
  STD_TORCH_CHECK(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4 && (!mask || mask->dim() == 4),
                  "deform_conv2d: input, offset, weight and mask need four dimensions");
  const ScalarType type = input.scalar_type();
  if (type == ScalarType::Float)
    return forward<float, float>(input, offset, weight, bias, mask, stride, padding, dilation);
  if (type == ScalarType::Double)
    return forward<double, double>(input, offset, weight, bias, mask, stride, padding, dilation);
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "deform_conv2d: float32, float64 or bfloat16 only");
#if UPSNET_X86
  // Products of pairs need an even number of channels, unless those of one group are padded.
  if (multiplies_halves() && (weight.size(1) % 2 == 0 || weight.size(1) == input.size(1)))
    return forward<float, uint16_t>(input, offset, weight, bias, mask, stride, padding, dilation);
#endif
  return torch::stable::to(
      forward<float, float>(widened(input), offset, widened(weight), widened(bias), mask, stride, padding, dilation),
      ScalarType::BFloat16);
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) { m.impl("deform_conv2d", TORCH_BOX(&upsnet::deform_conv2d)); }
