// What every launch needs: the tensor's device made current, its stream, a grid, and errors that are not lost.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace upsnet {

constexpr int threads_per_block = 256;

inline unsigned int blocks_for(int64_t items) {
  return static_cast<unsigned int>((items + threads_per_block - 1) / threads_per_block);
}

// Makes the device of a tensor current while it lives.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// To be called after each launch: a wrong grid shows here.
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel: ", cudaGetErrorString(error));
}

}  // namespace upsnet
