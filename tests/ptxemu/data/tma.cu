// Asynchronous copies of CUDA C++ for the emulator's tests, as NVIDIA's programming guide writes them.
// tma.ptx is made of this by: nvcc -ptx -arch=sm_90 -O3 -std=c++17 tma.cu -o tma.ptx
#include <cuda.h>
#include <cuda/barrier>
#include <utility>

using barrier = cuda::barrier<cuda::thread_scope_block>;
namespace cde = cuda::device::experimental;
#pragma nv_diag_suppress static_var_with_dynamic_init

// to = 2 from, in tiles of 16 x 32 by tensor maps.
extern "C" __global__ void double_tiles(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to) {
  __shared__ alignas(128) float tile[16 * 32];
  __shared__ barrier bar;
  int x = blockIdx.x * 32, y = blockIdx.y * 16;
  if (threadIdx.x == 0) {
    init(&bar, blockDim.x);
    cde::fence_proxy_async_shared_cta();
  }
  __syncthreads();
  barrier::arrival_token token;
  if (threadIdx.x == 0) {
    cde::cp_async_bulk_tensor_2d_global_to_shared(tile, &from, x, y, bar);
    token = cuda::device::barrier_arrive_tx(bar, 1, sizeof(tile));
  } else {
    token = bar.arrive();
  }
  bar.wait(std::move(token));
  for (int i = threadIdx.x; i < 16 * 32; i += blockDim.x) tile[i] *= 2;
  cde::fence_proxy_async_shared_cta();
  __syncthreads();
  if (threadIdx.x == 0) {
    cde::cp_async_bulk_tensor_2d_shared_to_global(&to, x, y, tile);
    cde::cp_async_bulk_commit_group();
    cde::cp_async_bulk_wait_group_read<0>();
    (&bar)->~barrier();
  }
}

// y[i] = x[n - 1 - i], each thread copies one and waits for all.
extern "C" __global__ void reverse(const float *x, float *y) {
  extern __shared__ float part[];
  __shared__ barrier bar;
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  cuda::memcpy_async(part + threadIdx.x, x + threadIdx.x, cuda::aligned_size_t<4>(4), bar);
  bar.arrive_and_wait();
  y[threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}
