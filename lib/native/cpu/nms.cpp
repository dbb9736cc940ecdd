// upsnet::nms_flags: greedy non-maximum suppression over boxes that are already in their order of preference.
//
// The boxes of a group are laid out by place: strips of rows, within them columns from left to right. An overlap above
// the threshold bounds how far the other box may begin from this one, so a kept box meets only some runs of neighbours,
// which are tested without a branch: the compiler vectorises that. Groups of few boxes are not laid out.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "shared/nms_arguments.h"
#include "variants.h"

UPSNET_NO_CONTRACTION  // contracted multiply-adds would round the union differently from torchvision
#include "shared/nms.h"

namespace upsnet {
namespace {

constexpr int64_t block = 16;  // runs begin and end at multiples of it, so that the inner loop has no tail

// The five arrays that overlaps are computed from.
struct Columns {
  float *x1, *y1, *x2, *y2, *area;

  UPSNET_INLINE NmsBox at(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i], area[i]}; }
  UPSNET_INLINE void put(int64_t i, const NmsBox& box) const {
    x1[i] = box.x1, y1[i] = box.y1, x2[i] = box.x2, y2[i] = box.y2, area[i] = box.area;
  }
};

// Marks what the box overlaps in blocks [first, last).
UPSNET_INLINE void suppress(const Columns& c, const NmsBox& box, int64_t first, int64_t last, float threshold,
                            uint8_t* __restrict__ removed) {
  for (int64_t start = first * block; start < last * block; start += block)
    for (int64_t j = start; j < start + block; ++j) removed[j] |= uint8_t(overlap_exceeds(box, c.at(j), threshold));
}

#if UPSNET_X86
UPSNET_TARGET_AVX512 void suppress_avx512(const Columns& c, const NmsBox& b, int64_t f, int64_t l, float t, uint8_t* r) {
  suppress(c, b, f, l, t, r);
}
UPSNET_TARGET_AVX2 void suppress_avx2(const Columns& c, const NmsBox& b, int64_t f, int64_t l, float t, uint8_t* r) {
  suppress(c, b, f, l, t, r);
}
#endif
void suppress_generic(const Columns& c, const NmsBox& b, int64_t f, int64_t l, float t, uint8_t* r) {
  suppress(c, b, f, l, t, r);
}

NmsBox box_of(const float* corners, bool inclusive) { return nms_box(corners, inclusive); }

UPSNET_CONTRACTION_AGAIN

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Suppress = void (*)(const Columns&, const NmsBox&, int64_t, int64_t, float, uint8_t*);

Suppress chosen_suppress() {
#if UPSNET_X86
  const Variant variant = chosen_variant();
  if (variant == Variant::avx512) return suppress_avx512;
  if (variant == Variant::avx2) return suppress_avx2;
#endif
  return suppress_generic;
}

// Whether a box can overlap anything by a threshold of 0 or more. Empty, inverted, infinite boxes and NaN cannot.
bool can_overlap(const NmsBox& box) {
  return box.x2 > box.x1 && box.area > 0 && box.area < std::numeric_limits<float>::infinity();
}

// Where boxes begin along an axis, and how wide they are.
struct Extent {
  float least = std::numeric_limits<float>::infinity(), most = -least, widest = 0;

  void add(float begin, float end) {
    least = std::min(least, begin), most = std::max(most, begin), widest = std::max(widest, end - begin);
  }
};

// One axis of the layout: equal bins over the boxes' beginnings, and how far from a box its partners may begin.
//
// IoU > t asks of the widths v, w and the common width c: c > t * max(v, w). With c <= v - (how much later the other
// one begins) and c <= w - (how much earlier), and w < v / t, it begins less than (1 - t) * v later and less than
// (1 - t) / t * v earlier; and in any case less than the greatest width earlier.
struct Axis {
  double least, bins_per_unit, ahead, back, widest;
  int64_t bins;

  Axis(const Extent& extent, double threshold, int64_t bins)
      : least(extent.least), bins_per_unit(0), ahead(1 - threshold), back((1 - threshold) / threshold),
        widest(1.0001 * extent.widest), bins(bins) {
    if (extent.most > extent.least) bins_per_unit = double(bins) / (double(extent.most) - least);
  }
  // Monotone, also in what rounding does.
  int64_t bin(double place) const {
    return int64_t(std::clamp((place - least) * bins_per_unit, 0.0, double(bins - 1)));
  }
  int64_t first(double begin, double width) const { return bin(begin - std::min(back * width, widest)); }
  int64_t last(double begin, double width) const { return bin(begin + ahead * width); }
};

class Sweep {
 public:
  Sweep(const float* corners, const bool* valid, bool inclusive, double threshold, int64_t n, bool* keep)
      : corners_(corners), valid_(valid), inclusive_(inclusive), limit_(float_below(threshold)), keep_(keep),
        suppress_(chosen_suppress()), values_(5 * (n + block)), removed_(n + block) {
    float* column = values_.data();
    for (float** of : {&columns_.x1, &columns_.y1, &columns_.x2, &columns_.y2, &columns_.area})
      *of = column, column += n + block;
  }

  // Boxes [begin, end) are one group.
  void group(int64_t begin, int64_t end) {
    members_.clear();
    boxes_.clear();
    for (int64_t i = begin; i < end; ++i) {
      keep_[i] = valid_ == nullptr || valid_[i];
      if (!keep_[i]) continue;
      const NmsBox box = box_of(corners_ + 4 * i, inclusive_);
      if (limit_ >= 0 && !can_overlap(box)) continue;
      members_.push_back(i);
      boxes_.push_back(box);
    }
    const int64_t count = members_.size();
    std::fill_n(removed_.begin(), count + block, uint8_t(0));
    if (count < 2) return;
    if (limit_ >= 0 && limit_ <= 1 && count >= few)
      by_place(count);
    else
      one_by_one(count);
  }

 private:
  static constexpr int64_t few = 128;          // boxes for which a layout does not pay
  static constexpr float least_area = 1e-30f;  // below it, and below the next, underflow makes overlaps coarse
  static constexpr double least_threshold = 1e-3;

  void one_by_one(int64_t count) {
    for (int64_t i = 0; i < count; ++i) columns_.put(i, boxes_[i]);
    pad(count);
    for (int64_t i = 0; i < count; ++i) {
      keep_[members_[i]] = !removed_[i];
      if (!removed_[i]) suppress_(columns_, boxes_[i], i / block, (count + block - 1) / block, limit_, removed_.data());
    }
  }

  void by_place(int64_t count) {
    Extent along_x, along_y;
    float area = std::numeric_limits<float>::infinity();
    for (const NmsBox& box : boxes_) {
      along_x.add(box.x1, box.x2);
      along_y.add(box.y1, box.y2);
      area = std::min(area, box.area);
    }
    const bool coarse = limit_ < least_threshold || area < least_area;
    const double threshold = coarse ? 0 : 0.9999 * limit_;  // rounding errs by less
    const int64_t strips = std::clamp<int64_t>(count / 512, 1, 16);
    const Axis y(along_y, threshold, strips), x(along_x, threshold, std::max<int64_t>(count / (4 * strips), 8));
    lay_out(x, y);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = places_[i];
      keep_[members_[i]] = !removed_[place];
      if (removed_[place]) continue;
      const NmsBox& box = boxes_[i];
      const double width = double(box.x2) - box.x1, height = double(box.y2) - box.y1;
      const int64_t first = x.first(box.x1, width), last = x.last(box.x1, width), bottom = y.last(box.y1, height);
      for (int64_t strip = y.first(box.y1, height); strip <= bottom; ++strip) {
        const int64_t begin = starts_[strip * x.bins + first], end = starts_[strip * x.bins + last + 1];
        // Also meets boxes before it and itself, on which has been decided.
        suppress_(columns_, box, begin / block, (end + block - 1) / block, limit_, removed_.data());
      }
    }
  }

  // Sorts the boxes by cell, counting: starts_[cell] is where a cell begins, places_[i] where box i lies.
  void lay_out(const Axis& x, const Axis& y) {
    const int64_t count = boxes_.size();
    starts_.assign(x.bins * y.bins + 1, 0);
    places_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      places_[i] = y.bin(boxes_[i].y1) * x.bins + x.bin(boxes_[i].x1);
      ++starts_[places_[i]];
    }
    int64_t before = 0;
    for (int64_t& start : starts_) before += std::exchange(start, before);
    ends_ = starts_;
    for (int64_t i = 0; i < count; ++i) {
      places_[i] = ends_[places_[i]]++;
      columns_.put(places_[i], boxes_[i]);
    }
    pad(count);
  }

  // Empty boxes to the end of the last block.
  void pad(int64_t count) {
    for (int64_t i = count; i < count + block; ++i) columns_.put(i, {0, 0, 0, 0, 0});
  }

  const float* corners_;
  const bool* valid_;
  const bool inclusive_;
  const float limit_;
  bool* keep_;
  const Suppress suppress_;
  std::vector<float> values_;
  std::vector<uint8_t> removed_;
  Columns columns_;
  std::vector<int64_t> members_, starts_, ends_, places_;
  std::vector<NmsBox> boxes_;
};

// boxes[n, 4] float32 by descending preference; groups[n] int64, equal values adjacent, or none; valid[n] bool, boxes
// that take part, or none. Returns which boxes stay, bool[n].
Tensor nms_flags(const Tensor& boxes, std::optional<Tensor> groups, std::optional<Tensor> valid, double threshold,
                 bool inclusive) {
  check_nms_arguments(boxes, groups, valid);
  const int64_t n = boxes.size(0);
  const Tensor dense = torch::stable::contiguous(boxes);
  if (groups) groups = torch::stable::contiguous(*groups);
  if (valid) valid = torch::stable::contiguous(*valid);
  Tensor keep = torch::stable::empty({n}, ScalarType::Bool, std::nullopt, boxes.device());
  Sweep sweep(dense.const_data_ptr<float>(), valid ? valid->const_data_ptr<bool>() : nullptr, inclusive, threshold, n,
              keep.mutable_data_ptr<bool>());
  const int64_t* group = groups ? groups->const_data_ptr<int64_t>() : nullptr;
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    end = group ? std::find_if(group + begin, group + n, [&](int64_t g) { return g != group[begin]; }) - group : n;
    sweep.group(begin, end);
  }
  return keep;
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def("nms_flags(Tensor boxes, Tensor? groups, Tensor? valid, float threshold, bool inclusive) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) { m.impl("nms_flags", TORCH_BOX(&upsnet::nms_flags)); }
