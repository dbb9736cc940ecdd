// upsnet::pyramid_roi_align and its backward on CUDA: one launch for all levels and all boxes, in any memory format.
//
// A thread works out where one bin samples and serves four channels with it. Threads beside each other take neighbouring
// channels where the output is channels last, else neighbouring bins. The gradients are added by atomics, in float32 for
// half precision; so their last bits change from run to run.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "shared/images.h"
#include "shared/pyramid_roi_align.h"
#include "launch.h"

namespace upsnet {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int max_levels = 8;
constexpr int channels_per_thread = 4;

// A tensor of four dimensions in any memory format.
template <class T>
struct Images {
  T* data;
  int64_t height, width;
  int64_t strides[4];
};

// What a kernel gets. V: values of the levels; A: sums, and the boxes' coordinates.
template <class V, class A>
struct Pyramid {
  Images<V> maps[max_levels];
  A scales[max_levels];
  const A* rois;
  const int64_t* levels;
  int64_t boxes, images, channels, bins;
  int num_levels;
  bool aligned, channels_first;

  __host__ __device__ int64_t parts() const { return (channels + channels_per_thread - 1) / channels_per_thread; }
  __host__ __device__ int64_t items() const { return boxes * bins * bins * parts(); }
};

// The work of a thread: a bin of a box, and the channels part, part + parts, …
struct Item {
  int64_t roi, row, column, part;
};

template <class V, class A>
__device__ Item item_of(const Pyramid<V, A>& p, int64_t index) {
  const int64_t bins = p.bins * p.bins, parts = p.parts();
  const int64_t within = index % (bins * parts);
  const int64_t bin = p.channels_first ? within % bins : within / parts;
  const int64_t part = p.channels_first ? within / bins : within % parts;
  return {index / (bins * parts), bin / p.bins, bin % p.bins, part};
}

// The pixels of one bin in the map of its level; a box of no level or of no image reads nothing.
template <class V, class A>
struct BinTaps {
  V* image = nullptr;
  int64_t channel_stride = 0;
  AxisTaps<A> rows, columns;  // the indices times the strides

  __device__ BinTaps(const Pyramid<V, A>& p, const Item& item) {
    const A* roi = p.rois + 5 * item.roi;
    const int64_t level = p.levels[item.roi];
    if (!(level >= 0 && level < p.num_levels && roi[0] >= A(0) && roi[0] < A(p.images))) return;
    const Images<V> map = p.maps[level];
    const A scale = p.scales[level];
    image = map.data + int64_t(roi[0]) * map.strides[0];
    channel_stride = map.strides[1];
    rows = taps_of_bin(roi_axis(roi[2], roi[4], scale, p.bins, p.aligned), item.row, map.height);
    columns = taps_of_bin(roi_axis(roi[1], roi[3], scale, p.bins, p.aligned), item.column, map.width);
    for (int i = 0; i < taps_per_axis; ++i) rows.index[i] *= map.strides[2], columns.index[i] *= map.strides[3];
  }

  __device__ V* at(int64_t channel, int i, int j) const {
    return image + channel * channel_stride + rows.index[i] + columns.index[j];
  }
  __device__ A weight(int i, int j) const { return rows.weight[i] * columns.weight[j]; }
};

template <class T, class A>
__global__ void pool(const __grid_constant__ Pyramid<const T, A> p, const __grid_constant__ Images<T> output) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.items()) return;
  const Item item = item_of(p, index);
  const BinTaps<const T, A> taps(p, item);
  for (int64_t c = item.part; c < p.channels; c += p.parts()) {
    A sum = A(0);
    if (taps.image != nullptr)
      for (int i = 0; i < taps_per_axis; ++i)
        for (int j = 0; j < taps_per_axis; ++j)
          if (taps.weight(i, j) != A(0)) sum += taps.weight(i, j) * A(*taps.at(c, i, j));
    const int64_t* strides = output.strides;
    output.data[item.roi * strides[0] + c * strides[1] + item.row * strides[2] + item.column * strides[3]] = T(sum);
  }
}

template <class T, class A>
__global__ void scatter(const __grid_constant__ Pyramid<A, A> p, const __grid_constant__ Images<const T> grad) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.items()) return;
  const Item item = item_of(p, index);
  const BinTaps<A, A> taps(p, item);
  if (taps.image == nullptr) return;
  for (int64_t c = item.part; c < p.channels; c += p.parts()) {
    const int64_t* strides = grad.strides;
    const A given =
        A(grad.data[item.roi * strides[0] + c * strides[1] + item.row * strides[2] + item.column * strides[3]]);
    for (int i = 0; i < taps_per_axis; ++i)
      for (int j = 0; j < taps_per_axis; ++j)
        if (taps.weight(i, j) != A(0)) atomicAdd(taps.at(c, i, j), taps.weight(i, j) * given);
  }
}

template <class T>
Images<T> images_of(const Tensor& tensor, T* data) {
  return {data, tensor.size(2), tensor.size(3),
          {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

// All but the maps.
template <class V, class A>
Pyramid<V, A> pyramid(const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
                      const std::vector<double>& scales, int64_t bins, bool aligned, bool channels_first) {
  STD_TORCH_CHECK(features.size() <= max_levels, "pyramid_roi_align: at most ", max_levels, " levels on CUDA");
  Pyramid<V, A> p{};
  p.rois = rois.const_data_ptr<A>();
  p.levels = levels.const_data_ptr<int64_t>();
  p.boxes = rois.size(0), p.images = features[0].size(0), p.channels = features[0].size(1), p.bins = bins;
  p.num_levels = int(features.size());
  p.aligned = aligned, p.channels_first = channels_first;
  for (int i = 0; i < p.num_levels; ++i) p.scales[i] = A(scales[i]);
  return p;
}

template <class T>
Tensor forward(const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
               const std::vector<double>& scales, int64_t bins, bool aligned) {
  using A = RoiSum<T>;
  const OnDevice device(rois);
  const bool channels_last = is_channels_last(features[0]);
  auto p = pyramid<const T, A>(features, rois, levels, scales, bins, aligned, !channels_last);
  for (int i = 0; i < p.num_levels; ++i) p.maps[i] = images_of(features[i], features[i].const_data_ptr<T>());
  Tensor output = empty_images(rois, {p.boxes, p.channels, bins, bins}, features[0].scalar_type(), channels_last);
  if (p.items() == 0) return output;
  pool<T, A><<<blocks_for(p.items()), threads_per_block, 0, device.stream()>>>(
      p, images_of(output, output.mutable_data_ptr<T>()));
  check_launch();
  return output;
}

template <class T>
std::vector<Tensor> backward(const Tensor& grad, const std::vector<Tensor>& features, const Tensor& rois,
                             const Tensor& levels, const std::vector<double>& scales, bool aligned) {
  using A = RoiSum<T>;
  const OnDevice device(rois);
  const ScalarType type = features[0].scalar_type(), sum_type = type == ScalarType::Double ? type : ScalarType::Float;
  const bool channels_first = grad.stride(1) != 1;
  auto p = pyramid<A, A>(features, rois, levels, scales, grad.size(2), aligned, channels_first);
  std::vector<Tensor> sums;
  for (int i = 0; i < p.num_levels; ++i) {
    const Tensor& f = features[i];
    sums.push_back(empty_images(f, {f.size(0), f.size(1), f.size(2), f.size(3)}, sum_type, is_channels_last(f)));
    torch::stable::zero_(sums[i]);
    p.maps[i] = images_of(sums[i], sums[i].mutable_data_ptr<A>());
  }
  if (p.items() > 0) {
    scatter<T, A><<<blocks_for(p.items()), threads_per_block, 0, device.stream()>>>(
        p, images_of(grad, grad.const_data_ptr<T>()));
    check_launch();
  }
  if (type != sum_type)
    for (Tensor& sum : sums) sum = torch::stable::to(sum, type);
  return sums;
}

// Calls with a value of the C++ type that a dtype stands for.
template <class Call>
auto by_type(ScalarType type, const Call& call) {
  if (type == ScalarType::Double) return call(double());
  if (type == ScalarType::BFloat16) return call(BFloat16());
  if (type == ScalarType::Half) return call(Half());
  STD_TORCH_CHECK(type == ScalarType::Float, "pyramid_roi_align: floating point features only");
  return call(float());
}

Tensor pyramid_roi_align(std::vector<Tensor> features, const Tensor& rois, const Tensor& levels,
                         std::vector<double> scales, int64_t bins, bool aligned) {
  check_pyramid(features, rois, levels, scales, bins);
  const Tensor boxes = torch::stable::contiguous(rois), chosen = torch::stable::contiguous(levels);
  return by_type(features[0].scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(features, boxes, chosen, scales, bins, aligned);
  });
}

std::vector<Tensor> pyramid_roi_align_backward(const Tensor& grad, std::vector<Tensor> features, const Tensor& rois,
                                               const Tensor& levels, std::vector<double> scales, bool aligned) {
  check_pyramid(features, rois, levels, scales, 1);
  check_gradient(grad, features[0], rois);
  const Tensor boxes = torch::stable::contiguous(rois), chosen = torch::stable::contiguous(levels);
  return by_type(features[0].scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(grad, features, boxes, chosen, scales, aligned);
  });
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_IMPL(upsnet, CUDA, m) {
  m.impl("pyramid_roi_align", TORCH_BOX(&upsnet::pyramid_roi_align));
  m.impl("pyramid_roi_align_backward", TORCH_BOX(&upsnet::pyramid_roi_align_backward));
}
