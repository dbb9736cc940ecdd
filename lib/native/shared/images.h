// The memory formats of image batches: contiguous (NCHW) and channels last (NHWC).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace upsnet {

// Channels last, and not contiguous as well (which one channel or one pixel makes it).
inline bool is_channels_last(const torch::stable::Tensor& tensor) {
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  if (tensor.is_contiguous()) return false;
  for (int d = 0; d < 4; ++d)
    if (tensor.size(d) != 1 && tensor.stride(d) != strides[d]) return false;
  return true;
}

inline torch::stable::Tensor empty_images(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                          torch::headeronly::ScalarType type, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(shape, type, std::nullopt, like.device(), std::nullopt, format);
}

}  // namespace upsnet
