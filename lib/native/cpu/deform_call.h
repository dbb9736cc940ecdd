// Deformable convolution: what forward and backward share on the side of torch's tensors. Checks, layouts, packing, and
// the variants of the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "deform_kernels.h"
#include "memory.h"
#include "shared/images.h"

namespace upsnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// For each variant NAME of a kernel, target attributes, and the kernel's parameters.
#if UPSNET_X86
#define UPSNET_EACH_VARIANT(DEFINE)                             \
  DEFINE(avx512, UPSNET_TARGET_AVX512, float, float, 64, 12, 2) \
  DEFINE(avx2, UPSNET_TARGET_AVX2, float, float, 32, 6, 2)      \
  DEFINE(generic, , float, float, 16, 6, 2)                     \
  DEFINE(precise, , double, double, 16, 6, 2)
#else
#define UPSNET_EACH_VARIANT(DEFINE)         \
  DEFINE(generic, , float, float, 16, 6, 2) \
  DEFINE(precise, , double, double, 16, 6, 2)
#endif

template <class T>
const T* values_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* target_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void copy_strides(const Tensor& tensor, int64_t (&strides)[4]) {
  for (int i = 0; i < 4; ++i) strides[i] = tensor.stride(i);
}

// `input` must be dense and channels last. The last line of defence: Python checks first, with better sentences.
template <class T, class S>
Deform<T, S> geometry(const Tensor& input, const Tensor& offset, const Tensor& weight,
                      const std::optional<Tensor>& mask, const Ints& stride, const Ints& padding,
                      const Ints& dilation) {
  Deform<T, S> d{};
  d.images = input.size(0), d.channels = input.size(1), d.height = input.size(2), d.width = input.size(3);
  d.outputs = weight.size(0), d.kernel_h = weight.size(2), d.kernel_w = weight.size(3);
  d.stride_h = stride.at(0), d.stride_w = stride.at(1), d.pad_h = padding.at(0), d.pad_w = padding.at(1);
  d.dilation_h = dilation.at(0), d.dilation_w = dilation.at(1);
  STD_TORCH_CHECK(d.stride_h > 0 && d.stride_w > 0 && d.taps() > 0,
                  "deform_conv2d: stride and kernel must be positive");
  d.out_height = (d.height + 2 * d.pad_h - d.dilation_h * (d.kernel_h - 1) - 1) / d.stride_h + 1;
  d.out_width = (d.width + 2 * d.pad_w - d.dilation_w * (d.kernel_w - 1) - 1) / d.stride_w + 1;
  STD_TORCH_CHECK(weight.size(1) > 0 && d.channels > 0 && d.channels % weight.size(1) == 0,
                  "deform_conv2d: weight and input differ in channels");
  d.weight_groups = d.channels / weight.size(1);
  STD_TORCH_CHECK(d.outputs % d.weight_groups == 0, "deform_conv2d: weight groups do not divide the outputs");
  d.offset_groups = offset.size(1) / (2 * d.taps());
  STD_TORCH_CHECK(d.offset_groups > 0 && offset.size(1) == 2 * d.taps() * d.offset_groups &&
                      d.channels % d.offset_groups == 0 && offset.size(0) == d.images &&
                      offset.size(2) == d.out_height && offset.size(3) == d.out_width,
                  "deform_conv2d: offset has the wrong shape");
  const ScalarType places = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type() && offset.scalar_type() == places,
                  "deform_conv2d: weight or offset has the wrong dtype");
  d.input = values_of<S>(input);
  d.offset = values_of<T>(offset);
  copy_strides(offset, d.offset_strides);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == places && mask->size(0) == d.images &&
                        mask->size(1) == d.taps() * d.offset_groups && mask->size(2) == d.out_height &&
                        mask->size(3) == d.out_width,
                    "deform_conv2d: mask has the wrong shape or dtype");
    d.mask = values_of<T>(*mask);
    copy_strides(*mask, d.mask_strides);
  }
  return d;
}

inline Tensor widened(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); }

inline std::optional<Tensor> widened(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(widened(*tensor)) : std::nullopt;
}

template <class S>
Plane<S> plane(S* data, int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t pixel = channels_last ? channels : 1;
  return {data, channels * height * width, width * pixel, pixel, channels_last ? 1 : height * width};
}

// Items per thread worth waking one for, if each item moves `size` values.
inline int64_t grain(int64_t size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size)); }

// The same images dense, with their channels innermost.
template <class S>
Tensor channels_last(const Tensor& tensor) {
  if (is_channels_last(tensor)) return tensor;
  const Tensor source = torch::stable::contiguous(tensor);
  const int64_t n = tensor.size(0), c = tensor.size(1), h = tensor.size(2), w = tensor.size(3);
  const Tensor result = empty_images(tensor, {n, c, h, w}, tensor.scalar_type(), true);
  const Plane<S> from = plane(const_cast<S*>(values_of<S>(source)), c, h, w, false);
  torch::stable::parallel_for(0, n * h, grain(w * c), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      move_tile<false>(from, Tile{row / h, row % h, 0, 1, 1, w}, c, target_of<S>(result) + row * w * c, c);
  });
  return result;
}

// weight[G * o, c, taps] -> [tap][group][panel][depth][lane]; the lanes are outputs (forward) or channels (backward).
// `factors` values of the depth lie side by side in a lane.
template <class S>
Zeros<S> pack_weight(const Tensor& weight, int64_t groups, int64_t panel, int64_t factors, bool lanes_are_outputs) {
  const int64_t outputs = weight.size(0) / groups, channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t wide = lanes_are_outputs ? outputs : channels, depth = lanes_are_outputs ? channels : outputs;
  const int64_t panels = (wide + panel - 1) / panel, panel_size = panel * round_up(depth, factors);
  Zeros<S> packed(taps * groups * panels * panel_size);
  const S* source = values_of<S>(weight);
  torch::stable::parallel_for(0, groups * panels, grain(panel_size * taps), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const S* group = source + i / panels * outputs * channels * taps;
      const int64_t first = i % panels * panel;
      for (int64_t lane = first; lane < std::min(first + panel, wide); ++lane)
        for (int64_t p = 0; p < depth; ++p) {
          const S* from = group + (lanes_are_outputs ? lane * channels + p : p * channels + lane) * taps;
          S* to = packed.get() + i * panel_size + (p / factors * panel + lane - first) * factors + p % factors;
          for (int64_t tap = 0; tap < taps; ++tap) to[tap * groups * panels * panel_size] = from[tap];
        }
    }
  });
  return packed;
}

}  // namespace upsnet
