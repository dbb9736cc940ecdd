// Deformable convolution: a call's geometry, its tiles of output pixels, the places that they sample.
#pragma once

#include <cstdint>

#include "variants.h"

namespace upsnet {

// A block of output pixels.
struct Tile {
  int64_t image, row, column;  // the first
  int64_t images, rows, columns;

  UPSNET_INLINE int64_t count() const { return images * rows * columns; }
};

// One call's geometry and data: places, masks and sums are of type T, features and weights of type S (T, or the bits of
// bfloat16). Index order of strided tensors: image, channel, row, column.
template <class T, class S>
struct Deform {
  int64_t images, channels, height, width;  // input
  int64_t outputs, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t offset_groups, weight_groups;
  const S* input;   // channels last, dense
  const T* offset;  // strided: [2 * (group * taps + tap)] = dy, + 1 = dx
  int64_t offset_strides[4];
  const T* mask;  // strided, or null
  int64_t mask_strides[4];

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return images * out_height * out_width; }
  int64_t group_channels() const { return channels / weight_groups; }
  int64_t group_outputs() const { return outputs / weight_groups; }
  Tile whole_output() const { return {0, 0, 0, images, out_height, out_width}; }
};

// A strided image batch that tiles are read from or written to: NCHW or channels last.
template <class S>
struct Plane {
  S* data;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;
};

template <class T>
struct Corners {
  int64_t index[4];  // element offset of the corner's first channel in the input, -1 outside
  T weight[4];       // bilinear weights: upper left, upper right, lower left, lower right
  T fraction_y, fraction_x;
};

UPSNET_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
UPSNET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
UPSNET_INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// The pixels of a tile, one after another, without a division.
struct Place {
  int64_t image, row, column;

  UPSNET_INLINE explicit Place(const Tile& tile) : image(tile.image), row(tile.row), column(tile.column) {}
  UPSNET_INLINE void next(const Tile& tile) {
    if (++column < tile.column + tile.columns) return;
    column = tile.column;
    if (++row == tile.row + tile.rows) row = tile.row, ++image;
  }
  UPSNET_INLINE int64_t at(const int64_t (&strides)[4], int64_t channel) const {
    return image * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3];
  }
};

// An area of the output cut into equal blocks.
struct Grid {
  Tile area;
  int64_t along_images, along_rows, along_columns;  // numbers of blocks

  // Tiles of at most `largest` pixels. They are blocks, not runs of a row: the places that a block samples lie close
  // together, so that most of them are found in a core's second cache. Several small maps share a tile.
  static Grid of(const Tile& area, int64_t largest) {
    const int64_t rows = most(1, least(area.rows, largest / least(area.columns, 16)));
    const int64_t columns = least(area.columns, largest / rows);
    const int64_t maps = rows == area.rows && columns == area.columns ? most(1, largest / (rows * columns)) : 1;
    return {area, round_up(area.images, maps) / maps, round_up(area.rows, rows) / rows,
            round_up(area.columns, columns) / columns};
  }
  int64_t count() const { return along_images * along_rows * along_columns; }
  UPSNET_INLINE Tile tile(int64_t index) const {
    const int64_t i = index / (along_rows * along_columns), r = index / along_columns % along_rows,
                  c = index % along_columns;
    const Tile from = {i * area.images / along_images, r * area.rows / along_rows, c * area.columns / along_columns};
    return {area.image + from.image, area.row + from.row, area.column + from.column,
            (i + 1) * area.images / along_images - from.image, (r + 1) * area.rows / along_rows - from.row,
            (c + 1) * area.columns / along_columns - from.column};
  }
};

// A kernel tap: its number among all groups' taps, and its place relative to the pixel's place times the stride.
struct Tap {
  int64_t channel, y, x;

  template <class D>
  UPSNET_INLINE static Tap of(const D& d, int64_t tap, int64_t group) {
    return {group * d.taps() + tap, tap / d.kernel_w * d.dilation_h - d.pad_h,
            tap % d.kernel_w * d.dilation_w - d.pad_w};
  }
};

// Where one tap of one output pixel samples. The condition is closed at -1: the value there is 0 either way, but the
// derivative towards the inside is wanted, and at zero offsets the padding's samples lie exactly there.
template <class T, class S>
UPSNET_INLINE void locate(const Deform<T, S>& d, const Place& place, const Tap& tap, Corners<T>& out) {
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

// `count` pixels that follow each other in memory <-> buffer[count][row_length]; 16 x 16 at a time where they are NCHW.
template <bool to_plane, class S>
UPSNET_INLINE void move_run(const Plane<S>& plane, S* origin, int64_t count, int64_t channels, S* buffer,
                            int64_t row_length) {
  constexpr int64_t block = 16;
  const int64_t ps = plane.pixel_stride, cs = plane.channel_stride;
  if (cs == 1) {
    for (int64_t p = 0; p < count; ++p) {
      S* outer = origin + p * ps;
      S* inner = buffer + p * row_length;
      __builtin_memcpy(to_plane ? outer : inner, to_plane ? inner : outer, sizeof(S) * channels);
    }
    return;
  }
  for (int64_t p0 = 0; p0 < count; p0 += block)
    for (int64_t c0 = 0; c0 < channels; c0 += block)
      for (int64_t c = c0; c < least(c0 + block, channels); ++c)
        for (int64_t p = p0; p < least(p0 + block, count); ++p) {
          S& outer = origin[p * ps + c * cs];
          S& inner = buffer[p * row_length + c];
          if (to_plane) outer = inner;
          else inner = outer;
        }
}

template <bool to_plane, class S>
UPSNET_INLINE void move_tile(const Plane<S>& plane, const Tile& tile, int64_t channels, S* buffer, int64_t row_length) {
  const bool whole_rows = plane.row_stride == tile.columns * plane.pixel_stride;
  const int64_t run = whole_rows ? tile.rows * tile.columns : tile.columns;
  for (int64_t i = tile.image; i < tile.image + tile.images; ++i)
    for (int64_t r = tile.row; r < tile.row + tile.rows; r += whole_rows ? tile.rows : 1) {
      S* origin = plane.data + i * plane.image_stride + r * plane.row_stride + tile.column * plane.pixel_stride;
      move_run<to_plane>(plane, origin, run, channels, buffer, row_length);
      buffer += run * row_length;
    }
}

}  // namespace upsnet
