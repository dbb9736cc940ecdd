// upsnet::fuse_panoptic on the CPU: checks, mask removal, partition of the work, choice of the variant.
//
// Removal: the bits of all masks in parallel, then the candidates one after another; a class has one bit map of what
// its kept instances cover. Fusion: groups of rows in parallel, each from its two source rows straight to the labels.
// Each pixel is computed alike whatever the partition, so the number of threads changes nothing.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "panoptic_kernels.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t most_mask_words = 1 << 21;  // 16 MB of mask bits at a time
constexpr int64_t least_groups = 4;           // of rows, for a thread

template <int LANES>
struct Entry {
  int64_t (*mask_bits)(const PanopticPlan<LANES>&, int32_t, uint8_t*, uint64_t*);
  void (*fuse_group)(const PanopticPlan<LANES>&, const RowGroup&, const float*, const float*,
                     const std::vector<ActiveInstance>&, int32_t);
};

#define UPSNET_VARIANT(NAME, TARGET, BYTES, WIDE)                                                                  \
  TARGET int64_t mask_bits_##NAME(const PanopticPlan<BYTES / 4>& plan, int32_t candidate, uint8_t* line,            \
                                  uint64_t* words) {                                                                \
    return PanopticKernel<BYTES, WIDE>::mask_bits(plan, candidate, line, words);                                   \
  }                                                                                                                 \
  TARGET void fuse_group_##NAME(const PanopticPlan<BYTES / 4>& plan, const RowGroup& group, const float* above,     \
                                const float* below, const std::vector<ActiveInstance>& active, int32_t idle) {      \
    if (group.rows == 1)                                                                                            \
      PanopticKernel<BYTES, WIDE>::template fuse_group<1>(plan, group, above, below, active, idle);                \
    else                                                                                                            \
      PanopticKernel<BYTES, WIDE>::template fuse_group<group_rows>(plan, group, above, below, active, idle);       \
  }                                                                                                                 \
  const Entry<BYTES / 4> entry_##NAME = {mask_bits_##NAME, fuse_group_##NAME};

#if UPSNET_X86
UPSNET_VARIANT(avx512, UPSNET_TARGET_AVX512, 64, false)
UPSNET_VARIANT(avx2, UPSNET_TARGET_AVX2, 32, false)
#endif
UPSNET_VARIANT(generic, , 16, UPSNET_X86 == 1)

template <int LANES>
void lay_out(PanopticPlan<LANES>& plan, int64_t candidates) {
  const PanopticTask& t = plan.task;
  const int64_t lines = (t.score_width + LANES + 15) / 16;
  plan.pitch = 16 * (lines | 1);  // an odd number of cache lines: no set conflicts between channels
  for (int32_t y = 0; y < t.height; ++y) {
    const Sample row = sample_at(y, t.score_height, t.height);
    const bool joins = !plan.groups.empty() && plan.groups.back().rows < group_rows &&
        plan.groups.back().above == row.first && plan.groups.back().below == row.second;
    if (joins)
      ++plan.groups.back().rows;
    else
      plan.groups.push_back({y, 1, row.first, row.second});
  }
  append_blocks(plan.score_blocks, 0, (t.width + LANES - 1) / LANES, 0, t.score_width, t.width);
  for (int32_t i = 0; i < candidates; ++i) {
    const Placed& box = t.placed[i];
    plan.mask_begin.push_back(int64_t(plan.mask_blocks.size()));
    if (box.columns.size() > 0)
      append_blocks(plan.mask_blocks, plan.first_block(i), (box.columns.end + LANES - 1) / LANES, box.left, t.side,
                    box.width);
  }
}

// -- mask removal -----------------------------------------------------------------------------------------------------

int64_t words_of(const Placed& box) {
  return box.columns.size() > 0 && box.rows.size() > 0 ? int64_t(Words(box).count) * box.rows.size() : 0;
}

// The words of what a class' instances cover, over the whole map.
class Cover {
 public:
  Cover(int32_t height, int32_t width) : row_((width + 63) / 64), words_(size_t(height) * row_) {}

  int64_t shared(const Placed& box, const uint64_t* mask) {
    int64_t sum = 0;
    each(box, mask, [&](uint64_t& covered, uint64_t bits) { sum += std::popcount(covered & bits); });
    return sum;
  }
  void add(const Placed& box, const uint64_t* mask) {
    each(box, mask, [](uint64_t& covered, uint64_t bits) { covered |= bits; });
  }

 private:
  template <class Action>
  void each(const Placed& box, const uint64_t* mask, Action action) {
    const Words line(box);
    for (int32_t y = box.rows.begin; y < box.rows.end; ++y)
      for (int32_t w = 0; w < line.count; ++w) action(words_[size_t(y) * row_ + line.first + w], *mask++);
  }

  int64_t row_;
  std::vector<uint64_t> words_;
};

// Goes on with candidates [begin, end), whose bits lie one after another from `bits` on.
void keep_visible(const PanopticTask& t, int32_t begin, int32_t end, const uint64_t* bits,
                  const std::vector<int64_t>& areas, std::unordered_map<int64_t, Cover>& covers,
                  std::vector<int32_t>& kept) {
  for (int32_t i = begin; i < end; bits += words_of(t.placed[i++])) {
    if (areas[i] == 0) continue;
    Cover& cover = covers.try_emplace(t.classes[i], t.height, t.width).first->second;
    if (double(cover.shared(t.placed[i], bits)) / double(areas[i]) > max_overlap) continue;
    cover.add(t.placed[i], bits);
    kept.push_back(i);
  }
}

// Positions of the candidates that do not lie behind stronger ones of their class.
template <int LANES>
std::vector<int32_t> remove_hidden(const PanopticPlan<LANES>& plan, const Entry<LANES>& entry, int32_t candidates) {
  const PanopticTask& t = plan.task;
  std::vector<int32_t> kept;
  std::unordered_map<int64_t, Cover> covers;
  std::vector<int64_t> areas(candidates, 0), offsets(candidates, 0);
  std::vector<uint64_t> bits;
  for (int32_t begin = 0, end = 0; begin < candidates; begin = end) {
    int64_t total = 0;
    for (end = begin; end < candidates && (end == begin || total + words_of(t.placed[end]) <= most_mask_words); ++end) {
      offsets[end] = total;
      total += words_of(t.placed[end]);
    }
    bits.resize(std::max<size_t>(bits.size(), size_t(total)));
    torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
      std::vector<uint8_t> line((t.width + 63) / 64 * 64);
      for (int64_t i = from; i < to; ++i)
        if (words_of(t.placed[i]) > 0)
          areas[i] = entry.mask_bits(plan, int32_t(i), line.data(), bits.data() + offsets[i]);
    });
    keep_visible(t, begin, end, bits.data(), areas, covers, kept);
  }
  return kept;
}

// -- fusion -----------------------------------------------------------------------------------------------------------

// All channels of a row of scores, one behind the other.
void copy_row(const PanopticTask& t, int32_t row, int64_t pitch, float* to) {
  const float* from = t.scores + row * t.row_stride;
  const int32_t channels = t.num_stuff + t.num_things;
  if (t.column_stride == 1) {
    for (int32_t c = 0; c < channels; ++c)
      std::copy_n(from + c * t.channel_stride, t.score_width, to + c * pitch);
    return;
  }
  for (int32_t x = 0; x < t.score_width; ++x)
    for (int32_t c = 0; c < channels; ++c) to[c * pitch + x] = from[c * t.channel_stride + x * t.column_stride];
}

// The two source rows that a thread has at hand.
class SourceRows {
 public:
  SourceRows(const PanopticTask& task, int64_t pitch)
      : task_(task), pitch_(pitch), floats_(size_t(task.num_stuff + task.num_things) * pitch) {
    for (auto& row : rows_) row.resize(floats_);
  }

  // A row; the one that holds `other` stays.
  const float* get(int32_t row, int32_t other) {
    for (int i = 0; i < 2; ++i)
      if (held_[i] == row) return rows_[i].data();
    const int i = held_[0] == other ? 1 : 0;
    copy_row(task_, row, pitch_, rows_[i].data());
    held_[i] = row;
    return rows_[i].data();
  }

 private:
  const PanopticTask& task_;
  int64_t pitch_;
  size_t floats_;
  std::vector<float> rows_[2];
  int32_t held_[2] = {-1, -1};
};

// Those of the kept instances that meet the group's rows. Returns the position of the first that does not.
int32_t find_active(const PanopticTask& t, const RowGroup& group, std::vector<ActiveInstance>& active) {
  int32_t idle = t.survivors->count;
  active.clear();
  for (int32_t k = 0; k < t.survivors->count; ++k) {
    const Placed& box = t.placed[t.kept[k]];
    if (!box.meets_rows(group.top, group.top + group.rows)) {
      idle = std::min(idle, k);
      continue;
    }
    ActiveInstance& instance = active.emplace_back(ActiveInstance{k, t.kept[k], {}});
    for (int32_t r = 0; r < group.rows; ++r)
      if (box.rows.has(group.top + r))
        instance.rows[r] = sample_at(group.top + r - box.top, t.side, box.height);
  }
  return idle;
}

template <int LANES>
void fuse_rows(const PanopticPlan<LANES>& plan, const Entry<LANES>& entry) {
  torch::stable::parallel_for(0, int64_t(plan.groups.size()), least_groups, [&](int64_t begin, int64_t end) {
    SourceRows rows(plan.task, plan.pitch);
    std::vector<ActiveInstance> active;
    for (int64_t g = begin; g < end; ++g) {
      const RowGroup& group = plan.groups[g];
      const int32_t idle = find_active(plan.task, group, active);
      const float *above = rows.get(group.above, group.below), *below = rows.get(group.below, group.above);
      entry.fuse_group(plan, group, above, below, active, idle);
    }
  });
}

// Pixel by pixel: for scores larger than the map, which no vector holds. The text is CUDA's.
void fuse_pixels(const PanopticTask& t, int16_t* channels, int16_t* semantic) {
  torch::stable::parallel_for(0, t.height, least_groups, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      for (int64_t x = 0; x < t.width; ++x) {
        const Labels labels = fuse_pixel(t, int32_t(y), int32_t(x));
        channels[y * t.width + x] = labels.channel;
        semantic[y * t.width + x] = labels.semantic;
      }
  });
}

template <int LANES>
void run(const Entry<LANES>& entry, const PanopticTask& task, int32_t candidates, PanopticLabels& labels) {
  PanopticPlan<LANES> plan{};
  plan.task = task;
  plan.channels = labels.channels.mutable_data_ptr<int16_t>();
  plan.semantic = labels.semantic.mutable_data_ptr<int16_t>();
  lay_out(plan, candidates);
  std::vector<int32_t> kept = remove_hidden(plan, entry, candidates);
  Survivors survivors = {int32_t(kept.size()), 1};
  if (kept.empty() && candidates > 0) kept = {0}, survivors = {1, 0};
  bool* flags = labels.kept.mutable_data_ptr<bool>();
  std::fill_n(flags, candidates, false);
  for (const int32_t i : kept) flags[i] = true;
  plan.task.kept = kept.data(), plan.task.survivors = &survivors;
  const bool vectors = std::all_of(plan.score_blocks.begin(), plan.score_blocks.end(), [](auto& b) { return b.fits; });
  if (vectors)
    fuse_rows(plan, entry);
  else
    fuse_pixels(plan.task, plan.channels, plan.semantic);
}

void run_chosen(const PanopticTask& task, int32_t candidates, PanopticLabels& labels) {
#if UPSNET_X86
  const Variant variant = chosen_variant();
  if (variant == Variant::avx512) return run(entry_avx512, task, candidates, labels);
  if (variant == Variant::avx2) return run(entry_avx2, task, candidates, labels);
#endif
  run(entry_generic, task, candidates, labels);
}

std::tuple<Tensor, Tensor, Tensor> fuse_panoptic(const Tensor& scores, int64_t height, int64_t width,
                                                 const Tensor& boxes, const Tensor& classes, const Tensor& mask_logits,
                                                 int64_t num_stuff, bool unknown) {
  check_panoptic(scores, height, width, boxes, classes, mask_logits, num_stuff);
  const int32_t candidates = int32_t(boxes.size(0)), side = int32_t(mask_logits.size(1));
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_masks = torch::stable::contiguous(mask_logits);
  const Tensor dense_classes = torch::stable::contiguous(classes);
  std::vector<Placed> placed(candidates);
  for (int32_t i = 0; i < candidates; ++i)
    placed[i] = place_box(dense_boxes.const_data_ptr<float>() + 4 * i, int32_t(height), int32_t(width));
  std::vector<float> masks(size_t(candidates) * side * side + max_lanes);  // a vector may read beyond the last row
  std::copy_n(dense_masks.const_data_ptr<float>(), masks.size() - max_lanes, masks.data());

  PanopticLabels labels(scores, height, width, candidates);
  PanopticTask task = panoptic_task(scores, height, width, num_stuff, unknown);
  task.masks = masks.data(), task.side = side;
  task.placed = placed.data(), task.classes = dense_classes.const_data_ptr<int64_t>();
  run_chosen(task, candidates, labels);
  return {labels.channels, labels.semantic, labels.kept};
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def(
      "fuse_panoptic(Tensor scores, int height, int width, Tensor boxes, Tensor classes, Tensor mask_logits, "
      "int num_stuff, bool unknown) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) { m.impl("fuse_panoptic", TORCH_BOX(&upsnet::fuse_panoptic)); }
