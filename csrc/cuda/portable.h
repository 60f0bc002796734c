// Macros with which one source compiles for a GPU and, for tests, for a host that emulates one.
#pragma once

#ifdef GPK_HOST_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>

#define GPK_SHARED(T, name, count) __shared__ T name[count]
#define GPK_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif
