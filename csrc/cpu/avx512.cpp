// AVX-512 without bf16 dot products (Skylake-X to Ice Lake): a pair of bf16 is two float multiply-adds.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2")

namespace moe_lora {
namespace {
#include "vector_avx512.h"

#include "kernels_impl.h"

#include "few_impl.h"
}  // namespace

extern const Kernels<bf16> kAvx512Half{pack<bf16>, shrink<bf16>, expand<bf16>, sum<bf16>, few_shrink<bf16>, few_rows<bf16>};
extern const Kernels<float> kAvx512Single{pack<float>, shrink<float>, expand<float>, sum<float>, few_shrink<float>, few_rows<float>};
}  // namespace moe_lora
#pragma GCC pop_options
#endif
