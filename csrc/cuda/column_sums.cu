// column_sums: sums over the rows of several matrices in one launch, some rows perhaps weighted.
#include "device.h"

namespace gpk::cuda {
namespace {

constexpr int kMatrices = 128;

// Which blocks along x do which matrix: kColumns columns each.
template <typename T>
struct Matrices {
  const T* from[kMatrices];
  T* to[kMatrices];
  int64_t cols[kMatrices];
  unsigned first_block[kMatrices];
  int count;
};

// Blocks along y share the rows; the last one to finish some columns adds the shares up.
template <typename T, typename A>
__global__ void GPK_BOUNDS sums_kernel(const Matrices<T> matrices, const A* scale, A* partials, unsigned* ticket,
                                       int64_t rows, int64_t plain) {
  GPK_SHARED(A, shared, kThreads);
  int which = matrices.count - 1;
  while (matrices.first_block[which] > blockIdx.x) --which;
  const int across = int(threadIdx.x) % kColumns, down = int(threadIdx.x) / kColumns;
  const int64_t cols = matrices.cols[which];
  const int64_t col = int64_t(blockIdx.x - matrices.first_block[which]) * kColumns + across;
  A sum = A(0);
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * kRows + down; row < rows; row += int64_t(gridDim.y) * kRows)
      sum += (row < plain ? A(1) : scale[row - plain]) * A(matrices.from[which][row * cols + col]);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int row = 1; down == 0 && row < kRows; ++row) sum += shared[row * kColumns + across];
  if (gridDim.y > 1) {
    A* partial = partials + int64_t(blockIdx.x) * kColumns + across;
    const int64_t step = int64_t(gridDim.x) * kColumns;
    if (down == 0) partial[blockIdx.y * step] = sum;
    if (!last_block(ticket + blockIdx.x, gridDim.y)) return;
    sum = A(0);
    for (unsigned share = 0; share < gridDim.y; ++share) sum += partial[share * step];
  }
  if (down == 0 && col < cols) matrices.to[which][col] = T(sum);
}

template <typename T>
void sum_columns(const std::vector<Tensor>& from, const std::vector<Tensor>& to, const Tensor& scale, int64_t plain) {
  using A = Accumulate<T>;
  const int64_t all = from[0].size(0), rows = scale.numel() ? all : plain;
  const Tensor weights = scale.numel() ? in_accumulation<A>(scale) : scale;
  const Stream stream(from[0]);
  for (size_t begin = 0; begin < from.size(); begin += kMatrices) {
    Matrices<T> matrices{};
    int64_t blocks = 0;
    for (size_t i = begin; i < std::min(from.size(), begin + kMatrices); ++i) {
      if (from[i].size(1) == 0) continue;
      matrices.from[matrices.count] = data<T>(from[i]);
      matrices.to[matrices.count] = mutable_data<T>(to[i]);
      matrices.cols[matrices.count] = from[i].size(1);
      matrices.first_block[matrices.count++] = unsigned(blocks);
      blocks += ceil_div(from[i].size(1), kColumns);
    }
    STD_TORCH_CHECK(blocks < 0x7FFFFFFF, "matrices: too many columns");
    if (blocks == 0) continue;
    const int64_t wanted = rows <= 1024 ? 1 : ceil_div(rows, 32 * kRows);
    const int64_t shares = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, 2048 / blocks));
    const Tensor partials = empty(from[0], shares > 1 ? shares * blocks * kColumns : 0, scalar_type_of<A>());
    const Tensor ticket = shares > 1 ? tickets(from[0], blocks, stream) : partials;
    auto kernel = sums_kernel<T, A>;
    GPK_LAUNCH(kernel, dim3(unsigned(blocks), unsigned(shares)), dim3(kThreads), stream, matrices,
               weights.numel() ? data<A>(weights) : nullptr, mutable_data<A>(partials),
               shares > 1 ? ticket_of(ticket) : nullptr, rows, plain);
    check_launch();
  }
}

std::vector<Tensor> column_sums_cuda(std::vector<Tensor> matrices, int64_t plain, Tensor scale) {
  STD_TORCH_CHECK(!matrices.empty(), "matrices: expected at least one");
  std::vector<Tensor> sums;
  for (Tensor& x : matrices) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == matrices[0].size(0), "matrices: expected as many rows in each");
    STD_TORCH_CHECK(x.scalar_type() == matrices[0].scalar_type(), "matrices: dtypes differ");
    x = torch::stable::contiguous(x);
    sums.push_back(empty(x, x.size(1), x.scalar_type()));
  }
  const int64_t rows = matrices[0].size(0);
  STD_TORCH_CHECK(0 <= plain && plain <= rows, "plain: expected a number of rows");
  STD_TORCH_CHECK(scale.numel() == 0 || scale.numel() == rows - plain, "scale: expected one number per row");
  dispatch(matrices[0], [&](auto zero) { sum_columns<decltype(zero)>(matrices, sums, scale, plain); });
  return sums;
}

}  // namespace

GPK_REGISTER(m) { m.impl("column_sums", TORCH_BOX(&column_sums_cuda)); }

}  // namespace gpk::cuda
