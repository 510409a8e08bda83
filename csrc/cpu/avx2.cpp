// AVX2 and FMA, float. Other dtypes are converted as they are read.
#define TARGET "avx2,fma,f16c"
#define VECTORS "vector_avx2.h"
#define ELEMENT float
#define KERNELS kAvx2
#include "instantiate.h"
