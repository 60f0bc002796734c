// Sums over rows of any length in one launch: a thread per tiny row, a warp per short row, one or several blocks per
// long row. The last block to finish adds the partial sums, in an order that depends on the shape alone.
#pragma once

#include <optional>

#include "device.h"

namespace gpk::cuda {

struct RowPlan {
  int lanes;  // threads per row, or 0 for blocks
  dim3 grid;
  int64_t partials;  // workspace elements for rows shared by blocks, per sum
};

constexpr int64_t kTinyRow = 4, kShortRow = 128, kTileOfRow = 16 * kThreads;  // accesses

inline RowPlan plan_rows(int64_t rows, int64_t accesses) {
  if (accesses <= kShortRow) {
    const int lanes = accesses <= kTinyRow ? 1 : kWarp;
    return {lanes, dim3(unsigned(std::clamp<int64_t>(ceil_div(rows, kThreads / lanes), 1, 2048))), 0};
  }
  const int64_t tiles = rows >= 1024 ? 1 : std::clamp<int64_t>(ceil_div(accesses, kTileOfRow), 1, 4096 / rows + 1);
  return {0, dim3(unsigned(tiles), unsigned(std::min<int64_t>(rows, 65535))), rows * tiles};
}

// Row::sum(row, first, step, sums) adds one thread's share of a row; Row::finish(row, sums) stores the row's results
// and returns its value. out, unless null, receives the sum of the values times share.
template <int kLanes, typename Row, typename A>
__global__ void GPK_BOUNDS reduce_short_rows(Row row_of, A* out, double share, double* totals, unsigned* ticket,
                                             int64_t rows) {
  const int lane = int(threadIdx.x) % kLanes;
  double total = 0;
  for (int64_t row = flat_thread() / kLanes; row < rows; row += flat_threads() / kLanes) {
    A sums[Row::kSums] = {};
    row_of.sum(row, lane, kLanes, sums);
    for (A& sum : sums) sum = lanes_sum<kLanes>(sum);
    if (lane == 0) total += row_of.finish(row, sums);
  }
  if (out == nullptr) return;
  grid_sum(total, totals, ticket, [&](double sum) { *out = A(sum * share); });
}

template <typename Row, typename A>
__global__ void GPK_BOUNDS reduce_long_rows(Row row_of, A* out, double share, A* partials, unsigned* ticket,
                                            int64_t rows) {
  const int64_t tiles = gridDim.x;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    A sums[Row::kSums] = {};
    row_of.sum(row, int64_t(blockIdx.x) * kThreads + threadIdx.x, tiles * kThreads, sums);
    for (int k = 0; k < Row::kSums; ++k) {
      const A sum = block_sum(sums[k]);
      if (threadIdx.x == 0) partials[(row * tiles + blockIdx.x) * Row::kSums + k] = sum;
    }
  }
  if (!last_block(ticket, gridDim.x * gridDim.y)) return;
  double total = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    A sums[Row::kSums] = {};
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int k = 0; k < Row::kSums; ++k) sums[k] += partials[(row * tiles + tile) * Row::kSums + k];
    total += row_of.finish(row, sums);
  }
  total = block_sum(total);
  if (out != nullptr && threadIdx.x == 0) *out = A(total * share);
}

// accesses: loads of the longest row.
template <typename A, typename Row>
void reduce_rows(const Tensor& like, const Row& row, A* out, double share, int64_t rows, int64_t accesses) {
  const RowPlan plan = plan_rows(rows, accesses);
  const Stream stream(like);
  if (plan.lanes) {
    std::optional<Workspace<double>> workspace;  // a single block needs none
    if (out && plan.grid.x > 1) workspace.emplace(like, plan.grid.x, stream);
    auto kernel = plan.lanes == 1 ? &reduce_short_rows<1, Row, A> : &reduce_short_rows<kWarp, Row, A>;
    GPK_LAUNCH(kernel, plan.grid, dim3(kThreads), stream, row, out, share, workspace ? workspace->sums() : nullptr,
               workspace ? workspace->ticket() : nullptr, rows);
  } else {
    const Workspace<A> workspace(like, plan.partials * Row::kSums, stream);
    auto kernel = reduce_long_rows<Row, A>;
    GPK_LAUNCH(kernel, plan.grid, dim3(kThreads), stream, row, out, share, workspace.sums(), workspace.ticket(), rows);
  }
  check_launch();
}

}  // namespace gpk::cuda
