// Images cut into windows, as mean pooling sees them.
#pragma once

#include "tensors.h"

namespace gpk {

// Images in memory: rows of windows; each element is a vector of `lanes`, the channels if they come last.
struct Windows {
  int64_t rows, cols, lanes, h, w;
};

// Elements of a row of windows, on either side.
inline int64_t out_row(const Windows& v) { return v.cols * v.lanes; }
inline int64_t in_row(const Windows& v) { return v.cols * v.w * v.lanes; }

// Images like x with their last two axes changed by f, in x's order.
template <typename F>
Tensor resized(const Tensor& x, MemoryFormat format, int64_t h, int64_t w, const F& f) {
  std::vector<int64_t> sizes = sizes_of(x);
  f(sizes[sizes.size() - 2], h);
  f(sizes.back(), w);
  return empty_strided(x, sizes, dense_strides(sizes, format), dtype_code(x));
}

inline MemoryFormat format_of(const Tensor& x, int64_t h, int64_t w) {
  STD_TORCH_CHECK(x.dim() >= 2 && h > 0 && w > 0, "x: expected images, and windows that are not empty");
  return x.dim() == 4 ? common_format({&x}) : MemoryFormat::Contiguous;
}

// By the small side of the two.
inline Windows windows_of(const Tensor& small, MemoryFormat format, int64_t h, int64_t w) {
  const int64_t lanes = format == MemoryFormat::Contiguous ? 1 : small.size(1), cols = small.size(small.dim() - 1);
  return {small.numel() / std::max<int64_t>(1, cols * lanes), cols, lanes, h, w};
}

}  // namespace gpk
