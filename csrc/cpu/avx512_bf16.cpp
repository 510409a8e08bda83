// AVX-512 with bf16 dot products (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2")
#define NATIVE_BF16

namespace moe_lora {
namespace {
#include "vector_avx512.h"

#include "kernels_impl.h"

#include "few_impl.h"
}  // namespace

extern const Kernels<bf16> kAvx512Bf16Half{pack<bf16>, shrink<bf16>, expand<bf16>, sum<bf16>, few_shrink<bf16>, few_rows<bf16>};
extern const Kernels<float> kAvx512Bf16Single{pack<float>, shrink<float>, expand<float>, sum<float>, few_shrink<float>, few_rows<float>};
}  // namespace moe_lora
#pragma GCC pop_options
#endif
