// upsnet::caffe_sgd_: a step of SGD in Caffe's form over all parameters, in one pass over the memory.
//
// For all tensors as if they lay one behind the other, cut evenly among the threads. Every sum of a product is fused,
// as torch's own kernels do it on these processors; so the numbers are those of the same step with torch._foreach_*.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "variants.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t grain = 1 << 15;  // elements that are worth a thread

struct Rule {
  float momentum, rate, decay;  // decay: rate · weight decay
  bool decays;                  // not the same as decay ≠ 0 for a weight that is infinite
};

// Where one parameter, its gradient and its buffer begin; as a whole, or at an element.
struct Place {
  float* parameter;
  const float* gradient;
  float* buffer;
};

template <bool fused>
UPSNET_INLINE float multiply_add(float a, float b, float c) {
  return fused ? __builtin_fmaf(a, b, c) : a * b + c;
}

template <bool fused>
UPSNET_INLINE void update(const Place& place, int64_t count, const Rule& rule) {
  float* __restrict__ w = place.parameter;
  float* __restrict__ v = place.buffer;
  const float* __restrict__ g = place.gradient;
  const Rule r = rule;
  if (!r.decays) {
    for (int64_t i = 0; i < count; ++i) {
      v[i] = multiply_add<fused>(g[i], r.rate, r.momentum * v[i]);
      w[i] -= v[i];
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    v[i] = multiply_add<fused>(w[i], r.decay, multiply_add<fused>(g[i], r.rate, r.momentum * v[i]));
    w[i] -= v[i];
  }
}

#if UPSNET_X86
UPSNET_TARGET_AVX512 void update_avx512(const Place& place, int64_t count, const Rule& rule) {
  update<true>(place, count, rule);
}
UPSNET_TARGET_AVX2 void update_avx2(const Place& place, int64_t count, const Rule& rule) {
  update<true>(place, count, rule);
}
#endif
void update_generic(const Place& place, int64_t count, const Rule& rule) {
  update<!UPSNET_X86>(place, count, rule);  // the oldest x86 processors cannot fuse
}

using Update = void (*)(const Place&, int64_t, const Rule&);

Update chosen_update() {
#if UPSNET_X86
  const Variant variant = chosen_variant();
  if (variant == Variant::avx512) return update_avx512;
  if (variant == Variant::avx2) return update_avx2;
#endif
  return update_generic;
}

// Whether memory holds a tensor without gaps, in whatever order of its dimensions.
bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_layout(const Tensor& one, const Tensor& other) {
  for (int64_t d = 0; d < one.dim(); ++d)
    if (one.size(d) != 1 && one.stride(d) != other.stride(d)) return false;
  return true;
}

// One element after the other, for tensors that are not laid out alike. Autograd lays gradients out as the parameters
// are; others come from buffers that were stored in another layout, and from tests.
void update_elements(Update step, Place place, const Tensor& w, const Tensor& g, const Tensor& v, const Rule& rule) {
  const int64_t dimensions = w.dim();
  std::vector<int64_t> index(dimensions, 0);
  for (int64_t left = w.numel(); left > 0; --left) {
    step(place, 1, rule);
    for (int64_t d = dimensions; d-- > 0;) {
      const int64_t moved = ++index[d] < w.size(d) ? 1 : 1 - w.size(d);
      place.parameter += moved * w.stride(d);
      place.gradient += moved * g.stride(d);
      place.buffer += moved * v.stride(d);
      if (moved == 1) break;
      index[d] = 0;
    }
  }
}

void check(const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
           const std::vector<Tensor>& buffers) {
  STD_TORCH_CHECK(parameters.size() == gradients.size() && parameters.size() == buffers.size(),
                  "caffe_sgd_: parameters, gradients and buffers must be equally many");
  for (size_t i = 0; i < parameters.size(); ++i) {
    for (const Tensor* tensor : {&parameters[i], &gradients[i], &buffers[i]}) {
      bool same = tensor->dim() == parameters[i].dim() && tensor->scalar_type() == ScalarType::Float;
      for (int64_t d = 0; same && d < tensor->dim(); ++d) same = tensor->size(d) == parameters[i].size(d);
      STD_TORCH_CHECK(same, "caffe_sgd_: a parameter, its gradient and its buffer must be float32 of one shape");
    }
  }
}

// v ← momentum · v + rate · (gradient + weight decay · w); w ← w - v. float32; parameters and buffers change.
void caffe_sgd_(std::vector<Tensor> parameters, std::vector<Tensor> gradients, std::vector<Tensor> buffers, double rate,
                double momentum, double weight_decay) {
  check(parameters, gradients, buffers);
  const Rule rule = {float(momentum), float(rate), float(rate * weight_decay), weight_decay != 0};
  const Update step = chosen_update();
  std::vector<Place> places;
  std::vector<int64_t> ends;  // of each place in the row of all of them
  int64_t total = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor &w = parameters[i], &g = gradients[i], &v = buffers[i];
    const Place place = {w.mutable_data_ptr<float>(), g.const_data_ptr<float>(), v.mutable_data_ptr<float>()};
    if (w.numel() == 0) continue;
    if (is_dense(w) && same_layout(w, g) && same_layout(w, v)) {
      places.push_back(place);
      ends.push_back(total += w.numel());
    } else {
      update_elements(step, place, w, g, v, rule);
    }
  }
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1], count = std::min(end, ends[i]) - begin, offset = begin - start;
      step({places[i].parameter + offset, places[i].gradient + offset, places[i].buffer + offset}, count, rule);
      begin += count;
    }
  });
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def(
      "caffe_sgd_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] buffers, float rate, float momentum, "
      "float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) { m.impl("caffe_sgd_", TORCH_BOX(&upsnet::caffe_sgd_)); }
