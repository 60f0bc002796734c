// affine_gradients: gradients of w and b (K,) in y = x w + b, for a cotangent and an operand (R, K, I): sums of
// cotangent * operand, and of cotangent, over R and I.
#include "device.h"

namespace gpk::cuda {
namespace {

// Columns and rows that a block covers; its warps stride over the rows.
constexpr int kColumns = kWarp, kRows = kThreads / kWarp;

struct Extent {
  int64_t rows, cols, inner;
};

// A block sums kColumns columns over a share of the rows; the last block of those columns adds the shares. With I > 1 a
// column's elements are contiguous, and a warp strides over them.
template <typename T, typename A>
__global__ void GPK_BOUNDS affine_kernel(const T* cotangent, const T* operand, A* products, A* sums, A* partials,
                                         unsigned* ticket, Extent e) {
  GPK_SHARED(A, shared, 2 * kThreads);
  const int across = int(threadIdx.x) % kColumns, down = int(threadIdx.x) / kColumns;
  const bool along = e.inner > 1;
  const int64_t col = along ? blockIdx.x : int64_t(blockIdx.x) * kColumns + across;
  A product = 0, sum = 0;
  if (col < e.cols)
    for (int64_t row = int64_t(blockIdx.y) * kRows + down; row < e.rows; row += int64_t(gridDim.y) * kRows)
      for (int64_t i = along ? across : 0; i < e.inner; i += along ? kColumns : 1) {
        const int64_t at = (row * e.cols + col) * e.inner + i;
        product += A(cotangent[at]) * A(operand[at]);
        sum += A(cotangent[at]);
      }
  if (along) {
    product = warp_sum(product);
    sum = warp_sum(sum);
  }
  shared[threadIdx.x] = product;
  shared[kThreads + threadIdx.x] = sum;
  __syncthreads();
  const bool mine = down == 0 && col < e.cols && (!along || across == 0);
  A* partial = partials + 2 * (int64_t(blockIdx.y) * e.cols + col);
  if (mine) {
    for (int row = 1; row < kRows; ++row) {
      product += shared[row * kColumns + across];
      sum += shared[kThreads + row * kColumns + across];
    }
    partial[0] = product;
    partial[1] = sum;
  }
  if (!last_block(ticket + blockIdx.x, gridDim.y) || !mine) return;
  product = sum = A(0);
  for (unsigned share = 0; share < gridDim.y; ++share) {
    product += partials[2 * (int64_t(share) * e.cols + col)];
    sum += partials[2 * (int64_t(share) * e.cols + col) + 1];
  }
  products[col] = product;
  sums[col] = sum;
}

std::tuple<Tensor, Tensor> affine_gradients_cuda(Tensor cotangent, Tensor operand) {
  check_affine_gradients(cotangent, operand);
  const Tensor c = torch::stable::contiguous(cotangent), x = torch::stable::contiguous(operand);
  const Extent e{c.size(0), c.size(1), c.size(2)};
  STD_TORCH_CHECK(e.rows > 0 && e.cols > 0, "cotangent: expected at least one row and column, got shape ", text_of(c));
  const int64_t blocks = e.inner > 1 ? e.cols : ceil_div(e.cols, kColumns);
  const int64_t shares = std::clamp<int64_t>(ceil_div(e.rows, 4 * kRows), 1, std::max<int64_t>(1, 1024 / blocks));
  STD_TORCH_CHECK(blocks < 0x7FFFFFFF, "cotangent: expected fewer than 2^31 blocks of columns, got ", blocks);
  const Stream stream(c);
  const Tensor ticket = tickets(c, blocks, stream);
  Tensor products, sums;
  dispatch(c, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    products = empty(c, e.cols, scalar_type_of<A>());
    sums = empty(c, e.cols, scalar_type_of<A>());
    const Tensor partials = empty(c, 2 * shares * e.cols, scalar_type_of<A>());
    auto kernel = affine_kernel<T, A>;
    GPK_LAUNCH(kernel, dim3(unsigned(blocks), unsigned(shares)), dim3(kThreads), stream, data<T>(c), data<T>(x),
               mutable_data<A>(products), mutable_data<A>(sums), mutable_data<A>(partials), ticket_of(ticket), e);
  });
  check_launch();
  return {products, sums};
}

}  // namespace

GPK_REGISTER(m) { m.impl("affine_gradients", TORCH_BOX(&affine_gradients_cuda)); }

}  // namespace gpk::cuda
