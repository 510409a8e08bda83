// The C interface of the CPU kernels: pointers, sizes and strides. It knows nothing of Python or PyTorch, so one build
// serves every version of both.
//
// Letters as everywhere: T rows of D features in and F out; N instances; E experts of rank R, K of them per instance.
// Strides count elements. Every function returns null, or a message that is valid until the thread's next call.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define MOE_LORA_API __attribute__((visibility("default")))
#else
#define MOE_LORA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The number of this interface; callers compare it with the one that they were written for.
enum { MOE_LORA_INTERFACE = 2 };

// How a number is stored.
enum { MOE_LORA_FLOAT = 0, MOE_LORA_BF16 = 1, MOE_LORA_FP16 = 2, MOE_LORA_DOUBLE = 3 };

// The two forms of the forward. FEW_ROWS is for at most moe_lora_few_rows() rows without dropout.
enum { MOE_LORA_TILES = 0, MOE_LORA_FEW_ROWS = 1 };

typedef struct {  // T rows with adjacent elements
  const void* data;
  int64_t stride;
} moe_lora_rows;

typedef struct {  // [F, D]; one of the two strides is 1, for FEW_ROWS the second
  const void* data;
  int64_t strides[2];
  int64_t dtype;
} moe_lora_matrix;

typedef struct {  // [E, D, R] or [E, R, F]; one of the last two strides is 1, for FEW_ROWS the last
  const void* data;
  int64_t strides[3];
  int64_t dtype;
  int64_t only_used;  // 1: it holds only the experts in use, in rising order
} moe_lora_experts;

typedef struct {  // one linear; those of a call share x, E and R
  int64_t F;
  moe_lora_matrix weight;
  const void* bias;  // [F] of the call's dtype, or null
  moe_lora_experts lora_a, lora_b;
} moe_lora_member;

typedef struct {
  const int32_t* experts;  // [N, K]
  int64_t expert_strides[2];
  const int32_t* offsets;  // [N + 1] adjacent, or null: N equal runs of the T rows
  int64_t N, K, E, T;
} moe_lora_routing;

typedef struct {
  int64_t dtype;    // of rows, biases, y, h, dy and dx: MOE_LORA_FLOAT, or MOE_LORA_BF16 if moe_lora_has_bf16()
  int64_t threads;  // at most so many
  moe_lora_rows x;
  int64_t D, R;
  const moe_lora_member* members;
  int64_t count;
  moe_lora_routing routing;
  const float* gates;  // [N, K]
  int64_t gate_strides[2];
  double scale, dropout;  // dropout is a probability, 0 for none
  int64_t seed;
} moe_lora_call;

// ys[m] [T, F] and hs[m] [T, K * R] are written, of the call's dtype.
MOE_LORA_API const char* moe_lora_forward(const moe_lora_call* call, int form, void* const* ys, void* const* hs);

typedef struct {  // adjacent elements, to be written; null if that gradient is not needed
  void* data;
  int64_t dtype;  // all but MOE_LORA_FP16
} moe_lora_gradient;

// dys[m] are rows [T, F], hs[m] what the forward gave, both of the call's dtype; biases are not looked at. Written are
// dx [T, D] of that dtype if it is not null, dgates [N, K], das[m] [E, D, R] and dbs[m] [E, R, F], zeros for experts that
// no instance uses.
MOE_LORA_API const char* moe_lora_backward(const moe_lora_call* call, const moe_lora_rows* dys, const void* const* hs,
                                           void* dx, moe_lora_gradient dgates, const moe_lora_gradient* das,
                                           const moe_lora_gradient* dbs);

// The experts in use, rising, at most min(E, N * K) of them, and their number.
MOE_LORA_API const char* moe_lora_used(const moe_lora_routing* routing, int32_t* used, int64_t* count);

MOE_LORA_API int moe_lora_few_rows(void);

// The instruction sets that run here: number i of them, best first, or null; the one in use, or null; another one in use.
MOE_LORA_API const char* moe_lora_instruction_set(int i);
MOE_LORA_API const char* moe_lora_instructions(void);
MOE_LORA_API const char* moe_lora_use_instructions(const char* name);
MOE_LORA_API int moe_lora_has_bf16(void);  // whether the set in use multiplies bf16

// On how many threads a loop of at most `limit` runs, counted.
MOE_LORA_API int64_t moe_lora_threads(int64_t limit);

#ifdef __cplusplus
}
#endif
