// What gcc's headers and flags take from libraries newer than those of manylinux_2_28, the platform of PyTorch's wheels
// (glibc 2.28, libstdc++ of gcc 8), defined within each module, as by libstdc++_nonshared.a of gcc-toolset. Two members
// of std::exception_ptr are not here: libtorch_cpu.so has them, for PyTorch's own modules.
#include <version>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GLIBCXX__)
#include <new>
#include <sstream>

extern "C" {
#define GPK_HIDDEN __attribute__((visibility("hidden")))

// The process may have threads: reference counts are atomic, as in PyTorch's libraries.
GPK_HIDDEN extern char gpk_single_threaded __asm__("__libc_single_threaded");
char gpk_single_threaded = 0;

// log and pow by their oldest names without errno; glibc 2.28 has today's algorithms under them.
double gpk_log_2_15(double);
double gpk_pow_2_15(double, double);
__asm__(".symver gpk_log_2_15, __log_finite@GLIBC_2.15");
__asm__(".symver gpk_pow_2_15, __pow_finite@GLIBC_2.15");
GPK_HIDDEN double gpk_log(double) __asm__("log");
GPK_HIDDEN double gpk_pow(double, double) __asm__("pow");
double gpk_log(double x) { return gpk_log_2_15(x); }
double gpk_pow(double x, double y) { return gpk_pow_2_15(x, y); }

// Weak, for compilers that link libstdc++ statically.
[[noreturn]] __attribute__((weak)) GPK_HIDDEN void gpk_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void gpk_bad_array_new_length() { throw std::bad_array_new_length(); }
}

// Members that the header defines, and declares to be in the library.
template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif
