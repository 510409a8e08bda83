// Sums rounded to the type that they are kept in.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace moe_lora {

inline bf16 as_bf16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(value != value ? 0x7fc0 : rounded)};
}

inline void round_to(const float* from, int64_t n, float* to) { std::copy_n(from, n, to); }
inline void round_to(const float* from, int64_t n, double* to) { std::copy_n(from, n, to); }
inline void round_to(const float* from, int64_t n, bf16* to) { std::transform(from, from + n, to, as_bf16); }

}  // namespace moe_lora
