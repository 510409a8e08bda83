// AVX-512, float. Other dtypes are converted as they are read (Skylake-X to Ice Lake; float on all later ones).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")
#endif

namespace moe_lora {
namespace {
#include "vector_avx512.h"

#include "kernels_impl.h"

#include "few_impl.h"
}  // namespace

extern const Kernels<float> kAvx512{pack<float>,       shrink<float>,   expand<float>, sum<float>,
                                    few_shrink<float>, few_rows<float>, kDots};
}  // namespace moe_lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
