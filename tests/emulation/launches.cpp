// How many kernels have been launched, for tests that count.
#include "emulation.h"

extern "C" unsigned emulated_launches() { return emulation::launches(); }
