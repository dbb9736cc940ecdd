// upsnet::paste_masks: masks on the photo as COCO's compressed run lengths; no pixel of the photo is ever stored.
//
// A column of the photo blends two columns of the mask, and along it the value is linear between two rows of the mask.
// So a stretch whose both ends lie on one side of the threshold lies there as a whole, and only where the mask's edge
// passes are single pixels computed: as bilinear interpolation without aligned corners rounds them in float32.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "variants.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

UPSNET_INLINE float blend(float low, float high, float weight) { return low * (1 - weight) + high * weight; }

// One side of a box: which places of the mask its pixels begin..end-1, those within the photo, look at.
struct Side {
  int64_t begin, end;
  std::vector<int64_t> low;   // the place at or before the pixel
  std::vector<float> weight;  // of the place after it

  Side(int64_t first, int64_t last, int64_t photo, int64_t places)
      : begin(std::max<int64_t>(first, 0)), end(std::max(begin, std::min(last + 1, photo))) {
    const float scale = float(places) / float(std::max<int64_t>(last - first + 1, 1));
    low.resize(end - begin), weight.resize(end - begin);
    for (int64_t i = 0; i < end - begin; ++i) {
      const float place = std::max(scale * (float(begin + i - first) + 0.5f) - 0.5f, 0.0f);
      low[i] = std::min(int64_t(place), places - 1);
      weight[i] = std::min(std::max(place - float(low[i]), 0.0f), 1.0f);
    }
  }
};

// The runs of ones of one mask, column by column from the top left.
class Runs {
 public:
  void add(int64_t begin, int64_t end) {
    if (!edges_.empty() && edges_.back() == begin) {
      edges_.back() = end;
    } else {
      edges_.push_back(begin), edges_.push_back(end);
    }
  }

  // COCO's text: lengths of alternate runs of zeros and ones, from the third on as differences from the last but one.
  std::string text(int64_t pixels) const {
    std::vector<int64_t> lengths;
    int64_t last = 0;
    for (int64_t edge : edges_) lengths.push_back(edge - last), last = edge;
    if (edges_.empty() || last < pixels) lengths.push_back(pixels - last);
    std::string text;
    for (size_t i = 0; i < lengths.size(); ++i) append(text, i > 2 ? lengths[i] - lengths[i - 2] : lengths[i]);
    return text;
  }

 private:
  // Five bits a character, the lowest first; the sixth says that more follow.
  static void append(std::string& text, int64_t value) {
    for (bool more = true; more;) {
      const int64_t bits = value & 31;
      value >>= 5;
      more = value != (bits & 16 ? -1 : 0);
      text += char(48 + bits + (more ? 32 : 0));
    }
  }

  std::vector<int64_t> edges_;
};

struct Photo {
  int64_t height, width;
};

// mask[side, side] lies in box (x1, y1, x2, y2; both ends included).
Runs paste(const float* mask, int64_t side, const int64_t* box, Photo photo, float threshold) {
  Runs runs;
  const Side columns(box[0], box[2], photo.width, side), rows(box[1], box[3], photo.height, side);
  std::vector<float> transposed(side * side), column(side + 1);
  for (int64_t y = 0; y < side; ++y)
    for (int64_t x = 0; x < side; ++x) transposed[x * side + y] = mask[y * side + x];
  std::vector<int64_t> first(side + 1, int64_t(rows.low.size()));  // of the pixels at or after each place
  for (int64_t i = int64_t(rows.low.size()); i-- > 0;) first[rows.low[i]] = i;
  for (int64_t place = side; place-- > 0;) first[place] = std::min(first[place], first[place + 1]);

  for (int64_t x = 0; x < int64_t(columns.low.size()); ++x) {
    const float* left = transposed.data() + columns.low[x] * side;
    const float* right = columns.low[x] + 1 < side ? left + side : left;
    for (int64_t place = 0; place < side; ++place) column[place] = blend(left[place], right[place], columns.weight[x]);
    column[side] = column[side - 1];
    const int64_t start = (columns.begin + x) * photo.height + rows.begin;
    for (int64_t place = 0; place < side; ++place) {
      const bool above = column[place] > threshold;
      if (above == (column[place + 1] > threshold)) {
        if (above && first[place] < first[place + 1]) runs.add(start + first[place], start + first[place + 1]);
        continue;
      }
      for (int64_t y = first[place]; y < first[place + 1]; ++y)
        if (blend(column[place], column[place + 1], rows.weight[y]) > threshold) runs.add(start + y, start + y + 1);
    }
  }
  return runs;
}

// masks[n, m, m] float32 in boxes[n, 4] int64. Returns the texts of all masks in a row, uint8, and where each ends, int64.
std::tuple<Tensor, Tensor> paste_masks(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width,
                                       double threshold) {
  STD_TORCH_CHECK(masks.dim() == 3 && masks.size(1) == masks.size(2) && masks.size(1) > 0 &&
                      masks.scalar_type() == ScalarType::Float,
                  "paste_masks: masks must be float32 of shape (n, m, m)");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4 &&
                      boxes.scalar_type() == ScalarType::Long,
                  "paste_masks: boxes must be int64 of shape (n, 4)");
  STD_TORCH_CHECK(height >= 0 && width >= 0, "paste_masks: height and width must not be negative");
  const int64_t n = masks.size(0), side = masks.size(1);
  const Tensor dense_masks = torch::stable::contiguous(masks), dense_boxes = torch::stable::contiguous(boxes);
  const float* mask = dense_masks.const_data_ptr<float>();
  const int64_t* box = dense_boxes.const_data_ptr<int64_t>();
  std::vector<std::string> texts(n);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      texts[i] = paste(mask + i * side * side, side, box + 4 * i, {height, width}, float(threshold)).text(height * width);
  });

  Tensor ends = torch::stable::empty({n}, ScalarType::Long, std::nullopt, masks.device());
  int64_t* end = ends.mutable_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) end[i] = total += int64_t(texts[i].size());
  Tensor joined = torch::stable::empty({total}, ScalarType::Byte, std::nullopt, masks.device());
  uint8_t* to = joined.mutable_data_ptr<uint8_t>();
  for (const std::string& text : texts) {
    std::memcpy(to, text.data(), text.size());
    to += text.size();
  }
  return {joined, ends};
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_FRAGMENT(upsnet, m) {
  m.def("paste_masks(Tensor masks, Tensor boxes, int height, int width, float threshold) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(upsnet, CPU, m) { m.impl("paste_masks", TORCH_BOX(&upsnet::paste_masks)); }
