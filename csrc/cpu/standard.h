// Every standard header that the kernels use: those files include this one alone. A file that switches the compiler to
// an instruction set includes it first. Otherwise an inline function of theirs could be compiled there and be the copy
// that the linker keeps for all.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>
