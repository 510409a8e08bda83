// bf16 by AVX-512 products of pairs of bf16 (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2"
#define VECTORS "vector_avx512.h"
#define NATIVE_BF16
#define ELEMENT bf16
#define KERNELS kAvx512Bf16
#include "instantiate.h"
