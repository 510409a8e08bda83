// One call of the forward or the backward, and what the kernels take of it.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "moe_lora.h"
#include "plan.h"

namespace moe_lora {

using Call = moe_lora_call;
using Member = moe_lora_member;

constexpr int kFewRows = 64;

// The two forms of the forward, and the backward, on at least one row, for each element type that there are kernels of.
template <class E>
void few_forward(const Call& call, const Plan& plan, void* const* ys, void* const* hs);
template <class E>
void tiles_forward(const Call& call, const Plan& plan, void* const* ys, void* const* hs);

struct Grads {
  void* dx;  // or null
  moe_lora_gradient dgates;
  const moe_lora_gradient *das, *dbs;
};
template <class E>
void tiles_backward(const Call& call, const Plan& plan, const moe_lora_rows* dys, const void* const* hs,
                    const Grads& grads);

// The scale of everything low-rank, with that of the elements which dropout keeps.
float scale_of(const Call& call);

// [N, K]: that scale times all that an instance gives to each pick's expert
std::vector<float> total_gates(const Call& call, const Plan& plan);

Mask mask_of(const Call& call);

// Throws std::runtime_error if the routing does not fit.
// `tile`: rows of one tile, or 0 if that does not matter
std::shared_ptr<const Plan> plan_of(const moe_lora_routing& routing, int tile);

// Columns along the dimension that is not summed over; the last one is if `sum_last`.
Source source(const moe_lora_matrix& matrix, bool sum_last);
Source source(const moe_lora_experts& parameter, bool sum_last, const Plan& plan);

// Uninitialised memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory(static_cast<T*>(::operator new(count * sizeof(T), kLine))) {}
  T* data() const { return memory.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<T, Free> memory;
};

}  // namespace moe_lora
