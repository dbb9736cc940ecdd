// The arithmetic of pyramid_roi_align on the CPU, for every variant: one box from and to a map that is channels last.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "shared/pyramid_roi_align.h"
#include "variants.h"

namespace upsnet {

using torch::headeronly::BFloat16;

constexpr int taps_per_bin = taps_per_axis * taps_per_axis;

// Where a bin reads along one axis, each pixel once: element offsets of its first channel, and weights.
template <class A>
struct Bin {
  int count;
  int64_t offset[taps_per_axis];
  A weight[taps_per_axis];
};

template <class A>
struct BoxBins {
  const Bin<A>*rows, *columns;
  int64_t bins;
};

// All variants give the same bits; the loads take the time, not the sums.
UPSNET_NO_CONTRACTION

// Vectors of sums, read from and written to values of type T.
template <class T, int BYTES>
struct Lanes {
  typedef T Vector __attribute__((vector_size(BYTES)));
  typedef T Unaligned __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t count = BYTES / sizeof(T);

  static UPSNET_INLINE Vector load(const T* from) { return *(const Unaligned*)from; }
  static UPSNET_INLINE void store(T* to, Vector values) { *(Unaligned*)to = values; }
};

// Stores round to the nearest, ties to even. A macro, because GCC 12 converts no vectors inside a template.
#define UPSNET_BFLOAT16_LANES(BYTES)                                                                                 \
  template <>                                                                                                        \
  struct Lanes<BFloat16, BYTES> {                                                                                    \
    typedef float Vector __attribute__((vector_size(BYTES)));                                                        \
    typedef uint32_t Bits __attribute__((vector_size(BYTES)));                                                       \
    typedef uint16_t Halves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));                          \
    static constexpr int64_t count = BYTES / sizeof(float);                                                          \
                                                                                                                     \
    static UPSNET_INLINE Vector load(const BFloat16* from) {                                                         \
      return (Vector)(__builtin_convertvector(*(const Halves*)from, Bits) << 16);                                    \
    }                                                                                                                \
    static UPSNET_INLINE void store(BFloat16* to, Vector values) {                                                   \
      const Bits bits = (Bits)values, rounded = bits + 0x7fff + (bits >> 16 & 1);                                    \
      const Bits kept = values == values ? rounded : bits | 0x400000;                                                \
      *(Halves*)to = __builtin_convertvector(kept >> 16, Halves);                                                    \
    }                                                                                                                \
  };

UPSNET_BFLOAT16_LANES(16)
#if UPSNET_X86
UPSNET_BFLOAT16_LANES(32)
UPSNET_BFLOAT16_LANES(64)
#endif

template <class T, int BYTES>
struct RoiKernel {
  using A = RoiSum<T>;
  using L = Lanes<T, BYTES>;
  using S = Lanes<A, BYTES>;
  using Vector = typename L::Vector;
  static constexpr int wide = 4;  // vectors at a time

  // All pixels of a bin.
  struct Taps {
    int count = 0;
    int64_t offset[taps_per_bin];
    A weight[taps_per_bin];

    UPSNET_INLINE Taps(const Bin<A>& row, const Bin<A>& column) {
      for (int i = 0; i < row.count; ++i)
        for (int j = 0; j < column.count; ++j) {
          offset[count] = row.offset[i] + column.offset[j];
          weight[count++] = row.weight[i] * column.weight[j];
        }
    }
  };

  template <int VECTORS>
  static UPSNET_INLINE void sum(const T* map, const Taps& taps, T* out) {
    Vector sums[VECTORS] = {};
    for (int tap = 0; tap < taps.count; ++tap) {
      const T* from = map + taps.offset[tap];
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) sums[i] += taps.weight[tap] * L::load(from + i * L::count);
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) L::store(out + i * L::count, sums[i]);
  }

  // map: [pixels][channels] of the box' image; out: [bins * bins][channels].
  static UPSNET_INLINE void pool(const T* map, const BoxBins<A>& box, int64_t channels, T* out) {
    for (int64_t bin = 0; bin < box.bins * box.bins; ++bin, out += channels) {
      const Taps taps(box.rows[bin / box.bins], box.columns[bin % box.bins]);
      int64_t c = 0;
      for (; c + wide * L::count <= channels; c += wide * L::count) sum<wide>(map + c, taps, out + c);
      for (; c + L::count <= channels; c += L::count) sum<1>(map + c, taps, out + c);
      for (; c < channels; ++c) {
        A total = 0;
        for (int tap = 0; tap < taps.count; ++tap) total += taps.weight[tap] * A(map[taps.offset[tap] + c]);
        out[c] = T(total);
      }
    }
  }

  // The transpose of `pool`, for channels [begin, end): adds to `map` what its pixels gave.
  static UPSNET_INLINE void scatter(A* map, const BoxBins<A>& box, int64_t channels, int64_t begin, int64_t end,
                                    const T* grad) {
    for (int64_t bin = 0; bin < box.bins * box.bins; ++bin, grad += channels) {
      const Taps taps(box.rows[bin / box.bins], box.columns[bin % box.bins]);
      int64_t c = begin;
      for (; c + wide * L::count <= end; c += wide * L::count) add<wide>(map + c, taps, grad + c);
      for (; c + L::count <= end; c += L::count) add<1>(map + c, taps, grad + c);
      for (; c < end; ++c)
        for (int tap = 0; tap < taps.count; ++tap) map[taps.offset[tap] + c] += taps.weight[tap] * A(grad[c]);
    }
  }

  template <int VECTORS>
  static UPSNET_INLINE void add(A* map, const Taps& taps, const T* grad) {
    Vector given[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) given[i] = L::load(grad + i * L::count);
    for (int tap = 0; tap < taps.count; ++tap) {
      A* to = map + taps.offset[tap];
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i)
        S::store(to + i * L::count, S::load(to + i * L::count) + taps.weight[tap] * given[i]);
    }
  }
};

UPSNET_CONTRACTION_AGAIN

}  // namespace upsnet
