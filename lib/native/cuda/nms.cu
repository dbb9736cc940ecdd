// upsnet::nms_flags on CUDA: one launch for all groups, and nothing that the host has to wait for.
//
// A block sweeps a group. It takes 64 boxes at a time: which of them overlap each other is worked out in parallel, which
// of them stay is decided by one thread on bit masks, then all threads test the group's later boxes against those that
// stay. So there is no matrix of all pairs, whatever the number of boxes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "shared/nms.h"
#include "shared/nms_arguments.h"
#include "launch.h"

namespace upsnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int warp_size = 32;
constexpr int tile_size = 64;
constexpr int sweep_threads = 1024;
constexpr int positions_per_block = 8;  // a block sweeps the groups that begin at these
constexpr unsigned int all_lanes = 0xffffffffu;

struct Task {
  const float* corners;
  const int64_t* groups;  // or null
  int64_t n;
  float threshold;
  bool inclusive;
  bool* keep;  // in: which boxes take part

  __device__ bool same_group(int64_t i, int64_t j) const { return groups == nullptr || groups[i] == groups[j]; }
  __device__ bool begins_group(int64_t i) const { return i == 0 || !same_group(i - 1, i); }
  __device__ bool is_alone(int64_t i) const { return begins_group(i) && (i + 1 == n || !same_group(i, i + 1)); }
  __device__ NmsBox box(int64_t i) const { return nms_box(corners + 4 * i, inclusive); }
};

struct Tile {
  NmsBox boxes[tile_size];
  unsigned int overlapped[tile_size][2];  // of each box: the later boxes of the tile that it overlaps, as bits
  unsigned int alive[2];
  uint64_t kept;
};

// Decides on the boxes start, start + 1, … of the tile, of which there are `count`, and leaves the kept ones as bits.
__device__ void decide(const Task& task, Tile& tile, int64_t start, int count) {
  const int thread = threadIdx.x, lane = thread % warp_size, warp = thread / warp_size;
  if (thread < count) tile.boxes[thread] = task.box(start + thread);
  if (thread < tile_size) {
    const unsigned int alive = __ballot_sync(all_lanes, thread < count && task.keep[start + thread]);
    if (lane == 0) tile.alive[warp] = alive;
  }
  __syncthreads();
  for (int half_row = warp; half_row < 2 * count; half_row += sweep_threads / warp_size) {
    const int row = half_row / 2, column = half_row % 2 * warp_size + lane;
    const bool overlaps = column > row && column < count &&
        overlap_exceeds(tile.boxes[row], tile.boxes[column], task.threshold);
    const unsigned int bits = __ballot_sync(all_lanes, overlaps);
    if (lane == 0) tile.overlapped[row][half_row % 2] = bits;
  }
  __syncthreads();
  if (thread == 0) {
    uint64_t kept = uint64_t(tile.alive[1]) << 32 | tile.alive[0];
    for (int row = 0; row < count; ++row)
      if (kept >> row & 1) kept &= ~(uint64_t(tile.overlapped[row][1]) << 32 | tile.overlapped[row][0]);
    tile.kept = kept;
  }
  __syncthreads();
  if (thread < count) task.keep[start + thread] = tile.kept >> thread & 1;
}

__device__ bool is_overlapped(const Task& task, const Tile& tile, uint64_t kept, const NmsBox& box) {
  for (; kept != 0; kept &= kept - 1)
    if (overlap_exceeds(tile.boxes[__ffsll(static_cast<long long>(kept)) - 1], box, task.threshold)) return true;
  return false;
}

__device__ void sweep_group(const Task& task, Tile& tile, int64_t begin) {
  for (int64_t start = begin;; start += tile_size) {
    const int64_t own = start + threadIdx.x;
    const bool in_tile = threadIdx.x < tile_size && own < task.n && task.same_group(begin, own);
    // Also waits for all threads: what the last tile removed is written, and its boxes may be overwritten.
    const int count = __syncthreads_count(in_tile);
    decide(task, tile, start, count);
    if (count < tile_size) return;
    for (int64_t j = start + tile_size + threadIdx.x; j < task.n && task.same_group(begin, j); j += sweep_threads)
      if (task.keep[j] && is_overlapped(task, tile, tile.kept, task.box(j))) task.keep[j] = false;
  }
}

__global__ void __launch_bounds__(sweep_threads) sweep(const Task task) {
  __shared__ Tile tile;
  const int64_t first = int64_t(blockIdx.x) * positions_per_block;
  for (int64_t i = first; i < first + positions_per_block && i < task.n; ++i)
    if (task.begins_group(i) && !task.is_alone(i)) sweep_group(task, tile, i);
}

Tensor nms_flags(const Tensor& boxes, std::optional<Tensor> groups, std::optional<Tensor> valid, double threshold,
                 bool inclusive) {
  check_nms_arguments(boxes, groups, valid);
  const int64_t n = boxes.size(0);
  const OnDevice device(boxes);
  const Tensor dense = torch::stable::contiguous(boxes);
  if (groups) groups = torch::stable::contiguous(*groups);
  Tensor keep = torch::stable::full({n}, 1, ScalarType::Bool, std::nullopt, boxes.device());
  if (valid) torch::stable::copy_(keep, *valid);
  if (n == 0) return keep;
  const Task task = {dense.const_data_ptr<float>(), groups ? groups->const_data_ptr<int64_t>() : nullptr, n,
                     float_below(threshold), inclusive, keep.mutable_data_ptr<bool>()};
  const int64_t blocks = groups ? (n + positions_per_block - 1) / positions_per_block : 1;
  sweep<<<static_cast<unsigned int>(blocks), sweep_threads, 0, device.stream()>>>(task);
  check_launch();
  return keep;
}

}  // namespace
}  // namespace upsnet

STABLE_TORCH_LIBRARY_IMPL(upsnet, CUDA, m) { m.impl("nms_flags", TORCH_BOX(&upsnet::nms_flags)); }
