// upsnet::nms_sorted: greedy non-maximum suppression over boxes that are already in their order of preference.
//
// One row of overlaps per kept box against all later ones, without a branch in the inner loop: the compiler vectorises
// it. The formula is torchvision's, in float32: intersection / (area + area - intersection) > threshold.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "variants.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The five arrays that a row is computed from.
struct Boxes {
  const float *x1, *y1, *x2, *y2, *area;
};

// Contracted multiply-adds would round the union differently from torchvision.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
UPSNET_INLINE void suppress(const Boxes& boxes, int64_t i, int64_t end, float threshold, uint8_t* __restrict__ removed) {
  const float x1 = boxes.x1[i], y1 = boxes.y1[i], x2 = boxes.x2[i], y2 = boxes.y2[i], area = boxes.area[i];
  for (int64_t j = i + 1; j < end; ++j) {
    const float left = x1 < boxes.x1[j] ? boxes.x1[j] : x1, top = y1 < boxes.y1[j] ? boxes.y1[j] : y1;
    const float right = boxes.x2[j] < x2 ? boxes.x2[j] : x2, bottom = boxes.y2[j] < y2 ? boxes.y2[j] : y2;
    const float width = right - left > 0 ? right - left : 0, height = bottom - top > 0 ? bottom - top : 0;
    const float intersection = width * height;
    removed[j] |= uint8_t(intersection / (area + boxes.area[j] - intersection) > threshold);
  }
}

#if UPSNET_X86
UPSNET_TARGET_AVX512 void suppress_avx512(const Boxes& b, int64_t i, int64_t end, float t, uint8_t* removed) {
  suppress(b, i, end, t, removed);
}
UPSNET_TARGET_AVX2 void suppress_avx2(const Boxes& b, int64_t i, int64_t end, float t, uint8_t* removed) {
  suppress(b, i, end, t, removed);
}
#endif
void suppress_generic(const Boxes& b, int64_t i, int64_t end, float t, uint8_t* removed) {
  suppress(b, i, end, t, removed);
}
#ifndef __clang__
#pragma GCC pop_options
#endif

using Suppress = void (*)(const Boxes&, int64_t, int64_t, float, uint8_t*);

Suppress chosen_suppress() {
#if UPSNET_X86
  const Variant variant = chosen_variant();
  if (variant == Variant::avx512) return suppress_avx512;
  if (variant == Variant::avx2) return suppress_avx2;
#endif
  return suppress_generic;
}

// The largest float that is not above `threshold`: a float exceeds the one exactly if it exceeds the other.
float float_below(double threshold) {
  const float rounded = float(threshold);
  return double(rounded) > threshold ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}

// boxes[n, 4] float32 by descending preference; groups[n] int64, equal values adjacent, or none.
// Returns the positions of the kept boxes, ascending, int64.
Tensor nms_sorted(const Tensor& boxes, std::optional<Tensor> groups, double threshold) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == ScalarType::Float,
                  "nms_sorted: boxes must be float32 of shape (n, 4)");
  STD_TORCH_CHECK(!groups || (groups->dim() == 1 && groups->size(0) == boxes.size(0) &&
                              groups->scalar_type() == ScalarType::Long),
                  "nms_sorted: groups must be int64 of shape (n)");
  const int64_t n = boxes.size(0);
  const Tensor dense = torch::stable::contiguous(boxes);
  const float* source = dense.const_data_ptr<float>();
  std::vector<float> columns(5 * n);
  float *x1 = columns.data(), *y1 = x1 + n, *x2 = y1 + n, *y2 = x2 + n, *area = y2 + n;
  for (int64_t i = 0; i < n; ++i) {
    x1[i] = source[4 * i], y1[i] = source[4 * i + 1], x2[i] = source[4 * i + 2], y2[i] = source[4 * i + 3];
    area[i] = (x2[i] - x1[i]) * (y2[i] - y1[i]);
  }
  std::optional<Tensor> dense_groups;
  if (groups) dense_groups = torch::stable::contiguous(*groups);
  const int64_t* group = dense_groups ? dense_groups->const_data_ptr<int64_t>() : nullptr;

  const Boxes columns_of = {x1, y1, x2, y2, area};
  const Suppress row = chosen_suppress();
  const float limit = float_below(threshold);
  std::vector<uint8_t> removed(n, 0);
  int64_t end = group ? 0 : n;
  for (int64_t i = 0; i < n; ++i) {
    while (group && end < n && (end <= i || group[end] == group[i])) ++end;
    if (!removed[i]) row(columns_of, i, end, limit, removed.data());
  }
  const int64_t count = std::count(removed.begin(), removed.end(), uint8_t(0));
  Tensor kept = torch::stable::empty({count}, ScalarType::Long, std::nullopt, boxes.device());
  int64_t* position = kept.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    if (!removed[i]) *position++ = i;
  return kept;
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def("nms_sorted(Tensor boxes, Tensor? groups, float threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) { m.impl("nms_sorted", TORCH_BOX(&upsnet::nms_sorted)); }
