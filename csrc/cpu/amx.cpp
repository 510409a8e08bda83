// bf16 by AMX: products of tiles of sixteen rows (Sapphire Rapids and later).
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2,amx-tile,amx-bf16"
#define VECTORS "vector_avx512.h"
#define NATIVE_BF16
#define TILES
#define ELEMENT bf16
#define KERNELS kAmx
#include "instantiate.h"
