// Kernels in CUDA C++ for the emulator's tests.
// kernels.ptx is made of this by: nvcc -ptx -arch=sm_80 -O3 kernels.cu -o kernels.ptx
#include <cstdio>
#include <cuda_bf16.h>

template <int PITCH> __device__ void transpose(const float *x, float *y, int n) {
  __shared__ float tile[32][PITCH];
  int i = blockIdx.x * 32 + threadIdx.x, j = blockIdx.y * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    if (i < n && j + k < n) tile[threadIdx.y + k][threadIdx.x] = x[(j + k) * n + i];
  __syncthreads();
  i = blockIdx.y * 32 + threadIdx.x, j = blockIdx.x * 32 + threadIdx.y;
  for (int k = 0; k < 32; k += 8)
    if (i < n && j + k < n) y[(j + k) * n + i] = tile[threadIdx.x][threadIdx.y + k];
}
extern "C" __global__ void transpose_padded(const float *x, float *y, int n) { transpose<33>(x, y, n); }
extern "C" __global__ void transpose_unpadded(const float *x, float *y, int n) { transpose<32>(x, y, n); }

extern "C" __global__ void block_sum(const float *x, float *total, int n) {
  __shared__ float part[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int k = 16; k; k >>= 1) sum += __shfl_down_sync(~0u, sum, k);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int k = 16; k; k >>= 1) sum += __shfl_down_sync(~0u, sum, k);
    if (threadIdx.x == 0) atomicAdd(total, sum);
  }
}

extern "C" __global__ void count_bins(const int *x, int *bins, int n) {
  extern __shared__ int local_bins[];
  for (int i = threadIdx.x; i < 64; i += blockDim.x) local_bins[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(local_bins + (x[i] & 63), 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 64; i += blockDim.x) bins[i] = local_bins[i];
}

// One warp: C[16, 8] = A[16, 16] B[16, 8] in bf16 through ldmatrix and mma.
extern "C" __global__ void mma_tile(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c) {
  __shared__ __align__(16) __nv_bfloat16 sa[16 * 16], sb[16 * 8];
  int lane = threadIdx.x;
  unsigned to = __cvta_generic_to_shared(sa + lane * 8);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(a + lane * 8));
  if (lane < 16) {
    to = __cvta_generic_to_shared(sb + lane * 8);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(b + lane * 8));
  }
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
  unsigned fa[4], fb[2];
  float d[4] = {0, 0, 0, 0};
  unsigned at = __cvta_generic_to_shared(sa + (lane % 16) * 16 + lane / 16 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3]) : "r"(at));
  at = __cvta_generic_to_shared(sb + (lane % 16) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(fb[0]), "=r"(fb[1]) : "r"(at));
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  for (int i = 0; i < 4; i++) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

extern "C" __global__ void packed_fma(const __nv_bfloat162 *x, const __nv_bfloat162 *y, __nv_bfloat162 *z, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) z[i] = __hmax2(__hfma2(x[i], y[i], z[i]), __float2bfloat162_rn(-1.0f));
}

__constant__ float weight[4] = {0.5f, 1.0f, 1.5f, 2.0f};
// The slow path of sinf keeps an array in local memory.
extern "C" __global__ void functions(const float *x, float *y, int n, int shift) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i], stack[8];
  for (int k = 0; k < 8; k++) stack[k] = v * k;
  y[i] = sinf(v * 1e5f) + stack[(i + shift) & 7] * weight[i & 3];
  y[n + i] = expf(v) + logf(fabsf(v)) + powf(fabsf(v), 1.5f);
  y[2 * n + i] = tanhf(v) + v / 3.0f + sqrtf(fabsf(v)) + rsqrtf(fabsf(v)) + erff(v);
}

extern "C" __global__ void votes(const int *x, unsigned *y) {
  int v = x[threadIdx.x];
  y[threadIdx.x] = __ballot_sync(~0u, v > 0);
  y[blockDim.x + threadIdx.x] = __any_sync(~0u, v > 90) | __all_sync(~0u, v > -90) << 1;
  y[2 * blockDim.x + threadIdx.x] = __match_any_sync(~0u, v & 3);
  y[3 * blockDim.x + threadIdx.x] = __reduce_add_sync(~0u, v) ^ __popc(v) ^ __clz(v) ^ __brev(v) ^ __byte_perm(v, ~v, 0x2461);
  y[4 * blockDim.x + threadIdx.x] = __dp4a(v, v * 77, 5) ^ __funnelshift_l(v, ~v, 9) ^ __umulhi(v, 12345u);
}

extern "C" __global__ void check(const float *x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n && x[i] != x[i]) {
    printf("NaN at %d\n", i);
    __trap();
  }
}
