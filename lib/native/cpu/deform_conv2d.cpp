// upsnet::deform_conv2d and its backward on the CPU: checks, packing, partition of the work, choice of the variant.
//
// Forward: tiles of output pixels in parallel; a tile samples tap by tap and multiplies at once (deform_kernels.h).
// Backward: the output rows are cut into parts whose number depends on the shape alone, each part sums its gradients
// privately, and the parts are added in a fixed order. So the result is bitwise the same for any number of threads. A
// part's private input gradient covers only the rows that its offsets reach.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "deform_kernels.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

template <class T>
struct Entry {
  int64_t panel, rows;
  int64_t (*forward_scratch)(const Deform<T>&, int64_t);
  int64_t (*backward_scratch)(const Deform<T>&, int64_t);
  int64_t (*weight_rows)(const Deform<T>&);
  int64_t (*weight_row)(const Deform<T>&);
  void (*forward)(const ForwardTask<T>&, T*, int64_t, int64_t);
  void (*backward)(const BackwardTask<T>&, const PartSums<T>&, T*, int64_t, int64_t);
};

#define UPSNET_VARIANT(NAME, TARGET, T, BYTES, ROWS, VECTORS)                                                        \
  TARGET void forward_##NAME(const ForwardTask<T>& task, T* scratch, int64_t begin, int64_t end) {                   \
    Kernel<T, BYTES, ROWS, VECTORS>::forward(task, scratch, begin, end);                                             \
  }                                                                                                                  \
  TARGET void backward_##NAME(const BackwardTask<T>& task, const PartSums<T>& sums, T* scratch, int64_t begin,       \
                              int64_t end) {                                                                         \
    Kernel<T, BYTES, ROWS, VECTORS>::backward(task, sums, scratch, begin, end);                                      \
  }                                                                                                                  \
  const Entry<T> entry_##NAME = {                                                                                    \
      Kernel<T, BYTES, ROWS, VECTORS>::panel,           ROWS,                                                        \
      Kernel<T, BYTES, ROWS, VECTORS>::forward_scratch, Kernel<T, BYTES, ROWS, VECTORS>::backward_scratch,           \
      Kernel<T, BYTES, ROWS, VECTORS>::weight_rows,     Kernel<T, BYTES, ROWS, VECTORS>::weight_row,                 \
      forward_##NAME,                                   backward_##NAME};

#if UPSNET_X86
UPSNET_VARIANT(avx512, UPSNET_TARGET_AVX512, float, 64, 12, 2)
UPSNET_VARIANT(avx2, UPSNET_TARGET_AVX2, float, 32, 6, 2)
#endif
UPSNET_VARIANT(generic, , float, 16, 6, 2)
UPSNET_VARIANT(precise, , double, 16, 4, 2)  // for gradcheck: plain is enough

template <class T>
const Entry<T>& entry();

template <>
const Entry<double>& entry<double>() {
  return entry_precise;
}

template <>
const Entry<float>& entry<float>() {
#if UPSNET_X86
  const Variant variant = chosen_variant();
  if (variant == Variant::avx512) return entry_avx512;
  if (variant == Variant::avx2) return entry_avx2;
#endif
  return entry_generic;
}

// Zeros, aligned to a cache line. calloc leaves untouched pages unmapped.
template <class T>
class Zeros {
 public:
  explicit Zeros(int64_t count) : data_(std::calloc(size_t(count) * sizeof(T) + 64, 1)) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Zeros(Zeros&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  Zeros& operator=(Zeros&&) = delete;
  ~Zeros() { std::free(data_); }
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_) + 63) / 64 * 64); }

 private:
  void* data_;
};

void copy_strides(const Tensor& tensor, int64_t (&strides)[4]) {
  for (int i = 0; i < 4; ++i) strides[i] = tensor.stride(i);
}

// `input` must be dense and channels last. The last line of defence: Python checks first, with better sentences.
template <class T>
Deform<T> geometry(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                   const Ints& stride, const Ints& padding, const Ints& dilation) {
  Deform<T> d{};
  d.images = input.size(0), d.channels = input.size(1), d.height = input.size(2), d.width = input.size(3);
  d.outputs = weight.size(0), d.kernel_h = weight.size(2), d.kernel_w = weight.size(3);
  d.stride_h = stride.at(0), d.stride_w = stride.at(1), d.pad_h = padding.at(0), d.pad_w = padding.at(1);
  d.dilation_h = dilation.at(0), d.dilation_w = dilation.at(1);
  STD_TORCH_CHECK(d.stride_h > 0 && d.stride_w > 0 && d.taps() > 0, "deform_conv2d: stride and kernel must be positive");
  d.out_height = (d.height + 2 * d.pad_h - d.dilation_h * (d.kernel_h - 1) - 1) / d.stride_h + 1;
  d.out_width = (d.width + 2 * d.pad_w - d.dilation_w * (d.kernel_w - 1) - 1) / d.stride_w + 1;
  d.offset_groups = offset.size(1) / (2 * d.taps());
  STD_TORCH_CHECK(weight.size(1) == d.channels, "deform_conv2d: weight and input differ in channels");
  STD_TORCH_CHECK(d.offset_groups > 0 && offset.size(1) == 2 * d.taps() * d.offset_groups &&
                      d.channels % d.offset_groups == 0 && offset.size(0) == d.images &&
                      offset.size(2) == d.out_height && offset.size(3) == d.out_width,
                  "deform_conv2d: offset has the wrong shape");
  for (const Tensor* other : {&offset, &weight})
    STD_TORCH_CHECK(other->scalar_type() == input.scalar_type(), "deform_conv2d: tensors differ in dtype");
  d.input = input.const_data_ptr<T>();
  d.offset = offset.const_data_ptr<T>();
  copy_strides(offset, d.offset_strides);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == input.scalar_type() && mask->size(0) == d.images &&
                        mask->size(1) == d.taps() * d.offset_groups && mask->size(2) == d.out_height &&
                        mask->size(3) == d.out_width,
                    "deform_conv2d: mask has the wrong shape or dtype");
    d.mask = mask->const_data_ptr<T>();
    copy_strides(*mask, d.mask_strides);
  }
  return d;
}

Tensor channels_last(const Tensor& tensor) {
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor empty_images(const Tensor& like, const Ints& shape, bool channels_last) {
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

template <class T>
Plane<T> plane(T* data, int64_t channels, int64_t pixels, bool channels_last) {
  return {data, channels * pixels, channels_last ? channels : 1, channels_last ? 1 : pixels, pixels};
}

// Memory format of a dense 4-d tensor; anything else is copied to NCHW first.
Tensor dense(const Tensor& tensor, bool& is_channels_last) {
  const int64_t c = tensor.size(1), h = tensor.size(2), w = tensor.size(3);
  is_channels_last = !tensor.is_contiguous() && tensor.stride(1) == 1 && tensor.stride(3) == c &&
      tensor.stride(2) == w * c && tensor.stride(0) == h * w * c;
  return is_channels_last ? tensor : torch::stable::contiguous(tensor);
}

// Items per thread worth waking one for, if each item moves `size` values.
int64_t grain(int64_t size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size)); }

// weight[O, C, taps] -> [tap][panel][depth][lane]; the lanes are outputs (forward) or channels (backward).
template <class T>
Zeros<T> pack_weight(const Tensor& weight, int64_t panel, bool lanes_are_outputs) {
  const int64_t outputs = weight.size(0), channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t wide = lanes_are_outputs ? outputs : channels, depth = lanes_are_outputs ? channels : outputs;
  const int64_t panels = round_up(wide, panel) / panel;
  Zeros<T> packed(taps * panels * panel * depth);
  const T* source = weight.const_data_ptr<T>();
  torch::stable::parallel_for(0, panels, grain(panel * depth * taps), [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin * panel; lane < std::min(end * panel, wide); ++lane)
      for (int64_t p = 0; p < depth; ++p) {
        const T* from = source + (lanes_are_outputs ? lane * channels + p : p * channels + lane) * taps;
        T* to = packed.get() + (lane / panel * depth + p) * panel + lane % panel;
        for (int64_t tap = 0; tap < taps; ++tap) to[tap * panels * panel * depth] = from[tap];
      }
  });
  return packed;
}

// Small maps get smaller tiles so that every thread has several; no pixel's sum depends on the tile that it lies in.
int64_t tile_size(int64_t pixels, int64_t rows) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  return std::clamp(round_up(std::max<int64_t>(1, pixels / (4 * threads)), rows), 2 * rows, max_tile);
}

template <class T>
Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, const Ints& stride, const Ints& padding, const Ints& dilation) {
  bool is_channels_last = false;
  const Tensor given = dense(input, is_channels_last), source = channels_last(given);
  const Tensor kernel = torch::stable::contiguous(weight);
  const Entry<T>& use = entry<T>();
  ForwardTask<T> task{};
  task.d = geometry<T>(source, offset, kernel, mask, stride, padding, dilation);
  const Deform<T>& d = task.d;
  Tensor output = empty_images(input, {d.images, d.outputs, d.out_height, d.out_width}, is_channels_last);
  if (d.pixels() == 0 || d.outputs == 0) return output;

  const Zeros<T> packed = pack_weight<T>(kernel, use.panel, true);
  const Zeros<T> padded_bias(round_up(d.outputs, use.panel));
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == d.outputs && bias->scalar_type() == input.scalar_type(),
                    "deform_conv2d: bias has the wrong shape or dtype");
    const Tensor values = torch::stable::contiguous(*bias);
    std::copy_n(values.const_data_ptr<T>(), d.outputs, padded_bias.get());
  }
  task.bias = padded_bias.get();
  task.weight = packed.get();
  task.output = plane(output.mutable_data_ptr<T>(), d.outputs, d.out_height * d.out_width, is_channels_last);
  task.tile = tile_size(d.pixels(), use.rows);
  torch::stable::parallel_for(0, (d.pixels() + task.tile - 1) / task.tile, 1, [&](int64_t begin, int64_t end) {
    const Zeros<T> scratch(use.forward_scratch(d, task.tile));
    use.forward(task, scratch.get(), begin, end);
  });
  return output;
}

// Rows [first, last) of the flattened (image, row) axis of the input that output pixels [begin, end) reach.
template <class T>
std::pair<int64_t, int64_t> reached_rows(const Deform<T>& d, int64_t begin, int64_t end) {
  int64_t first = d.images * d.height, last = 0;
  Place place = Place::of(d, begin);
  for (int64_t p = begin; p < end; ++p, place.next(d)) {
    for (int64_t i = 0; i < d.offset_groups * d.taps(); ++i) {
      const T y = T(place.row * d.stride_h + Tap::of(d, i % d.taps(), 0).y) + d.offset[place.at(d.offset_strides, 2 * i)];
      if (!(y >= T(-1) && y < T(d.height))) continue;
      const int64_t top = int64_t(y + 1) - 1;  // floor, as y + 1 >= 0
      first = std::min(first, place.image * d.height + std::max<int64_t>(top, 0));
      last = std::max(last, place.image * d.height + std::min(top + 2, d.height));
    }
  }
  return {std::min(first, last), last};
}

template <class T>
struct Part {
  int64_t begin, end;              // output pixels
  int64_t first_row, last_row;     // input rows of its private sum
  Zeros<T> input, weight, bias;
};

// A power of two between 2 and 16, one part per 2048 pixels, whole output rows each: a function of the shape alone.
template <class T>
int64_t part_count(const Deform<T>& d) {
  const auto wanted = std::bit_ceil(uint64_t(std::clamp<int64_t>(d.pixels() / 2048, 2, 16)));
  return std::min(int64_t(wanted), d.images * d.out_height);
}

template <class T>
Part<T> make_part(const BackwardTask<T>& task, const Entry<T>& use, int64_t begin, int64_t end) {
  const Deform<T>& d = task.d;
  const auto [first, last] = reached_rows(d, begin, end);
  return {begin, end, first, last, Zeros<T>((last - first) * d.width * d.channels),
          Zeros<T>(d.taps() * use.weight_rows(d) * use.weight_row(d)), Zeros<T>(d.outputs)};
}

template <class T>
void add_inputs(const Deform<T>& d, const std::vector<std::optional<Part<T>>>& parts, const Plane<T>& grad_input) {
  const int64_t row_size = d.width * d.channels;
  torch::stable::parallel_for(0, d.images * d.height, grain(row_size), [&](int64_t begin, int64_t end) {
    const Zeros<T> sum(row_size);
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(sum.get(), row_size, T(0));
      for (const auto& part : parts) {
        if (row < part->first_row || row >= part->last_row) continue;
        const T* from = part->input.get() + (row - part->first_row) * row_size;
        for (int64_t i = 0; i < row_size; ++i) sum.get()[i] += from[i];
      }
      move_tile<T, true>(grad_input, row * d.width, d.width, d.channels, sum.get(), d.channels);
    }
  });
}

template <class T>
void add_weights(const Deform<T>& d, const Entry<T>& use, const std::vector<std::optional<Part<T>>>& parts,
                 T* grad_weight, T* grad_bias) {
  const int64_t taps = d.taps(), row = use.weight_row(d), tap_size = use.weight_rows(d) * row;
  torch::stable::parallel_for(0, d.outputs, grain(d.channels * taps), [&](int64_t begin, int64_t end) {
    std::vector<T> sum(row);
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        std::fill(sum.begin(), sum.end(), T(0));
        for (const auto& part : parts) {
          const T* from = part->weight.get() + tap * tap_size + o * row;
          for (int64_t c = 0; c < d.channels; ++c) sum[c] += from[c];
        }
        for (int64_t c = 0; c < d.channels; ++c) grad_weight[(o * d.channels + c) * taps + tap] = sum[c];
      }
      grad_bias[o] = T(0);
      for (const auto& part : parts) grad_bias[o] += part->bias.get()[o];
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Gradients backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
                   const std::optional<Tensor>& mask, const Ints& stride, const Ints& padding, const Ints& dilation) {
  bool is_channels_last = false, grad_is_channels_last = false;
  const Tensor given = dense(input, is_channels_last), source = channels_last(given);
  const Tensor upstream = dense(grad, grad_is_channels_last), kernel = torch::stable::contiguous(weight);
  const Entry<T>& use = entry<T>();
  BackwardTask<T> task{};
  task.d = geometry<T>(source, offset, kernel, mask, stride, padding, dilation);
  const Deform<T>& d = task.d;
  STD_TORCH_CHECK(grad.size(0) == d.images && grad.size(1) == d.outputs && grad.size(2) == d.out_height &&
                      grad.size(3) == d.out_width && grad.scalar_type() == input.scalar_type(),
                  "deform_conv2d: the gradient has the wrong shape or dtype");
  const Ints input_shape = {d.images, d.channels, d.height, d.width};
  const Ints mask_shape = {d.images, mask ? d.offset_groups * d.taps() : 0, d.out_height, d.out_width};
  Tensor grad_input = empty_images(input, input_shape, is_channels_last);
  Tensor grad_offset = empty_images(
      input, {d.images, 2 * d.offset_groups * d.taps(), d.out_height, d.out_width}, false);
  Tensor grad_weight = empty_images(input, {d.outputs, d.channels, d.kernel_h, d.kernel_w}, false);
  Tensor grad_mask = empty_images(input, mask_shape, false);
  Tensor grad_bias = torch::stable::new_empty(input, {d.outputs});

  const Zeros<T> packed = pack_weight<T>(kernel, use.panel, false);
  task.weight = packed.get();
  task.grad_output = plane(const_cast<T*>(upstream.const_data_ptr<T>()), d.outputs, d.out_height * d.out_width,
                           grad_is_channels_last);
  task.grad_offset = grad_offset.mutable_data_ptr<T>();
  task.grad_mask = mask ? grad_mask.mutable_data_ptr<T>() : nullptr;
  const int64_t count = part_count(d), rows = d.images * d.out_height;
  task.tile = max_tile;
  std::vector<std::optional<Part<T>>> parts(count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parts[i].emplace(make_part(task, use, i * rows / count * d.out_width, (i + 1) * rows / count * d.out_width));
      const Part<T>& part = *parts[i];
      const Zeros<T> scratch(use.backward_scratch(d, task.tile));
      const PartSums<T> sums = {part.input.get(), part.first_row, part.weight.get(), part.bias.get()};
      use.backward(task, sums, scratch.get(), part.begin, part.end);
    }
  });
  add_inputs(d, parts, plane(grad_input.mutable_data_ptr<T>(), d.channels, d.height * d.width, is_channels_last));
  add_weights(d, use, parts, grad_weight.mutable_data_ptr<T>(), grad_bias.mutable_data_ptr<T>());
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight, std::optional<Tensor> bias,
                     std::optional<Tensor> mask, Ints stride, Ints padding, Ints dilation) {
  STD_TORCH_CHECK(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4 && (!mask || mask->dim() == 4),
                  "deform_conv2d: input, offset, weight and mask need four dimensions");
  if (input.scalar_type() == ScalarType::Double)
    return forward<double>(input, offset, weight, bias, mask, stride, padding, dilation);
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "deform_conv2d: float32 or float64 only");
  return forward<float>(input, offset, weight, bias, mask, stride, padding, dilation);
}

Gradients deform_conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
                                 std::optional<Tensor> mask, Ints stride, Ints padding, Ints dilation) {
  if (input.scalar_type() == ScalarType::Double)
    return backward<double>(grad, input, offset, weight, mask, stride, padding, dilation);
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "deform_conv2d: float32 or float64 only");
  return backward<float>(grad, input, offset, weight, mask, stride, padding, dilation);
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[] stride, "
      "int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&upsnet::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&upsnet::deform_conv2d_backward));
}
