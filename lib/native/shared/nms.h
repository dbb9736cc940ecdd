// Non-maximum suppression: the one decision that the CPU's and CUDA's sweeps ask for.
#pragma once

#include "both.h"

namespace upsnet {

// x2, y2 exclusive: the width is x2 - x1.
struct NmsBox {
  float x1, y1, x2, y2, area;
};

// A product that is rounded before it is added to anything: a contracted multiply-add would decide otherwise at the
// threshold. On the CPU the including file switches contraction off.
UPSNET_BOTH float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// corners: x1, y1, x2, y2. inclusive: the last pixel belongs to the box.
UPSNET_BOTH NmsBox nms_box(const float* corners, bool inclusive) {
  const float last = inclusive ? 1.0f : 0.0f;
  const float x1 = corners[0], y1 = corners[1], x2 = corners[2] + last, y2 = corners[3] + last;
  return {x1, y1, x2, y2, rounded_product(x2 - x1, y2 - y1)};
}

// Whether intersection / union is above the threshold: torchvision's formula, float32, false wherever it gives NaN.
UPSNET_BOTH bool overlap_exceeds(const NmsBox& a, const NmsBox& b, float threshold) {
  const float left = a.x1 < b.x1 ? b.x1 : a.x1, top = a.y1 < b.y1 ? b.y1 : a.y1;
  const float right = b.x2 < a.x2 ? b.x2 : a.x2, bottom = b.y2 < a.y2 ? b.y2 : a.y2;
  const float width = right - left > 0 ? right - left : 0, height = bottom - top > 0 ? bottom - top : 0;
  const float intersection = rounded_product(width, height);
  return intersection / (a.area + b.area - intersection) > threshold;
}

}  // namespace upsnet
