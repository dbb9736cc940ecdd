// Non-maximum suppression: what both devices ask of the arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace upsnet {

inline void check_nms_arguments(const torch::stable::Tensor& boxes, const std::optional<torch::stable::Tensor>& groups,
                                const std::optional<torch::stable::Tensor>& valid) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == ScalarType::Float,
                  "nms_flags: boxes must be float32 of shape (n, 4)");
  const auto fits = [&](const torch::stable::Tensor& other, ScalarType type) {
    return other.dim() == 1 && other.size(0) == boxes.size(0) && other.scalar_type() == type &&
        other.device() == boxes.device();
  };
  STD_TORCH_CHECK(!groups || fits(*groups, ScalarType::Long),
                  "nms_flags: groups must be int64 of shape (n), on the device of boxes");
  STD_TORCH_CHECK(!valid || fits(*valid, ScalarType::Bool),
                  "nms_flags: valid must be bool of shape (n), on the device of boxes");
}

// The largest float that is not above `threshold`: a float exceeds the one exactly if it exceeds the other.
inline float float_below(double threshold) {
  const float rounded = float(threshold);
  return double(rounded) > threshold ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}

}  // namespace upsnet
