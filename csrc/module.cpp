// Build facts, for `gpkernels info` and for errors about an incompatible binary.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict facts;
  facts["torch"] = GPK_TORCH_VERSION;
  facts["oldest_torch"] = GPK_OLDEST_TORCH;
  facts["compiler"] = GPK_COMPILER;
  facts["flags"] = GPK_FLAGS;
  facts["revision"] = GPK_REVISION;
#ifdef GPK_TARGET_CLONES
  facts["instruction_sets"] = py::make_tuple(GPK_TARGET_CLONES);
#else
  facts["instruction_sets"] = py::make_tuple("the compiler's default");
#endif
  return facts;
}

// The clone that the loader selects on this machine.
const char* instruction_set() {
#if defined(GPK_TARGET_CLONES) && defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return "AVX-512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
  return "x86-64";
#else
  return "the compiler's default";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("instruction_set", &instruction_set);
}
