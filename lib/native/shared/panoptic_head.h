// The panoptic head: what its inputs must be, where boxes lie, bilinear samples, the fusion of one pixel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "both.h"

namespace upsnet {

constexpr double max_overlap = 0.3;  // an instance goes if more than this part of its mask is covered already
constexpr int16_t void_label = -1;

// a * wa + b * wb rounded as PyTorch's bilinear interpolation rounds it: b's product is rounded, a's is not.
UPSNET_BOTH float blend(float a, float wa, float b, float wb) { return fmaf(a, wa, b * wb); }

// What a pixel of an enlargement reads along one axis.
struct Sample {
  int32_t first, second;
  float first_weight, second_weight;
};

// Pixel `i` of `out` over `in` source pixels; the middles of pixels are aligned, not the corners.
UPSNET_BOTH Sample sample_at(int32_t i, int32_t in, int32_t out) {
  if (in == out) return {i, i, 1.0f, 0.0f};
  const float place = fmaxf(fmaf(float(in) / float(out), float(i) + 0.5f, -0.5f), 0.0f);
  const int32_t first = int32_t(place) < in - 1 ? int32_t(place) : in - 1;
  const float beyond = fminf(place - float(first), 1.0f);
  return {first, first + 1 < in ? first + 1 : first, 1.0f - beyond, beyond};
}

struct Span {
  int32_t begin, end;

  UPSNET_BOTH bool has(int32_t i) const { return begin <= i && i < end; }
  UPSNET_BOTH bool meets(int32_t from, int32_t to) const { return begin < to && from < end && begin < end; }
  UPSNET_BOTH int32_t size() const { return end - begin; }
};

// Rows or columns from `begin` to `end` as far as they lie in the map; none where the box is inside out.
UPSNET_BOTH Span clipped(int32_t begin, int32_t end, int32_t length) {
  const int32_t from = begin < 0 ? 0 : begin < length ? begin : length;
  const int32_t to = end < from ? from : end;
  return {from, to < length ? to : length};
}

// Coordinates as whole numbers that sums cannot overflow; a NaN is 0.
UPSNET_BOTH int32_t truncated(float v) { return v == v ? int32_t(fminf(fmaxf(v, -5e8f), 5e8f)) : 0; }

// Where an instance acts: its semantic logit up to the rounded end (half to even) of its box, its mask up to the
// truncated one. `top`, `left`, `height`, `width`: the box that the mask is resized to; it may stand over the border.
struct Placed {
  int32_t top, left, height, width;
  Span rows, columns;
  Span semantic_rows, semantic_columns;

  UPSNET_BOTH bool meets_rows(int32_t from, int32_t to) const {
    return rows.meets(from, to) || semantic_rows.meets(from, to);
  }
  UPSNET_BOTH bool meets_columns(int32_t from, int32_t to) const {
    return columns.meets(from, to) || semantic_columns.meets(from, to);
  }
};

UPSNET_BOTH Placed place_box(const float* box, int32_t height, int32_t width) {
  const int32_t left = truncated(box[0]), top = truncated(box[1]);
  const int32_t right = truncated(box[2]), bottom = truncated(box[3]);
  Placed placed;
  placed.top = top, placed.left = left;
  placed.height = bottom - top + 1 > 1 ? bottom - top + 1 : 1;
  placed.width = right - left + 1 > 1 ? right - left + 1 : 1;
  placed.rows = clipped(top, bottom + 1, height);
  placed.columns = clipped(left, right + 1, width);
  placed.semantic_rows = clipped(top, truncated(rintf(box[3])) + 1, height);
  placed.semantic_columns = clipped(left, truncated(rintf(box[2])) + 1, width);
  return placed;
}

// The last line of defence: Python checks first, with better sentences.
inline void check_panoptic(const torch::stable::Tensor& scores, int64_t height, int64_t width,
                           const torch::stable::Tensor& boxes, const torch::stable::Tensor& classes,
                           const torch::stable::Tensor& masks, int64_t num_stuff) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(scores.dim() == 3 && scores.size(1) > 0 && scores.size(2) > 0 && height > 0 && width > 0 &&
                      num_stuff >= 0 && num_stuff <= scores.size(0) && scores.scalar_type() == ScalarType::Float,
                  "fuse_panoptic: scores must be float32 of shape (stuff + things, h, w), and the map not empty");
  const int64_t n = boxes.dim() == 2 ? boxes.size(0) : 0;
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == ScalarType::Float &&
                      classes.dim() == 1 && classes.size(0) == n && classes.scalar_type() == ScalarType::Long,
                  "fuse_panoptic: boxes must be float32 of shape (n, 4), classes int64 of shape (n)");
  STD_TORCH_CHECK(masks.dim() == 3 && masks.size(0) == n && masks.size(1) == masks.size(2) && masks.size(1) > 0 &&
                      masks.scalar_type() == ScalarType::Float,
                  "fuse_panoptic: mask_logits must be float32 of shape (n, m, m)");
  STD_TORCH_CHECK(num_stuff + n < 32768 && scores.size(0) < 32768, "fuse_panoptic: labels are 16-bit numbers");
  STD_TORCH_CHECK(std::max({height, width, scores.size(1), scores.size(2)}) < (1 << 24) && masks.size(1) < (1 << 12) &&
                      height * width < (int64_t(1) << 31),
                  "fuse_panoptic: the map is too large");
  STD_TORCH_CHECK(boxes.device() == scores.device() && classes.device() == scores.device() &&
                      masks.device() == scores.device(),
                  "fuse_panoptic: all tensors must lie on one device");
}

// What the operator returns.
struct PanopticLabels {
  torch::stable::Tensor channels, semantic, kept;

  PanopticLabels(const torch::stable::Tensor& like, int64_t height, int64_t width, int64_t candidates)
      : channels(empty(like, {height, width}, torch::headeronly::ScalarType::Short)),
        semantic(empty(like, {height, width}, torch::headeronly::ScalarType::Short)),
        kept(empty(like, {candidates}, torch::headeronly::ScalarType::Bool)) {}

  static torch::stable::Tensor empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
                                     torch::headeronly::ScalarType type) {
    return torch::stable::empty(sizes, type, std::nullopt, like.device());
  }
};

// How many candidates take part, and whether with their masks: without, where all went and the strongest one stayed.
struct Survivors {
  int32_t count, with_masks;
};

// One image's inputs, and which candidates take part.
struct PanopticTask {
  const float* scores;  // strided: channel, row, column
  int64_t channel_stride, row_stride, column_stride;
  int32_t num_stuff, num_things, score_height, score_width;
  int32_t height, width;  // of the map
  bool unknown;
  const float* masks;  // [candidate][side][side]
  int32_t side;
  const Placed* placed;    // of each candidate
  const int64_t* classes;  // of each candidate, 1..num_things
  const int32_t* kept;     // positions of those that take part, in their order
  const Survivors* survivors;

  UPSNET_BOTH int32_t thing_of(int32_t candidate) const { return int32_t(classes[candidate]) - 1; }
};

// What the scores say; candidates are the caller's.
inline PanopticTask panoptic_task(const torch::stable::Tensor& scores, int64_t height, int64_t width, int64_t num_stuff,
                                  bool unknown) {
  PanopticTask task{};
  task.scores = scores.const_data_ptr<float>();
  task.channel_stride = scores.stride(0), task.row_stride = scores.stride(1), task.column_stride = scores.stride(2);
  task.num_stuff = int32_t(num_stuff), task.num_things = int32_t(scores.size(0) - num_stuff);
  task.score_height = int32_t(scores.size(1)), task.score_width = int32_t(scores.size(2));
  task.height = int32_t(height), task.width = int32_t(width), task.unknown = unknown;
  return task;
}

UPSNET_BOTH float score_at(const PanopticTask& t, int32_t channel, const Sample& row, const Sample& column) {
  const float* above = t.scores + channel * t.channel_stride + row.first * t.row_stride;
  const float* below = above + (row.second - row.first) * t.row_stride;
  const int64_t left = column.first * t.column_stride, right = column.second * t.column_stride;
  return blend(blend(above[left], column.first_weight, above[right], column.second_weight), row.first_weight,
               blend(below[left], column.first_weight, below[right], column.second_weight), row.second_weight);
}

UPSNET_BOTH float mask_at(const PanopticTask& t, int32_t candidate, int32_t y, int32_t x) {
  const Placed& box = t.placed[candidate];
  const Sample row = sample_at(y - box.top, t.side, box.height), column = sample_at(x - box.left, t.side, box.width);
  const float* mask = t.masks + int64_t(candidate) * t.side * t.side;
  const float *above = mask + row.first * t.side, *below = mask + row.second * t.side;
  return blend(
      blend(above[column.first], column.first_weight, above[column.second], column.second_weight), row.first_weight,
      blend(below[column.first], column.first_weight, below[column.second], column.second_weight), row.second_weight);
}

struct Labels {
  int16_t channel, semantic;
};

// The first of equal channels wins. An instance is 0 outside its box, and there, too, it competes.
UPSNET_BOTH Labels fuse_pixel(const PanopticTask& t, int32_t y, int32_t x) {
  const Sample row = sample_at(y, t.score_height, t.height), column = sample_at(x, t.score_width, t.width);
  float value = -INFINITY, thing_value = -INFINITY;
  int32_t channel = 0, thing = 0;
  for (int32_t c = 0; c < t.num_stuff; ++c) {
    const float score = score_at(t, c, row, column);
    if (score > value) value = score, channel = c;
  }
  for (int32_t c = 0; c < t.num_things; ++c) {
    const float score = score_at(t, t.num_stuff + c, row, column);
    if (score > thing_value) thing_value = score, thing = c;
  }
  const int32_t semantic = value >= thing_value ? channel : t.num_stuff + thing;
  const int32_t count = t.survivors->count;
  float explained = count > 0 ? -INFINITY : 0.0f;
  for (int32_t k = 0; k < count; ++k) {
    const int32_t candidate = t.kept[k];
    const Placed& box = t.placed[candidate];
    const int32_t own = t.thing_of(candidate);
    float logit = 0.0f;
    if (box.semantic_rows.has(y) && box.semantic_columns.has(x) && own >= 0 && own < t.num_things)
      logit = score_at(t, t.num_stuff + own, row, column);
    explained = logit > explained ? logit : explained;
    if (t.survivors->with_masks && box.rows.has(y) && box.columns.has(x)) logit += mask_at(t, candidate, y, x);
    if (logit > value) value = logit, channel = t.num_stuff + k;
  }
  if (t.unknown && thing_value - explained > value) channel = void_label;
  return {int16_t(channel), int16_t(semantic)};
}

}  // namespace upsnet
