// Images as rows of pooling windows.
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

inline MemoryFormat format_of(const char* name, const Tensor& x, int64_t h, int64_t w) {
  STD_TORCH_CHECK(x.dim() >= 2, name, ": expected images (*, H, W), got shape ", text_of(x));
  STD_TORCH_CHECK(h > 0 && w > 0, "h, w: expected windows of at least one pixel, got ", h, " x ", w);
  return x.dim() == 4 ? common_format({&x}) : MemoryFormat::Contiguous;
}

inline Tensor resized(const Tensor& x, MemoryFormat format, int64_t rows, int64_t cols) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[sizes.size() - 2] = rows;
  sizes.back() = cols;
  return empty_strided(x, sizes, dense_strides(sizes, format), dtype_code(x));
}

// Outputs of the two directions, uninitialised, in the format of x.
inline Tensor pooled(const Tensor& x, MemoryFormat format, int64_t h, int64_t w) {
  const int64_t rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1);
  STD_TORCH_CHECK(rows % h == 0 && cols % w == 0, "x: expected images that windows of ", h, " x ", w,
                  " tile, got shape ", text_of(x));
  return resized(x, format, rows / h, cols / w);
}

inline Tensor unpooled(const Tensor& x, MemoryFormat format, int64_t h, int64_t w) {
  return resized(x, format, x.size(x.dim() - 2) * h, x.size(x.dim() - 1) * w);
}

// small: the pooled tensor.
inline Windows windows_of(const Tensor& small, MemoryFormat format, int64_t h, int64_t w) {
  const int64_t lanes = format == MemoryFormat::Contiguous ? 1 : small.size(1), cols = small.size(small.dim() - 1);
  return {small.numel() / std::max<int64_t>(1, cols * lanes), cols, lanes, h, w};
}

}  // namespace gpk
