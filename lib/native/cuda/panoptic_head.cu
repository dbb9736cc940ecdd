// upsnet::fuse_panoptic on CUDA. Nothing is asked of the device: whatever depends on values stays there.
//
// Five kernels: where the boxes lie; the bits of all masks; removal, a block for each class that walks the candidates;
// the list of those that stay; the fusion, a thread for each pixel, with the text that the CPU has for it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "launch.h"
#include "shared/panoptic_head.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int lanes = 32;
constexpr unsigned int all_lanes = 0xffffffffu;
constexpr int blocks_per_mask = 16;
constexpr int most_rows_of_blocks = 65535;  // CUDA's limit of a grid's second dimension
static_assert(sizeof(Placed) % sizeof(int32_t) == 0);

// What the kernels share: the task, and memory that they write. All pointers are the device's.
struct Removal {
  PanopticTask task;
  const float* boxes;
  int32_t candidates;
  int32_t row_words;  // words of 32 columns in a row of the map
  Placed* placed;
  int32_t* areas;      // pixels of each mask; zeros before
  uint32_t* bits;      // [candidate][row][word]; only those of its box are written and read
  uint32_t* covered;   // [thing][row][word]; zeros before
  int32_t* kept;
  bool* flags;
  Survivors* survivors;

  __device__ int64_t map_words() const { return int64_t(task.height) * row_words; }
};

// The words of a candidate's box, counted row by row.
struct BoxWords {
  int32_t top, first, columns;
  int64_t count;

  __device__ explicit BoxWords(const Placed& box)
      : top(box.rows.begin), first(box.columns.begin / lanes), columns((box.columns.end + lanes - 1) / lanes - first),
        count(box.columns.size() > 0 ? int64_t(box.rows.size()) * columns : 0) {}

  __device__ int32_t row(int64_t i) const { return top + int32_t(i / columns); }
  __device__ int32_t word(int64_t i) const { return first + int32_t(i % columns); }
};

__global__ void place_boxes(const __grid_constant__ Removal r) {
  const int32_t i = int32_t(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= r.candidates) return;
  r.placed[i] = place_box(r.boxes + 4 * int64_t(i), r.task.height, r.task.width);
  r.flags[i] = false;
}

// A warp forms a word at a time.
__global__ void form_bits(const __grid_constant__ Removal r) {
  const int32_t lane = int32_t(threadIdx.x % lanes), warps = int32_t(gridDim.x * (blockDim.x / lanes));
  const int32_t warp = int32_t(blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes);
  for (int32_t i = int32_t(blockIdx.y); i < r.candidates; i += int32_t(gridDim.y)) {
    const Placed& box = r.placed[i];
    const BoxWords words(box);
    int32_t area = 0;
    for (int64_t k = warp; k < words.count; k += warps) {
      const int32_t y = words.row(k), x = words.word(k) * lanes + lane;
      const bool positive = box.columns.has(x) && mask_at(r.task, i, y, x) > 0.0f;
      const uint32_t word = __ballot_sync(all_lanes, positive);
      area += __popc(word);
      if (lane == 0) r.bits[i * r.map_words() + int64_t(y) * r.row_words + words.word(k)] = word;
    }
    if (lane == 0 && area > 0) atomicAdd(r.areas + i, area);
  }
}

// Sum over the block, for all its threads. `shared_sum`: one number in shared memory.
__device__ int32_t block_sum(int32_t own, int32_t* shared_sum) {
  __syncthreads();  // whoever still reads the sum before
  if (threadIdx.x == 0) *shared_sum = 0;
  __syncthreads();
  for (int step = lanes / 2; step > 0; step /= 2) own += __shfl_down_sync(all_lanes, own, step);
  if (threadIdx.x % lanes == 0) atomicAdd(shared_sum, own);
  __syncthreads();
  return *shared_sum;
}

// Classes do not touch, so each has its block and its map of what is covered.
__global__ void remove_hidden(const __grid_constant__ Removal r) {
  __shared__ int32_t shared_sum;
  uint32_t* covered = r.covered + blockIdx.x * r.map_words();
  for (int32_t i = 0; i < r.candidates; ++i) {
    const int32_t area = r.areas[i];
    if (r.task.thing_of(i) != int32_t(blockIdx.x) || area == 0) continue;  // alike for all threads of the block
    const BoxWords words(r.placed[i]);
    const uint32_t* bits = r.bits + i * r.map_words();
    int32_t own = 0;
    for (int64_t k = threadIdx.x; k < words.count; k += blockDim.x) {
      const int64_t at = int64_t(words.row(k)) * r.row_words + words.word(k);
      own += __popc(bits[at] & covered[at]);
    }
    if (double(block_sum(own, &shared_sum)) / double(area) > max_overlap) continue;
    for (int64_t k = threadIdx.x; k < words.count; k += blockDim.x) {
      const int64_t at = int64_t(words.row(k)) * r.row_words + words.word(k);
      covered[at] |= bits[at];
    }
    if (threadIdx.x == 0) r.flags[i] = true;
    __syncthreads();  // the next candidate's words fall to other threads
  }
}

// One warp. Where nothing stays, the strongest does, without its mask.
__global__ void list_kept(const __grid_constant__ Removal r) {
  const int32_t lane = int32_t(threadIdx.x);
  int32_t count = 0;
  for (int32_t begin = 0; begin < r.candidates; begin += lanes) {
    const int32_t i = begin + lane;
    const bool stays = i < r.candidates && r.flags[i];
    const uint32_t word = __ballot_sync(all_lanes, stays);
    if (stays) r.kept[count + __popc(word & ((1u << lane) - 1))] = i;
    count += __popc(word);
  }
  if (lane != 0) return;
  *r.survivors = {count, 1};
  if (count > 0 || r.candidates == 0) return;
  r.flags[0] = true;
  r.kept[0] = 0;
  *r.survivors = {1, 0};
}

__global__ void fuse(const __grid_constant__ PanopticTask task, int16_t* channels, int16_t* semantic) {
  const int64_t pixel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pixel >= int64_t(task.height) * task.width) return;
  const Labels labels = fuse_pixel(task, int32_t(pixel / task.width), int32_t(pixel % task.width));
  channels[pixel] = labels.channel;
  semantic[pixel] = labels.semantic;
}

void launch(const Removal& r, PanopticLabels& labels, cudaStream_t stream) {
  if (r.candidates > 0) {
    place_boxes<<<blocks_for(r.candidates), threads_per_block, 0, stream>>>(r);
    check_launch();
    const dim3 grid(blocks_per_mask, unsigned(std::min(r.candidates, most_rows_of_blocks)));
    form_bits<<<grid, threads_per_block, 0, stream>>>(r);
    check_launch();
    if (r.task.num_things > 0) remove_hidden<<<unsigned(r.task.num_things), threads_per_block, 0, stream>>>(r);
    check_launch();
  }
  list_kept<<<1, lanes, 0, stream>>>(r);
  check_launch();
  fuse<<<blocks_for(int64_t(r.task.height) * r.task.width), threads_per_block, 0, stream>>>(
      r.task, labels.channels.mutable_data_ptr<int16_t>(), labels.semantic.mutable_data_ptr<int16_t>());
  check_launch();
}

std::tuple<Tensor, Tensor, Tensor> fuse_panoptic(const Tensor& scores, int64_t height, int64_t width,
                                                 const Tensor& boxes, const Tensor& classes, const Tensor& mask_logits,
                                                 int64_t num_stuff, bool unknown) {
  check_panoptic(scores, height, width, boxes, classes, mask_logits, num_stuff);
  const OnDevice device(scores);
  const int64_t n = boxes.size(0), row_words = (width + lanes - 1) / lanes, map_words = height * row_words;
  const Tensor dense_boxes = torch::stable::contiguous(boxes), dense_masks = torch::stable::contiguous(mask_logits);
  const Tensor dense_classes = torch::stable::contiguous(classes);
  const auto numbers = [&](int64_t count) { return PanopticLabels::empty(scores, {count}, ScalarType::Int); };
  Tensor placed = numbers(n * int64_t(sizeof(Placed) / sizeof(int32_t))), kept = numbers(n), survivors = numbers(2);
  Tensor areas = numbers(n), bits = numbers(n * map_words);
  Tensor covered = numbers(n > 0 ? (scores.size(0) - num_stuff) * map_words : 0);
  torch::stable::zero_(areas);
  torch::stable::zero_(covered);
  PanopticLabels labels(scores, height, width, n);

  Removal r{};
  r.boxes = dense_boxes.const_data_ptr<float>();
  r.candidates = int32_t(n), r.row_words = int32_t(row_words);
  r.placed = reinterpret_cast<Placed*>(placed.mutable_data_ptr<int32_t>());
  r.areas = areas.mutable_data_ptr<int32_t>(), r.kept = kept.mutable_data_ptr<int32_t>();
  r.bits = reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>());
  r.covered = reinterpret_cast<uint32_t*>(covered.mutable_data_ptr<int32_t>());
  r.flags = labels.kept.mutable_data_ptr<bool>();
  r.survivors = reinterpret_cast<Survivors*>(survivors.mutable_data_ptr<int32_t>());
  r.task = panoptic_task(scores, height, width, num_stuff, unknown);
  r.task.masks = dense_masks.const_data_ptr<float>(), r.task.side = int32_t(mask_logits.size(1));
  r.task.placed = r.placed, r.task.classes = dense_classes.const_data_ptr<int64_t>();
  r.task.kept = r.kept, r.task.survivors = r.survivors;
  launch(r, labels, device.stream());
  return {labels.channels, labels.semantic, labels.kept};
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_IMPL(upsnet, CUDA, m) { m.impl("fuse_panoptic", TORCH_BOX(&upsnet::fuse_panoptic)); }
