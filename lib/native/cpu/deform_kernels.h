// Deformable convolution, the inner loops. Sizes, layouts and the partition of the work are decided in
// deform_conv2d.cpp; what is here works on one tile of output pixels.
//
// All tile buffers are pixel-major (channels last) and padded with zeros to whole vectors and whole row blocks, so that
// the matrix kernel has no tails.
#pragma once

#include <cstdint>

#include "variants.h"

namespace upsnet {

constexpr int64_t max_tile = 96;  // pixels; 96 x 256 floats are 98 KB: two such buffers stay in a core's L2

// One call's geometry and data. Index order of strided tensors: image, channel, row, column.
template <class T>
struct Deform {
  int64_t images, channels, height, width;  // input
  int64_t outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t offset_groups;
  const T* input;   // channels last, dense
  const T* offset;  // strided: [2 * (group * taps + tap)] = dy, + 1 = dx
  int64_t offset_strides[4];
  const T* mask;  // strided, or null
  int64_t mask_strides[4];

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return images * out_height * out_width; }
};

// A strided image batch that tiles are read from or written to: NCHW or channels last.
template <class T>
struct Plane {
  T* data;
  int64_t image_stride, pixel_stride, channel_stride, image_pixels;
};

template <class T>
struct Corners {
  int64_t index[4];  // element offset of the corner's first channel in the input, -1 outside
  T weight[4];       // bilinear weights: upper left, upper right, lower left, lower right
  T fraction_y, fraction_x;
};

UPSNET_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// An output pixel, and the step to the next one without a division.
struct Place {
  int64_t image, row, column;

  template <class T>
  UPSNET_INLINE static Place of(const Deform<T>& d, int64_t pixel) {
    return {pixel / (d.out_width * d.out_height), pixel / d.out_width % d.out_height, pixel % d.out_width};
  }
  template <class T>
  UPSNET_INLINE void next(const Deform<T>& d) {
    if (++column < d.out_width) return;
    column = 0;
    if (++row == d.out_height) row = 0, ++image;
  }
  UPSNET_INLINE int64_t at(const int64_t (&strides)[4], int64_t channel) const {
    return image * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3];
  }
};

// A kernel tap: its number among all groups' taps, and its place relative to the pixel's place times the stride.
struct Tap {
  int64_t channel, y, x;

  template <class T>
  UPSNET_INLINE static Tap of(const Deform<T>& d, int64_t tap, int64_t group) {
    return {group * d.taps() + tap, tap / d.kernel_w * d.dilation_h - d.pad_h, tap % d.kernel_w * d.dilation_w - d.pad_w};
  }
};

// Where one tap of one output pixel samples. The condition is closed at -1: the value there is 0 either way, but the
// derivative towards the inside is wanted, and at zero offsets the padding's samples lie exactly there.
template <class T>
UPSNET_INLINE void locate(const Deform<T>& d, const Place& place, const Tap& tap, Corners<T>& out) {
  const T* offset = d.offset + place.at(d.offset_strides, 2 * tap.channel);
  const T y = T(place.row * d.stride_h + tap.y) + offset[0];
  const T x = T(place.column * d.stride_w + tap.x) + offset[d.offset_strides[1]];
  if (!(y >= T(-1) && y < T(d.height) && x >= T(-1) && x < T(d.width))) {
    const T outside = (y != y || x != x) ? y + x : T(0);  // a NaN offset must stay visible in the result
    for (int i = 0; i < 4; ++i) {
      out.index[i] = -1;
      out.weight[i] = outside;
    }
    out.fraction_y = out.fraction_x = T(0);
    return;
  }
  const T floor_y = __builtin_floor(y), floor_x = __builtin_floor(x);
  const int64_t top = int64_t(floor_y), left = int64_t(floor_x);
  const T fy = y - floor_y, fx = x - floor_x;
  const int64_t base = ((place.image * d.height + top) * d.width + left) * d.channels;
  const bool has_top = top >= 0, has_bottom = top + 1 < d.height, has_left = left >= 0, has_right = left + 1 < d.width;
  out.index[0] = has_top && has_left ? base : -1;
  out.index[1] = has_top && has_right ? base + d.channels : -1;
  out.index[2] = has_bottom && has_left ? base + d.width * d.channels : -1;
  out.index[3] = has_bottom && has_right ? base + (d.width + 1) * d.channels : -1;
  out.weight[0] = (1 - fy) * (1 - fx);
  out.weight[1] = (1 - fy) * fx;
  out.weight[2] = fy * (1 - fx);
  out.weight[3] = fy * fx;
  out.fraction_y = fy;
  out.fraction_x = fx;
}

// Tile of `count` pixels from `first` <-> buffer[count][row_length]; a 16 x 16 block at a time where the plane is NCHW.
template <class T, bool to_plane>
UPSNET_INLINE void move_tile(const Plane<T>& plane, int64_t first, int64_t count, int64_t channels, T* buffer,
                             int64_t row_length) {
  constexpr int64_t block = 16;
  while (count > 0) {
    const int64_t image = first / plane.image_pixels, pixel = first % plane.image_pixels;
    const int64_t run = plane.image_pixels - pixel < count ? plane.image_pixels - pixel : count;
    T* origin = plane.data + image * plane.image_stride + pixel * plane.pixel_stride;
    const int64_t ps = plane.pixel_stride, cs = plane.channel_stride;
    if (cs == 1) {
      for (int64_t p = 0; p < run; ++p) {
        T* outer = origin + p * ps;
        T* inner = buffer + p * row_length;
        __builtin_memcpy(to_plane ? outer : inner, to_plane ? inner : outer, sizeof(T) * channels);
      }
    } else {
      for (int64_t p0 = 0; p0 < run; p0 += block) {
        const int64_t p1 = p0 + block < run ? p0 + block : run;
        for (int64_t c0 = 0; c0 < channels; c0 += block) {
          const int64_t c1 = c0 + block < channels ? c0 + block : channels;
          for (int64_t c = c0; c < c1; ++c)
            for (int64_t p = p0; p < p1; ++p) {
              T& outer = origin[p * ps + c * cs];
              T& inner = buffer[p * row_length + c];
              if (to_plane) outer = inner;
              else inner = outer;
            }
        }
      }
    }
    first += run;
    count -= run;
    buffer += run * row_length;
  }
}

template <class T>
struct ForwardTask {
  Deform<T> d;
  const T* bias;    // padded to whole panels
  const T* weight;  // [tap][panel of outputs][channel][lanes of the panel]
  Plane<T> output;
  int64_t tile;
};

template <class T>
struct BackwardTask {
  Deform<T> d;
  const T* weight;  // [tap][panel of channels][output][lanes of the panel]
  Plane<T> grad_output;
  T* grad_offset;  // dense NCHW
  T* grad_mask;    // dense NCHW, or null
  int64_t tile;
};

// Private sums of one part of the backward pass.
template <class T>
struct PartSums {
  T* input;          // rows [first_row, ...) of the flattened (image, row) axis, channels last
  int64_t first_row;
  T* weight;         // [tap][output, padded to rows][channel, padded to lanes]
  T* bias;           // [outputs]
};

// BYTES a vector, ROWS x VECTORS accumulators in the matrix kernel.
template <class T, int BYTES, int ROWS, int VECTORS>
struct Kernel {
  static constexpr int64_t lanes = BYTES / sizeof(T);
  static constexpr int64_t panel = lanes * VECTORS;
  typedef T Vector __attribute__((vector_size(BYTES)));
  typedef T Unaligned __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));

  static UPSNET_INLINE void block(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* c,
                                  int64_t c_row, int64_t depth) {
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = *(const Unaligned*)(c + i * c_row + j * lanes);
    for (int64_t p = 0; p < depth; ++p) {
      Vector right[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) right[j] = *(const Unaligned*)(b + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sum[i][j] += a[i * a_row] * right[j];
      a += a_column;
      b += b_row;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) *(Unaligned*)(c + i * c_row + j * lanes) = sum[i][j];
  }

  // c[rows, panels] += a[rows, depth] b[depth, panels]; every sum runs in ascending depth, whatever the block shape.
  static UPSNET_INLINE void multiply(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_panel,
                                     int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t panels, int64_t depth) {
    for (int64_t j = 0; j < panels; ++j)
      for (int64_t i = 0; i < rows; i += ROWS)
        block(a + i * a_row, a_row, a_column, b + j * b_panel, b_row, c + i * c_row + j * panel, c_row, depth);
  }

  static UPSNET_INLINE void sample(const Deform<T>& d, int64_t first, int64_t count, int64_t tap, const T* zeros,
                                   T* out, int64_t out_row) {
    const int64_t width = d.channels / d.offset_groups;
    for (int64_t g = 0; g < d.offset_groups; ++g) {
      const Tap where = Tap::of(d, tap, g);
      Place place = Place::of(d, first);
      for (int64_t p = 0; p < count; ++p, place.next(d)) {
        Corners<T> at;
        locate(d, place, where, at);
        if (d.mask != nullptr) {
          const T m = d.mask[place.at(d.mask_strides, where.channel)];
          for (int i = 0; i < 4; ++i) at.weight[i] *= m;
        }
        const T* corner[4];
        for (int i = 0; i < 4; ++i) corner[i] = at.index[i] < 0 ? zeros : d.input + at.index[i] + g * width;
        T* target = out + p * out_row + g * width;
        int64_t c = 0;
        for (; c + lanes <= width; c += lanes)
          *(Unaligned*)(target + c) = at.weight[0] * *(const Unaligned*)(corner[0] + c) +
              at.weight[1] * *(const Unaligned*)(corner[1] + c) + at.weight[2] * *(const Unaligned*)(corner[2] + c) +
              at.weight[3] * *(const Unaligned*)(corner[3] + c);
        for (; c < width; ++c)
          target[c] = at.weight[0] * corner[0][c] + at.weight[1] * corner[1][c] + at.weight[2] * corner[2][c] +
              at.weight[3] * corner[3][c];
      }
    }
  }

  static int64_t sample_row(const Deform<T>& d) { return round_up(d.channels, panel) + 16; }  // + 16: no set conflicts
  static int64_t output_row(const Deform<T>& d) { return round_up(round_up(d.outputs, panel), ROWS) + 16; }
  static int64_t tile_rows(int64_t tile) { return round_up(tile, ROWS); }

  static int64_t forward_scratch(const Deform<T>& d, int64_t tile) {
    return tile_rows(tile) * (sample_row(d) + output_row(d)) + d.channels;
  }

  // Output tiles [begin, end). `scratch` holds forward_scratch() zeros.
  static UPSNET_INLINE void forward(const ForwardTask<T>& task, T* scratch, int64_t begin, int64_t end) {
    const Deform<T>& d = task.d;
    const int64_t samples_row = sample_row(d), sums_row = output_row(d);
    const int64_t panels = round_up(d.outputs, panel) / panel;
    T* samples = scratch;
    T* sums = samples + tile_rows(task.tile) * samples_row;
    const T* zeros = sums + tile_rows(task.tile) * sums_row;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * task.tile;
      const int64_t count = d.pixels() - first < task.tile ? d.pixels() - first : task.tile;
      for (int64_t p = 0; p < count; ++p)
        __builtin_memcpy(sums + p * sums_row, task.bias, sizeof(T) * panels * panel);
      for (int64_t tap = 0; tap < d.taps(); ++tap) {
        sample(d, first, count, tap, zeros, samples, samples_row);
        multiply(samples, samples_row, 1, task.weight + tap * panels * panel * d.channels, panel * d.channels, panel,
                 sums, sums_row, round_up(count, ROWS), panels, d.channels);
      }
      move_tile<T, true>(task.output, first, count, d.outputs, sums, sums_row);
    }
  }

  // For one tile and tap, in one pass over the corners: samples again (for the weight gradient), the scatter to the
  // input gradient, and the four dot products that give the gradients of offset and mask.
  static UPSNET_INLINE void scatter(const BackwardTask<T>& task, const PartSums<T>& sums, int64_t first, int64_t count,
                                    int64_t tap, const T* zeros, T* waste, const T* columns, T* samples,
                                    int64_t row_length) {
    const Deform<T>& d = task.d;
    const int64_t width = d.channels / d.offset_groups, image_pixels = d.out_height * d.out_width;
    T* const grad_base = sums.input - sums.first_row * d.width * d.channels;
    for (int64_t g = 0; g < d.offset_groups; ++g) {
      const Tap where = Tap::of(d, tap, g);
      Place place = Place::of(d, first);
      for (int64_t p = 0; p < count; ++p, place.next(d)) {
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
        for (int i = 0; i < 4; ++i)
          for (int64_t l = 0; l < lanes; ++l) dot[i] += dots[i][l];
        const T fy = at.fraction_y, fx = at.fraction_x;
        const int64_t pixel = place.row * d.out_width + place.column, channels = d.offset_groups * d.taps();
        T* grad_offset = task.grad_offset + 2 * (place.image * channels + where.channel) * image_pixels + pixel;
        grad_offset[0] = m * ((1 - fx) * (dot[2] - dot[0]) + fx * (dot[3] - dot[1]));
        grad_offset[image_pixels] = m * ((1 - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]));
        if (task.grad_mask != nullptr)
          task.grad_mask[(place.image * channels + where.channel) * image_pixels + pixel] =
              at.weight[0] * dot[0] + at.weight[1] * dot[1] + at.weight[2] * dot[2] + at.weight[3] * dot[3];
      }
    }
  }

  static int64_t weight_rows(const Deform<T>& d) { return round_up(d.outputs, ROWS); }
  static int64_t weight_row(const Deform<T>& d) { return round_up(d.channels, panel); }

  static int64_t backward_scratch(const Deform<T>& d, int64_t tile) {
    return tile_rows(tile) * (2 * sample_row(d) + output_row(d)) + 2 * d.channels;
  }

  // Output pixels [begin, end) into the private sums of one part. `scratch` holds backward_scratch() zeros.
  static UPSNET_INLINE void backward(const BackwardTask<T>& task, const PartSums<T>& sums, T* scratch, int64_t begin,
                                     int64_t end) {
    const Deform<T>& d = task.d;
    const int64_t columns_row = sample_row(d), grads_row = output_row(d), rows = tile_rows(task.tile);
    const int64_t panels = round_up(d.channels, panel) / panel;
    T* columns = scratch;
    T* samples = columns + rows * columns_row;
    T* grads = samples + rows * columns_row;
    T* zeros = grads + rows * grads_row;
    T* waste = zeros + d.channels;
    for (int64_t first = begin; first < end; first += task.tile) {
      const int64_t count = end - first < task.tile ? end - first : task.tile;
      move_tile<T, false>(task.grad_output, first, count, d.outputs, grads, grads_row);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t o = 0; o < d.outputs; ++o) sums.bias[o] += grads[p * grads_row + o];
      for (int64_t tap = 0; tap < d.taps(); ++tap) {
        __builtin_memset(columns, 0, sizeof(T) * round_up(count, ROWS) * columns_row);
        multiply(grads, grads_row, 1, task.weight + tap * panels * panel * d.outputs, panel * d.outputs, panel, columns,
                 columns_row, round_up(count, ROWS), panels, d.outputs);
        scatter(task, sums, first, count, tap, zeros, waste, columns, samples, columns_row);
        multiply(grads, 1, grads_row, samples, panel, columns_row, sums.weight + tap * weight_rows(d) * weight_row(d),
                 weight_row(d), weight_rows(d), panels, count);
      }
    }
  }
};

}  // namespace upsnet
