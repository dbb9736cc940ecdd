// Deformable convolution, the inner loops. Sizes, layouts and the partition of the work are decided by the callers;
// what is here works on one tile of output pixels (deform_tiles.h).
//
// All tile buffers are pixel-major (channels last) and padded with zeros to whole vectors and whole row blocks, so that
// the matrix kernel has no tails.
#pragma once

#include <cstdint>
#include <type_traits>

#include "deform_tiles.h"
#include "variants.h"

namespace upsnet {

constexpr int64_t largest_tile = 288;  // pixels; each tap's weights are fetched once a tile, and stay in a core's L2

template <class T, class S>
struct ForwardTask {
  Deform<T, S> d;
  Grid grid;
  int64_t tile;     // no tile of the grid has more pixels
  const T* bias;    // [group][lanes of all its panels]
  const S* weight;  // [tap][group][panel of outputs][channel][lanes of the panel], halves: [channel / 2][lanes][2]
  Plane<S> output;
};

template <class T>
struct BackwardTask {
  Deform<T, T> d;
  const T* weight;  // [tap][group][panel of channels][output][lanes of the panel]
  Plane<T> grad_output;
  T* grad_offset;  // dense NCHW
  T* grad_mask;    // dense NCHW, or null
};

// Private sums of one part of the backward pass.
template <class T>
struct PartSums {
  T* input;          // rows [first_row, ...) of the flattened (image, row) axis, channels last
  int64_t first_row;
  T* weight;         // [tap][group][output, padded to steps][channel, padded to panels]
  T* bias;           // [outputs]
};

// Sixteen bfloat16, as bits. AVX-512's instructions for them stand as text in here, since compilers disagree about the
// types of their names.
typedef uint16_t HalfBits __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t WideBits __attribute__((vector_size(64)));

// BYTES a vector, ROWS x VECTORS accumulators in the matrix kernel. Bits of bfloat16 are multiplied in pairs.
template <class T, class S, int BYTES, int ROWS, int VECTORS>
struct Kernel {
  static constexpr bool halves = sizeof(S) < sizeof(T);
  static constexpr int64_t factors = halves ? 2 : 1;  // values that one product takes from either side
  static constexpr int64_t lanes = BYTES / sizeof(T);
  static constexpr int64_t panel = lanes * VECTORS;
  static constexpr int64_t step = ROWS / 3;  // what remains of the rows is rounded up to it
  using Element = std::conditional_t<halves, int32_t, T>;
  typedef Element Factor __attribute__((aligned(alignof(S)), may_alias));
  typedef Element Factors __attribute__((vector_size(BYTES), aligned(alignof(S)), may_alias));
  typedef T Vector __attribute__((vector_size(BYTES)));
  typedef T Unaligned __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));

  static UPSNET_INLINE Vector load(const S* from) {
    if constexpr (halves) {
      return (Vector)(__builtin_convertvector(*(const HalfBits*)from, WideBits) << 16);
    } else {
      return *(const Unaligned*)from;
    }
  }
  static UPSNET_INLINE void store(S* to, Vector values) {
    if constexpr (halves) {
      HalfBits rounded;
      asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(values));
      *(HalfBits*)to = rounded;
    } else {
      *(Unaligned*)to = values;
    }
  }
  static UPSNET_INLINE Vector add_product(Vector sum, Element left, Factors right) {
    if constexpr (halves) {
      const Factors lefts = left - Factors{};
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(lefts), "v"(right));
      return sum;
    } else {
      return sum + left * right;
    }
  }

  template <bool add, int COUNT>
  static UPSNET_INLINE void block(const S* a, int64_t a_row, int64_t a_column, const S* b, int64_t b_row, T* c,
                                  int64_t c_row, int64_t depth) {
    Vector sum[COUNT][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        sum[i][j] = Vector{};
        if (add) __builtin_prefetch(c + i * c_row + j * lanes, 1);  // it may lie far away; it is wanted at the end
      }
    for (int64_t p = 0; p < depth; ++p) {
      Factors right[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) right[j] = *(const Factors*)(b + j * lanes * factors);
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j)
          sum[i][j] = add_product(sum[i][j], *(const Factor*)(a + i * a_row), right[j]);
      a += a_column;
      b += b_row;
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        Unaligned& target = *(Unaligned*)(c + i * c_row + j * lanes);
        target = add ? target + sum[i][j] : sum[i][j];
      }
  }

  // c[rows, panels] += a[rows, depth] b[depth, panels], or = where `add` is false. Rows come in whole steps; depth
  // counts products. Every sum runs in ascending depth, whatever the block shape.
  template <bool add>
  static UPSNET_INLINE void multiply(const S* a, int64_t a_row, int64_t a_column, const S* b, int64_t b_panel,
                                     int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t panels, int64_t depth) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
      for (int64_t j = 0; j < panels; ++j)
        block<add, ROWS>(a + i * a_row, a_row, a_column, b + j * b_panel, b_row, c + i * c_row + j * panel, c_row,
                         depth);
    for (; i < rows; i += step)
      for (int64_t j = 0; j < panels; ++j)
        block<add, step>(a + i * a_row, a_row, a_column, b + j * b_panel, b_row, c + i * c_row + j * panel, c_row,
                         depth);
  }

  static UPSNET_INLINE Vector blend(const Corners<T>& at, const S* first, const S* second, const S* third,
                                    const S* fourth) {
    return at.weight[0] * load(first) + at.weight[1] * load(second) + at.weight[2] * load(third) +
        at.weight[3] * load(fourth);
  }

  static UPSNET_INLINE void sample(const Deform<T, S>& d, const Tile& tile, int64_t tap, const S* zeros, S* out,
                                   int64_t out_row) {
    const int64_t width = d.channels / d.offset_groups;
    for (int64_t g = 0; g < d.offset_groups; ++g) {
      const Tap where = Tap::of(d, tap, g);
      Place place(tile);
      for (int64_t p = 0; p < tile.count(); ++p, place.next(tile)) {
        Corners<T> at;
        locate(d, place, where, at);
        if (d.mask != nullptr) {
          const T m = d.mask[place.at(d.mask_strides, where.channel)];
          for (int i = 0; i < 4; ++i) at.weight[i] *= m;
        }
        const S* corner[4];
        for (int i = 0; i < 4; ++i) corner[i] = at.index[i] < 0 ? zeros : d.input + at.index[i] + g * width;
        S* target = out + p * out_row + g * width;
        int64_t c = 0;
        for (; c + lanes <= width; c += lanes)
          store(target + c, blend(at, corner[0] + c, corner[1] + c, corner[2] + c, corner[3] + c));
        if (c < width) {
          S rest[5][lanes] = {};
          for (int i = 0; i < 4; ++i) __builtin_memcpy(rest[i], corner[i] + c, sizeof(S) * (width - c));
          store(rest[4], blend(at, rest[0], rest[1], rest[2], rest[3]));
          __builtin_memcpy(target + c, rest[4], sizeof(S) * (width - c));
        }
      }
    }
  }

  // + 16: rows do not fall on the same sets of a cache.
  static int64_t sample_row(const Deform<T, S>& d) { return round_up(d.channels, panel) + 16; }
  static int64_t padded_outputs(const Deform<T, S>& d) { return round_up(d.group_outputs(), panel); }
  static int64_t sums_row(const Deform<T, S>& d) { return d.weight_groups * padded_outputs(d) + 16; }
  static int64_t padded_depth(const Deform<T, S>& d) { return round_up(d.group_channels(), factors); }

  // In values of T; the samples are of type S.
  static int64_t forward_scratch(const Deform<T, S>& d, int64_t tile) {
    return round_up(tile, step) * (sample_row(d) + sums_row(d)) + sample_row(d);
  }

  // Output tiles [begin, end). `scratch` holds forward_scratch() zeros.
  static UPSNET_INLINE void forward(const ForwardTask<T, S>& task, T* scratch, int64_t begin, int64_t end) {
    const Deform<T, S>& d = task.d;
    const int64_t samples_row = sample_row(d), row = sums_row(d), rows = round_up(task.tile, step);
    const int64_t wide = padded_outputs(d), depth = padded_depth(d), group_weight = wide * depth;
    T* sums = scratch;
    S* samples = (S*)(sums + rows * row);
    const S* zeros = samples + rows * samples_row;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = task.grid.tile(t);
      for (int64_t p = 0; p < tile.count(); ++p)
        __builtin_memcpy(sums + p * row, task.bias, sizeof(T) * d.weight_groups * wide);
      for (int64_t tap = 0; tap < d.taps(); ++tap) {
        sample(d, tile, tap, zeros, samples, samples_row);
        for (int64_t g = 0; g < d.weight_groups; ++g)
          multiply<true>(samples + g * d.group_channels(), samples_row, factors,
                         task.weight + (tap * d.weight_groups + g) * group_weight, panel * depth, panel * factors,
                         sums + g * wide, row, round_up(tile.count(), step), wide / panel, depth / factors);
      }
      S* results = (S*)sums;
      if constexpr (halves)  // each row is rounded where it stands
        for (int64_t p = 0; p < tile.count(); ++p)
          for (int64_t c = 0; c < d.weight_groups * wide; c += lanes)
            store(results + p * row * factors + c, *(const Unaligned*)(sums + p * row + c));
      for (int64_t g = 0; g < d.weight_groups; ++g) {
        Plane<S> output = task.output;
        output.data += g * d.group_outputs() * output.channel_stride;
        move_tile<true>(output, tile, d.group_outputs(), results + g * wide, row * factors);
      }
    }
  }

  static UPSNET_INLINE T total(Vector values) {
#pragma GCC unroll 4
    for (int64_t half = lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
  }

  // For one tile and tap, in one pass over the corners: samples again (for the weight gradient), the scatter to the
  // input gradient, and the four dot products that give the gradients of offset and mask.
  static UPSNET_INLINE void scatter(const BackwardTask<T>& task, const PartSums<T>& sums, const Tile& tile, int64_t tap,
                                    const T* zeros, T* waste, const T* columns, T* samples, int64_t row_length) {
    const Deform<T, T>& d = task.d;
    const int64_t width = d.channels / d.offset_groups, image_pixels = d.out_height * d.out_width;
    T* const grad_base = sums.input - sums.first_row * d.width * d.channels;
    for (int64_t g = 0; g < d.offset_groups; ++g) {
      const Tap where = Tap::of(d, tap, g);
      Place place(tile);
      for (int64_t p = 0; p < tile.count(); ++p, place.next(tile)) {
        Corners<T> at;
        locate(d, place, where, at);
        const T m = d.mask != nullptr ? d.mask[place.at(d.mask_strides, where.channel)] : T(1);
        const T* corner[4];
        T* grad[4];
        T scale[4];
        for (int i = 0; i < 4; ++i) {
          corner[i] = at.index[i] < 0 ? zeros : d.input + at.index[i] + g * width;
          grad[i] = at.index[i] < 0 ? waste : grad_base + at.index[i] + g * width;
          scale[i] = at.weight[i] * m;
        }
        const T* column_p = columns + p * row_length + g * width;
        T* sample_p = samples + p * row_length + g * width;
        T dot[4] = {0, 0, 0, 0};
        Vector dots[4] = {{}, {}, {}, {}};
        int64_t c = 0;
        for (; c + lanes <= width; c += lanes) {
          const Vector go = *(const Unaligned*)(column_p + c);
          Vector value = {};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const Vector v = *(const Unaligned*)(corner[i] + c);
            value += scale[i] * v;
            dots[i] += go * v;
            *(Unaligned*)(grad[i] + c) += scale[i] * go;
          }
          *(Unaligned*)(sample_p + c) = value;
        }
        for (; c < width; ++c) {
          T value = 0;
          for (int i = 0; i < 4; ++i) {
            value += scale[i] * corner[i][c];
            dot[i] += column_p[c] * corner[i][c];
            grad[i][c] += scale[i] * column_p[c];
          }
          sample_p[c] = value;
        }
        for (int i = 0; i < 4; ++i) dots[i][0] += dot[i];
        const T fy = at.fraction_y, fx = at.fraction_x;
        const int64_t pixel = place.row * d.out_width + place.column, channels = d.offset_groups * d.taps();
        T* grad_offset = task.grad_offset + 2 * (place.image * channels + where.channel) * image_pixels + pixel;
        grad_offset[0] = m * total((1 - fx) * (dots[2] - dots[0]) + fx * (dots[3] - dots[1]));
        grad_offset[image_pixels] = m * total((1 - fy) * (dots[1] - dots[0]) + fy * (dots[3] - dots[2]));
        if (task.grad_mask != nullptr)
          task.grad_mask[(place.image * channels + where.channel) * image_pixels + pixel] =
              total(at.weight[0] * dots[0] + at.weight[1] * dots[1] + at.weight[2] * dots[2] + at.weight[3] * dots[3]);
      }
    }
  }

  static int64_t weight_rows(const Deform<T, T>& d) { return round_up(d.group_outputs(), step); }
  static int64_t weight_row(const Deform<T, T>& d) { return round_up(d.group_channels(), panel) + 16; }
  // The last groups' blocks reach beyond the last channel and output by less than a panel and a row block.
  static int64_t columns_row(const Deform<T, T>& d) { return round_up(d.channels + panel, panel) + 16; }
  static int64_t grads_row(const Deform<T, T>& d) { return round_up(d.outputs + step, panel) + 16; }

  static int64_t backward_scratch(const Deform<T, T>& d) {
    return round_up(largest_tile, step) * (2 * columns_row(d) + grads_row(d)) + 2 * d.channels;
  }

  // One part of the output into its private sums. `scratch` holds backward_scratch() zeros.
  static UPSNET_INLINE void backward(const BackwardTask<T>& task, const Tile& part, const PartSums<T>& sums,
                                     T* scratch) {
    const Deform<T, T>& d = task.d;
    const int64_t row = columns_row(d), go_row = grads_row(d), rows = round_up(largest_tile, step);
    const int64_t wide = round_up(d.group_channels(), panel), panels = wide / panel, deep = d.group_outputs();
    T* columns = scratch;
    T* samples = columns + rows * row;
    T* grads = samples + rows * row;
    T* zeros = grads + rows * go_row;
    T* waste = zeros + d.channels;
    const Grid grid = Grid::of(part, largest_tile);
    for (int64_t t = 0; t < grid.count(); ++t) {
      const Tile tile = grid.tile(t);
      const int64_t count = tile.count();
      move_tile<false>(task.grad_output, tile, d.outputs, grads, go_row);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t o = 0; o < d.outputs; ++o) sums.bias[o] += grads[p * go_row + o];
      for (int64_t tap = 0; tap < d.taps(); ++tap) {
        // In ascending order: what a group's last panel writes beyond its channels, the next group overwrites.
        for (int64_t g = 0; g < d.weight_groups; ++g)
          multiply<false>(grads + g * deep, go_row, 1, task.weight + (tap * d.weight_groups + g) * wide * deep,
                          panel * deep, panel, columns + g * d.group_channels(), row, round_up(count, step), panels,
                          deep);
        scatter(task, sums, tile, tap, zeros, waste, columns, samples, row);
        for (int64_t g = 0; g < d.weight_groups; ++g)
          multiply<true>(grads + g * deep, 1, go_row, samples + g * d.group_channels(), panel, row,
                         sums.weight + (tap * d.weight_groups + g) * weight_rows(d) * weight_row(d), weight_row(d),
                         weight_rows(d), panels, count);
      }
    }
  }
};

}  // namespace upsnet
