// bf16 by AVX-512 products of pairs of bf16 (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")
#endif

#define NATIVE_BF16

namespace moe_lora {
namespace {
#include "vector_avx512.h"

#include "kernels_impl.h"

#include "few_impl.h"
}  // namespace

extern const Kernels<bf16> kAvx512Bf16{pack<bf16>,       shrink<bf16>,   expand<bf16>, sum<bf16>,
                                    few_shrink<bf16>, few_rows<bf16>, kDots};
}  // namespace moe_lora

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
