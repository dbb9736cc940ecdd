// upsnet::pyramid_roi_align and its backward on the CPU: all levels and all boxes in one call.
//
// Where a box samples is worked out once per bin and axis, not per channel; pixels that samples of a bin share are read
// once. The sums run over channels as vectors, so features are wanted channels last. Forward: boxes in parallel.
// Backward: blocks of channels in parallel, boxes in one order; so no two threads meet, and the result is bitwise the
// same for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "shared/images.h"
#include "roi_align_kernels.h"
#include "variants.h"

namespace upsnet {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

UPSNET_NO_CONTRACTION

template <class T>
struct Entry {
  void (*pool)(const T*, const BoxBins<RoiSum<T>>&, int64_t, T*);
  void (*scatter)(RoiSum<T>*, const BoxBins<RoiSum<T>>&, int64_t, int64_t, int64_t, const T*);
};

#define UPSNET_VARIANT(NAME, TARGET, BYTES)                                                                          \
  template <class T>                                                                                                 \
  TARGET void pool_##NAME(const T* map, const BoxBins<RoiSum<T>>& box, int64_t channels, T* out) {                   \
    RoiKernel<T, BYTES>::pool(map, box, channels, out);                                                              \
  }                                                                                                                  \
  template <class T>                                                                                                 \
  TARGET void scatter_##NAME(RoiSum<T>* map, const BoxBins<RoiSum<T>>& box, int64_t channels, int64_t begin,         \
                             int64_t end, const T* grad) {                                                           \
    RoiKernel<T, BYTES>::scatter(map, box, channels, begin, end, grad);                                              \
  }

#if UPSNET_X86
UPSNET_VARIANT(avx512, UPSNET_TARGET_AVX512, 64)
UPSNET_VARIANT(avx2, UPSNET_TARGET_AVX2, 32)
#endif
UPSNET_VARIANT(generic, , 16)

UPSNET_CONTRACTION_AGAIN

template <class T>
Entry<T> entry() {
#if UPSNET_X86
  const Variant variant = chosen_variant();
  if (variant == Variant::avx512) return {pool_avx512<T>, scatter_avx512<T>};
  if (variant == Variant::avx2) return {pool_avx2<T>, scatter_avx2<T>};
#endif
  return {pool_generic<T>, scatter_generic<T>};
}

// A box with its place in the list and its place in the pyramid. What has no level (Python gives boxes at no number
// none) comes last, and is 0.
struct Box {
  int64_t level, image;
  double top;
  int64_t roi;

  bool operator<(const Box& other) const {
    return std::tie(level, image, top) < std::tie(other.level, other.image, other.top);
  }
};

// The boxes by level, image and height, so that those that read the same rows follow each other: a third of the time.
template <class A>
std::vector<Box> ordered_boxes(const Tensor& rois, const Tensor& levels, int64_t num_levels, int64_t images) {
  const A* roi = rois.const_data_ptr<A>();
  const int64_t* level = levels.const_data_ptr<int64_t>();
  std::vector<Box> boxes;
  boxes.reserve(rois.size(0));
  for (int64_t i = 0; i < rois.size(0); ++i, roi += 5) {
    STD_TORCH_CHECK(roi[0] >= 0 && roi[0] < A(images), "pyramid_roi_align: rois name an image that is not among ",
                    images);
    const bool has_level = level[i] >= 0 && level[i] < num_levels;
    const double top = roi[2] == roi[2] ? double(roi[2]) : 0;  // NaN has no place in an order
    boxes.push_back({has_level ? level[i] : num_levels, int64_t(roi[0]), top, i});
  }
  std::stable_sort(boxes.begin(), boxes.end());
  return boxes;
}

template <class A>
void fill_axis(const RoiAxis<A>& axis, int64_t size, int64_t step, Bin<A>* bins, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const AxisTaps<A> taps = taps_of_bin(axis, i, size);
    Bin<A>& bin = bins[i];
    bin.count = 0;
    for (int tap = 0; tap < taps_per_axis; ++tap) {
      if (taps.weight[tap] == A(0)) continue;
      const int64_t offset = taps.index[tap] * step;
      int place = 0;
      while (place < bin.count && bin.offset[place] != offset) ++place;
      if (place == bin.count) {
        bin.offset[place] = offset;
        bin.weight[place] = A(0);
        ++bin.count;
      }
      bin.weight[place] += taps.weight[tap];
    }
  }
}

// A level: [images][height][width][channels].
template <class V, class A>
struct Map {
  V* data;
  int64_t height, width;
  A scale;
};

// Everything that a thread needs to walk through boxes. V: values of the maps; A: sums, and the boxes' coordinates.
template <class V, class A>
struct Pyramid {
  std::vector<Map<V, A>> maps;
  const A* rois;
  std::vector<Box> boxes;
  int64_t channels, bins;
  bool aligned;

  int64_t box_size() const { return bins * bins * channels; }
  bool has_level(const Box& box) const { return box.level < int64_t(maps.size()); }
  V* image_of(const Box& box) const {
    const Map<V, A>& map = maps[box.level];
    return map.data + box.image * map.height * map.width * channels;
  }
  // Where a box samples; `room` holds 2 * bins.
  BoxBins<A> locate(const Box& box, std::vector<Bin<A>>& room) const {
    const Map<V, A>& map = maps[box.level];
    const A* roi = rois + 5 * box.roi;
    fill_axis(roi_axis(roi[2], roi[4], map.scale, bins, aligned), map.height, map.width * channels, room.data(), bins);
    fill_axis(roi_axis(roi[1], roi[3], map.scale, bins, aligned), map.width, channels, room.data() + bins, bins);
    return {room.data(), room.data() + bins, bins};
  }
};

// [bins][channels] -> [channels][bins]; a few channels at a time, whose lines stay in cache.
template <class T>
void transpose(const T* from, int64_t bins, int64_t channels, T* to) {
  constexpr int64_t block = 16;
  for (int64_t first = 0; first < channels; first += block)
    for (int64_t bin = 0; bin < bins; ++bin)
      for (int64_t c = first; c < std::min(first + block, channels); ++c) to[c * bins + bin] = from[bin * channels + c];
}

template <class T>
Tensor forward(const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
               const std::vector<double>& scales, int64_t bins, bool aligned) {
  using A = RoiSum<T>;
  const int64_t num_levels = features.size(), images = features[0].size(0), channels = features[0].size(1);
  Pyramid<const T, A> p{{}, rois.const_data_ptr<A>(), ordered_boxes<A>(rois, levels, num_levels, images),
                        channels, bins, aligned};
  std::vector<Tensor> maps;
  for (int64_t i = 0; i < num_levels; ++i) {
    maps.push_back(torch::stable::contiguous(features[i], MemoryFormat::ChannelsLast));
    p.maps.push_back({maps[i].const_data_ptr<T>(), maps[i].size(2), maps[i].size(3), A(scales[i])});
  }
  const bool channels_last = is_channels_last(features[0]);
  Tensor output = empty_images(rois, {rois.size(0), channels, bins, bins}, features[0].scalar_type(), channels_last);
  T* result = output.mutable_data_ptr<T>();
  const Entry<T> use = entry<T>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.box_size()));  // worth waking a thread for
  torch::stable::parallel_for(0, p.boxes.size(), grain, [&](int64_t begin, int64_t end) {
    std::vector<Bin<A>> room(2 * bins);
    std::vector<T> pooled(channels_last ? 0 : p.box_size());
    for (int64_t i = begin; i < end; ++i) {
      const Box& box = p.boxes[i];
      T* out = result + box.roi * p.box_size();
      if (!p.has_level(box)) {
        std::fill_n(out, p.box_size(), T(0));
        continue;
      }
      use.pool(p.image_of(box), p.locate(box, room), channels, channels_last ? out : pooled.data());
      if (!channels_last) transpose(pooled.data(), bins * bins, channels, out);
    }
  });
  return output;
}

template <class T>
std::vector<Tensor> backward(const Tensor& grad, const std::vector<Tensor>& features, const Tensor& rois,
                             const Tensor& levels, const std::vector<double>& scales, bool aligned) {
  using A = RoiSum<T>;
  const int64_t num_levels = features.size(), images = features[0].size(0), channels = features[0].size(1);
  Pyramid<A, A> p{{}, rois.const_data_ptr<A>(), ordered_boxes<A>(rois, levels, num_levels, images),
                  channels, grad.size(2), aligned};
  const ScalarType type = features[0].scalar_type(), sum_type = type == ScalarType::Double ? type : ScalarType::Float;
  std::vector<Tensor> sums;
  for (int64_t i = 0; i < num_levels; ++i) {
    const int64_t height = features[i].size(2), width = features[i].size(3);
    sums.push_back(empty_images(features[i], {images, channels, height, width}, sum_type, true));
    torch::stable::zero_(sums[i]);
    p.maps.push_back({sums[i].mutable_data_ptr<A>(), height, width, A(scales[i])});
  }
  const Tensor upstream = torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  const T* given = upstream.const_data_ptr<T>();
  const Entry<T> use = entry<T>();
  constexpr int64_t line = 16;  // channels: so two threads share no line of the cache
  torch::stable::parallel_for(0, (channels + line - 1) / line, 1, [&](int64_t begin, int64_t end) {
    std::vector<Bin<A>> room(2 * p.bins);
    for (const Box& box : p.boxes)
      if (p.has_level(box))
        use.scatter(p.image_of(box), p.locate(box, room), channels, begin * line, std::min(end * line, channels),
                    given + box.roi * p.box_size());
  });
  for (int64_t i = 0; i < num_levels; ++i) {
    if (!is_channels_last(features[i])) sums[i] = torch::stable::contiguous(sums[i]);
    if (type != sum_type) sums[i] = torch::stable::to(sums[i], type);
  }
  return sums;
}

// Calls with a value of the C++ type that a dtype stands for.
template <class Call>
auto by_type(ScalarType type, const Call& call) {
  if (type == ScalarType::Double) return call(double());
  if (type == ScalarType::BFloat16) return call(BFloat16());
  STD_TORCH_CHECK(type == ScalarType::Float, "pyramid_roi_align: float32, float64 or bfloat16 only");
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

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def(
      "pyramid_roi_align(Tensor[] features, Tensor rois, Tensor levels, float[] scales, int bins, bool aligned) "
      "-> Tensor");
  m.def(
      "pyramid_roi_align_backward(Tensor grad, Tensor[] features, Tensor rois, Tensor levels, float[] scales, "
      "bool aligned) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) {
  m.impl("pyramid_roi_align", TORCH_BOX(&upsnet::pyramid_roi_align));
  m.impl("pyramid_roi_align_backward", TORCH_BOX(&upsnet::pyramid_roi_align_backward));
}
