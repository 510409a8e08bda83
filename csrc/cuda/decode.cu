// A linear with low-rank experts for at most 64 rows, in one launch; without torch, behind a C ABI (at the end).
//
//     h[t, k, :] = x[t] A[e],   y[t] = x[t] Wᵀ + bias + Σ_k s g[t, k] h[t, k, :] B[e],   e = experts[i, k], t of instance i
//
// W is streamed once, from memory into tensor-core fragments, 16 bytes a load. Before that each block shrinks a piece of
// D for one expert and eight rows and leaves the sums in `parts`; after it, when all blocks of the grid have done so, it
// adds them up in a fixed order and expands. Where F is too small to occupy the device, blocks split D as well. The
// grid's blocks run at the same time (a cooperative launch). No atomics on numbers: the same inputs, the same bits.
//
// A fragment may take any 16 elements of D if both operands take the same. A lane's 16 bytes of a row of W, and of x,
// are its share of two products: elements 0 to 3 of the first, 4 to 7 of the second.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int THREADS = 256, WARPS = 8;
constexpr int WIDE = 2, DEEP = 4;       // warps of a block along F, 16 columns each, and along D
constexpr int COLUMNS = 16 * WIDE;      // of y that a block makes at a time
constexpr int BATCH = 8;                // rows that are shrunk together
constexpr int CHUNK = 256;              // of D that is shrunk at a time
constexpr int AHEAD = 4;                // loads of W that the second cache does while x is shrunk
constexpr int RANKS = 128;              // rows of B in shared memory
constexpr int STRIDE = COLUMNS + 4;     // of the sums of warps: no two lanes in one bank

struct Sizes {
    int T, D, F, N, L, E, K, R;
    int stride;        // of rows of x, in elements
    int slabs, slab;   // of D in the shrink, and the length of one
    int splits, span;  // of D among blocks that share columns of y, and the length of one
    float scale;
};

__device__ float number(float v) { return v; }
__device__ float number(__half v) { return __half2float(v); }
__device__ float number(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void round_to(float v, __half* out) { *out = __float2half(v); }
__device__ void round_to(float v, __nv_bfloat16* out) { *out = __float2bfloat16(v); }

#define MMA(TYPE)                                                                                                     \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
        "{%0, %1, %2, %3};"                                                                                           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                              \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

template <typename X>
__device__ void product(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
template <>
__device__ void product<__half>(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    MMA("f16");
}
template <>
__device__ void product<__nv_bfloat16>(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    MMA("bf16");
}

// Instance of row t: the largest i with offsets[i] <= t; without offsets N equal runs of L rows.
__device__ int instance_of(int t, const int* offsets, const Sizes& z) {
    if (!offsets) return t / z.L;
    int low = 0, high = z.N - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (offsets[middle] <= t) low = middle;
        else high = middle - 1;
    }
    return low;
}

// Who uses what, in shared memory.
struct Routes {
    int* pick;     // [T, K] expert
    float* gate;   // [T, K] scale · gate
    int* place;    // [E] its place among the experts in use; -1: not in use
    int* used;     // [U] experts in use, ascending
    int count;     // U

    __device__ Routes(int* memory, const Sizes& z)
        : pick(memory), gate(reinterpret_cast<float*>(memory + z.T * z.K)), place(memory + 2 * z.T * z.K),
          used(place + z.E), count(0) {}

    __device__ void find(const int* experts, const float* gates, const int* offsets, const Sizes& z, int* total) {
        for (int e = threadIdx.x; e < z.E; e += THREADS) place[e] = -1;
        __syncthreads();
        for (int j = threadIdx.x; j < z.T * z.K; j += THREADS) {
            int at = instance_of(j / z.K, offsets, z) * z.K + j % z.K;
            pick[j] = experts[at];
            gate[j] = gates[at] * z.scale;
            place[pick[j]] = 0;
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            int before = 0;
            for (int first = 0; first < z.E; first += 32) {
                int e = first + threadIdx.x;
                bool in_use = e < z.E && place[e] == 0;
                unsigned all = __ballot_sync(~0u, in_use);
                if (in_use) {
                    place[e] = before + __popc(all & ((1u << threadIdx.x) - 1));
                    used[place[e]] = e;
                }
                before += __popc(all);
            }
            if (threadIdx.x == 0) *total = before;
        }
        __syncthreads();
        count = *total;
    }
};

// parts[slab, t, k, :] = x[t, slab] A[e, slab] for the pieces of this block: (slab, expert, batch of rows).
template <typename X, typename A>
__device__ void shrink(
    const X* x, const A* lora_a, float* parts, const Routes& routes, float* memory, const Sizes& z) {
    float* rows = memory;                    // [BATCH, CHUNK]
    float* sums = memory + BATCH * CHUNK;    // [BATCH, THREADS]
    const int width = z.R <= 1 ? 1 : 1 << (32 - __clz(z.R - 1));  // threads along R; the others along D
    const int r = threadIdx.x & (width - 1), phase = threadIdx.x / width, phases = THREADS / width;
    const int batches = (z.T + BATCH - 1) / BATCH;
    for (int piece = blockIdx.x; piece < z.slabs * routes.count * batches; piece += gridDim.x) {
        const int t0 = piece % batches * BATCH, e = routes.used[piece / batches % routes.count];
        const int slab = piece / batches / routes.count, end = min(z.D, (slab + 1) * z.slab);
        bool mine = false;
        for (int j = t0 * z.K; j < min(t0 + BATCH, z.T) * z.K; j++) mine |= routes.pick[j] == e;
        if (!mine) continue;
        float acc[BATCH] = {};
        for (int first = slab * z.slab; first < end; first += CHUNK) {
            __syncthreads();
            for (int i = threadIdx.x; i < BATCH * CHUNK / 4; i += THREADS) {
                const int t = t0 + i / (CHUNK / 4), d = first + i % (CHUNK / 4) * 4;
                X four[4] = {};
                if (t < z.T && d < end)
                    *reinterpret_cast<uint2*>(four) =
                        __ldg(reinterpret_cast<const uint2*>(x + static_cast<long long>(t) * z.stride + d));
                reinterpret_cast<float4*>(rows)[i] =
                    make_float4(number(four[0]), number(four[1]), number(four[2]), number(four[3]));
            }
            __syncthreads();
            const A* a = lora_a + (static_cast<long long>(e) * z.D + first) * z.R + r;
#pragma unroll 1
            for (int d = 4 * phase; d < min(CHUNK, end - first); d += 4 * phases) {
                float value[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    value[i] = r < z.R ? number(a[static_cast<long long>(d + i) * z.R]) : 0.0f;
#pragma unroll
                for (int t = 0; t < BATCH; t++) {
                    const float4 row = *reinterpret_cast<const float4*>(rows + t * CHUNK + d);
                    acc[t] = fmaf(row.x, value[0], acc[t]);
                    acc[t] = fmaf(row.y, value[1], acc[t]);
                    acc[t] = fmaf(row.z, value[2], acc[t]);
                    acc[t] = fmaf(row.w, value[3], acc[t]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < BATCH; t++) sums[t * THREADS + threadIdx.x] = acc[t];
        __syncthreads();
        for (int i = threadIdx.x; i < BATCH * z.R; i += THREADS) {
            const int t = i / z.R, c = i % z.R;
            if (t0 + t >= z.T) break;
            float sum = 0.0f;
            for (int p = 0; p < phases; p++) sum += sums[t * THREADS + p * width + c];
            for (int k = 0; k < z.K; k++)
                if (routes.pick[(t0 + t) * z.K + k] == e)
                    parts[((slab * z.T + t0 + t) * z.K + k) * z.R + c] = sum;
        }
    }
}

// Fragments of W: 16 rows, STEPS · 32 elements of D.
template <typename X, int STEPS>
struct Stage {
    uint4 w[STEPS][2];

    // A lane's 16 bytes of each half of each step, to registers, or only as far as the second cache. `rows` points to
    // the lane's place in the first half, where so many rows `exist`, of `length` elements from the quad's place on.
    template <bool TO_CACHE = false>
    __device__ void load(const X* rows, int exist, int d0, int length, const Sizes& z) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const X* at = rows + static_cast<long long>(8 * i) * z.D + (d0 + 32 * step);
                const bool exists = d0 + 32 * step + threadIdx.x % 4 * 8 < length && 8 * i < exist;
                if (!TO_CACHE) w[step][i] = exists ? __ldcs(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
                else if (exists) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
            }
    }
};

// x Wᵀ over a part of D for 32 columns; each warp's share to sums [DEEP, 8·TILES, STRIDE]. `x` points to the lane's
// place in the first eight rows; the rest as for `Stage::load`.
template <typename X, int TILES, int STEPS>
__device__ void stream(
    const X* x, const X* rows, int exist, int length, float* sums, const Sizes& z) {
    const int lane = threadIdx.x % 32, f = threadIdx.x / 32 % WIDE * 16, deep = threadIdx.x / 32 / WIDE;
    float acc[TILES][4] = {};
    Stage<X, STEPS> stage;
    stage.load(rows, exist, deep * 32 * STEPS, length, z);
#pragma unroll 1
    for (int d0 = deep * 32 * STEPS; d0 < length; d0 += DEEP * 32 * STEPS) {
        Stage<X, STEPS> next;
        next.load(rows, exist, d0 + DEEP * 32 * STEPS, length, z);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const uint4 a = stage.w[step][0], b = stage.w[step][1];
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const int t = 8 * n + lane / 4, d = d0 + 32 * step;
                if (TILES > 1 && 8 * n >= z.T) break;
                const X* at = x + static_cast<long long>(8 * n) * z.stride + d;
                const uint4 v =
                    d + lane % 4 * 8 < length && t < z.T ? __ldg(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
                product<X>(acc[n], a.x, b.x, a.y, b.y, v.x, v.y);
                product<X>(acc[n], a.z, b.z, a.w, b.w, v.z, v.w);
            }
        }
        stage = next;
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = 8 * n + lane % 4 * 2 + i % 2;
            sums[(deep * 8 * TILES + t) * STRIDE + f + lane / 4 + i / 2 * 8] = acc[n][i];
        }
}

// B of the experts in use, rows [first, first + RANKS) of their rank space, 32 columns from f0 on.
template <typename A>
__device__ void fetch_b(const A* lora_b, float* b, const Routes& routes, int first, int f0, const Sizes& z) {
    const int f = threadIdx.x % COLUMNS;
    const int rows = min(RANKS, routes.count * z.R - first);
#pragma unroll 2
    for (int row = threadIdx.x / COLUMNS; row < rows; row += THREADS / COLUMNS) {
        const long long e = routes.used[(first + row) / z.R], r = (first + row) % z.R;
        b[row * COLUMNS + f] = f0 + f < z.F ? number(lora_b[(e * z.R + r) * z.F + f0 + f]) : 0.0f;
    }
}

// What one row gets from rows [first, first + RANKS) of the rank space: lane by lane a column of y.
template <typename X>
__device__ float expand(
    const float* parts, const float* b, X* h, const Routes& routes, int first, int t, bool keep_h, const Sizes& z) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int k = 0; k < z.K; k++) {
        const int j = t * z.K + k, start = routes.place[routes.pick[j]] * z.R;
        const int last = min(start + z.R, first + RANKS);
        for (int c = max(start, first); c < last; c += 32) {
            float mine = 0.0f;
            if (c + lane < last) {
                const int at = j * z.R + c + lane - start, all = z.T * z.K * z.R;
#pragma unroll 4
                for (int slab = 0; slab < z.slabs; slab++) mine += __ldcg(parts + (slab * all + at));
                if (keep_h) round_to(mine, h + at);
                mine *= routes.gate[j];
            }
            for (int i = 0; i < min(32, last - c); i++)
                sum = fmaf(__shfl_sync(~0u, mine, i), b[(c + i - first) * COLUMNS + lane], sum);
        }
    }
    return sum;
}

template <typename X, typename A, int TILES>
__device__ void decode(
    const X* __restrict__ x, const X* __restrict__ weight, const X* __restrict__ bias, const A* __restrict__ lora_a,
    const A* __restrict__ lora_b, const int* __restrict__ experts, const float* __restrict__ gates,
    const int* __restrict__ offsets, X* y, X* h, float* parts, const Sizes& z) {
    extern __shared__ float4 memory[];
    __shared__ int total;
    constexpr int ROWS = 8 * TILES, STEPS = TILES == 1 ? 4 : 2;
    float* sums = reinterpret_cast<float*>(memory);
    float* b = sums + max(BATCH * (CHUNK + THREADS), DEEP * ROWS * STRIDE);
    Routes routes(reinterpret_cast<int*>(b + RANKS * COLUMNS), z);
    float* base = parts + static_cast<long long>(z.slabs) * z.T * z.K * z.R;  // [splits, T, F] if D is split
    const auto grid = cooperative_groups::this_grid();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_unit = blockIdx.x;
    const int units = (z.F + COLUMNS - 1) / COLUMNS * z.splits;

    unsigned token = 0;
    for (int unit = first_unit; unit < units; unit += gridDim.x) {
        const int f0 = unit / z.splits * COLUMNS, split = unit % z.splits;
        const int begin = split * z.span, end = min(z.D, begin + z.span);
        const int row = f0 + warp % WIDE * 16 + lane / 4, d = begin + lane % 4 * 8;
        const X* rows = weight + static_cast<long long>(row) * z.D + d;
        if (unit == first_unit) {  // with the first of W on its way
#pragma unroll 1
            for (int i = 0; i < AHEAD; i++)
                Stage<X, STEPS>().template load<true>(
                    rows, z.F - row, (i * DEEP + warp / WIDE) * 32 * STEPS, end - begin, z);
            routes.find(experts, gates, offsets, z, &total);
            shrink(x, lora_a, parts, routes, sums, z);
            if (z.splits == 1) token = grid.barrier_arrive();
        }
        __syncthreads();
        fetch_b(lora_b, b, routes, 0, f0, z);
        stream<X, TILES, STEPS>(
            x + static_cast<long long>(lane / 4) * z.stride + d, rows, z.F - row, end - begin, sums, z);
        __syncthreads();
        const bool inside = f0 + lane < z.F;
        for (int t = warp; t < z.T; t += WARPS) {
            float sum = 0.0f;
#pragma unroll
            for (int deep = 0; deep < DEEP; deep++) sum += sums[(deep * ROWS + t) * STRIDE + lane];
            if (z.splits == 1) sums[t * STRIDE + lane] = sum;
            else if (inside) base[(static_cast<long long>(split) * z.T + t) * z.F + f0 + lane] = sum;
        }
        if (z.splits > 1) token = grid.barrier_arrive();
        if (unit == first_unit) grid.barrier_wait(static_cast<unsigned&&>(token));
        for (int first = 0; first < routes.count * z.R; first += RANKS) {
            if (first) {
                __syncthreads();
                fetch_b(lora_b, b, routes, first, f0, z);
                __syncthreads();
            }
            for (int t = warp + WARPS * split; t < z.T; t += WARPS * z.splits) {
                float sum = sums[t * STRIDE + lane];
                if (first == 0 && z.splits > 1) {
                    sum = 0.0f;
                    for (int s = 0; inside && s < z.splits; s++)
                        sum += __ldcg(base + (static_cast<long long>(s) * z.T + t) * z.F + f0 + lane);
                }
                sum += expand(parts, b, h, routes, first, t, f0 == 0, z);
                sums[t * STRIDE + lane] = sum;
                if (first + RANKS >= routes.count * z.R && inside)
                    round_to(bias ? sum + number(bias[f0 + lane]) : sum, y + static_cast<long long>(t) * z.F + f0 + lane);
            }
        }
    }
}

}  // namespace

#define KERNEL(NAME, X, A, TILES, RESIDENT)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) NAME(                                             \
        const X* x, const X* weight, const X* bias, const A* lora_a, const A* lora_b, const int* experts,             \
        const float* gates, const int* offsets, X* y, X* h, float* parts, Sizes sizes) {                              \
        decode<X, A, TILES>(x, weight, bias, lora_a, lora_b, experts, gates, offsets, y, h, parts, sizes);            \
    }

KERNEL(decode_bf16_bf16_8, __nv_bfloat16, __nv_bfloat16, 1, 2)
KERNEL(decode_bf16_bf16_64, __nv_bfloat16, __nv_bfloat16, 8, 1)
KERNEL(decode_bf16_f32_8, __nv_bfloat16, float, 1, 2)
KERNEL(decode_bf16_f32_64, __nv_bfloat16, float, 8, 1)
KERNEL(decode_f16_f16_8, __half, __half, 1, 2)
KERNEL(decode_f16_f16_64, __half, __half, 8, 1)
KERNEL(decode_f16_f32_8, __half, float, 1, 2)
KERNEL(decode_f16_f32_64, __half, float, 8, 1)

// What the library offers. All return a cudaError_t: 0 is success.

static const void* const KERNELS[] = {
    reinterpret_cast<const void*>(decode_bf16_bf16_8), reinterpret_cast<const void*>(decode_bf16_bf16_64),
    reinterpret_cast<const void*>(decode_bf16_f32_8),  reinterpret_cast<const void*>(decode_bf16_f32_64),
    reinterpret_cast<const void*>(decode_f16_f16_8),   reinterpret_cast<const void*>(decode_f16_f16_64),
    reinterpret_cast<const void*>(decode_f16_f32_8),   reinterpret_cast<const void*>(decode_f16_f32_64)};

// Blocks of a kernel that the current device holds at a time, with so many bytes of shared memory each.
extern "C" int moe_lora_decode_blocks(int kernel, int shared, int* blocks) {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaFuncSetAttribute(KERNELS[kernel], cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, KERNELS[kernel], THREADS, shared);
    *blocks *= processors;
    return error;
}

// tensors: the kernel's eleven pointers, in order. `moe_lora_decode_blocks` has been asked before, with as much memory.
extern "C" int moe_lora_decode(int kernel, void** tensors, Sizes* sizes, int grid, int shared, void* stream) {
    void* arguments[12];
    for (int i = 0; i < 11; i++) arguments[i] = tensors + i;
    arguments[11] = sizes;
    return cudaLaunchCooperativeKernel(
        KERNELS[kernel], grid, THREADS, arguments, shared, static_cast<cudaStream_t>(stream));
}

extern "C" const char* moe_lora_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
