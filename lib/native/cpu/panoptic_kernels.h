// The panoptic head's inner loops over vectors of neighbouring pixels. Sizes, memory and the partition of the work are
// decided in panoptic_head.cpp. The arithmetic is that of shared/panoptic_head.h, operation by operation.
#pragma once

#include <cstdint>
#include <vector>

#include "shared/panoptic_head.h"
#include "variants.h"

namespace upsnet {

constexpr int max_lanes = 16;
constexpr int group_rows = 4;  // rows that share their two source rows: four of them at stride 4

// What LANES neighbouring pixels read along a row: samples relative to `base`. Where they fit into one vector that
// starts there, a permutation fetches them.
template <int LANES>
struct alignas(64) Block {
  int32_t first[LANES], second[LANES];
  float first_weight[LANES], second_weight[LANES];
  int32_t base;
  bool fits;
};

// Blocks `from` to `to` of a map's columns, for a source that is enlarged to `width` columns from `left` on.
template <int LANES>
void append_blocks(std::vector<Block<LANES>>& blocks, int32_t from, int32_t to, int32_t left, int32_t source,
                   int32_t width) {
  for (int32_t b = from; b < to; ++b) {
    Block<LANES>& block = blocks.emplace_back();
    block.base = source;
    int32_t last = 0;
    for (int l = 0; l < LANES; ++l) {
      const int32_t x = b * LANES + l - left;  // pixels beside the enlargement read its edge; nobody looks at them
      const Sample at = sample_at(x < 0 ? 0 : x < width ? x : width - 1, source, width);
      block.first[l] = at.first, block.second[l] = at.second;
      block.first_weight[l] = at.first_weight, block.second_weight[l] = at.second_weight;
      block.base = at.first < block.base ? at.first : block.base;
      last = at.second > last ? at.second : last;
    }
    for (int l = 0; l < LANES; ++l) block.first[l] -= block.base, block.second[l] -= block.base;
    block.fits = last - block.base < LANES;
  }
}

// The words of a candidate's box: 64 columns of a row a word, aligned to the map.
struct Words {
  int32_t first, count;  // of a row

  explicit Words(const Placed& box) : first(box.columns.begin / 64), count((box.columns.end + 63) / 64 - first) {}
};

// Rows of the map that share their two source rows.
struct RowGroup {
  int32_t top, rows, above, below;
};

// The task in the shape that vectors want it.
template <int LANES>
struct PanopticPlan {
  PanopticTask task;             // its masks are padded by a vector
  int64_t pitch;                 // floats between channels of a source row
  std::vector<RowGroup> groups;  // of the map's rows
  std::vector<Block<LANES>> score_blocks;
  std::vector<Block<LANES>> mask_blocks;  // of all candidates, one after another
  std::vector<int64_t> mask_begin;        // where those of each candidate begin
  int16_t *channels, *semantic;

  int32_t first_block(int32_t candidate) const { return task.placed[candidate].columns.begin / LANES; }
  const Block<LANES>& mask_block(int32_t candidate, int32_t b) const {
    return mask_blocks[mask_begin[candidate] + b - first_block(candidate)];
  }
};

// A kept candidate that meets the rows of a group, and how its mask's rows are sampled there.
struct ActiveInstance {
  int32_t position, candidate;
  Sample rows[group_rows];
};

// The compiler heeds the attribute on a dependent type only.
template <class T, int BYTES>
struct VectorOf {
  typedef T Aligned __attribute__((vector_size(BYTES), may_alias));
  typedef T Unaligned __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

// BYTES a vector. WIDE: the machine has no fused multiply-add, so a product is formed in double precision.
template <int BYTES, bool WIDE>
struct PanopticKernel {
  static constexpr int lanes = BYTES / 4;
  using Floats = typename VectorOf<float, BYTES>::Aligned;
  using Doubles = typename VectorOf<double, BYTES * 2>::Aligned;
  using Ints = typename VectorOf<int32_t, BYTES>::Aligned;
  using Shorts = typename VectorOf<int16_t, BYTES / 2>::Aligned;
  using Bytes = typename VectorOf<int8_t, BYTES / 4>::Aligned;
  using Plan = PanopticPlan<lanes>;
  using Columns = Block<lanes>;

  static UPSNET_INLINE Floats load(const float* from) {
    return *(const typename VectorOf<float, BYTES>::Unaligned*)from;
  }
  static UPSNET_INLINE Ints load(const int32_t* from) { return *(const Ints*)from; }

  // `blend` of the shared header. A sum of two products may be contracted either way, and other ways in other places;
  // so the second product passes through a register that the compiler does not look into.
  static UPSNET_INLINE Floats mix(Floats a, Floats wa, Floats b, Floats wb) {
    Floats second = b * wb;
    if constexpr (WIDE)
      return __builtin_convertvector(__builtin_convertvector(a, Doubles) * __builtin_convertvector(wa, Doubles) +
                                         __builtin_convertvector(second, Doubles),
                                     Floats);
#if UPSNET_X86
    asm("" : "+v"(second));
#elif defined(__aarch64__)
    asm("" : "+w"(second));
#endif
    return a * wa + second;
  }

  static UPSNET_INLINE Floats pick(Floats from, Ints which) {
#ifdef __clang__
    Floats picked;
    for (int l = 0; l < lanes; ++l) picked[l] = from[which[l]];
    return picked;
#else
    return __builtin_shuffle(from, which);
#endif
  }

  // A block of a source row, enlarged.
  static UPSNET_INLINE Floats enlarged(const float* row, const Columns& at) {
    const Floats source = load(row + at.base);
    return mix(pick(source, load(at.first)), load(at.first_weight), pick(source, load(at.second)),
               load(at.second_weight));
  }

  static UPSNET_INLINE Floats mask_row(const float* row, const Columns& at) {
    if (at.fits) return enlarged(row, at);
    Floats left = {}, right = {};
    for (int l = 0; l < lanes; ++l) left[l] = row[at.base + at.first[l]], right[l] = row[at.base + at.second[l]];
    return mix(left, load(at.first_weight), right, load(at.second_weight));
  }

  static UPSNET_INLINE Floats mask_values(const PanopticTask& t, int32_t candidate, const Sample& row,
                                          const Columns& at) {
    const float* mask = t.masks + int64_t(candidate) * t.side * t.side;
    const Floats above = mask_row(mask + row.first * t.side, at), below = mask_row(mask + row.second * t.side, at);
    return mix(above, Floats{} + row.first_weight, below, Floats{} + row.second_weight);
  }

  // All bits set in the lanes of block `b` whose columns lie in the span.
  static UPSNET_INLINE Ints inside(const Span& span, int32_t b) {
    Ints x;
    for (int l = 0; l < lanes; ++l) x[l] = l;
    x += b * lanes;
    return (x >= span.begin) & (x < span.end);
  }

  // -- mask removal --

  // Where the logits of a candidate's mask are positive: for each row of its box the words that hold its columns, 64
  // columns a word. Returns the number of such pixels.
  static UPSNET_INLINE int64_t mask_bits(const Plan& plan, int32_t candidate, uint8_t* line, uint64_t* words) {
    const PanopticTask& t = plan.task;
    const Placed& box = t.placed[candidate];
    const Words of_row(box);
    int64_t area = 0;
    __builtin_memset(line, 0, 64 * of_row.count);
    for (int32_t y = box.rows.begin; y < box.rows.end; ++y, words += of_row.count) {
      const Sample row = sample_at(y - box.top, t.side, box.height);
      for (int32_t b = plan.first_block(candidate); b * lanes < box.columns.end; ++b) {
        const Floats value = mask_values(t, candidate, row, plan.mask_block(candidate, b));
        const Ints positive = (value > 0.0f) & inside(box.columns, b) & 1;
        const Bytes flags = __builtin_convertvector(positive, Bytes);
        __builtin_memcpy(line + b * lanes - of_row.first * 64, &flags, lanes);
      }
      for (int32_t w = 0; w < of_row.count; ++w) {
        words[w] = packed(line + w * 64);
        area += __builtin_popcountll(words[w]);
      }
    }
    return area;
  }

  // 64 bytes of 0 or 1 as the bits of a word, in an order that is the same for all of them.
  static UPSNET_INLINE uint64_t packed(const uint8_t* flags) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) {
      uint64_t eight;
      __builtin_memcpy(&eight, flags + 8 * i, 8);
      word |= (eight * 0x0102040810204080u >> 56) << (8 * i);
    }
    return word;
  }

  // -- fusion --

  template <int ROWS>
  struct Weights {
    Floats above[ROWS], below[ROWS];
  };

  // Maximum and first channel of a block's enlarged scores, -inf and 0 where there is none.
  template <int ROWS>
  static UPSNET_INLINE void strongest(const float* above, const float* below, int64_t pitch, int32_t channels,
                                      const Columns& at, const Weights<ROWS>& weights, Floats (&best)[ROWS],
                                      Ints (&channel)[ROWS]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) best[r] = Floats{} - INFINITY, channel[r] = Ints{};
    for (int32_t c = 0; c < channels; ++c, above += pitch, below += pitch) {
      const Floats upper = enlarged(above, at), lower = enlarged(below, at);
      const Ints number = Ints{} + c;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Floats score = mix(upper, weights.above[r], lower, weights.below[r]);
        channel[r] = score > best[r] ? number : channel[r];
        best[r] = score > best[r] ? score : best[r];
      }
    }
  }

  template <int ROWS>
  struct Pixels {
    Floats value[ROWS], explained[ROWS];
    Ints channel[ROWS];

    UPSNET_INLINE void compete(int r, Floats logit, int32_t number) {
      channel[r] = logit > value[r] ? Ints{} + number : channel[r];
      value[r] = logit > value[r] ? logit : value[r];
    }
    UPSNET_INLINE void explain(int r, Floats logit) { explained[r] = logit > explained[r] ? logit : explained[r]; }
    // An instance that lies elsewhere.
    UPSNET_INLINE void compete_with_zero(int32_t number) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) explain(r, Floats{}), compete(r, Floats{}, number);
    }
  };

  template <int ROWS>
  static UPSNET_INLINE void add_instance(const Plan& plan, const RowGroup& group, const float* above,
                                         const float* below, const ActiveInstance& instance, int32_t b,
                                         const Weights<ROWS>& weights, Pixels<ROWS>& pixels) {
    const PanopticTask& t = plan.task;
    const Placed& box = t.placed[instance.candidate];
    const int32_t own = t.thing_of(instance.candidate);
    const bool known = own >= 0 && own < t.num_things;
    const int64_t plane = known ? (t.num_stuff + own) * plan.pitch : 0;
    const Columns& at = plan.score_blocks[b];
    const Floats upper = enlarged(above + plane, at), lower = enlarged(below + plane, at);
    const Ints in_box = inside(box.semantic_columns, b), in_mask = inside(box.columns, b);
    const bool has_mask = t.survivors->with_masks && box.columns.meets(b * lanes, (b + 1) * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int32_t y = group.top + r;
      Floats logit = {};
      if (known && box.semantic_rows.has(y))
        logit = in_box ? mix(upper, weights.above[r], lower, weights.below[r]) : logit;
      pixels.explain(r, logit);
      if (has_mask && box.rows.has(y)) {
        const Floats mask =
            mask_values(t, instance.candidate, instance.rows[r], plan.mask_block(instance.candidate, b));
        logit += in_mask ? mask : Floats{};
      }
      pixels.compete(r, logit, t.num_stuff + instance.position);
    }
  }

  static UPSNET_INLINE void store(Ints labels, int16_t* to, int32_t count) {
    const Shorts narrow = __builtin_convertvector(labels, Shorts);
    if (count >= lanes)
      __builtin_memcpy(to, &narrow, sizeof narrow);
    else
      __builtin_memcpy(to, &narrow, sizeof(int16_t) * count);
  }

  // The first instance that meets none of the group's pixels stands at `idle` among the kept ones.
  template <int ROWS>
  static UPSNET_INLINE void fuse_block(const Plan& plan, const RowGroup& group, const float* above, const float* below,
                                       const std::vector<ActiveInstance>& active, int32_t idle, int32_t b,
                                       const Weights<ROWS>& weights) {
    const PanopticTask& t = plan.task;
    const Columns& at = plan.score_blocks[b];
    const int64_t things = t.num_stuff * plan.pitch;
    Pixels<ROWS> pixels;
    Floats thing_value[ROWS];
    Ints thing[ROWS], semantic[ROWS];
    strongest<ROWS>(above, below, plan.pitch, t.num_stuff, at, weights, pixels.value, pixels.channel);
    strongest<ROWS>(above + things, below + things, plan.pitch, t.num_things, at, weights, thing_value, thing);
    const int32_t count = t.survivors->count;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      semantic[r] = pixels.value[r] >= thing_value[r] ? pixels.channel[r] : thing[r] + t.num_stuff;
      pixels.explained[r] = Floats{} + (count > 0 ? -INFINITY : 0.0f);
    }
    bool seen_zero = false;
    for (const ActiveInstance& instance : active) {
      if (!seen_zero && idle < instance.position) pixels.compete_with_zero(t.num_stuff + idle), seen_zero = true;
      if (t.placed[instance.candidate].meets_columns(b * lanes, (b + 1) * lanes))
        add_instance<ROWS>(plan, group, above, below, instance, b, weights, pixels);
      else if (!seen_zero)
        pixels.compete_with_zero(t.num_stuff + instance.position), seen_zero = true;
    }
    if (!seen_zero && idle < count) pixels.compete_with_zero(t.num_stuff + idle);
    for (int r = 0; r < ROWS && r < group.rows; ++r) {
      if (t.unknown) pixels.compete(r, thing_value[r] - pixels.explained[r], void_label);
      const int64_t place = int64_t(group.top + r) * t.width + b * lanes;
      store(pixels.channel[r], plan.channels + place, t.width - b * lanes);
      store(semantic[r], plan.semantic + place, t.width - b * lanes);
    }
  }

  template <int ROWS>
  static UPSNET_INLINE void fuse_group(const Plan& plan, const RowGroup& group, const float* above, const float* below,
                                       const std::vector<ActiveInstance>& active, int32_t idle) {
    const PanopticTask& t = plan.task;
    Weights<ROWS> weights;
    for (int r = 0; r < ROWS; ++r) {
      const Sample row = sample_at(group.top + (r < group.rows ? r : 0), t.score_height, t.height);
      weights.above[r] = Floats{} + row.first_weight, weights.below[r] = Floats{} + row.second_weight;
    }
    for (int32_t b = 0; b * lanes < t.width; ++b)
      fuse_block<ROWS>(plan, group, above, below, active, idle, b, weights);
  }
};

}  // namespace upsnet
