// RoIAlign over a pyramid (Mask R-CNN, section 3): where a bin samples, and what both devices demand of the arguments.
//
// A box is cut into bins × bins, a bin into 2 × 2 samples, and a sample is bilinear: the product of a weight along y and
// one along x. So the axes are worked out apart from each other.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "both.h"

namespace upsnet {

constexpr int samples_per_axis = 2;
constexpr int taps_per_axis = 2 * samples_per_axis;  // each sample lies between two pixels

// What values of type T are summed in, and boxes are given in.
template <class T>
using RoiSum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One axis of a box in pixels of its level: where it starts, and the length of a bin.
template <class A>
struct RoiAxis {
  A start, bin;
};

// `aligned` puts pixel centres at halves; without it a box is at least one pixel long.
template <class A>
UPSNET_BOTH RoiAxis<A> roi_axis(A first, A last, A scale, int64_t bins, bool aligned) {
  const A shift = aligned ? A(0.5) : A(0);
  const A start = first * scale - shift;
  A length = last * scale - shift - start;
  if (!aligned && length < A(1)) length = A(1);  // NaN stays
  return {start, length / A(bins)};
}

// The pixels that a bin reads along one axis of `size` pixels, and their weights; of the mean, an axis has its half.
template <class A>
struct AxisTaps {
  int64_t index[taps_per_axis];
  A weight[taps_per_axis];
};

// A sample beyond -1 or `size`, or at no number at all, counts as 0; one beyond the border's centre lies on the border.
template <class A>
UPSNET_BOTH AxisTaps<A> taps_of_bin(const RoiAxis<A>& axis, int64_t bin, int64_t size) {
  AxisTaps<A> taps = {};
  for (int sample = 0; sample < samples_per_axis; ++sample) {
    A position = axis.start + A(bin) * axis.bin + (A(sample) + A(0.5)) * axis.bin / A(samples_per_axis);
    if (!(size > 0 && position >= A(-1) && position <= A(size))) continue;
    if (position < A(0)) position = A(0);
    const int64_t last = size - 1;
    const int64_t low = int64_t(position) < last ? int64_t(position) : last;
    const A fraction = low < last ? position - A(low) : A(0);
    taps.index[2 * sample] = low;
    taps.index[2 * sample + 1] = low < last ? low + 1 : low;
    taps.weight[2 * sample] = (A(1) - fraction) / A(samples_per_axis);
    taps.weight[2 * sample + 1] = fraction / A(samples_per_axis);
  }
  return taps;
}

// The last line of defence: Python checks first, with better sentences.
inline void check_pyramid(const std::vector<torch::stable::Tensor>& features, const torch::stable::Tensor& rois,
                          const torch::stable::Tensor& levels, const std::vector<double>& scales, int64_t bins) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!features.empty() && features.size() == scales.size() && bins > 0,
                  "pyramid_roi_align: one scale a level, at least one level and one bin are needed");
  for (const auto& feature : features)
    STD_TORCH_CHECK(feature.dim() == 4 && feature.size(0) == features[0].size(0) &&
                        feature.size(1) == features[0].size(1) && feature.scalar_type() == features[0].scalar_type() &&
                        feature.device() == features[0].device(),
                    "pyramid_roi_align: levels need four dimensions and the same images, channels, dtype and device");
  const auto wanted = features[0].scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5 && rois.scalar_type() == wanted &&
                      rois.device() == features[0].device(),
                  "pyramid_roi_align: rois must be of shape (r, 5), float32, or float64 as the features");
  STD_TORCH_CHECK(levels.dim() == 1 && levels.size(0) == rois.size(0) && levels.scalar_type() == ScalarType::Long &&
                      levels.device() == features[0].device(),
                  "pyramid_roi_align: levels must be int64 of shape (r)");
}

inline void check_gradient(const torch::stable::Tensor& grad, const torch::stable::Tensor& feature,
                           const torch::stable::Tensor& rois) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois.size(0) && grad.size(1) == feature.size(1) &&
                      grad.size(2) == grad.size(3) && grad.scalar_type() == feature.scalar_type() &&
                      grad.device() == feature.device(),
                  "pyramid_roi_align: the gradient has the wrong shape, dtype or device");
}

}  // namespace upsnet
