// AVX-512, float. Other dtypes are converted as they are read (Skylake-X to Ice Lake; float on all later ones).
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,avx2"
#define VECTORS "vector_avx512.h"
#define ELEMENT float
#define KERNELS kAvx512
#include "instantiate.h"
